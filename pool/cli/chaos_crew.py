"""The client processes of `pool chaos`, as the command sees them: started, killed, replaced, added up."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress

import msgspec

from pool.cli.chaos_client import Report, Task
from pool.cli.chaos_tally import Tally
from pool.errors import InternalError, PoolError, error_from_code

# A client connects and learns the signature in tens of milliseconds, on a machine that is not overrun.
START_TIMEOUT_S = 60.0


class Member:
    """One client process.

    Args:
        task: What it is to do.

    Attributes:
        tally: What it reported last.
        reports: How many times it reported.
        failure: The error it ended with, or None.
    """

    def __init__(self, task: Task) -> None:
        self.task = task
        self.tally = Tally()
        self.reports = 0
        self.failure: PoolError | None = None
        self._is_ready = False
        self._is_killed = False
        self._is_finished = False
        self._news = threading.Condition()
        # A session of its own: Ctrl-C is for the command. One thread each for numpy's libraries.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pool.cli.chaos_client"],
            env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        self._say(msgspec.json.encode(task))
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def await_news(self, is_true: Callable[[Member], bool], timeout_s: float) -> bool:
        """Wait until a condition of it holds, or it has ended; whether it holds."""
        with self._news:
            self._news.wait_for(lambda: is_true(self) or not self._reader.is_alive(), timeout_s)
            return is_true(self)

    def await_ready(self) -> None:
        """Wait until it asks.

        Raises:
            PoolError: it cannot.
        """
        if not self.await_news(
            lambda member: member._is_ready or member.failure is not None, START_TIMEOUT_S
        ):
            self.kill()
            raise InternalError(f"a {self.task.kind} client was not ready within {START_TIMEOUT_S:g} s")
        if self.failure is not None:
            raise self.failure

    def finish(self) -> None:
        """Ask no more, and await what is under way."""
        self._say(b"stop")

    def kill(self) -> None:
        """End it now; what it had under way is nobody's any more."""
        self._is_killed = True
        self._process.kill()
        self._reader.join()

    def hold(self) -> None:
        """Stop it (SIGSTOP)."""
        self._process.send_signal(signal.SIGSTOP)

    def release(self) -> None:
        """Let it go on (SIGCONT)."""
        self._process.send_signal(signal.SIGCONT)

    def join(self, timeout_s: float) -> None:
        """Wait until it has ended after `finish`; kill it if it does not."""
        self._reader.join(timeout_s)
        if self._reader.is_alive():
            self.failure = InternalError(f"a {self.task.kind} client did not end")
            self.kill()

    def _say(self, line: bytes) -> None:
        assert self._process.stdin is not None
        # It has ended, and its reader, which tells how, may have closed this end meanwhile.
        with suppress(BrokenPipeError, ValueError):
            self._process.stdin.write(line + b"\n")
            self._process.stdin.flush()

    def _read(self) -> None:
        assert self._process.stdout is not None
        assert self._process.stdin is not None
        with self._process.stdout as lines, self._process.stdin:
            for line in lines:
                self._hear(line)
            code = self._process.wait()
        if not self._is_finished and not self._is_killed and self.failure is None:
            self.failure = InternalError(f"a {self.task.kind} client ended with {code}")
        with self._news:
            self._news.notify_all()

    def _hear(self, line: bytes) -> None:
        try:
            document = msgspec.json.decode(line)
        except msgspec.DecodeError:
            return  # it was killed in the middle of a line
        if "code" in document:
            self.failure = error_from_code(document["code"], document["message"])
        elif "is_ready" in document:
            self._is_ready = True
        else:
            report = msgspec.convert(document, Report)
            self.tally = report.tally
            self.reports += 1
            self._is_finished = report.is_last
        with self._news:
            self._news.notify_all()


class Crew:
    """All client processes; ends them on leaving.

    Args:
        tasks: One for each.

    Raises (on entering): PoolError, the first client's failure.
    """

    def __init__(self, tasks: Sequence[Task]) -> None:
        self._tasks = tasks
        self._past = Tally()  # of those killed
        self._replaced = 0
        self.members: list[Member] = []

    def __enter__(self) -> Crew:
        try:
            for task in self._tasks:
                self.members.append(Member(task))
            for member in self.members:
                member.await_ready()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for member in self.members:
            member.kill()

    def replace(self, place: int) -> Member:
        """Kill a client and start another of its kind; gives the new one.

        Raises:
            PoolError: it did not get ready.
        """
        old = self.members[place]
        old.kill()
        self._replaced += 1
        task = msgspec.structs.replace(old.task, seed=old.task.seed + self._replaced * len(self.members))
        new = Member(task)
        self._past.add(old.tally)
        self.members[place] = new
        new.await_ready()
        return new

    def total(self) -> Tally:
        """The counts of all, those killed included."""
        total = Tally()
        for tally in (self._past, *(member.tally for member in self.members)):
            total.add(tally)
        return total

    def finish(self, timeout_s: float) -> list[str]:
        """Have all settle what is under way, for so long at most.

        Returns:
            What became of those that did not: of each a sentence.
        """
        for member in self.members:
            member.finish()
        for member in self.members:
            member.join(timeout_s)
        failures = [member.failure for member in self.members if member.failure is not None]
        return [f"a client failed: {failure.code}: {failure.message}" for failure in failures]
