"""What of the workers' supervision is arithmetic; their lives and deaths are in `test_faults`."""

from __future__ import annotations

import mmap
import os

import numpy as np
import pytest

from pool.config import ModelConfig
from pool.front.workers import backoff_s, private_bytes, warm_up_rows
from pool.signature import Signature

BATCHED = Signature("s", (), ())
WHOLE = Signature("s", (), (), batched=False, unbatched_reason="it is not")


@pytest.mark.parametrize(
    ("failures", "most"), [(0, 0.0), (1, 0.0), (2, 0.1), (3, 0.2), (4, 0.4), (8, 6.4), (9, 10.0), (100, 10.0)]
)
def test_the_pause_before_a_restart_doubles_up_to_a_limit(failures, most):
    assert backoff_s(failures, 1.0) == pytest.approx(most)
    assert backoff_s(failures, 0.0) == pytest.approx(most / 2)


@pytest.mark.parametrize(
    ("signature", "keys", "rows"),
    [
        (BATCHED, {}, (1, 64)),
        (BATCHED, {"max_batch_size": 1}, (1,)),
        (BATCHED, {"allowed_batch_sizes": (4, 64)}, (4, 64)),
        (BATCHED, {"warm_up": False}, (1,)),
        (BATCHED, {"warm_up": False, "allowed_batch_sizes": (4, 64)}, (4,)),
        (WHOLE, {"allowed_batch_sizes": (4, 64)}, (1,)),
    ],
)
def test_each_size_that_will_be_seen_most_runs_once_before_the_first_user(signature, keys, rows):
    assert warm_up_rows(signature, ModelConfig(path="/m", **keys)) == rows


def test_private_memory_is_what_a_process_has_to_itself():
    before = private_bytes(os.getpid())
    with mmap.mmap(-1, 20 << 20, mmap.MAP_PRIVATE) as grown:  # not memory that was freed and kept
        np.frombuffer(grown, np.uint8)[:] = 1
        assert private_bytes(os.getpid()) - before > len(grown) // 2
    assert private_bytes(1 << 30) == 0
