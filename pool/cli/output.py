"""How the commands show things: tables for people, JSON for programs, sizes with a unit."""

from __future__ import annotations

import base64
import json
import math
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

# Columns where the output is a file or a pipe: wide enough that no table is folded.
FILE_COLUMNS = 200


def console(*, stderr: bool = False) -> Console:
    """A console for tables and sentences; plain and wide where it is not a terminal."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else FILE_COLUMNS
    # Names and paths are shown as they are, whatever brackets and colons they hold.
    return Console(file=stream, width=width, highlight=False, markup=False, emoji=False)


def progress() -> Progress:
    """Progress bars on the error output; nothing where that is not a terminal."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
    )

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
        console=console(stderr=True),
        disable=not sys.stderr.isatty(),
    )


def print_json(document: dict[str, Any]) -> None:
    """One JSON object on the output, indented."""
    print(json.dumps(document, indent=2, allow_nan=False))


def size(count: int) -> str:
    """`12.3 MB` of a number of bytes."""
    value = float(count)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.2f} GB"


def jsonable(array: npt.NDArray[Any]) -> Any:
    """An array as nested lists of what JSON has.

    Numbers that JSON lacks are the strings "NaN", "Infinity" and "-Infinity"; complex ones are pairs;
    byte strings are text where they are UTF-8 and `{"b64": ...}` where they are not.
    """
    return _jsonable(array.tolist() if array.dtype.kind != "V" else array.astype(np.float32).tolist())


def _jsonable(value: Any) -> Any:
    if isinstance(value, list):
        return [_jsonable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, complex):
        return [_jsonable(value.real), _jsonable(value.imag)]
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return {"b64": base64.b64encode(value).decode("ascii")}
    return value
