"""The engine in an application's own loop, without any socket: a real model, answers to a sink."""

from __future__ import annotations

import asyncio
import os
import time
from math import inf

import numpy as np
import pytest

from pool.config import Config, ModelConfig, ServerConfig
from pool.errors import (
    DeadlineExceeded,
    ModelError,
    ModelNotFound,
    Unavailable,
    VersionNotFound,
)
from pool.front.engine import Engine
from pool.front.slots import Account, Ticket
from pool.wire import PredictMeta, TensorMeta
from tests import models
from tests.rig import Collector

PATIENCE_S = 60.0


class AwaitedCollector(Collector):
    """A `Collector` whose answers can be awaited."""

    def __init__(self):
        super().__init__()
        self._arrived = asyncio.Event()

    def _keep(self, ticket, answer):
        super()._keep(ticket, answer)
        self._arrived.set()

    async def answer(self, id_):
        while id_ not in self.answers:
            self._arrived.clear()
            await asyncio.wait_for(self._arrived.wait(), PATIENCE_S)
        return self.answers[id_]


def run(scenario, **model):
    config = Config(
        server=ServerConfig(),
        models={
            "root": ModelConfig(path=str(models.path("raising")), slots=2, max_batch_size=4, **model),
            "cnn": ModelConfig(path=str(models.path("cnn")), slots=2),
        },
    )

    async def main():
        engine = Engine(config)
        try:
            return await scenario(engine)
        finally:
            await engine.stop()

    before = set(os.listdir("/proc/self/fd"))
    given = asyncio.run(main())
    assert set(os.listdir("/proc/self/fd")) == before
    return given


META = PredictMeta("root", None, None, (TensorMeta("x", "float32", ()),))


def place(engine, sink, id_, *values, timeout=inf):
    now = time.monotonic()
    route = engine.resolve(META)
    ticket = Ticket(sink, None, id_, route, len(values), now + timeout, engine.turn, route.key, Account())
    route.generation.place(ticket, [np.array(values, np.float32).tobytes()], now)
    engine.flush(route.generation, 1)


def test_an_application_embeds_it():
    async def scenario(engine):
        assert engine.readiness() == {"root": False, "cnn": False}
        with pytest.raises(Unavailable, match="model 'root' is loading"):
            engine.find("root", None)
        await engine.start()
        assert engine.readiness() == {"root": True, "cnn": True}
        with pytest.raises(ModelNotFound, match="no model 'x'; wanted one of 'root', 'cnn'"):
            engine.find("x", None)
        with pytest.raises(VersionNotFound, match="model 'root' has no version 5; wanted 1"):
            engine.find("root", 5)
        described = engine.describe_models()["root"]
        assert described == {"version": 1, "ready": True, "signatures": ["serving_default"]}

        sink = AwaitedCollector()
        for i in range(6):
            place(engine, sink, i, float(i * i))
            await sink.answer(i)
        assert [sink.answers[i]["y"].tolist() for i in range(6)] == [[float(i)] for i in range(6)]
        place(engine, sink, "split", *map(float, range(7)))
        np.testing.assert_allclose((await sink.answer("split"))["y"], np.sqrt(np.arange(7)), rtol=1e-6)
        # One bad row fails its own batch, with the model's words, and no more.
        place(engine, sink, "bad", -1.0)
        place(engine, sink, "good", 4.0)
        assert isinstance(await sink.answer("bad"), ModelError)
        assert (await sink.answer("good"))["y"].tolist() == [2.0]

        status = await engine.status()
        assert status["front"]["pid"] == os.getpid()
        root = status["models"]["root"]
        assert root["state"] == "ready"
        assert root["batches"] == sum(root["batch_sizes"].values())
        assert root["rows"] == sum(int(rows) * n for rows, n in root["batch_sizes"].items()) == 15
        assert root["queue_rows"] == 0
        assert root["workers"][0]["rows"] == 15
        assert root["workers"][0]["pss_bytes"] > 0

        unserved = []
        engine.on_unserved.append(lambda: unserved.append(True))
        assert await engine.drain(0.0)  # nothing is admitted: nothing to wait for
        assert unserved
        with pytest.raises(Unavailable, match="the server is stopping"):
            engine.resolve(META)
        assert engine.readiness() == {"root": False, "cnn": False}

    run(scenario)


def test_a_batch_that_waits_for_company_goes_when_it_is_overdue_or_expires():
    async def scenario(engine):
        await engine.start()
        sink = AwaitedCollector()
        place(engine, sink, "overdue", 9.0)
        assert sink.answers == {}
        assert (await sink.answer("overdue"))["y"].tolist() == [3.0]
        place(engine, sink, "late", 9.0, timeout=0.01)
        late = await sink.answer("late")
        assert isinstance(late, DeadlineExceeded)
        assert "no answer within the request's timeout" in late.message
        # A batch that is full waits for nothing. What waits when the engine stops is answered too.
        place(engine, sink, "full", 1.0, 1.0, 1.0, 1.0)
        await sink.answer("full")
        place(engine, sink, "left", 1.0)
        return sink

    sink = run(scenario, max_queue_delay_ms=200.0)
    assert isinstance(sink.answers["left"], Unavailable)
