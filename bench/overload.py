"""Ten times more offered than can be done, in open loop, by requests with a deadline.

The peak is what a closed loop with many full batches under way has answered. Then 90 % of it is offered,
which gives the usual p99. Then ten times the peak is offered, by requests with a timeout of `PATIENCE` times
that: what was answered within it, as the client counts, is the goodput.
"""

from __future__ import annotations

import os
import tempfile
from collections import defaultdict
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

from bench import models
from bench.figures import Figure, at_least, at_most, fact
from bench.processes import Server, drill_model, server

BATCH = 64
# Under way in the closed loop: full batches for all workers, and as many again that wait.
CONCURRENCY = 8 * BATCH
SECONDS = 10
LOAD = 0.9
OVERLOAD = 10
# Twice is what an answer may take. The server does not see the ways there and back: they get the rest.
PATIENCE = 1.75


def overload(rounds: int) -> list[Figure]:
    """A model of the drill backend, which sleeps, and one of TensorFlow, which has a core to itself."""
    with tempfile.TemporaryDirectory(prefix="pool-bench-") as folder:
        # Two workers, each 1,000 rows a second in full batches.
        path = drill_model(Path(folder), row_items=64, batch_s=0.032, row_s=0.0005)
        drill = {"backend": "drill", "workers": 2, "max_batch_size": BATCH}
        core = max(os.sched_getaffinity(0))
        tensorflow = {"workers": 1, "threads": 1, "devices": [f"cpu:{core}"], "max_batch_size": BATCH}
        return [
            *_measure("drill", path, drill, rounds),
            *_measure("TensorFlow", models.path("slow"), tensorflow, rounds, core),
        ]


def _measure(
    name: str, path: Path, settings: dict[str, Any], rounds: int, core: int | None = None
) -> list[Figure]:
    seen: dict[str, list[float]] = defaultdict(list)
    with server(path, **settings) as running, nullcontext() if core is None else running.apart_from(core):
        running.load("--concurrency", CONCURRENCY, "--requests", 10 * CONCURRENCY)
        for _ in range(rounds):
            for what, value in _round(running, seen["peak"]).items():
                seen[what].append(value)
    return [
        at_least(f"{name}: 10 x capacity offered, goodput against the peak", median(seen["share"]), "", 0.95),
        at_most("  p99 against that at 90 % load", median(seen["p99 ratio"]), "x", 2),
        fact("  peak", median(seen["peak"]), "requests/s"),
        fact("  offered", median(seen["offered"]), "requests/s"),
        fact("  goodput", median(seen["goodput"]), "requests/s"),
        fact("  p99 at 90 % load", median(seen["p99"]), "ms"),
        fact("  refused at 90 % load", median(seen["refused"]), "%"),
        fact("  p99 at 10 x capacity", median(seen["p99 overload"]), "ms"),
        fact("  admitted, but late", median(seen["late"]), "% of admitted"),
        fact("  CPU of the front", median(seen["front"]), "us/request"),
    ]


def _round(running: Server, peaks: list[float]) -> dict[str, float]:
    # What was the capacity in the round before says how many requests take so many seconds now.
    guess = peaks[-1] if peaks else 1000.0
    closed = running.load("--concurrency", CONCURRENCY, "--requests", int(guess * SECONDS))
    peak = closed["requests_per_s"]
    usual = running.flood("--rate", LOAD * peak, "--requests", int(LOAD * peak * SECONDS))
    patience_ms = PATIENCE * usual["p99_ms"]
    rate, requests = OVERLOAD * peak, int(OVERLOAD * peak * SECONDS)
    flood = running.flood("--rate", rate, "--requests", requests, "--request-timeout-ms", patience_ms)
    refused = 100 * sum(usual["errors"].values()) / int(LOAD * peak * SECONDS)
    judged = judge(flood, peak, usual["p99_ms"], requests)
    return {"peak": peak, "p99": usual["p99_ms"], "refused": refused, **judged}


def judge(flood: dict[str, Any], peak: float, p99_ms: float, requests: int) -> dict[str, float]:
    """What a run of `pool bench` beyond capacity comes to.

    Args:
        flood: Its report.
        peak: Requests per second that can be done.
        p99_ms: Of the answers under a usual load.
        requests: How many were sent.
    """
    answered = requests - sum(flood["errors"].values())
    late = flood["errors"].get("DEADLINE_EXCEEDED", 0)
    front_us = flood["server_cpu_us_per_request"]["front"]
    return {
        "offered": flood["requests_per_s"] * requests / answered,
        "goodput": flood["goodput_per_s"],
        "share": flood["goodput_per_s"] / peak,
        "p99 overload": flood["p99_ms"],
        "p99 ratio": flood["p99_ms"] / p99_ms,
        "late": 100 * late / (answered + late),
        "front": front_us * answered / requests,
    }
