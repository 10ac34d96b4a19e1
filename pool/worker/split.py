"""How many rows of a batch one call of the model takes. Pure; runs in the worker, one for each layout.

More rows a call save calls, and fill a framework's inner loops. But what one layer hands to the next may be
more than the caches hold, and then fewer rows a call are faster: MobileNetV2 hands on 38 MB between two
layers with eight pictures, and with two at a time two busy cores give a fifth more while the host's memory
is busy, a twelfth more when it is less so, and on a quiet host 6 % less (`docs/design.md` 9). No rule tells
where that is so, hence batches are cut into *pieces*, and the clock decides. A size is tried on every other
batch, each against the two batches around it, so that a machine that is slower by a third in the next minute
changes nothing; half as long again, and it is out at once. When no size is better than the best, there is
rest, twice as long each time.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

WHOLE = 0  # a size: all rows of the batch in one call

# A shorter run is not worth another call: that takes tens of µs.
_LEAST_S = 0.002
# Batches before the first bout: a worker that has just started is no measure.
_FIRST_REST = 8
_REST, _LONGEST_REST = 128, 4096
# Bouts of one size; odd, so that the median is one of them.
_BOUTS = 5
# Of the time of the best: what counts as better, what speaks against even smaller sizes, and what is enough.
_BETTER, _WORSE, _MUCH_WORSE = 0.97, 1.05, 1.5

_NOTHING = (0, 0.0)  # rows, and seconds that a batch of them took


class Split:
    """What is known of one layout's batches.

    Args:
        may_be: Whether calls of so many rows can be made at all; called seldom.
        most_s: A batch that takes longer is not tried with: a bout may take twice the time.
    """

    def __init__(self, may_be: Callable[[int], bool], most_s: float) -> None:
        self._may_be = may_be
        self._most_s = most_s
        self._best = WHOLE
        self._rest = self._next_rest = _FIRST_REST
        self._most = 0  # rows of the largest batch in the rest before the round
        # Sizes still to be tried in this round: first below the best, falling, then above, rising.
        self._smaller: list[int] = []
        self._larger: list[int] = []
        self._rival: int | None = None  # the one being tried
        self._ratios: list[float] = []
        self._waited = 0  # batches since the last bout
        self._is_warm = False  # whether the rival ran before: what a first run allocates is no measure
        self._before = self._bout = _NOTHING  # the last batch with the best size, and with the rival since

    @property
    def best(self) -> int:
        """Rows a call that were the best so far, or WHOLE."""
        return self._best

    def choose(self, rows: int) -> int:
        """Rows a call for a batch of so many rows, or WHOLE."""
        size = self._best
        if self._rival is not None and self._before[0] == rows <= self._most and not self._bout[0]:
            size = self._rival
        return size if size < rows else WHOLE

    def learn(self, rows: int, size: int, took_s: float) -> None:
        """A batch of so many rows was run with so many a call.

        Args:
            rows: Of the batch.
            size: As `choose` gave it.
            took_s: For all its calls.
        """
        if took_s < _LEAST_S or took_s > self._most_s:
            self._before = self._bout = _NOTHING
        elif self._rival is not None:
            self._compare(rows, size, took_s)
        elif self._rest and rows > 1:
            self._rest -= 1
            self._most = max(self._most, rows)
            if not self._rest:
                self._begin()

    def forbid(self) -> None:
        """Pieces do not give what the whole does: never again."""
        self._best = WHOLE
        self._rival = None
        self._rest = 0

    def _begin(self) -> None:
        """A round of bouts."""
        self._smaller = [size for size in _halves(self._best or self._most) if self._may_be(size)]
        self._larger = []
        if self._best:
            double = 2 * self._best
            self._larger = [double, WHOLE] if double < self._most and self._may_be(double) else [WHOLE]
        self._next()

    def _next(self) -> None:
        rivals = self._smaller or self._larger
        self._rival = rivals.pop(0) if rivals else None
        self._ratios = []
        self._waited = 0
        self._is_warm = False
        self._before = self._bout = _NOTHING
        if self._rival is None:
            self._repose(min(max(_REST, 2 * self._next_rest), _LONGEST_REST))

    def _repose(self, batches: int) -> None:
        self._rival = None
        self._rest = self._next_rest = batches
        self._most = 0

    def _compare(self, rows: int, size: int, took_s: float) -> None:
        """Take in a batch of a round."""
        usual = self._best if self._best < rows else WHOLE
        if size != usual:
            self._bout = (rows, took_s)
            self._waited = 0
            return
        self._waited += 1
        if self._waited > _REST:  # batches are not what they were when the round began
            self._repose(_FIRST_REST)
            return
        before, bout = self._before, self._bout
        self._before, self._bout = (rows, took_s), _NOTHING
        if not bout[0] or before[0] != rows:
            return
        if not self._is_warm:
            self._is_warm = True
            return
        self._judge(2 * bout[1] / (before[1] + took_s))

    def _judge(self, ratio: float) -> None:
        self._ratios.append(ratio)
        if len(self._ratios) < _BOUTS and ratio < _MUCH_WORSE:
            return
        assert self._rival is not None, "a bout without a rival"
        found = median(self._ratios)
        if found <= _BETTER:
            self._best = self._rival
            self._repose(_FIRST_REST)
            return
        if found >= _WORSE:  # and so would those be that are farther from the best
            if self._rival != WHOLE and (self._best == WHOLE or self._rival < self._best):
                self._smaller = []
            else:
                self._larger = []
        self._next()


def _halves(most: int) -> list[int]:
    """Powers of two below, the largest first."""
    return [1 << i for i in reversed(range((most - 1).bit_length()))]
