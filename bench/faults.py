"""What a fault costs: a worker killed under load, and a batch with one row that ends its worker.

Both on the drill backend, whose workers start in no time, and on TensorFlow. Full service is back when the
server logs the new worker as ready: to ask for its status every few milliseconds would be load of its own.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from bench import models
from bench.checked import is_close
from bench.figures import Figure, at_least, at_most, fact
from bench.processes import Checked, Server, drill_model, server
from pool import AsyncClient, PoolError
from pool.backends import drill
from pool.backends.drill import Fault
from tests import models as test_models
from tests.reference import ROWS, answers

Inputs = dict[str, np.ndarray[Any, Any]]

KILLS_A_ROUND = 10
CONCURRENCY = 16
PAUSES_S = (0.1, 0.5)  # between a whole server and the next kill: at any moment of a batch
RECOVERY_TIMEOUT_S = 60.0
BATCH = 64


def faults(rounds: int) -> list[Figure]:
    """Workers killed and poisoned, on both backends."""
    with tempfile.TemporaryDirectory(prefix="pool-bench-") as folder:
        return [
            *_kills_drill(Path(folder), rounds * KILLS_A_ROUND),
            *_kills_tensorflow(Path(folder), rounds * KILLS_A_ROUND),
            *_poison_drill(Path(folder), rounds),
            *_poison_tensorflow(rounds),
        ]


# -- kills -----------------------------------------------------------------------------------------


def _kills_drill(folder: Path, kills: int) -> list[Figure]:
    x = _rows(256, 4)
    inputs = _drill_inputs(x)
    path = drill_model(folder, batch_s=0.005)
    return _kill("drill", path, {"backend": "drill"}, inputs, drill.answer(x, 1), kills)


def _kills_tensorflow(folder: Path, kills: int) -> list[Figure]:
    x = _rows(16 * ROWS, 784)
    want = answers(folder, {"mlp": x})["mlp"]
    path = test_models.path("mlp")
    return _kill("TensorFlow, MLP", path, {"threads": 1}, {"x": x}, want, kills)


def _kill(
    name: str, path: Path, settings: dict[str, Any], inputs: Inputs, want: np.ndarray[Any, Any], kills: int
) -> list[Figure]:
    chance = random.Random(1)
    took_s = []
    with (
        server(path, logs=True, workers=2, **settings) as running,
        Checked(running.endpoint, inputs, want, CONCURRENCY) as load,
    ):
        for kill in range(kills):
            time.sleep(chance.uniform(*PAUSES_S))
            victim = _workers(running)[kill % 2]["pid"]
            began = time.monotonic()
            os.kill(victim, signal.SIGKILL)
            took_s.append(
                running.log.wait_for("worker ready .* role=serving ", began, RECOVERY_TIMEOUT_S) - began
            )
            _workers(running)
        tally, slowest_s = load.finish()
    return [
        at_most(f"{name}: SIGKILL of 1 of 2 workers, {kills} times, lost", tally.lost, "requests", 0),
        at_most("  wrong", tally.wrong, "requests", 0),
        at_most("  errors", sum(tally.errors.values()), "requests", 0),
        fact("  answered", tally.answered, "requests"),
        at_most("  time to full service, median", median(took_s), "s", 0.6),
        at_most("  time to full service, worst", max(took_s), "s", 2),
        fact("  slowest answer", slowest_s, "s"),
    ]


def _workers(running: Server) -> list[dict[str, Any]]:
    workers: list[dict[str, Any]] = running.status()["workers"]
    if any(worker["state"] not in ("ready", "busy") for worker in workers):
        raise RuntimeError(f"not at full service: {[worker['state'] for worker in workers]}")
    return workers


# -- poison ----------------------------------------------------------------------------------------


def _poison_drill(folder: Path, rounds: int) -> list[Figure]:
    inputs = _drill_inputs(_rows(BATCH, 4))
    bad = {name: array[:1].copy() for name, array in inputs.items()}
    bad["fault"][0] = Fault.SEGFAULT
    path = drill_model(folder)
    return _poison("drill: 64 rows, 1 segfaults", path, {"backend": "drill"}, inputs, bad, rounds)


def _poison_tensorflow(rounds: int) -> list[Figure]:
    inputs = {"x": _rows(BATCH, models.WIDTH)}
    bad = {"x": np.full((1, models.WIDTH), 2 * models.ABORT_ABOVE, np.float32)}
    return _poison(
        "TensorFlow: 64 rows, 1 aborts", models.path("aborting"), {"threads": 1}, inputs, bad, rounds
    )


def _poison(
    name: str, path: Path, settings: dict[str, Any], inputs: Inputs, bad: Inputs, rounds: int
) -> list[Figure]:
    chance = random.Random(2)
    right, errors, runs, took_s = [], [], [], []
    # It is about the batch, not about what is refused at the door afterwards.
    settings |= {"workers": 2, "max_batch_size": BATCH, "poison_memory_s": 0}
    with server(path, logs=True, **settings) as running:
        requests = [{key: array[i : i + 1] for key, array in inputs.items()} for i in range(BATCH)]
        want = [running.client.predict("model", request) for request in requests]
        for _ in range(rounds):
            guilty = chance.randrange(BATCH)
            before = running.status()
            began = time.monotonic()
            replies = asyncio.run(_ask(running.endpoint, [*requests[:guilty], bad, *requests[guilty + 1 :]]))
            took_s.append(time.monotonic() - began)
            running.log.wait_for(f"worker lost .* batch_rows={BATCH} ", began, RECOVERY_TIMEOUT_S)
            after = running.status()
            right.append(_count_right(replies, want, guilty))
            errors.append(sum(isinstance(reply, PoolError) for reply in replies))
            runs.append(after["retried_runs"] - before["retried_runs"])
    return [
        at_least(f"{name}, right answers, fewest", min(right), "", BATCH - 1),
        at_most("  errors, most", max(errors), "", 1),
        at_most("  extra runs, most", max(runs), "", 7),
        fact("  time to the last answer, median", median(took_s), "s"),
        fact("  time to the last answer, worst", max(took_s), "s"),
    ]


async def _ask(endpoint: str, requests: Sequence[Inputs]) -> list[Inputs | BaseException]:
    async with AsyncClient(endpoint) as client:
        await client.signature("model")  # so that all are sent at once, and fill one batch
        calls = [client.predict("model", request) for request in requests]
        return await asyncio.gather(*calls, return_exceptions=True)


def _count_right(replies: Sequence[Inputs | BaseException], want: Sequence[Inputs], guilty: int) -> int:
    return sum(
        isinstance(reply, dict) and place != guilty and is_close(reply["y"], want[place]["y"])
        for place, reply in enumerate(replies)
    )


def _rows(rows: int, items: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(3).random((rows, items), np.float32)


def _drill_inputs(x: np.ndarray[Any, Any]) -> Inputs:
    return {"x": x, "fault": np.zeros(len(x), np.int32), "argument": np.zeros(len(x), np.float32)}
