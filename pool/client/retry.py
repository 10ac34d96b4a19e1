"""When a call that failed is made again, and after how long. Client process; pure.

The pauses are those of exponential back-off with full jitter: many clients that were refused at the same
instant come back spread out, and each waits longer the more often it was refused.
"""

from __future__ import annotations

import math

import msgspec

from pool.errors import ConfigError, PoolError, WorkerLost


class Retry(msgspec.Struct, frozen=True, kw_only=True):
    """A client's policy for calls that fail although nothing is wrong with them. Times are in seconds.

    A call is made again after errors whose `retryable` is true: `Overloaded`, `Unavailable`. The pause
    before that is random, from 0 to `first_pause` after the first failure, `multiplier` times as much after
    each further one, at most `longest_pause`; the server's `retry_after_ms` is waited for in addition. All
    attempts together keep the call's timeout, and each tells the server what remains of it.

    `Unavailable` can mean that the connection ended before the answer came. Then the server may have run
    the request, and an attempt more runs it twice. Models do not mind, unless they count or keep what
    they see.

    Attributes:
        attempts: Most attempts of a call, the first included; 1 for no retry.
        first_pause: Longest pause before the second attempt.
        longest_pause: Longest pause before any, the server's advice apart.
        multiplier: How the longest pause grows from one attempt to the next.
        worker_lost: Whether `WorkerLost` is retried too. It may be the request that killed the worker.

    Raises:
        ConfigError: a value is out of its range.
    """

    attempts: int = 5
    first_pause: float = 0.05
    longest_pause: float = 2.0
    multiplier: float = 2.0
    worker_lost: bool = False

    def __post_init__(self) -> None:
        if self.attempts < 1:
            raise ConfigError(f"attempts is {self.attempts}; wanted 1 or more")
        if not 0 < self.first_pause <= self.longest_pause < math.inf:
            raise ConfigError(
                f"first_pause is {self.first_pause:g} s and longest_pause {self.longest_pause:g} s; "
                "wanted 0 < first_pause <= longest_pause"
            )
        if not 1 <= self.multiplier < math.inf:
            raise ConfigError(f"multiplier is {self.multiplier:g}; wanted 1 or more")

    def pause(
        self, error: PoolError, attempt: int, now: float, deadline: float, random: float
    ) -> float | None:
        """How long to wait before the next attempt.

        Args:
            error: How the last attempt failed.
            attempt: Its number, from 1.
            now: The present instant, in seconds.
            deadline: When the caller's patience ends, in seconds of the same clock.
            random: From 0 to less than 1.

        Returns:
            Seconds, such that the next attempt begins before the deadline; None to give up.
        """
        if attempt >= self.attempts or not self._covers(error):
            return None
        least = (error.retry_after_ms or 0) / 1000
        try:
            spread = min(self.longest_pause, self.first_pause * self.multiplier ** (attempt - 1))
        except OverflowError:  # of a float; a great many attempts
            spread = self.longest_pause
        pause = least + random * min(spread, deadline - now - least)
        # Not so if the advice is too long already, or where rounding made it so.
        return pause if pause >= least and now + pause < deadline else None

    def _covers(self, error: PoolError) -> bool:
        return error.retryable or (self.worker_lost and isinstance(error, WorkerLost))


class Attempts:
    """What became of one call so far.

    Args:
        retry: The policy.
        began: When the call began, in seconds.
        deadline: When the caller's patience ends, in seconds of the same clock.
    """

    def __init__(self, retry: Retry, began: float, deadline: float) -> None:
        self._retry = retry
        self._began = began
        self._deadline = deadline
        self._count = 0
        self._last: PoolError | None = None

    def pause_after(self, error: PoolError, now: float, random: float) -> float:
        """How long to wait before the next attempt.

        Args:
            error: How the last attempt failed.
            now: The present instant, in seconds.
            random: From 0 to less than 1.

        Raises:
            PoolError: there is to be no other attempt. It is the error, and if it is not the first, its
                sentence says how many attempts there were, and its cause is the error before it.
        """
        self._count += 1
        pause = self._retry.pause(error, self._count, now, self._deadline, random)
        if pause is not None:
            self._last = error
            return pause
        if self._last is None:
            raise error
        story = f"{error.message}; gave up after {self._count} attempts over {now - self._began:.3g} s"
        raise type(error)(story, retry_after_ms=error.retry_after_ms) from self._last
