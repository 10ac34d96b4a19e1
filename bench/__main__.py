"""`python -m bench [NAME …] [--rounds N]`: measure, print a table, write `bench/results.json`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from bench.machine import describe
from bench.processes import Bare, server
from tests import models

RESULTS = Path(__file__).with_name("results.json")
GB = 1e9


class Figure:
    """One line of the table: what was measured, what it came to, what it must reach."""

    def __init__(self, what: str, value: float, unit: str, goal: str, reached: bool) -> None:
        self.row = {"what": what, "value": value, "unit": unit, "goal": goal, "reached": reached}


def at_least(what: str, value: float, unit: str, goal: float) -> Figure:
    return Figure(what, value, unit, f">= {goal:g}", value >= goal)


def at_most(what: str, value: float, unit: str, goal: float) -> Figure:
    return Figure(what, value, unit, f"<= {goal:g}", value <= goal)


def mlp(rounds: int) -> list[Figure]:
    """784-256-10 dense layers, one-row requests, one worker, one client process."""
    path = models.path("mlp")
    pooled, alone, latency, direct, front = [], [], [], [], []
    bare64, bare1 = Bare(path, 64, 1), Bare(path, 1, 1)
    with server(path, workers=1, threads=1) as running:
        running.load("--concurrency", 256, "--requests", 30_000)
        for _ in range(rounds):
            alone.append(bare64.measure(1.5)["rows_per_s"])
            busy = running.load("--concurrency", 256, "--requests", 150_000)
            pooled.append(busy["requests_per_s"])
            front.append(busy["server_cpu_us_per_request"]["front"])
            direct.append(bare1.measure(1.0)["p50_ms"])
            latency.append(running.load("--concurrency", 1, "--requests", 5_000)["p50_ms"])
    bare64.close()
    bare1.close()
    return [
        at_least("MLP, 256 in flight", median(pooled), "requests/s", 60_000),
        at_least(
            "MLP, 256 in flight, share of the bare batch-64 rate",
            median(p / a for p, a in zip(pooled, alone, strict=True)),
            "",
            0.45,
        ),
        Figure("MLP, bare in-process, batch 64", median(alone), "rows/s", "", True),
        at_most(
            "MLP, 1 in flight, p50 against the bare call",
            median(p / d for p, d in zip(latency, direct, strict=True)),
            "x",
            1.6,
        ),
        Figure("MLP, 1 in flight, p50", median(latency), "ms", "", True),
        Figure("MLP, bare in-process call of 1 row, p50", median(direct), "ms", "", True),
        at_most("MLP, 256 in flight, CPU of the front", median(front), "us/request", 9),
    ]


def memory(rounds: int) -> list[Figure]:
    """12 dense layers of 4096x4096, 805 MB of weights: what each further worker costs."""
    path = models.path("dense_805mb")
    figures = []
    for workers, goal in ((1, 1.25), (2, 1.30), (4, 1.40)):
        pss, starts = [], []
        for _ in range(rounds if workers == 4 else 1):
            with server(path, workers=workers, threads=1, max_batch_size=8) as running:
                running.load("--concurrency", 2 * workers, "--requests", 16 * workers)
                pss.append(running.tree_pss_bytes() / GB)
                status = running.client.status()["models"]["model"]["workers"]
                starts += [worker["ready_s"] for worker in status[1:]]
        figures.append(at_most(f"805 MB model, {workers} workers, PSS of the tree", median(pss), "GB", goal))
    figures.append(at_most("805 MB model, fork to READY, workers 2 to n", median(starts), "s", 1.0))
    return figures


def mobilenet(rounds: int) -> list[Figure]:
    """MobileNetV2 224x224x3: two pinned workers against two bare processes pinned alike."""
    path = models.path("mobilenet")
    bare = [Bare(path, 8, 1, core) for core in (0, 1)]
    pooled, alone = [], []
    settings: dict[str, Any] = {"workers": 2, "devices": ["cpu:0", "cpu:1"], "max_batch_size": 8}
    with server(path, **settings) as running:
        running.load("--concurrency", 32, "--requests", 200)
        for _ in range(rounds):
            for process in bare:
                process.start(6.0)
            alone.append(sum(process.result()["rows_per_s"] for process in bare))
            pooled.append(running.load("--concurrency", 32, "--requests", 1_500)["requests_per_s"])
    for process in bare:
        process.close()
    share = median(p / a for p, a in zip(pooled, alone, strict=True))
    return [
        at_least("MobileNetV2, 32 in flight, share of two bare copies", share, "", 0.95),
        Figure("MobileNetV2, 32 in flight", median(pooled), "images/s", "", True),
        Figure("MobileNetV2, two bare copies side by side, batch 8", median(alone), "images/s", "", True),
    ]


MEASUREMENTS: dict[str, Callable[[int], list[Figure]]] = {
    "mlp": mlp,
    "memory": memory,
    "mobilenet": mobilenet,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("names", metavar="NAME", nargs="*", choices=[[], *MEASUREMENTS], help="default: all")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of which the median counts")
    args = parser.parse_args()
    machine = describe()
    print("\n".join(f"{key}: {value}" for key, value in machine.items()) + "\n")
    rows = []
    for name in args.names or MEASUREMENTS:
        for figure in MEASUREMENTS[name](args.rounds):
            row = figure.row
            rows.append(row)
            mark = "" if not row["goal"] else ("ok  " if row["reached"] else "MISS")
            print(
                f"{mark:4} {row['what']:62} {row['value']:>12,.3f} {row['unit']:12} {row['goal']}", flush=True
            )
    if not args.names:
        RESULTS.write_text(json.dumps({**machine, "rounds": args.rounds, "figures": rows}, indent=2) + "\n")


main()
