"""What `pool chaos` does to a server and to its own clients, and how long each took to get over it.

One fault at a time: it is done, and then the server is watched until it is whole again. Which faults, on whom
and how long they last, is settled beforehand by the seed (`plans`, which is pure); what they meet is not.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import msgspec
import numpy as np
import psutil

from pool.backends.drill import Fault, answer
from pool.cli.chaos_crew import Crew
from pool.cli.chaos_tally import Tally
from pool.client.sync import Client
from pool.errors import ModelError, PoolError, WorkerLost

# Rows that are at fault, and do not just cost time or memory: the request must get an error.
POISONS = {
    "raise": Fault.RAISE,
    "exit": Fault.EXIT,
    "segfault": Fault.SEGFAULT,
    "abort": Fault.ABORT,
    "hang": Fault.HANG,
    "hang-native": Fault.HANG_NATIVE,
}
KINDS = {
    "kill": "a worker gets SIGKILL",
    "stop": "a worker gets SIGSTOP, and SIGCONT after a while",
    "freeze": "a worker gets SIGSTOP for good: the server must notice by `timeout_ms`",
    "raise": "a row makes the model raise",
    "exit": "a row makes its worker exit",
    "segfault": "a row makes its worker read address 0",
    "abort": "a row makes its worker abort",
    "hang": "a row never ends, in Python",
    "hang-native": "a row never ends, in native code that holds the interpreter's lock",
    "leak": "a row makes its worker keep memory",
    "zygote-kill": "the zygote gets SIGKILL",
    "zygote-stop": "the zygote gets SIGSTOP, a worker SIGKILL, the zygote SIGCONT after a while",
    "client-kill": "a client process of this command gets SIGKILL; another takes its place",
    "client-stop": "a client process of this command gets SIGSTOP, and SIGCONT after a while",
}

BACKEND = "drill"
LEAK_MIB = 32.0
# A process that is stopped is continued after a time between these, in seconds.
HOLD_LEAST_S, HOLD_MOST_S = 0.1, 2.0
ROWS_MOST = 8  # of a request with a row at fault
# The status costs the front a look at each process's memory map, about a millisecond each.
LOOK_S = 0.02


class Plan(msgspec.Struct, frozen=True):
    """One fault to come.

    Attributes:
        kind: One of `KINDS`.
        pause_s: How long to wait before it.
        victim: Which of the processes that may be hit, as a share: 0 the first, to 1 the last.
        hold_s: How long what is stopped stays so.
        rows: Rows of the request that carries it, if one does.
        row: Which of them it is.
        seed: Of the other contents of that request.
    """

    kind: str
    pause_s: float
    victim: float
    hold_s: float
    rows: int
    row: int
    seed: int


def plans(kinds: Sequence[str], interval_s: float, seed: int) -> Iterator[Plan]:
    """Faults without end, the same for the same arguments: each kind once, in any order, then again."""
    chance = random.Random(seed)
    while True:
        for kind in chance.sample(list(kinds), len(kinds)):
            rows = chance.randint(1, ROWS_MOST)
            yield Plan(
                kind=kind,
                pause_s=chance.uniform(0.5, 1.5) * interval_s,
                victim=chance.random(),
                hold_s=chance.uniform(HOLD_LEAST_S, HOLD_MOST_S),
                rows=rows,
                row=chance.randrange(rows),
                seed=chance.getrandbits(32),
            )


class Target(msgspec.Struct, frozen=True):
    """The model that is drilled.

    Attributes:
        model: Its name.
        version: Of it; answers depend on it.
        row_items: Floats in a row.
        workers: How many of them a whole server has at work.
    """

    model: str
    version: int
    row_items: int
    workers: int


def is_whole(status: dict[str, Any], target: Target, gone: Sequence[int] = ()) -> bool:
    """Whether a status document shows all workers at work, a zygote, and none of the processes `gone`."""
    workers = status["models"][target.model].get("workers", ())
    zygotes = [zygote["pid"] for zygote in status["zygotes"] if zygote["backend"] == BACKEND]
    at_work = [worker for worker in workers if worker["state"] in ("ready", "busy")]
    pids = {*zygotes, *(worker["pid"] for worker in workers)}
    return len(at_work) >= target.workers and bool(zygotes) and pids.isdisjoint(gone)


class Injector:
    """Does what plans say.

    Args:
        client: Of the server.
        target: Of its models.
        crew: The client processes.
        patience_s: A request without a reply for so long is lost; a server not whole for so long is broken.

    Attributes:
        tally: Of the requests sent here, all of which are at fault or cost memory.
        recoveries_s: Of each kind, how long each fault took to get over; None for one that was not.
    """

    def __init__(self, client: Client, target: Target, crew: Crew, patience_s: float) -> None:
        self._client = client
        self._target = target
        self._crew = crew
        self._patience_s = patience_s
        self._held: list[psutil.Process] = []
        self.tally = Tally()
        self.recoveries_s: dict[str, list[float | None]] = {}

    def inject(self, plan: Plan) -> None:
        """Do it, and watch until all is well again."""
        took_s: float | None
        try:
            took_s = self._play(plan)
        except psutil.NoSuchProcess:
            return  # the victim was gone before it was hit
        except PoolError:
            took_s = self._await_whole(time.monotonic())  # the server does not tell what it is doing
        self.recoveries_s.setdefault(plan.kind, []).append(took_s)

    def release(self) -> None:
        """Let go of whatever is still stopped."""
        for process in self._held:
            with suppress(psutil.NoSuchProcess):
                process.resume()
        self._held.clear()
        for member in self._crew.members:
            member.release()

    def _play(self, plan: Plan) -> float | None:
        match plan.kind:
            case "kill":
                victim = self._worker(plan)
                began = time.monotonic()
                victim.kill()
                return self._await_whole(began, victim.pid)
            case "stop":
                self._hold(self._worker(plan), plan.hold_s)
                return self._await_whole(time.monotonic())
            case "freeze":
                victim = self._worker(plan)
                began = time.monotonic()
                self._held.append(victim)
                victim.suspend()
                took_s = self._await_whole(began, victim.pid)
                if took_s is not None:
                    self._held.remove(victim)
                return took_s
            case "zygote-kill":
                victim = self._zygote()
                began = time.monotonic()
                victim.kill()
                return self._await_whole(began, victim.pid)
            case "zygote-stop":
                victim = self._worker(plan)
                self._hold(self._zygote(), plan.hold_s, victim.kill)
                return self._await_whole(time.monotonic(), victim.pid)
            case "client-kill":
                began = time.monotonic()
                member = self._crew.replace(int(plan.victim * len(self._crew.members)))
                is_served = member.await_news(lambda each: each.tally.answered > 0, self._patience_s)
                return time.monotonic() - began if is_served else None
            case "client-stop":
                member = self._crew.members[int(plan.victim * len(self._crew.members))]
                member.hold()
                threading.Event().wait(plan.hold_s)
                began = time.monotonic()
                reports = member.reports
                member.release()
                # Its next report may tell of answers from before; one after that does not.
                member.await_news(lambda each: each.reports > reports, self._patience_s)
                answered = member.tally.answered
                is_served = member.await_news(lambda each: each.tally.answered > answered, self._patience_s)
                return time.monotonic() - began if is_served else None
            case _:
                began = time.monotonic()
                self._ask(plan)
                return self._await_whole(began)

    # -- processes -----------------------------------------------------------------------------------

    def _worker(self, plan: Plan) -> psutil.Process:
        workers = self._client.status()["models"][self._target.model]["workers"]
        pids = [worker["pid"] for worker in workers if worker["pid"] is not None]
        if not pids:
            raise psutil.NoSuchProcess(0)
        return psutil.Process(pids[int(plan.victim * len(pids))])

    def _zygote(self) -> psutil.Process:
        zygotes = self._client.status()["zygotes"]
        pids = [zygote["pid"] for zygote in zygotes if zygote["backend"] == BACKEND]
        if not pids:
            raise psutil.NoSuchProcess(0)
        return psutil.Process(pids[0])

    def _hold(
        self, victim: psutil.Process, hold_s: float, meanwhile: Callable[[], None] = lambda: None
    ) -> None:
        """Stop a process for so long; it may be gone by then."""
        self._held.append(victim)
        victim.suspend()
        meanwhile()
        threading.Event().wait(hold_s)
        self._held.remove(victim)
        with suppress(psutil.NoSuchProcess):
            victim.resume()

    def _await_whole(self, began: float, *gone: int) -> float | None:
        """Seconds from `began` until the server is whole; None if it is not in time."""
        deadline = time.monotonic() + self._patience_s
        while time.monotonic() < deadline:
            with suppress(PoolError):
                status = self._client.status(timeout=self._patience_s)
                if is_whole(status, self._target, gone):
                    return time.monotonic() - began
            threading.Event().wait(LOOK_S)
        return None

    # -- requests ------------------------------------------------------------------------------------

    def _ask(self, plan: Plan) -> None:
        """Send a request with one row at fault, and count what became of it."""
        generator = np.random.default_rng(plan.seed)
        x = generator.random((plan.rows, self._target.row_items), np.float32)
        faults = np.zeros(plan.rows, np.int32)
        faults[plan.row] = POISONS.get(plan.kind, Fault.LEAK)
        arguments = np.full(plan.rows, LEAK_MIB if plan.kind == "leak" else 1.0, np.float32)
        outcome: list[dict[str, Any] | PoolError] = []

        def ask() -> None:
            try:
                inputs = {"x": x, "fault": faults, "argument": arguments}
                outcome.append(self._client.predict(self._target.model, inputs, timeout=float("inf")))
            except PoolError as e:
                outcome.append(e)

        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(self._patience_s)
        if not outcome:
            self.tally.lose(f"lost: no reply within {self._patience_s:g} s ({plan.kind})")
        elif isinstance(outcome[0], PoolError):
            self.tally.fail(outcome[0], is_innocent=plan.kind == "leak")
        elif plan.kind != "leak":
            wanted = f"{ModelError.code} or {WorkerLost.code}"
            self.tally.answer(f"wrong: an answer to a row that is to {plan.kind}; wanted {wanted}")
        else:
            is_right = np.array_equal(outcome[0]["y"], answer(x, self._target.version))
            self.tally.answer("" if is_right else "wrong: the answer to a row that leaks")
