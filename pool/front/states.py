"""Theory of operation of slots and workers: two state tables. Pure; runs in the front.

A **slot** is one batch-sized region of the arena and always has one owner. The front owns it while
requests are placed (OPEN), while their answers are sent (DONE) and while a batch that failed waits to run
again (HELD); one worker owns it while it runs, or is about to (RUNNING), and may be deprived of it before it
began (recall).
Nobody else touches its bytes. A slot whose worker died is the worker's until the process is reaped:
only then can nothing write to it any more.

                        +<--recall----------+
                        v                   |
        FREE --open--> OPEN --dispatch--> RUNNING --finish--> DONE --release--> FREE
                        |                   | ^                |
                        +--abandon--> FREE  | +--dispatch--+   hold
                                            |              |   |
                                            +----reap----> HELD <
                                                           |
                                                           +--release--> FREE

A **worker** is one process. The supervisor feeds it the events below; a pair that is not in the table
cannot happen, and is a defect if it does (`IllegalTransition`).

        STARTING --load--> READY --dispatch--> BUSY --finish--> READY
        STARTING | READY | BUSY | DRAINING --exit--> BACKOFF | FAILED | STOPPED
        BACKOFF --retry--> STARTING
        READY | BUSY --drain--> DRAINING
"""

from __future__ import annotations

import enum
from collections.abc import Mapping


class IllegalTransition(AssertionError):
    """An event that the table does not allow in that state: a defect in pool, never a user's mistake."""


class _Entry(enum.Enum):
    """What the tables are looked up by, ten times a batch: the hash of Enum itself is written in Python."""

    __hash__ = object.__hash__


class SlotState(_Entry):
    """Who owns a slot, and why."""

    FREE = "free"
    OPEN = "open"
    RUNNING = "running"
    DONE = "done"
    HELD = "held"


class SlotEvent(_Entry):
    """What moves a slot on."""

    OPEN = "open"
    ABANDON = "abandon"  # every row expired, was cancelled, or turned out malformed
    DISPATCH = "dispatch"
    RECALL = "recall"  # its worker has not begun with it, and will not
    FINISH = "finish"
    REAP = "reap"  # its worker is dead and waited for
    HOLD = "hold"  # its batch raised, and its rows are to run again
    RELEASE = "release"


class WorkerState(_Entry):
    """Where a worker is in its life."""

    STARTING = "starting"
    READY = "ready"
    BUSY = "busy"
    DRAINING = "draining"
    BACKOFF = "backoff"
    FAILED = "failed"
    STOPPED = "stopped"


class WorkerEvent(_Entry):
    """What moves a worker on."""

    LOAD = "load"
    DISPATCH = "dispatch"
    FINISH = "finish"
    DRAIN = "drain"
    EXIT = "exit"  # it ended unasked and will be started again after a pause
    GIVE_UP = "give up"  # it ended unasked once too often
    STOP = "stop"  # it ended because it was asked to
    RETRY = "retry"


SLOT: Mapping[tuple[SlotState, SlotEvent], SlotState] = {
    (SlotState.FREE, SlotEvent.OPEN): SlotState.OPEN,
    (SlotState.OPEN, SlotEvent.ABANDON): SlotState.FREE,
    (SlotState.OPEN, SlotEvent.DISPATCH): SlotState.RUNNING,
    (SlotState.RUNNING, SlotEvent.RECALL): SlotState.OPEN,
    (SlotState.RUNNING, SlotEvent.FINISH): SlotState.DONE,
    (SlotState.RUNNING, SlotEvent.REAP): SlotState.HELD,
    (SlotState.DONE, SlotEvent.HOLD): SlotState.HELD,
    (SlotState.DONE, SlotEvent.RELEASE): SlotState.FREE,
    (SlotState.HELD, SlotEvent.DISPATCH): SlotState.RUNNING,
    (SlotState.HELD, SlotEvent.RELEASE): SlotState.FREE,
}

WORKER: Mapping[tuple[WorkerState, WorkerEvent], WorkerState] = {
    (WorkerState.STARTING, WorkerEvent.LOAD): WorkerState.READY,
    (WorkerState.READY, WorkerEvent.DISPATCH): WorkerState.BUSY,
    (WorkerState.BUSY, WorkerEvent.FINISH): WorkerState.READY,
    (WorkerState.READY, WorkerEvent.DRAIN): WorkerState.DRAINING,
    (WorkerState.BUSY, WorkerEvent.DRAIN): WorkerState.DRAINING,
    (WorkerState.STARTING, WorkerEvent.DRAIN): WorkerState.DRAINING,
    (WorkerState.DRAINING, WorkerEvent.FINISH): WorkerState.DRAINING,
    (WorkerState.STARTING, WorkerEvent.EXIT): WorkerState.BACKOFF,
    (WorkerState.READY, WorkerEvent.EXIT): WorkerState.BACKOFF,
    (WorkerState.BUSY, WorkerEvent.EXIT): WorkerState.BACKOFF,
    (WorkerState.STARTING, WorkerEvent.GIVE_UP): WorkerState.FAILED,
    (WorkerState.READY, WorkerEvent.GIVE_UP): WorkerState.FAILED,
    (WorkerState.BUSY, WorkerEvent.GIVE_UP): WorkerState.FAILED,
    (WorkerState.DRAINING, WorkerEvent.STOP): WorkerState.STOPPED,
    (WorkerState.BACKOFF, WorkerEvent.STOP): WorkerState.STOPPED,
    (WorkerState.BACKOFF, WorkerEvent.RETRY): WorkerState.STARTING,
}


def next_slot_state(state: SlotState, event: SlotEvent) -> SlotState:
    """The slot's state after `event`.

    Raises:
        IllegalTransition: the table has no such pair.
    """
    try:
        return SLOT[state, event]
    except KeyError:
        raise IllegalTransition(f"slot is {state.value}; cannot {event.value}") from None


def next_worker_state(state: WorkerState, event: WorkerEvent) -> WorkerState:
    """The worker's state after `event`.

    Raises:
        IllegalTransition: the table has no such pair.
    """
    try:
        return WORKER[state, event]
    except KeyError:
        raise IllegalTransition(f"worker is {state.value}; cannot {event.value}") from None
