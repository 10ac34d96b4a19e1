"""The README's figures: the block between two marks, written from the newest results."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN = "<!-- figures: written by `make bench` -->"
END = "<!-- end of figures -->"
PEERS_BEGIN = "<!-- peers: written by `make bench-peers` -->"
PEERS_END = "<!-- end of peers -->"


def render(results: dict[str, Any]) -> str:
    """The block, marks included."""
    commits = results["commits"].items()
    lines = [
        BEGIN,
        "",
        f"{results['machine']}; {results['system']}; {results['libraries']}.",
        f"{results['date']}, commits {', '.join(f'{commit} ({name})' for name, commit in commits)}. "
        f"Medians of {results['rounds']} rounds; "
        "what is compared was measured alternately, in the same run.",
        "",
        "| what | measured | goal |",
        "|---|---|---|",
    ]
    for figure in itertools.chain.from_iterable(results["figures"].values()):
        goal = figure["goal"].replace(">=", "at least").replace("<=", "at most")
        missed = "" if figure["reached"] else " (missed)"
        indent = "&nbsp;&nbsp;" if figure["what"].startswith("  ") else ""
        value = _number(figure["value"])
        lines.append(f"| {indent}{figure['what'].strip()} | {value} {figure['unit']} | {goal}{missed} |")
    return "\n".join([*lines, "", END])


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def write(results: dict[str, Any]) -> None:
    """Put the block of `make bench` in its place."""
    put(render(results), BEGIN, END)


def put(block: str, begin: str, end: str) -> None:
    """Put a block, marks included, in the place of the one with these marks."""
    text = README.read_text()
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    assert pattern.search(text), f"{README} has no place for the figures"
    README.write_text(pattern.sub(lambda _: block, text))
