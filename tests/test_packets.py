"""Messages on a line: whatever is sent comes out again, and nothing else is taken for a message."""

from __future__ import annotations

import random
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pool import packets, wire
from pool.errors import WireError
from tests.mutation import Mutator
from tests.test_wire import documented_messages

DAMAGED = 40_000

payloads = st.lists(st.binary(max_size=200), min_size=1, max_size=8)


def packed(frames):
    return packets.make_table(frames) + b"".join(frames)


def split(packet):
    return [bytes(frame) for frame in packets.split(memoryview(packet))]


@given(payloads, st.integers(0, 300))
def test_frames_come_out_as_they_went_in(frames, cut):
    packet = packed(frames)
    assert split(packet) == frames
    table = len(packets.make_table(frames))
    first = memoryview(packet)[: table + cut]  # the packet that begins a message of several
    assert packets.message_bytes(first) == len(packet)


@pytest.mark.parametrize("count", [1, 2, 257, 2 + wire.MAX_TENSORS])
def test_as_many_frames_as_a_message_may_have(count):
    frames = [bytes([i % 256]) * (i % 5) for i in range(count)]
    assert len(packets.make_table(frames)) <= packets.TABLE_MAX_BYTES
    assert split(packed(frames)) == frames


@pytest.mark.parametrize("count", [0, 3 + wire.MAX_TENSORS, 1 << 32, (1 << 64) - 1])
def test_no_other_number_of_frames_is_taken(count):
    few = min(count, 300)
    packet = struct.pack(f"<{2 + few}Q", 8 * (2 + few), count, *[0] * few)
    for take in (split, lambda data: packets.message_bytes(memoryview(data))):
        with pytest.raises(WireError, match=f"a message of {count} frames; wanted 1 to 258"):
            take(packet)


def test_frames_are_where_the_packet_is():
    packet = bytearray(packed([b"header", b"", b"tensor"]))
    *_, tensor = packets.split(memoryview(packet))
    packet[-1] = ord("s")
    assert tensor == b"tensos"


def test_what_has_lengths_is_a_frame():
    frames = [b"header", bytearray(b"ab"), memoryview(b"cde")]
    assert packets.make_table(frames) == packets.make_table([bytes(frame) for frame in frames])


@given(payloads, st.data())
def test_a_packet_cut_or_extended_is_no_whole_message(frames, data):
    packet = packed(frames)
    cut = packet[: data.draw(st.integers(0, len(packet) - 1))]
    for wrong in (cut, packet + data.draw(st.binary(min_size=1, max_size=50))):
        with pytest.raises(WireError):
            packets.split(memoryview(wrong))


@given(payloads, st.data())
def test_of_a_table_cut_short_nothing_is_known(frames, data):
    packet = packed(frames)
    table = len(packets.make_table(frames))
    with pytest.raises(WireError, match="table"):
        packets.message_bytes(memoryview(packet[: data.draw(st.integers(0, table - 1))]))


@given(payloads, st.data())
def test_a_table_must_add_up(frames, data):
    packet = bytearray(packed(frames))
    at = data.draw(st.sampled_from([0, *range(2, 2 + len(frames))])) * 8
    (number,) = struct.unpack_from("<Q", packet, at)
    other = data.draw(st.integers(0, (1 << 64) - 1).filter(lambda drawn: drawn != number))
    struct.pack_into("<Q", packet, at, other)
    for take in (packets.split, packets.message_bytes):
        with pytest.raises(WireError, match="its frames have others"):
            take(memoryview(packet))


@given(st.binary(max_size=400))
def test_noise_is_no_message(noise):
    try:
        frames = split(noise)
    except WireError:
        return
    assert packed(frames) == noise, "what is taken is a message, made in one way only"


@pytest.mark.parametrize("seed", [1, 2])
def test_damaged_packets_are_messages_or_wire_errors(seed):
    good = [[packed(frames)] for frames in documented_messages().values()]
    mutator, rng = Mutator(good, seed), random.Random(seed)
    taken = 0
    for _ in range(DAMAGED // 2):
        packet = mutator.next()[0] if rng.random() < 0.7 else _other_number(rng, rng.choice(good)[0])
        try:
            frames = split(packet)
        except WireError:
            continue
        assert packed(frames) == packet
        taken += 1
    assert 0.05 < taken / (DAMAGED // 2) < 0.95, "the damage is too little, or too much, to find anything"


def _other_number(rng, packet):
    """A packet with another number somewhere in its table."""
    at = 8 * rng.randrange(len(packet) // 8)
    number = rng.choice([0, 1, 2, 24, 25, 257, 258, 259, len(packet), 2**31, 2**63, 2**64 - 1])
    return packet[:at] + number.to_bytes(8, "little") + packet[at + 8 :]
