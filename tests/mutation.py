"""Damaged messages: what a broken or hostile peer may send, made from good ones. Seeded, so repeatable.

`Mutator.next()` gives a message as a list of frames. It takes 2 to 4 µs, since a million are made in a test:
chance is one `random()` per choice, and what is made of it plain slicing.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

Message = list[bytes]

# Bytes at which encodings change their meaning: msgpack's types, signs, the ends of ranges.
_BYTES = bytes.fromhex("00017f80818f90919fa0bfc0c1c2c4c6c7ccced3d9dbdcdddedfe0ff")
# Numbers at which a length, an offset or a count goes wrong.
_NUMBERS = (0, 1, 2, 7, 8, 15, 16, 17, 255, 256, 4096, 4097, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1)
_LONG_NUMBERS = (*_NUMBERS, 2**47, 2**63 - 1, 2**63, 2**64 - 1)


class Mutator:
    """Makes damaged messages of good ones.

    Args:
        good: Messages to start from.
        seed: Another one, other damage.
    """

    def __init__(self, good: Sequence[Message], seed: int) -> None:
        self._good = good
        self._random = random.Random(seed)
        self._chance: Callable[[], float] = self._random.random
        self._ways: tuple[Callable[[bytes], bytes], ...] = (
            self._flip,
            self._flip,
            self._set,
            self._set,
            self._number,
            self._number,
            self._cut,
            self._drop,
            self._repeat,
            self._insert,
            self._splice,
            self._noise,
        )

    def next(self) -> Message:
        """A message with one to three kinds of damage, most with one."""
        chance = self._chance
        good = self._good
        message = good[int(chance() * len(good))].copy()
        while True:
            # The header is the frame with the most structure: half of the damage goes there.
            at = 0 if chance() < 0.5 else int(chance() * len(message))
            if chance() < 0.06:
                self._reorder(message, at)
            else:
                message[at] = self._ways[int(chance() * len(self._ways))](message[at])
            if chance() < 0.7:
                return message

    # -- frames --------------------------------------------------------------------------------------

    def _reorder(self, message: Message, at: int) -> None:
        """Frames missing, doubled, exchanged or from elsewhere."""
        way = self._chance()
        if way < 0.3 and len(message) > 1:
            del message[at]
        elif way < 0.6:
            message.insert(at, message[at])
        elif way < 0.8:
            other = int(self._chance() * len(message))
            message[at], message[other] = message[other], message[at]
        else:
            message.append(self._any_frame())

    def _any_frame(self) -> bytes:
        chance = self._chance
        message = self._good[int(chance() * len(self._good))]
        return message[int(chance() * len(message))]

    # -- bytes of a frame ----------------------------------------------------------------------------

    def _flip(self, frame: bytes) -> bytes:
        at = int(self._chance() * len(frame))
        return (
            frame[:at] + bytes((frame[at] ^ 1 << int(self._chance() * 8),)) + frame[at + 1 :]
            if frame
            else frame
        )

    def _set(self, frame: bytes) -> bytes:
        at = int(self._chance() * len(frame))
        value = int(self._chance() * len(_BYTES))
        return frame[:at] + _BYTES[value : value + 1] + frame[at + 1 :]

    def _number(self, frame: bytes) -> bytes:
        """A field of 2, 4 or 8 bytes, where such a field may be, gets another number."""
        width = (2, 4, 8)[int(self._chance() * 3)]
        at = int(self._chance() * (len(frame) // width + 1)) * width
        numbers = _NUMBERS if width < 8 else _LONG_NUMBERS
        number = numbers[int(self._chance() * len(numbers))] & (1 << 8 * width) - 1
        order = "little" if self._chance() < 0.8 else "big"  # msgpack's are big-endian
        return frame[:at] + number.to_bytes(width, order) + frame[at + width :]

    def _cut(self, frame: bytes) -> bytes:
        return frame[: int(self._chance() * (len(frame) + 1))]

    def _drop(self, frame: bytes) -> bytes:
        at = int(self._chance() * len(frame))
        return frame[:at] + frame[at + 1 + int(self._chance() * 8) :]

    def _repeat(self, frame: bytes) -> bytes:
        start = int(self._chance() * len(frame))
        end = start + 1 + int(self._chance() * 16)
        return frame[:end] + frame[start:end] * int(1 + self._chance() * 3) + frame[end:]

    def _insert(self, frame: bytes) -> bytes:
        at = int(self._chance() * (len(frame) + 1))
        return frame[:at] + self._random.randbytes(1 + int(self._chance() * 8)) + frame[at:]

    def _splice(self, frame: bytes) -> bytes:
        other = self._any_frame()
        return frame[: int(self._chance() * len(frame))] + other[int(self._chance() * len(other)) :]

    def _noise(self, frame: bytes) -> bytes:
        kept = 0 if self._chance() < 0.5 else 24  # whatever the frame is: nothing, or a good fixed header
        return frame[:kept] + self._random.randbytes(int(self._chance() * 64))
