"""What the rounds came to: medians, ratios within rounds, the better of two waits, times of recovery. Pure.

The first round is of everybody, and takes so long that the machine at its end is not the one of its
beginning. Who leads in it goes through the *head-to-head* rounds, one after the other beside pool and the
ceilings, and is told by these alone.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any

Row = dict[str, Any]
Ceilings = dict[str, dict[str, float]]

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

# Rounds are named by their number, as JSON names things.
FIRST = "0"
# What ratios are made of: kept round by round.
COMPARED = ("requests_per_s", "p50_ms", "p99_ms", "cpu_us", "pss_mib", "gb_per_s", "recovery_s", "lost")

# The rate of a second counts as full service from this share of the rate before on. One worker of two gives
# half of it or a little more: by then the other must have worked for four fifths of the second.
FULL = 0.9
_WINDOW_S = 1.0


def medians(rows: Iterable[Row]) -> list[Row]:
    """One row for all rounds of the same thing: medians, figures by round, the sum of failures.

    Of who was in head-to-head rounds, only these count.
    """
    groups: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        key = (row["workload"], row["system"], row["wait_ms"], row["workers"], row["in_flight"])
        groups[key].append(row)
    return [_median(group) for group in groups.values()]


def _median(rows: Sequence[Row]) -> Row:
    group = [each for each in rows if each["round"] != FIRST] or rows
    row = dict(group[0])
    del row["round"]
    row["rounds"] = len(group)
    row["failures"] = sum(each["failures"] for each in rows)
    row["by_round"] = {name: {each["round"]: each[name] for each in rows} for name in COMPARED if name in row}
    for name in MEASURED:
        if name in row:
            # A round in which it never came counts as the worst.
            values = [math.inf if each[name] is None else each[name] for each in group]
            value = median(sorted(values))
            row[name] = None if math.isinf(value) else value
    return row


def ratio(own: Row, other: Row, figure: str) -> float | None:
    """The median of the ratios within rounds; None if there is no round in which both were measured.

    Of head-to-head rounds, if both were in any; or else of the first. What never came took infinitely long.
    """
    return _median_ratio(own["by_round"].get(figure, {}), other["by_round"].get(figure, {}))


def spread(row: Row) -> float | None:
    """The median of p99/p50 within rounds."""
    return _median_ratio(row["by_round"]["p99_ms"], row["by_round"]["p50_ms"])


def share(own: Row, ceilings: dict[str, Ceilings], name: str, figure: str, of: str = "") -> float | None:
    """The same, of what the machine could do at most.

    Args:
        own: A row.
        ceilings: By round.
        name: Of the ceiling.
        figure: Of the row.
        of: Of the ceiling, if it is called otherwise.
    """
    found = {number: each[name][of or figure] for number, each in ceilings.items() if name in each}
    return _median_ratio(own["by_round"].get(figure, {}), found)


def _median_ratio(above: dict[str, Any], below: dict[str, Any]) -> float | None:
    both = [number for number in above if number in below]
    both = [number for number in both if number != FIRST] or both
    found = [_quotient(_known(above[number]), _known(below[number])) for number in both]
    found = [value for value in found if not math.isnan(value)]
    return median(found) if found else None


def _known(value: float | None) -> float:
    return math.inf if value is None else value


def _quotient(above: float, below: float) -> float:
    return above / below if below else math.inf


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
