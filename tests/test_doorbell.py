"""The doorbell over real socket pairs."""

from __future__ import annotations

import contextlib
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pool.shm.doorbell import TEXT_MAX_BYTES, Message, Ring, Waiter, answer, make_pair, ring, take_back

U16 = st.integers(0, 0xFFFF)
U32 = st.integers(0, 0xFFFF_FFFF)


@contextlib.contextmanager
def pair():
    front, worker = make_pair()
    with front, worker:
        yield front, worker


@given(U16, U16, U32, U32, U32, st.text(max_size=200))
def test_a_message_arrives_as_it_was_sent_either_way(kind, slot, rows, generation, layout, text):
    message = Message(kind, slot, rows, generation, layout, text.encode("utf-8", "replace").decode())
    with pair() as (front, worker):
        ring(front, message)
        assert answer(worker) == message
        ring(worker, message)
        assert answer(front) == message


def test_a_message_without_text_is_16_bytes_little_endian():
    with pair() as (front, worker):
        ring(front, Message(Ring.RUN, slot=0x0102, rows=3, generation=0x01020304, layout=5))
        assert worker.recv(100) == bytes.fromhex("0100 0201 03000000 04030201 05000000")


def test_messages_keep_their_bounds_and_their_order():
    with pair() as (front, worker):
        for i in range(50):
            ring(worker, Message(Ring.DONE, slot=i, text="x" * i))
        got = [answer(front) for _ in range(50)]
    assert [(message.slot, len(message.text)) for message in got] == [(i, i) for i in range(50)]


@pytest.mark.parametrize("character", ["x", "é", "€", "😀"])
def test_a_long_text_is_cut_to_the_limit(character):
    with pair() as (front, worker):
        ring(worker, Message(Ring.MODEL_ERROR, text=character * TEXT_MAX_BYTES))
        text = answer(front).text
    kept = TEXT_MAX_BYTES // len(character.encode())
    # A character cut in half is replaced by one that says so.
    assert text.rstrip("\N{REPLACEMENT CHARACTER}") == character * kept


def test_a_lone_surrogate_in_a_models_message_does_not_stop_it():
    with pair() as (front, worker):
        ring(worker, Message(Ring.MODEL_ERROR, text="bad \ud800 text"))
        assert answer(front).text == "bad ? text"


def test_nothing_there_is_an_error_at_the_fronts_end_only_because_it_does_not_block():
    with pair() as (front, worker):
        assert worker.getblocking()
        with pytest.raises(BlockingIOError):
            answer(front)


def test_a_closed_end_reads_as_none_after_what_was_sent():
    with pair() as (front, worker):
        ring(worker, Message(Ring.DONE, slot=7))
        worker.close()
        assert answer(front) == Message(Ring.DONE, slot=7)
        assert answer(front) is None
        assert answer(front) is None
        with pytest.raises(OSError, match="Broken pipe"):
            ring(front, Message(Ring.RUN))


def test_an_end_closed_with_messages_unread_reads_as_none():
    with pair() as (front, worker):
        ring(front, Message(Ring.RUN))
        worker.close()
        assert answer(front) is None  # the kernel says ECONNRESET first


@pytest.mark.parametrize("awake_s", [0.0, 0.05])
def test_a_worker_that_waits_is_rung_awake_or_asleep(awake_s):
    with pair() as (front, worker):
        waiter = Waiter(worker, awake_s)
        ring(front, Message(Ring.RUN, slot=1))
        assert waiter.next() == Message(Ring.RUN, slot=1)
        # Nothing comes while it is awake: it falls asleep, and is woken.
        sleeper = threading.Thread(target=lambda: heard.append(waiter.next()))
        heard = []
        sleeper.start()
        while "S" not in thread_state(sleeper):
            pass
        ring(front, Message(Ring.RUN, slot=2))
        sleeper.join()
        assert heard == [Message(Ring.RUN, slot=2)]
        front.close()
        assert waiter.next() is None


def thread_state(thread):
    with open(f"/proc/self/task/{thread.native_id}/stat") as f:
        return f.read().rpartition(")")[2].split()[0]


def test_a_packet_that_is_no_message_reads_as_the_end():
    with pair() as (front, worker):
        worker.send(b"short")
        assert answer(front) is None


def test_what_the_worker_has_not_read_is_taken_back_once():
    with pair() as (front, worker):
        first, second = Message(Ring.RUN, slot=1), Message(Ring.RUN, slot=2)
        ring(front, first)
        ring(front, second)
        assert answer(worker) == first
        ring(front, Message(Ring.DRAIN))
        assert take_back(worker) == [second, Message(Ring.DRAIN)]
        assert take_back(worker) == []
