"""`python -m bench [NAME …] [--rounds N]`: measure and print a table.

Without names, everything is measured, and `bench/results.json` and the README's table are written.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from bench import readme
from bench.faults import faults
from bench.figures import Figure, at_least, at_most, fact
from bench.flow import flow
from bench.fronts import fronts
from bench.machine import describe
from bench.overload import overload
from bench.processes import Bare, server
from tests import models

RESULTS = Path(__file__).with_name("results.json")
GB = 1e9


def mlp(rounds: int) -> list[Figure]:
    """784-256-10 dense layers, one-row requests, one worker, one client process."""
    path = models.path("mlp")
    seen: dict[str, list[float]] = defaultdict(list)
    bare64, bare1 = Bare(path, 64, 1), Bare(path, 1, 1)
    with server(path, workers=1, threads=1) as running:
        running.load("--concurrency", 256, "--requests", 30_000)
        for _ in range(rounds):
            for call in ("documented", "cheapest"):
                seen[f"{call} 64"].append(bare64.measure(call, 1.0)["rows_per_s"])
            busy = running.load("--concurrency", 256, "--requests", 200_000)
            seen["256"].append(busy["requests_per_s"])
            seen["front"].append(busy["server_cpu_us_per_request"]["front"])
            for call in ("documented", "cheapest"):
                seen[f"{call} 1"].append(bare1.measure(call, 1.0)["p50_ms"])
            seen["1"].append(running.load("--concurrency", 1, "--requests", 5_000)["p50_ms"])
    bare64.close()
    bare1.close()

    def ratio(of: str, to: str) -> float:
        return median(a / b for a, b in zip(seen[of], seen[to], strict=True))

    return [
        at_least("MLP, 256 in flight", median(seen["256"]), "requests/s", 60_000),
        at_least("  share of the documented call, batch 64", ratio("256", "documented 64"), "", 0.45),
        fact("  share of the cheapest call, batch 64", ratio("256", "cheapest 64"), ""),
        fact("  documented call, batch 64", median(seen["documented 64"]), "rows/s"),
        fact("  cheapest call, batch 64", median(seen["cheapest 64"]), "rows/s"),
        at_most("  CPU of the front", median(seen["front"]), "us/request", 9),
        fact("MLP, 1 in flight, p50", median(seen["1"]), "ms"),
        at_most("  against the documented call", ratio("1", "documented 1"), "x", 1.6),
        fact("  against the cheapest call", ratio("1", "cheapest 1"), "x"),
        fact("  documented call, 1 row, p50", median(seen["documented 1"]), "ms"),
        fact("  cheapest call, 1 row, p50", median(seen["cheapest 1"]), "ms"),
    ]


def memory(rounds: int) -> list[Figure]:
    """12 dense layers of 4096x4096, 805 MB of weights: what each further worker costs."""
    path = models.path("big")
    figures = []
    for workers, goal in ((1, 1.25), (2, 1.30), (4, 1.40)):
        pss, starts = [], []
        for _ in range(rounds):
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
                process.start("cheapest", 6.0)
            alone.append(sum(process.result()["rows_per_s"] for process in bare))
            pooled.append(running.load("--concurrency", 32, "--requests", 3_000)["requests_per_s"])
    for process in bare:
        process.close()
    share = median(p / a for p, a in zip(pooled, alone, strict=True))
    return [
        at_least("MobileNetV2, 32 in flight, share of two bare copies", share, "", 0.95),
        fact("MobileNetV2, 32 in flight", median(pooled), "images/s"),
        fact("MobileNetV2, two bare copies side by side, batch 8", median(alone), "images/s"),
    ]


MEASUREMENTS: dict[str, Callable[[int], list[Figure]]] = {
    "mlp": mlp,
    "memory": memory,
    "mobilenet": mobilenet,
    "faults": faults,
    "overload": overload,
    "flow": flow,
    "fronts": fronts,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("names", metavar="NAME", nargs="*", choices=[[], *MEASUREMENTS], help="default: all")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of which the median counts")
    parser.add_argument("--record", action="store_true", help="with names: write these, keep the others")
    args = parser.parse_args()
    machine = describe()
    print("\n".join(f"{key}: {value}" for key, value in machine.items()) + "\n")
    measured: dict[str, list[dict[str, Any]]] = {}
    for name in args.names or MEASUREMENTS:
        measured[name] = []
        for figure in MEASUREMENTS[name](args.rounds):
            row = figure.row
            measured[name].append(row)
            mark = "" if not row["goal"] else ("ok  " if row["reached"] else "MISS")
            print(
                f"{mark:4} {row['what']:62} {row['value']:>12,.3f} {row['unit']:12} {row['goal']}", flush=True
            )
    if not args.names or args.record:
        before = json.loads(RESULTS.read_text()) if args.names else {"figures": {}, "commits": {}}
        figures = before["figures"] | measured
        # Each measurement keeps the commit it was taken of.
        commits = before["commits"] | dict.fromkeys(measured, machine["commit"])
        results = {
            **machine,
            "commits": {name: commits[name] for name in MEASUREMENTS if name in commits},
            "rounds": args.rounds,
            "figures": {name: figures[name] for name in MEASUREMENTS if name in figures},
        }
        RESULTS.write_text(json.dumps(results, indent=2) + "\n")
        readme.write(results)


main()
