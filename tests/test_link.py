"""The socket between the lead and a follower: messages in order, documents of any length, descriptors."""

from __future__ import annotations

import asyncio
import os
import socket

import pytest

from pool.front import link
from pool.front.link import Link


class Ends:
    """Both ends, and what came to the second."""

    def __init__(self):
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.heard = []
        self.closed = asyncio.Event()
        self.came = asyncio.Event()
        self.ours = Link(ours, link.decode_to_lead, lambda *_: None, lambda: None)
        self.theirs = Link(theirs, link.decode_to_follower, self._hear, self.closed.set)

    def _hear(self, message, document, fds):
        self.heard.append((message, document, fds))
        self.came.set()

    async def wait_for(self, count):
        while len(self.heard) < count:
            self.came.clear()
            await asyncio.wait_for(self.came.wait(), 30)

    def close(self):
        self.ours.close()
        self.theirs.close()


def run(scenario):
    async def play():
        ends = Ends()
        try:
            return await scenario(ends)
        finally:
            ends.close()

    return asyncio.run(play())


@pytest.mark.parametrize("size", [0, 1, 16_384, 16_385, 3_000_000])
def test_a_document_of_any_length_comes_with_its_message(size):
    async def scenario(ends):
        document = os.urandom(size)
        ends.ours.send(link.Serve(7), document)
        await ends.wait_for(1)
        assert ends.heard == [(link.Serve(7), document, [])]

    run(scenario)


@pytest.mark.parametrize("size", [10, 100_000])
def test_descriptors_come_along_and_stay_the_senders_too(size):
    async def scenario(ends):
        reading, writing = os.pipe()
        ends.ours.send(link.Begin(1), bytes(size), fds=[writing])
        await ends.wait_for(1)
        ((message, document, (passed,)),) = ends.heard
        assert (message, len(document)) == (link.Begin(1), size)
        os.write(passed, b"a")
        os.write(writing, b"b")
        assert os.read(reading, 2) == b"ab"
        for fd in (reading, writing, passed):
            os.close(fd)

    run(scenario)


def test_what_there_is_no_room_for_waits_in_its_order():
    async def scenario(ends):
        count = 5_000  # far more than a socket's buffer holds
        reading, writing = os.pipe()
        for number in range(count):
            ends.ours.send(link.WorkerLeaving(1, number), fds=[writing] if number % 100 == 0 else [])
        await ends.wait_for(count)
        assert [message.worker for message, _, _ in ends.heard] == list(range(count))
        for _, _, fds in ends.heard:
            for fd in fds:
                os.close(fd)
        os.close(reading)
        os.close(writing)

    run(scenario)


def test_the_end_of_the_other_side_is_told_after_what_it_said():
    async def scenario(ends):
        ends.ours.send(link.Stop())
        ends.ours.close()
        await asyncio.wait_for(ends.closed.wait(), 30)
        assert [message for message, _, _ in ends.heard] == [link.Stop()]
        ends.theirs.send(link.Drained(True))  # to nobody

    run(scenario)
