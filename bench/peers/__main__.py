"""`python -m bench.peers [--quick] [--only NAME,…] [--workloads NAME,… [--record]] [--rounds N]`.

All systems take part in the first round of each workload, with each batch wait; those that lead somewhere,
pool, and what the machine could do at most, go through the others head to head. Writes
`bench/results-peers.json`, pictures in `docs/`, and the README's second table, unless only a part was asked
for.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

from bench import readme
from bench.machine import describe
from bench.peers import environments, plots, report
from bench.peers.ceilings import bare, echo, memcpy, naked
from bench.peers.summary import FIRST, Ceilings, Row, better_waits, contenders, medians, unmeasured
from bench.peers.systems import SYSTEMS
from bench.peers.workloads import FULL, QUICK, WORKLOADS, Pace, Prepared, measure, prepare, variants

RESULTS = Path(__file__).resolve().parent.parent / "results-peers.json"
PICTURES = Path(__file__).resolve().parent.parent.parent / "docs"
LEADERS = 2

# Sockets of 1,024 clients, at both ends.
_FILES = 20_000


def main() -> None:
    args = _arguments()
    # So that servers are ended on the way out.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(_FILES, most), most))
    pace = QUICK if args.quick else FULL
    rounds = args.rounds if args.rounds is not None else 0 if args.quick else 5
    machine = describe()
    print("\n".join(f"{key}: {value}" for key, value in machine.items()), flush=True)
    absent = _install(args.only)
    names = [name for name in args.only if name not in absent]
    measured: dict[str, Any] = {}
    taken: list[Row] = []
    began = time.monotonic()
    for name in args.workloads:
        rows, ceilings = _rounds(prepare(WORKLOADS[name]), names, rounds, pace, is_quick=args.quick)
        taken += rows
        measured[name] = {
            "commit": machine["commit"],
            "ceilings": report.median_of(list(ceilings.values())),
            "ceilings_by_round": ceilings,
            "rows": better_waits(medians(row for row in rows if "error" not in row)),
            "errors": [row for row in rows if "error" in row],
        }
    took_s = time.monotonic() - began
    absent |= unmeasured(taken)
    if args.record and RESULTS.exists():
        before = json.loads(RESULTS.read_text())
        absent, measured = before["absent"] | absent, before["workloads"] | measured
    results = {
        **machine,
        "rounds": rounds,
        "versions": {
            system.name: environments.versions(system.environment) for system in SYSTEMS if system.environment
        },
        "absent": absent,
        "workloads": {name: measured[name] for name in WORKLOADS if name in measured},
    }
    text = report.render(results)
    print(f"\n{text}\nTook {took_s / 60:.0f} min.")
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    (output / RESULTS.name).write_text(json.dumps(results, indent=1) + "\n")
    plots.draw(results, PICTURES if args.is_whole else output)
    if args.is_whole:
        readme.put(text, readme.PEERS_BEGIN, readme.PEERS_END)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.peers", description=__doc__)
    known = [system.name for system in SYSTEMS]
    parser.add_argument("--quick", action="store_true", help="one short round, with one batch wait")
    parser.add_argument("--only", metavar="NAME,…", help=f"systems: {', '.join(known)}")
    parser.add_argument("--workloads", metavar="NAME,…", help=f"of {', '.join(WORKLOADS)}")
    parser.add_argument("--record", action="store_true", help="with workloads: write these, keep the others")
    parser.add_argument(
        "--rounds", type=int, help="head-to-head rounds, of which the median counts (default: 5; quick: 0)"
    )
    parser.add_argument(
        "--output",
        metavar="FOLDER",
        help="where to write results of a part, or a quick run (default: build/peers)",
    )
    args = parser.parse_args()
    args.is_whole = not (args.quick or args.only or args.output) and (args.record or not args.workloads)
    if args.record and not args.is_whole:
        parser.error("--record: only what is whole is kept; wanted no --quick, --only or --output")
    args.record = args.record and bool(args.workloads)
    args.output = args.output or (str(RESULTS.parent) if args.is_whole else "build/peers")
    for option, choices in (("only", known), ("workloads", list(WORKLOADS))):
        given = (getattr(args, option) or ",".join(choices)).split(",")
        unknown = sorted(set(given) - set(choices))
        if unknown:
            parser.error(f"--{option}: no {', '.join(unknown)}; wanted of {', '.join(choices)}")
        setattr(args, option, given)
    return args


def _install(names: list[str]) -> dict[str, str]:
    """Make the environments; gives those that cannot be made, and why."""
    absent = {}
    for system in SYSTEMS:
        if system.name in names and system.environment:
            try:
                environments.python(system.environment)
            except environments.Missing as e:
                absent[system.name] = str(e)
                print(f"{system.name}: {e}", flush=True)
    return absent


def _rounds(
    prepared: Prepared, names: list[str], rounds: int, pace: Pace, *, is_quick: bool
) -> tuple[list[Row], dict[str, Ceilings]]:
    workload = prepared.workload
    everyone = variants(workload, names, is_quick)
    print(f"\n{workload.what}", flush=True)
    rows = [row for system, wait_ms in everyone for row in _one(prepared, system, wait_ms, pace, FIRST)]
    if workload.name == "memory" or not rounds:  # bytes do not vary from round to round
        return rows, {FIRST: _ceilings(prepared, pace)}
    deciding = workload.deciding or workload.levels
    measured = [row for row in rows if "error" not in row and row["in_flight"] in deciding]
    leading = contenders(measured, LEADERS, "pool")
    by_name = {system.name: system for system in SYSTEMS}
    # Pool has its strongest rival on one side and the ceilings on the other, forth and back.
    again = [(by_name[name], wait_ms) for name, wait_ms in reversed(leading)]
    again += [(system, wait_ms) for system, wait_ms in everyone if system.name == "pool"]
    ceilings = {}
    for number in map(str, range(1, rounds + 1)):
        is_forth = int(number) % 2 == 1
        if not is_forth:
            ceilings[number] = _ceilings(prepared, pace)
        for system, wait_ms in again if is_forth else reversed(again):
            rows += _one(prepared, system, wait_ms, pace, number)
        if is_forth:
            ceilings[number] = _ceilings(prepared, pace)
    return rows, ceilings


def _one(prepared: Prepared, system: Any, wait_ms: float, pace: Pace, number: str) -> list[Row]:
    rows = [row | {"round": number} for row in measure(prepared, system, wait_ms, pace)]
    for row in rows:
        print(f"  {report.line(row)}", flush=True)
    return rows


def _ceilings(prepared: Prepared, pace: Pace) -> Ceilings:
    workload = prepared.workload
    row_bytes = prepared.x[0].nbytes
    seconds = pace.level * workload.length
    cores = sorted(os.sched_getaffinity(0))
    if workload.name == "mlp":
        cores = cores[:1]
    found: Ceilings = {}
    if workload.name in ("mlp", "mobilenet"):
        found["bare"] = bare(prepared.path, workload.batch, cores, 2 * seconds)
    if workload.name == "mlp":
        found["echo"] = echo(row_bytes, 256, seconds)
        found["echo bundled"] = echo(row_bytes, 256, seconds, workload.batch)
        found |= naked(prepared.path, prepared.x, prepared.y, 256, workload.batch, seconds)
    if workload.name == "large":
        found["echo"] = echo(row_bytes, 2, seconds)
        found["memcpy"] = {"gb_per_s": memcpy(row_bytes, seconds)}
    return found


main()
