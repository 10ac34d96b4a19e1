"""The worker's loop where several fronts share it (`[server] fronts`). A fork of the zygote.

Each front has a doorbell, an arena and a Runner of its own; the model is one. In each round every front that
has something to say is heard once, so that none waits for more than one batch of each other. A front that
ended is forgotten, with all that was bound to its memory; when the lead's doorbell closes, the worker leaves.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import TYPE_CHECKING

from pool.shm import doorbell, joining
from pool.shm.arena import Arena
from pool.shm.doorbell import Message, Ring
from pool.shm.loans import Borrowed

if TYPE_CHECKING:
    from pool.worker.runner import Runner

MakeRunner = Callable[[Arena, Borrowed], "Runner"]


class _Front:
    """A front that the worker serves.

    Args:
        sock: The worker's end of its doorbell, blocking.
        runner: On its arena.
    """

    def __init__(self, sock: socket.socket, runner: Runner) -> None:
        self.sock = sock
        self.runner = runner

    def serve_one(self, message: Message) -> bool:
        """Do what a message says; False if the front is gone."""
        if message.kind == Ring.GIVE_BACK:
            self.runner.give_back(message.generation)
            return True
        answer = self.runner.run(message)
        try:
            doorbell.ring(self.sock, answer)
        except OSError:
            return False
        return True

    def close(self) -> None:
        """Unmap what was its own."""
        self.sock.close()
        self.runner.close()


def serve_fronts(
    lead: socket.socket, runner: Runner, joins: socket.socket, make_runner: MakeRunner, awake_s: float
) -> int:
    """Run batches until the lead closes its doorbell, or lets the worker go.

    Args:
        lead: The worker's end of its doorbell.
        runner: On its arena.
        joins: Where other fronts join.
        make_runner: Of another front.
        awake_s: Longest the worker stays awake for the next batch.

    Returns:
        The process's exit code.
    """
    fronts = {lead.fileno(): _Front(lead, runner)}
    ears = doorbell.Vigil(awake_s)
    ears.listen(lead.fileno())
    ears.listen(joins.fileno())

    def forget(fd: int) -> None:
        ears.forget(fd)
        fronts.pop(fd).close()

    while True:
        for fd in ears.wait():
            if fd == joins.fileno():
                joined = joining.receive(joins)
                if joined is None:
                    ears.forget(fd)  # and the lead's doorbell says the same
                else:
                    front = _welcome(joined, make_runner)
                    fronts[front.sock.fileno()] = front
                    ears.listen(front.sock.fileno())
                continue
            front = fronts[fd]
            try:
                message = doorbell.answer_at_once(front.sock)
            except BlockingIOError:
                continue  # its front took it back meanwhile
            is_told_to_leave = message is not None and message.kind == Ring.DRAIN
            if message is not None and not is_told_to_leave and front.serve_one(message):
                continue
            if front.sock is not lead:
                forget(fd)
                continue
            for other in [each for each in fronts if each != fd]:
                if is_told_to_leave:
                    _finish(fronts[other])
                forget(other)
            return 0


def _welcome(joined: joining.Joined, make_runner: MakeRunner) -> _Front:
    sock = socket.socket(fileno=joined.doorbell_fd)
    sock.setblocking(True)
    arena = Arena.attach(joined.arena_fd, joined.slots, joined.slot_bytes)
    return _Front(sock, make_runner(arena, Borrowed(socket.socket(fileno=joined.loans_fd))))


def _finish(front: _Front) -> None:
    """Run what a front has given already; what it gives later nobody begins, which it sees."""
    is_there = True
    while is_there:
        try:
            message = doorbell.answer_at_once(front.sock)
        except BlockingIOError:
            return
        is_there = message is not None and front.serve_one(message)
