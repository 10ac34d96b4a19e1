"""One input tensor of one request, or of a bundle of requests, on its way into slots. Runs in the front.

A column knows the wire payload (`docs/wire.md` 4) and the slot's region for it (`pool.shm.arena`): how
many of its rows fit, and how to copy them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from pool import wire
from pool.errors import WireError
from pool.shm.arena import InputRegion
from pool.signature import row_items

if TYPE_CHECKING:
    from pool.front.route import Route


class Column:
    """A numeric input: rows of a fixed size."""

    def __init__(self, region: InputRegion, payload: memoryview | bytes) -> None:
        self._offset = region.offset
        self._row_bytes = region.row_bytes
        self._rows = np.frombuffer(payload, np.uint8)

    def span(self, start: int, rows: int) -> memoryview:
        """The payload of some of the rows."""
        return self._rows[start * self._row_bytes : (start + rows) * self._row_bytes].data

    def fit(self, _memory: npt.NDArray[np.uint8], _at: int, _start: int, rows: int) -> int:
        """How many of `rows` rows from `_start` on find room in the slot's rows from `_at` on: all."""
        return rows

    def write(self, memory: npt.NDArray[np.uint8], at: int, start: int, rows: int) -> None:
        """Copy them."""
        n = self._row_bytes
        to = self._offset + at * n
        memory[to : to + rows * n] = self._rows[start * n : (start + rows) * n]


class StringColumn:
    """A string input: offsets and a heap, both appended to those in the slot."""

    def __init__(self, region: InputRegion, rows: int, payload: memoryview | bytes) -> None:
        self._region = region
        self._items = row_items(region.shape)
        self._offsets, self._heap = wire.split_strings(payload, rows * self._items)

    def _slot_offsets(self, memory: npt.NDArray[np.uint8], at: int, rows: int) -> npt.NDArray[np.uint64]:
        start = self._region.offset + 8 * at * self._items
        view = memory[start : start + 8 * (rows * self._items + 1)].view("<u8")
        if at == 0:
            view[0] = 0
        return view

    def fit(self, memory: npt.NDArray[np.uint8], at: int, start: int, rows: int) -> int:
        """As `Column.fit`; here the heap may be short."""
        room = self._region.heap_bytes - int(self._slot_offsets(memory, at, 0)[0])
        ends = self._offsets[(start + np.arange(rows + 1)) * self._items]
        return int(np.searchsorted(ends - ends[0], room, side="right")) - 1

    def write(self, memory: npt.NDArray[np.uint8], at: int, start: int, rows: int) -> None:
        """Append offsets, moved to where the heap ends now, and the bytes."""
        offsets = self._slot_offsets(memory, at, rows)
        mine = self._offsets[start * self._items : (start + rows) * self._items + 1]
        offsets[1:] = mine[1:] - mine[0] + offsets[0]
        to = self._region.heap_offset + int(offsets[0])
        heap = np.frombuffer(self._heap, np.uint8)[int(mine[0]) : int(mine[-1])]
        memory[to : to + len(heap)] = heap


def read_rows(
    regions: Sequence[InputRegion], memory: npt.NDArray[np.uint8], start: int, rows: int
) -> list[bytes]:
    """Copies of rows that lie in a slot, as payloads: the way back of `Column.write`.

    Args:
        regions: The slot's, in any order.
        memory: The slot.
        start: The first row.
        rows: How many.
    """
    payloads = []
    for region in regions:
        if region.dtype == "string":
            items = row_items(region.shape)
            at = region.offset + 8 * start * items
            ends = memory[at : at + 8 * (rows * items + 1)].view("<u8")
            heap = memory[region.heap_offset + int(ends[0]) : region.heap_offset + int(ends[-1])]
            payloads.append((ends - ends[0]).tobytes() + heap.tobytes())
        else:
            at = region.offset + start * region.row_bytes
            payloads.append(memory[at : at + rows * region.row_bytes].tobytes())
    return payloads


def write_rows(
    regions: Sequence[InputRegion],
    memory: npt.NDArray[np.uint8],
    at: int,
    rows: int,
    payloads: Sequence[bytes],
) -> None:
    """Put such copies into a slot, at row `at`; rows before it are those written last."""
    for region, payload in zip(regions, payloads, strict=True):
        column: Column | StringColumn
        column = StringColumn(region, rows, payload) if region.dtype == "string" else Column(region, payload)
        column.write(memory, at, 0, rows)


def read_numeric(route: Route, rows: int, frames: Sequence[memoryview | bytes]) -> list[Column]:
    """As `read_columns`, for a route whose inputs are all numeric."""
    columns = read_columns(route, rows, frames)
    assert all(isinstance(column, Column) for column in columns), "a bundle of strings"
    return columns  # type: ignore[return-value]


def read_columns(
    route: Route, rows: int, frames: Sequence[memoryview | bytes]
) -> list[Column | StringColumn]:
    """The columns of a request's tensor frames.

    Raises:
        WireError: their number or a size is not what the header says.
    """
    if len(frames) != len(route.regions):
        raise WireError(f"{len(frames)} tensor frames; the header names {len(route.regions)}")
    columns: list[Column | StringColumn] = []
    for i, (region, frame) in enumerate(zip(route.regions, frames, strict=True)):
        if region.dtype == "string":
            columns.append(StringColumn(region, rows, frame))
        elif len(frame) != rows * region.row_bytes:
            raise frame_size_error(route, i, len(frame), rows)
        else:
            columns.append(Column(region, frame))
    return columns


def frame_size_error(route: Route, index: int, got: int, rows: int) -> WireError:
    """The refusal of a tensor frame whose size is not what the header says."""
    region = route.regions[index]
    return WireError(
        f"tensor frame {index} has {got} bytes; wanted {rows * region.row_bytes} "
        f"({rows} rows of {region.dtype} {list(region.shape)})"
    )
