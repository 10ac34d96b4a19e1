"""One line of the table: what was measured, what it came to, what it must reach."""

from __future__ import annotations


class Figure:
    """A measured value.

    Args:
        what: Was measured; two spaces before it where it belongs to the figure above.
        value: It came to.
        unit: Of the value; "" for counts and shares.
        goal: What it must reach, in words; "" if nothing.
        reached: Whether it does.
    """

    def __init__(self, what: str, value: float, unit: str, goal: str, reached: bool) -> None:
        self.row = {"what": what, "value": value, "unit": unit, "goal": goal, "reached": reached}


def at_least(what: str, value: float, unit: str, goal: float) -> Figure:
    """A figure that must not be smaller."""
    return Figure(what, value, unit, f">= {goal:g}", value >= goal)


def at_most(what: str, value: float, unit: str, goal: float) -> Figure:
    """A figure that must not be larger."""
    return Figure(what, value, unit, f"<= {goal:g}", value <= goal)


def fact(what: str, value: float, unit: str) -> Figure:
    """A figure that says how the others came about."""
    return Figure(what, value, unit, "", True)
