"""What an application gets of a pool of its own: embedded predictions, pipelines of many users, channels."""

from __future__ import annotations

import asyncio
import gc
import json
import subprocess
import sys
import time
import tracemalloc
from collections import defaultdict
from statistics import median
from typing import Any

import numpy as np
import uvloop

from bench import users
from bench.figures import Figure, at_least, at_most, fact
from bench.processes import server
from pool import AsyncClient, Pool, Predictor
from pool.config import Config, ModelConfig
from pool.flow import Channel
from tests import models

USERS, MESSAGES = 10_000, 10
ALONE_MESSAGES = 1  # of each user, where each takes its time
IN_FLIGHT, REQUESTS = 256, 50_000
ITEMS = 100_000
CAPACITIES = (1, 64)

Seen = dict[str, list[float]]


def flow(rounds: int) -> list[Figure]:
    """The MLP, one worker with one thread; ratios are of what was measured in turn."""
    return uvloop.run(_flow(rounds))


async def _flow(rounds: int) -> list[Figure]:
    path = models.path("mlp")
    settings: dict[str, Any] = {"workers": 1, "threads": 1, "max_batch_size": 64}
    seen: Seen = defaultdict(list)
    pool = Pool(Config(models={"model": ModelConfig(path=str(path), **settings)}))
    alone = subprocess.Popen(
        [sys.executable, "-m", "bench.users", str(path / "1"), str(USERS), str(ALONE_MESSAGES)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
    )  # fmt: skip
    assert alone.stdin is not None
    assert alone.stdout is not None
    with server(path, **settings) as running:
        async with pool, AsyncClient(running.endpoint) as client:
            alone.stdout.readline()  # it is warm
            for predictor in (pool, client):
                await _predict(predictor, REQUESTS // 5)
            await _talk(pool, defaultdict(list))
            for _ in range(rounds):
                await _talk(pool, seen)
                alone.stdin.write("\n")
                seen["alone"].append(json.loads(alone.stdout.readline()))
                for name, predictor in (("embedded", pool), ("remote", client)):
                    seen[name].append(await _predict(predictor, REQUESTS))
                for capacity in CAPACITIES:
                    seen[f"queue {capacity}"].append(await _hop_queue(capacity))
                    seen[f"channel {capacity}"].append(await _hop_channel(capacity))
            idle_bytes = await _idle_bytes(pool)
    alone.stdin.close()
    alone.wait(30)

    def ratio(above: str, below: str) -> float:
        return median(a / b for a, b in zip(seen[above], seen[below], strict=True))

    figures = [
        fact(f"{USERS:,} users, 3 steps, {MESSAGES} messages each", median(seen["talk"]), "messages/s"),
        at_least("  rows of a batch of at most 64, mean", median(seen["batch"]), "", 32),
        at_least("  against the model called in-process, one by one", ratio("talk", "alone"), "x", 10),
        fact("  model called in-process", median(seen["alone"]), "messages/s"),
        at_most("  memory of an idle pipeline", idle_bytes, "bytes", 8192),
        at_most("  time to make one", median(seen["made"]) * 1e6, "us", 30),
    ]
    for capacity in CAPACITIES:
        hop, theirs = f"channel {capacity}", f"queue {capacity}"
        figures += [
            at_most(f"channel of {capacity}, a hop, against asyncio.Queue", ratio(hop, theirs), "x", 1),
            fact("  channel", median(seen[hop]) * 1e9, "ns"),
        ]
    return [
        *figures,
        at_least("embedded, 256 in flight, against AsyncClient", ratio("embedded", "remote"), "x", 1.3),
        fact("  embedded", median(seen["embedded"]), "requests/s"),
        fact("  AsyncClient over ipc", median(seen["remote"]), "requests/s"),
    ]


async def _talk(pool: Pool, seen: Seen) -> None:
    pipelines = users.embedded(pool)
    began = time.perf_counter()
    for user in range(USERS):
        await pipelines.get(user)
    seen["made"].append((time.perf_counter() - began) / USERS)
    before = (await pool.status())["models"]["model"]
    seen["talk"].append(await users.talk(pipelines, USERS, MESSAGES))
    after = (await pool.status())["models"]["model"]
    seen["batch"].append((after["rows"] - before["rows"]) / (after["batches"] - before["batches"]))
    await pipelines.close()


async def _idle_bytes(pool: Pool) -> float:
    """What a pipeline keeps that has answered a message, its place in the registry and its state included."""
    pipelines = users.embedded(pool)
    await users.talk(pipelines, 1, 1)
    gc.collect()
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    await users.talk(pipelines, USERS, 1)
    gc.collect()
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    await pipelines.close()
    return (after - before) / USERS


async def _predict(predictor: Predictor, requests: int) -> float:
    """Requests/s of one row each, so many always under way."""
    x = np.random.default_rng(7).random((1, users.WIDTH), np.float32)
    left = requests

    async def ask() -> None:
        nonlocal left
        while left > 0:
            left -= 1
            await predictor.predict("model", x)

    began = time.perf_counter()
    await asyncio.gather(*(ask() for _ in range(IN_FLIGHT)))
    return requests / (time.perf_counter() - began)


async def _hop_channel(capacity: int) -> float:
    """Seconds of an item from one task to another."""
    channel: Channel[int] = Channel(capacity)

    async def send() -> None:
        for number in range(ITEMS):
            await channel.send(number)

    began = time.perf_counter()
    sending = asyncio.create_task(send())
    for _ in range(ITEMS):
        await channel.receive()
    await sending
    return (time.perf_counter() - began) / ITEMS


async def _hop_queue(capacity: int) -> float:
    """The same through an `asyncio.Queue`."""
    queue: asyncio.Queue[int] = asyncio.Queue(capacity)

    async def send() -> None:
        for number in range(ITEMS):
            await queue.put(number)

    began = time.perf_counter()
    sending = asyncio.create_task(send())
    for _ in range(ITEMS):
        await queue.get()
    await sending
    return (time.perf_counter() - began) / ITEMS
