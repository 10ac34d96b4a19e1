"""What the rounds came to: medians, the better of two waits, times of recovery. Pure."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any

Row = dict[str, Any]

MEASURED = (
    "requests_per_s",
    "p50_ms",
    "p99_ms",
    "cpu_us",
    "pss_mib",
    "ready_s",
    "gb_per_s",
    "recovery_s",
    "lost",
)

# The rate of a second counts as full service from this share of the rate before on. One worker of two gives
# half of it or a little more: by then the other must have worked for four fifths of the second.
FULL = 0.9
_WINDOW_S = 1.0


def medians(rows: Iterable[Row]) -> list[Row]:
    """One row for all rounds of the same thing: medians, the sum of failures, and how many rounds."""
    groups: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        key = (row["workload"], row["system"], row["wait_ms"], row["workers"], row["in_flight"])
        groups[key].append(row)
    return [_median(group) for group in groups.values()]


def _median(group: Sequence[Row]) -> Row:
    row = dict(group[0])
    row["rounds"] = len(group)
    row["failures"] = sum(each["failures"] for each in group)
    for name in MEASURED:
        if name in row:
            # A round in which it never came counts as the worst.
            values = [math.inf if each[name] is None else each[name] for each in group]
            value = median(sorted(values))
            row[name] = None if math.isinf(value) else value
    return row


def better_waits(rows: Iterable[Row]) -> list[Row]:
    """Of the batch waits that a system was measured with, the better one in each place.

    Better is more requests/s, or where one request is under way a smaller p50.
    """
    groups: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["workload"], row["system"], row["workers"], row["in_flight"]].append(row)
    return [max(group, key=_merit) for group in groups.values()]


def _merit(row: Row) -> tuple[int, float]:
    # First of all how often it was measured: one round is not better than the median of five.
    if "recovery_s" in row:
        return row["rounds"], -math.inf if row["recovery_s"] is None else -row["recovery_s"]
    if row["in_flight"] == 1:
        return row["rounds"], -row["p50_ms"] if not math.isnan(row["p50_ms"]) else -math.inf
    return row["rounds"], row["requests_per_s"]


def contenders(rows: Sequence[Row], count: int, own: str) -> list[tuple[str, float]]:
    """Servers, with their wait, that go into the further rounds: those that lead somewhere.

    Args:
        rows: Of the first round.
        count: How many of the first at each number of requests in flight.
        own: The server that is in every round; not among the answer.
    """
    chosen: dict[tuple[str, float], None] = {}
    levels = sorted({row["in_flight"] for row in rows})
    for level in levels:
        here = [dict(row, rounds=1) for row in rows if row["in_flight"] == level and row["server"] != own]
        for row in sorted(here, key=_merit, reverse=True)[:count]:
            chosen[row["server"], row["wait_ms"]] = None
    return list(chosen)


def unmeasured(rows: Iterable[Row]) -> dict[str, str]:
    """Systems of which there is not one figure, and the first reason that was given."""
    reasons: dict[str, str] = {}
    measured = set()
    for row in rows:
        if "error" in row:
            reasons.setdefault(row["system"], row["error"])
        else:
            measured.add(row["system"])
    return {system: reason for system, reason in reasons.items() if system not in measured}


def recovery(log: str, killed_at: float, replaced_at: float, until: float) -> tuple[float | None, int]:
    """What clients saw of a kill.

    Args:
        log: Of `bench.peers.steady`.
        killed_at: Monotonic.
        replaced_at: When another worker was there; not before is service full, whatever the rate.
        until: When the load ended.

    Returns:
        Seconds from the kill until there is another worker and the rate of the next second is full, None if
        they never are; and requests that failed or were given up since.
    """
    entries = [(float(a), b == "1") for a, b, _ in (line.split() for line in log.splitlines())]
    good = sorted(at for at, is_well in entries if is_well)
    lost = sum(not is_well for at, is_well in entries if at >= killed_at)
    if not good:
        return None, lost
    # The first second of a load is not its rate.
    begin = min(good[0] + 1.0, killed_at - 1.0)
    wanted = FULL * sum(begin <= at < killed_at for at in good) / (killed_at - begin) * _WINDOW_S
    has_fallen = False
    step = 0.05
    for index in range(int((until - killed_at - _WINDOW_S) / step) + 1):
        since = killed_at + index * step
        is_full = sum(since <= at < since + _WINDOW_S for at in good) >= wanted
        has_fallen = has_fallen or not is_full
        if has_fallen and is_full and since >= replaced_at:
            return since - killed_at, lost
    return (None if has_fallen or math.isinf(replaced_at) else max(0.0, replaced_at - killed_at)), lost
