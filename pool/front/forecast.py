"""When a row placed now will be answered, as batches so far tell. Pure; runs in the front, one per model.

Each worker is done with what it runs after the mean time of a batch; then the batches that wait follow, each
to the worker that is free first. What is refused by this need not be right to the millisecond when there is
little to do. It must be when more is offered than can be done: then rows are admitted as soon as their answer
is predicted to come in time, so nearly all are predicted to come just in time, and half would be late. Hence
a margin, from how much later than predicted batches were done.
"""

from __future__ import annotations

from collections.abc import Iterable

from pool.front.slots import Slot

# Weight of the newest batch in means: what happened ten batches ago counts a third.
_NEWEST = 0.1
# The same of a batch that went at once, in the mean of those that waited: when there are none of these for
# long, what was known of them is forgotten. Or else one slow second could have rows refused for ever.
_NEWEST_OTHER = 0.02
# Deviations beyond the mean by which a batch may be later than predicted: few are later than that.
_DEVIATIONS = 6


class Forecast:
    """What is known of the batches of one model."""

    def __init__(self) -> None:
        # Mean time of a batch: of those that waited, and so gathered rows, and of those that went at once.
        # Where time grows with the rows, the second say little about the first.
        self._run_s = 0.0
        self._run_at_once_s = 0.0
        # How much later than predicted batches were done: mean, and mean deviation from that.
        self._late_s = 0.0
        self._deviation_s = 0.0

    @property
    def margin_s(self) -> float:
        """How much later than predicted a batch may well be done."""
        return max(0.0, self._late_s + _DEVIATIONS * self._deviation_s)

    def done_at(self, ahead: int, ready: int, running: Iterable[Slot], now: float) -> float:
        """When a batch will be done, if all take the mean time.

        Args:
            ahead: Batches that wait and go before it.
            ready: Workers that have nothing to do.
            running: What the others run.
            now: Monotonic seconds.
        """
        run_s = self._run_s or self._run_at_once_s
        free_at = [now] * ready
        for slot in running:  # it had better be done by now
            free_at.append(max(now, slot.dispatched_at + (run_s if slot.has_waited else self._run_at_once_s)))
        free_at.sort()
        rounds, worker = divmod(ahead, len(free_at) or 1)
        return (free_at[worker] if free_at else now) + (rounds + 1) * run_s

    def begin(self, slot: Slot, ahead: int, ready: int, running: Iterable[Slot], now: float) -> None:
        """The first row of a batch was placed: note when it should be done."""
        slot.has_waited = not ready
        if not self._run_at_once_s:
            slot.predicted_at = 0.0
        elif slot.has_waited:
            slot.predicted_at = self.done_at(ahead, ready, running, now)
        else:
            slot.predicted_at = now + self._run_at_once_s

    def learn(self, slot: Slot, now: float) -> None:
        """A batch is done: take in how long it took, and how much later than predicted it was done.

        What far exceeds the usual counts as twice the usual: that the machine stood still for a second says
        little about the next batch.
        """
        if slot.runs != 1:
            return  # it failed before, and what took its time was that
        run_s = now - slot.dispatched_at
        if slot.has_waited:
            self._run_s = _mean(self._run_s, run_s, _NEWEST)
        else:
            self._run_at_once_s = _mean(self._run_at_once_s, run_s, _NEWEST)
            if self._run_s:
                self._run_s = _mean(self._run_s, self._run_at_once_s, _NEWEST_OTHER)
        if slot.predicted_at:
            most_s = self._run_s or self._run_at_once_s
            error_s = max(-most_s, min(most_s, now - slot.predicted_at - self._late_s))
            self._late_s += _NEWEST * error_s
            self._deviation_s += _NEWEST * (abs(error_s) - self._deviation_s)


def _mean(mean: float, newest: float, weight: float) -> float:
    return mean + weight * (min(newest, 2 * mean) - mean) if mean else newest
