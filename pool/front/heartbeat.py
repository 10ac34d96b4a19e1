"""Tells the service manager each second how the front is; silent when it is not well. Runs in the front.

The one thing in the front that comes by the clock alone: a manager that watches wants to hear at intervals,
and a blocked loop is found out by what it does not say. Without a manager there is no heartbeat.

    starting ──ready──> serving ──reloading──> reloading ──ready──> serving ──stopping──> stopping
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from math import inf
from typing import NamedTuple, Protocol

from pool.front import notify
from pool.front.logs import Log
from pool.front.notify import Notifier

log = Log("pool.heartbeat")

_BEAT_S = 1.0
_STATUS_S = 0.99  # a timer may fire a little early
# Beats in the time after which the manager acts: one may be late, and one lost.
_BEATS_A_PERIOD = 3
# How long the front may be silent while it starts or stops: to reserve a large arena blocks it for seconds.
_PATIENCE_S = 30.0
# What the front itself needs to end an overdue worker is 0.25 s; a kernel that is busy writing a core file of
# its gigabytes keeps the process for some seconds more.
GRACE_S = 15.0


class Batch(NamedTuple):
    """A batch that a worker has.

    Attributes:
        model: Which model.
        started_at: When the worker was given it.
        timeout_s: Longest it may run; `inf` for as long as it likes.
    """

    model: str
    started_at: float
    timeout_s: float


class Vitals(NamedTuple):
    """How the front is, in numbers.

    Attributes:
        models: Configured.
        models_ready: Those with a worker that answered its canary.
        workers: Configured, of all models.
        workers_ready: Those that can take a batch, or run one.
        queue_rows: Rows that no worker has started.
    """

    models: int
    models_ready: int
    workers: int
    workers_ready: int
    queue_rows: int


class Heart(Protocol):
    """What is listened to."""

    def vitals(self) -> Vitals:
        """The numbers of now."""

    def running(self) -> Iterable[Batch]:
        """The batches that workers have."""


class StatusLine:
    """The sentence in `systemctl status`: one a second and phase at most, none twice in a row. Pure."""

    def __init__(self) -> None:
        self._told = ""
        self._phase = ""
        self._told_at = -inf
        self._requests = 0

    def update(self, now: float, phase: str, vitals: Vitals, requests: int, trouble: str = "") -> str | None:
        """The sentence, if it is time for one.

        Args:
            now: Monotonic seconds.
            phase: `starting`, `serving`, `reloading` or `stopping`.
            vitals: The numbers.
            requests: Admitted since the start.
            trouble: What is wrong, if anything is.
        """
        passed = now - self._told_at
        if passed < _STATUS_S and phase == self._phase:
            return None
        # Of a moment there is no rate to tell.
        rate = (requests - self._requests) / passed if _STATUS_S <= passed < inf else 0.0
        words = [
            f"{vitals.models_ready}/{vitals.models} models ready",
            f"{vitals.workers_ready}/{vitals.workers} workers",
            f"{rate:.0f} requests/s",
            f"{vitals.queue_rows} rows queued",
        ]
        sentence = ", ".join(words)
        if phase != "serving":
            sentence = f"{phase}: {sentence}"
        if trouble:
            sentence = f"{trouble}; {sentence}"
        self._told_at, self._requests, self._phase = now, requests, phase
        if sentence == self._told:
            return None
        self._told = sentence
        return sentence


class Watchdog:
    """Whether what was given to workers gets on. Pure.

    A front whose loop turns ends a worker that runs a batch for too long. A batch that is still there well
    after that is one the front has lost hold of, and whoever waits for it waits for ever.

    Args:
        grace_s: How far beyond its `timeout_s` a batch may run.
    """

    def __init__(self, grace_s: float = GRACE_S) -> None:
        self._grace_s = grace_s

    def trouble(self, now: float, batches: Iterable[Batch]) -> str:
        """What is stuck, in a sentence; empty if nothing is."""
        for batch in batches:
            if now - batch.started_at > batch.timeout_s + self._grace_s:
                return (
                    f"a batch of model {batch.model!r} has run for {now - batch.started_at:.0f} s, "
                    f"though its worker was to be killed after {batch.timeout_s:g} s"
                )
        return ""


class Heartbeat:
    """Beats on the running loop from `start` to `close`.

    Args:
        notifier: To the manager.
        heart: Listened to, each beat.
        requests: Gives how many were admitted since the start.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        notifier: Notifier,
        heart: Heart,
        requests: Callable[[], int],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._notifier = notifier
        self._heart = heart
        self._requests = requests
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._line = StatusLine()
        self._watchdog = Watchdog()
        self._phase = "starting"
        self._trouble = ""
        self._owed: list[str] = []  # what the manager must hear, and has not yet
        self._owed_status = ""  # the same of its last sentence
        self._timer: asyncio.TimerHandle | None = None
        period_s = notifier.watchdog_s
        self._every_s = _BEAT_S if period_s is None else min(_BEAT_S, period_s / _BEATS_A_PERIOD)

    def start(self) -> None:
        """Begin, if there is somebody to hear it."""
        if self._notifier.is_heard:
            self._beat()

    def ready(self) -> None:
        """Every model has answered its canary: clients may come. Also: a reload is over."""
        self._enter("serving", notify.READY)

    def reloading(self) -> None:
        """A reload begins; `ready` tells when it is over."""
        self._enter("reloading", notify.reloading(time.monotonic_ns()))

    def stopping(self) -> None:
        """No more requests are admitted; what is admitted is finished."""
        self._enter("stopping", notify.STOPPING)

    def close(self) -> None:
        """The last beat was the last."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _enter(self, phase: str, line: str) -> None:
        if self._phase in (phase, "stopping"):  # there is no way back from stopping
            return
        self._phase = phase
        self._owed.append(line)
        if self._timer is not None:
            self._timer.cancel()
            self._beat()

    def _beat(self) -> None:
        self._timer = self._loop.call_later(self._every_s, self._beat)
        now = self._clock()
        trouble = self._watchdog.trouble(now, self._heart.running())
        if trouble and not self._trouble:
            log.error("the watchdog is fed no more", reason=trouble)
        self._trouble = trouble
        lines = list(self._owed)
        if self._phase in ("starting", "reloading", "stopping"):
            lines.append(notify.extend_timeout(_PATIENCE_S))
        if self._notifier.watchdog_s is not None and not trouble:
            lines.append(notify.ALIVE)
        sentence = self._line.update(now, self._phase, self._heart.vitals(), self._requests(), trouble)
        if sentence is not None:
            self._owed_status = notify.status(sentence)
        if self._owed_status:
            lines.append(self._owed_status)
        if lines and self._notifier.send(*lines):
            self._owed.clear()
            self._owed_status = ""
