"""One front against two that share a worker: `python -m bench fronts`.

Two clients, each with half of the requests in flight. Which front a client meets is chance; a round counts
when each has met another one.
"""

from __future__ import annotations

from collections import defaultdict
from statistics import median
from typing import Any

from bench.figures import Figure, fact
from bench.processes import Server, server
from tests import models

_REQUESTS = 100_000
_IN_FLIGHT = 256


def fronts(rounds: int) -> list[Figure]:
    """784-256-10 dense layers, one-row requests, one worker, two client processes."""
    path = models.path("mlp")
    seen: dict[str, list[float]] = defaultdict(list)
    with (
        server(path, workers=1, threads=1) as one,
        server(path, fronts=2, workers=1, threads=1) as two,
    ):
        for running in (one, two):
            _load(running, _REQUESTS // 4)
        for _ in range(rounds):
            for name, running in (("one", one), ("two", two)):
                figures = _load(running, _REQUESTS)
                seen[f"{name} requests"].append(figures["requests_per_s"])
                seen[f"{name} fronts"].append(figures["server_cpu_us_per_request"]["front"])
                seen[f"{name} workers"].append(figures["server_cpu_us_per_request"]["workers"])
                seen[f"{name} clients"].append(figures["client_cpu_us_per_request"])
                seen[f"{name} rows"].append(figures["mean_batch_rows"])
    found = []
    for name, sentence in (("one", "1 front"), ("two", "2 fronts")):
        found += [
            fact(
                f"MLP, 2 clients, 256 in flight, {sentence}", median(seen[f"{name} requests"]), "requests/s"
            ),
            fact("  CPU of the fronts", median(seen[f"{name} fronts"]), "us/request"),
            fact("  CPU of the worker", median(seen[f"{name} workers"]), "us/request"),
            fact("  CPU of the clients", median(seen[f"{name} clients"]), "us/request"),
            fact("  rows in a batch", median(seen[f"{name} rows"]), ""),
        ]
    pairs = zip(seen["two requests"], seen["one requests"], strict=True)
    return [*found, fact("  2 fronts against 1", median(two / one for two, one in pairs), "x")]


def _load(running: Server, requests: int) -> dict[str, Any]:
    while True:
        before = _requests(running)
        figures = running.load("--clients", 2, "--concurrency", _IN_FLIGHT, "--requests", requests)
        done = [now - then for now, then in zip(_requests(running), before, strict=True)]
        if min(done) > requests / (2 * len(done)):
            return figures


def _requests(running: Server) -> list[int]:
    return [front["requests"] for front in running.client.status()["fronts"]]
