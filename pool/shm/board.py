"""How many batches each front has given to each worker: read by all, so that they do not meet. Fronts only.

Fronts that share workers (`[server] fronts`) do not speak to each other about batches. Each gives a worker
one batch, and one ahead; that another front's batch is there already it could not know. So each notes what it
has given, in a memfd that all of them map, and of the workers that are idle for it takes the one with which
the others have least to do. What is read may be a moment old: then a batch waits behind another one, no more.

    board   u32 [fronts][2][1025]   batches given and not answered, and batches answered, by the worker's
                                    index; a row is written by its front alone (by the lead, when it ended)

A worker that has answered nobody for as long as a batch may take hangs, whoever gave it what it runs.
"""

from __future__ import annotations

import mmap
import os

_PLACES = 1025  # workers of a model, at most, and one for what may kill it
_CELL_BYTES = 4


class Board:
    """A front's view of the board of one generation.

    Args:
        fd: The memfd; owned from now on.
        front: Whose row is written.
        fronts: How many there are.
    """

    def __init__(self, fd: int, front: int, fronts: int) -> None:
        self.fd = fd
        self.front = front
        self.fronts = fronts
        self._cells = memoryview(mmap.mmap(fd, fronts * 2 * _PLACES * _CELL_BYTES)).cast("I")
        self._mine = front * 2 * _PLACES
        self._rows = [row * 2 * _PLACES for row in range(fronts)]
        self._others = [row for row in self._rows if row != self._mine]

    @classmethod
    def create(cls, fronts: int) -> Board:
        """Make one, of the lead (front 0).

        Raises:
            OSError: out of descriptors or memory.
        """
        fd = os.memfd_create("pool-board", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, fronts * 2 * _PLACES * _CELL_BYTES)
            return cls(fd, 0, fronts)
        except OSError:
            os.close(fd)
            raise

    def add(self, worker: int, count: int) -> None:
        """So many batches more, or fewer, are with the worker of this index."""
        self._cells[self._mine + worker] += count

    def answered(self, worker: int) -> None:
        """The worker of this index has answered for a batch."""
        cells, mine = self._cells, self._mine + worker
        cells[mine] -= 1
        cells[mine + _PLACES] = (cells[mine + _PLACES] + 1) & 0xFFFFFFFF

    def answers(self, worker: int) -> int:
        """How many batches the worker of this index has answered for, to all fronts that there are now."""
        cells = self._cells
        return sum([cells[row + _PLACES + worker] for row in self._rows])

    def others(self, worker: int) -> int:
        """How many batches other fronts have given to the worker of this index."""
        cells = self._cells
        return sum([cells[row + worker] for row in self._others])

    def clear(self, front: int) -> None:
        """A front has ended: nobody waits for what it has given."""
        for cell in range(front * 2 * _PLACES, (front + 1) * 2 * _PLACES):
            self._cells[cell] = 0

    def close(self) -> None:
        """Let go of the memory."""
        self._cells = memoryview(b"")
        os.close(self.fd)
