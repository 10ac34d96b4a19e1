"""Time lines of requests whose batch a worker took in any turn of the loop."""

from __future__ import annotations

import numpy as np
import pytest

from pool.front.timelines import timeline_of
from tests.rig import Rig, generation, identity


def test_no_stage_is_shorter_than_nothing():
    """Though its turn ended after a worker had taken its batch."""
    with Rig(generation(identity(("x", "float32", (None, 2))))) as rig:
        ticket = rig.place(1, {"x": np.zeros((1, 2), np.float32)})
        rig.now += 0.5
        (slot,) = rig.start()
        ticket.turn.ended = rig.now + 1.0
        rig.now += 2.0
        rig.answer(slot)
        line = timeline_of(ticket, slot)
        assert line.queue_ns == 0
        assert (line.receive_ns, line.run_ns) == pytest.approx((5e8, 2e9), abs=1e3)  # floats of seconds
        rig.batcher.release(slot)
