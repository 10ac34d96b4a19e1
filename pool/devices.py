"""Names of devices: `cpu:0`, `cpu:1-3,6` or `gpu:0`. Used by the front and the commands; pure."""

from __future__ import annotations

import re

MAX_CORE = 4095  # Linux's own limit is 8192; beyond any machine, and keeps "cpu:0-999999999" small


def parse_device(text: str) -> tuple[tuple[int, ...], int | None]:
    """The cores and the GPU of a device: exactly one of the two is there.

    Raises:
        ValueError: it is neither; the message is the rule.
    """
    if re.fullmatch(r"gpu:\d{1,4}", text):
        return (), int(text[4:])
    if re.fullmatch(r"cpu:\d{1,4}(-\d{1,4})?(,\d{1,4}(-\d{1,4})?)*", text) is None:
        raise ValueError('must read "cpu:0", "cpu:1-3", "cpu:0,2" or "gpu:0"')
    cores: list[int] = []
    for part in text[4:].split(","):
        first, _, last = part.partition("-")
        low, high = int(first), int(last or first)
        if low > high:
            raise ValueError(f"must have ranges that rise, not {part}")
        if high > MAX_CORE:
            raise ValueError(f"must name cores up to {MAX_CORE}")
        cores.extend(range(low, high + 1))
    if len(set(cores)) != len(cores):
        raise ValueError("must not name a core twice")
    return tuple(sorted(cores)), None


def ranges(cores: set[int]) -> str:
    """`0-3,5` of {0, 1, 2, 3, 5}."""
    parts: list[str] = []
    ordered = sorted(cores)
    start = 0
    for i in range(1, len(ordered) + 1):
        if i == len(ordered) or ordered[i] != ordered[i - 1] + 1:
            first, last = ordered[start], ordered[i - 1]
            parts.append(str(first) if first == last else f"{first}-{last}")
            start = i
    return ",".join(parts)
