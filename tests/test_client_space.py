"""Blocks of a region: taken and given back in any order, they never overlap and none is lost."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from pool.client.space import ALIGN_BYTES, Space


class SpaceMachine(RuleBasedStateMachine):
    """Blocks are taken and given back in any order."""

    BLOCKS = 32
    blocks = Bundle("blocks")

    def __init__(self):
        super().__init__()
        self.space = Space(self.BLOCKS * ALIGN_BYTES)
        self.held = {}  # offset to bytes asked for

    @rule(target=blocks, size=st.integers(1, 12 * ALIGN_BYTES))
    def take(self, size):
        offset = self.space.take(size)
        if offset is None:
            count = -(-size // ALIGN_BYTES)
            assert not any(self.is_free(first, count) for first in range(self.BLOCKS - count + 1))
            return -1
        self.held[offset] = size
        return offset

    def is_free(self, first, count):
        used = [(at // ALIGN_BYTES, -(-(at + n) // ALIGN_BYTES)) for at, n in self.held.items()]
        return all(first + count <= start or first >= end for start, end in used)

    @rule(offset=consumes(blocks))
    def give_back(self, offset):
        if offset >= 0:
            self.space.give_back(offset)
            del self.held[offset]

    @invariant()
    def no_two_overlap_and_all_are_inside(self):
        ends = 0
        for offset, size in sorted(self.held.items()):
            assert offset >= ends
            assert offset % ALIGN_BYTES == 0
            ends = offset + size
        assert ends <= self.space.size
        assert self.space.is_empty == (not self.held)

    def teardown(self):
        for offset in self.held:
            self.space.give_back(offset)
        assert self.space.take(self.space.size) == 0, "everything is free again"


TestSpace = SpaceMachine.TestCase
