"""Which bytes of a region are in use. Client process; pure."""

from __future__ import annotations

import bisect

# Of blocks, and of the tensors in them: what copies are fastest at, and frameworks want. Not more: rows that
# follow each other, without a gap, can be run on where they lie (`pool.shm.loans`).
ALIGN_BYTES = 64


def align(size: int) -> int:
    """The next multiple of 64."""
    return (size + ALIGN_BYTES - 1) & -ALIGN_BYTES


class Space:
    """Which bytes of a region are in use.

    Blocks are taken from the lowest place that has room, where the memory was used before and is warm.

    Args:
        size: Bytes there are.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._free: list[tuple[int, int]] = [(0, size)]  # offset, bytes; in order, never two side by side
        self._blocks: dict[int, int] = {}  # offset to bytes

    @property
    def is_empty(self) -> bool:
        """Whether nothing is in use."""
        return not self._blocks

    def take(self, size: int) -> int | None:
        """Where a block of so many bytes (above 0) begins, aligned; None if there is no room."""
        assert size > 0, "a block of nothing"
        size = align(size)
        for i, (offset, free) in enumerate(self._free):
            if free >= size:
                if free == size:
                    del self._free[i]
                else:
                    self._free[i] = (offset + size, free - size)
                self._blocks[offset] = size
                return offset
        return None

    def give_back(self, offset: int) -> None:
        """End the use of a block."""
        size = self._blocks.pop(offset)
        i = bisect.bisect(self._free, (offset, 0))
        if i < len(self._free) and offset + size == self._free[i][0]:
            size += self._free.pop(i)[1]
        if i > 0 and sum(self._free[i - 1]) == offset:
            before, room = self._free[i - 1]
            self._free[i - 1] = (before, room + size)
        else:
            self._free.insert(i, (offset, size))
