"""The tables: what was measured, shares of ceilings, and what must be reached. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from statistics import median
from typing import Any

from bench.peers.summary import FULL, Row, ratio, share, spread
from bench.readme import PEERS_BEGIN, PEERS_END

OWN = "pool"

Results = dict[str, Any]

# What takes part in the naked loop, or is the same with other messages; for comparison, without a goal.
_PARTS = (
    ("the naked loop past ZeroMQ", "naked loop bundled, line"),
    ("the naked loop through ZeroMQ", "naked loop bundled"),
    ("the naked loop past ZeroMQ, one row a message", "naked loop, line"),
    ("the naked loop through ZeroMQ, one row a message", "naked loop"),
    ("the model alone, on one core", "bare"),
    ("a naked ROUTER with bundles", "echo bundled"),
    ("a naked ROUTER with one row a message", "echo"),
)


def median_of(rounds: Sequence[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Medians of every figure of every ceiling."""
    return {
        name: {figure: median(each[name][figure] for each in rounds) for figure in figures}
        for name, figures in rounds[0].items()
    }


def line(row: Row) -> str:
    """One measurement as it is taken, in words."""
    what = f"{row['system']:28} {row['workers']} workers, wait {row['wait_ms']:g} ms"
    if "error" in row:
        return f"{what}: FAILED: {row['error']}"
    if "lost" in row:
        back = "never" if row["recovery_s"] is None else f"{row['recovery_s']:.2f} s"
        return f"{what}: back {back}, lost {row['lost']}"
    return (
        f"{what}, {row['in_flight']:>4} in flight: {row['requests_per_s']:>9,.0f}/s  p50 {row['p50_ms']:.2f} "
        f"p99 {row['p99_ms']:.2f} ms  CPU {row['cpu_us']:,.0f} us  PSS {row['pss_mib']:,.0f} MiB"
        + (f"  FAILURES {row['failures']}" if row["failures"] else "")
    )


def render(results: Results) -> str:
    """Everything, in Markdown, with the README's marks around it."""
    parts = [
        f"{results['machine']}; {results['system']}; {results['libraries']}. {results['date']}, commits "
        f"{commits(results)}. Medians of {results['rounds']} head-to-head rounds for pool, whoever leads "
        "somewhere in a round of all, and the ceilings; that one round for the others; the better of a 2 ms "
        "batch wait and none is shown. Ratios are medians of those within rounds.",
        *_goals(results),
        *_throughput(results, "mlp", "MLP 784-256-10: requests/s (p99 ms)", 256),
        *_throughput(results, "mobilenet", "MobileNetV2 224x224x3: images/s (p99 ms)", 32),
        *_memory(results),
        *_large(results),
        *_kills(results),
        *_absent(results),
        *_pictures(results),
    ]
    return "\n\n".join([PEERS_BEGIN, *parts, PEERS_END])


# -- tables --------------------------------------------------------------------------------------------


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def commits(results: Results) -> str:
    """Which commit each workload was measured of."""
    return ", ".join(f"{each['commit']} ({name})" for name, each in results["workloads"].items())


def of(results: Results, workload: str) -> list[Row]:
    """The rows of a workload."""
    rows: list[Row] = results["workloads"].get(workload, {}).get("rows", [])
    return rows


def ceilings(results: Results, workload: str) -> dict[str, dict[str, float]]:
    """The most that is possible in a workload: figures by what is measured."""
    found: dict[str, dict[str, float]] = results["workloads"].get(workload, {}).get("ceilings", {})
    return found


def _throughput(results: Results, workload: str, title: str, shared: int) -> Iterator[str]:
    rows = of(results, workload)
    if not rows:
        return
    levels = sorted({row["in_flight"] for row in rows})
    ceiling = ceilings(results, workload).get("bare", {}).get("requests_per_s")
    table = []
    for system, found in _by_system(
        rows, lambda r: -r["requests_per_s"] if r["in_flight"] == shared else 0.0
    ):
        here = {row["in_flight"]: row for row in found}
        cells = [_rate(here.get(level)) for level in levels]
        last = here.get(shared)
        cpu = f"{last['cpu_us']:,.0f}" if last else "-"
        share = f"{last['requests_per_s'] / ceiling:.0%}" if last and ceiling else "-"
        failures = sum(row["failures"] for row in found)
        table.append([system, str(found[0]["workers"]), *cells, cpu, share, str(failures)])
    head = [title, "workers", *(f"{level} in flight" for level in levels)]
    yield _table([*head, f"CPU us/request at {shared}", f"share of the ceiling at {shared}", "failed"], table)
    for name, figures in ceilings(results, workload).items():
        words = ", ".join(
            f"{key} {value:,.3g}" if value < 1000 else f"{key} {value:,.0f}" for key, value in figures.items()
        )
        yield f"Ceiling, {name}: {words}."  # fmt: skip


def _rate(row: Row | None) -> str:
    if row is None:
        return "-"
    return f"{row['requests_per_s']:,.0f} ({row['p99_ms']:.3g})"


def _by_system(rows: Sequence[Row], rank: Callable[[Row], float]) -> list[tuple[str, list[Row]]]:
    systems: dict[str, list[Row]] = {}
    for row in rows:
        systems.setdefault(row["system"], []).append(row)
    return sorted(systems.items(), key=lambda item: min(map(rank, item[1])))


def _memory(results: Results) -> Iterator[str]:
    rows = of(results, "memory")
    if not rows:
        return
    counts = sorted({row["workers"] for row in rows})
    table = []
    for system, found in _by_system(rows, lambda r: r["pss_mib"] if r["workers"] == counts[-1] else math.inf):
        here = {row["workers"]: row for row in found}
        table.append([system, *(_size(here.get(count)) for count in counts)])
    words = [f"{count} workers" if count > 1 else "1 worker" for count in counts]
    yield _table(["805 MB model: PSS of the tree, MiB (s to the first answer)", *words], table)


def _size(row: Row | None) -> str:
    return "-" if row is None else f"{row['pss_mib']:,.0f} ({row['ready_s']:.1f})"


def _large(results: Results) -> Iterator[str]:
    rows = of(results, "large")
    if not rows:
        return
    levels = sorted({row["in_flight"] for row in rows})
    ceiling = ceilings(results, "large").get("memcpy", {}).get("gb_per_s")
    table = []
    for system, found in _by_system(rows, lambda r: -r["gb_per_s"]):
        here = {row["in_flight"]: row for row in found}
        best = max(row["gb_per_s"] for row in found)
        share = f"{best / ceiling:.0%}" if ceiling else "-"
        table.append([system, *(f"{here[n]['gb_per_s']:.2f}" if n in here else "-" for n in levels), share])
    head = ["25 MB requests: GB/s", *(f"{level} in flight" for level in levels), "share of memcpy"]
    yield _table(head, table)


def _kills(results: Results) -> Iterator[str]:
    rows = of(results, "kill")
    if not rows:
        return
    ranked = sorted(rows, key=lambda row: math.inf if row["recovery_s"] is None else row["recovery_s"])
    table = [
        [
            row["system"],
            "never" if row["recovery_s"] is None else f"{row['recovery_s']:.2f}",
            f"{row['lost']:g}",
        ]
        for row in ranked
    ]
    yield _table(["SIGKILL of one worker of two, 16 clients", "s to full rate", "requests lost"], table)
    yield f"Full is a rate of {FULL:.0%} of that before, from then on for a second."


def _absent(results: Results) -> Iterator[str]:
    if results["absent"]:
        yield "Not measured:\n" + "\n".join(f"- {name}: {why}" for name, why in results["absent"].items())


def _pictures(results: Results) -> Iterator[str]:
    for workload, what in (("mlp", "MLP"), ("mobilenet", "MobileNetV2"), ("memory", "memory")):
        if of(results, workload):
            yield f"![Peers: {what}](docs/peers-{workload}.png)"


# -- what must be reached ------------------------------------------------------------------------------


def _goals(results: Results) -> Iterator[str]:
    table = [row for row in goals(results) if row]
    if table:
        yield _table(["pool against the best peer, or its ceiling", "measured", "goal"], table)


def goals(results: Results) -> Iterator[list[str]]:
    """What was asked for: words, what it came to, the goal; only what was measured."""

    def rows(workload: str, **where: int) -> tuple[Row | None, list[Row]]:
        """Pool's, and those of the others."""
        found = [
            row for row in of(results, workload) if all(row[key] == value for key, value in where.items())
        ]
        own = next((row for row in found if row["system"] == OWN), None)
        return own, [row for row in found if row["system"] != OWN]

    def against(
        words: str, goal: float, is_rate: bool, figure: str, own: Row | None, peers: Sequence[Row]
    ) -> list[str]:
        """The ratio with the peer that comes off best in it."""
        if own is None:
            return []
        ratios = [(ratio(own, peer, figure), peer["system"]) for peer in peers]
        known = [(value, name) for value, name in ratios if value is not None]
        if not known:
            return []
        value, name = (min if is_rate else max)(known)
        return [words, f"{value:.2f}x ({name})", _goal(goal, is_rate, value)]

    def plain(words: str, goal: float, value: float | None, at_least: bool = True) -> list[str]:
        return [] if value is None else [words, f"{value:.2f}", _goal(goal, at_least, value)]

    def part(own: Row | None, name: str, figure: str, of_figure: str = "") -> float | None:
        """Share of a ceiling."""
        if own is None:
            return None
        by_round = results["workloads"][own["workload"]]["ceilings_by_round"]
        return share(own, by_round, name, figure, of_figure)

    rate = "requests_per_s"
    own, peers = rows("mlp", in_flight=256)
    yield against("MLP, 256 in flight: requests/s", 4, True, rate, own, peers)
    yield against("MLP, 256 in flight: server CPU per request", 1 / 3, False, "cpu_us", own, peers)
    alone, others = rows("mlp", in_flight=1)
    yield against("MLP, 1 in flight: p50", 1 / 3, False, "p50_ms", alone, others)
    called = part(alone, "bare", "p50_ms", "documented_p50_ms")
    yield plain("MLP, 1 in flight: p50 against the call in-process", 1.6, called, False)
    # pool's client sends bundles: so does that of the loop it is compared with, by the faster of two ways.
    names = ("naked loop bundled, line", "naked loop bundled")
    loop = min((value for name in names if (value := part(own, name, rate)) is not None), default=None)
    if loop is None and own is not None:
        yield ["MLP, 256 in flight: share of the naked loop", "not measured", "at least 0.70"]
    yield plain("MLP, 256 in flight: share of the naked loop", 0.7, loop)
    for words, name in _PARTS:
        value = part(own, name, rate)
        yield [] if value is None else [f"  share of {words}", f"{value:.2f}", ""]
    own, _ = rows("mlp", in_flight=64)
    yield plain("MLP, 64 in flight: p99/p50", 3, spread(own) if own else None, False)
    own, peers = rows("mobilenet", in_flight=32)
    copies = part(own, "bare", rate)
    yield plain("MobileNetV2, 32 in flight: share of bare copies", 0.97, copies)
    yield against("MobileNetV2, 32 in flight: images/s", 1, True, rate, own, peers)
    own, peers = rows("memory", workers=4)
    processes = [row for row in peers if row["system"] != "PyTriton"]
    threads = [row for row in peers if row["system"] == "PyTriton"]
    pss = "pss_mib"
    yield against("805 MB model, 4 workers: PSS against processes", 1 / 3, False, pss, own, processes)
    yield against("  against threads of one process", 1, False, pss, own, threads)
    own, peers = _best_levels(of(results, "large"), "gb_per_s")
    regions = [row for row in peers if row["system"] == "Triton gRPC, shared memory"]
    yield against("25 MB requests: GB/s against Triton's shared memory", 1.5, True, "gb_per_s", own, regions)
    yield plain("  share of memcpy", 0.5, part(own, "memcpy", "gb_per_s"))
    own, peers = rows("kill")
    yield against("worker SIGKILL: s to full service", 1 / 3, False, "recovery_s", own, peers)
    yield plain("  requests lost", 0, own["lost"] if own else None, False)


def _best_levels(rows: Sequence[Row], figure: str) -> tuple[Row | None, list[Row]]:
    """Of each system the row where it reaches most; pool's, and those of the others."""
    best: dict[str, Row] = {}
    for row in rows:
        if row["system"] not in best or row[figure] > best[row["system"]][figure]:
            best[row["system"]] = row
    return best.pop(OWN, None), list(best.values())


def _goal(goal: float, at_least: bool, value: float) -> str:
    reached = value >= goal if at_least else value <= goal
    words = f"at {'least' if at_least else 'most'} {goal:.2f}"
    return words if reached else f"{words} (missed)"
