"""Names of devices."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pool.devices import parse_device, ranges


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("cpu:0", ((0,), None)),
        ("cpu:1-3", ((1, 2, 3), None)),
        ("cpu:7,2-3", ((2, 3, 7), None)),
        ("gpu:1", ((), 1)),
    ],
)
def test_devices(text, want):
    assert parse_device(text) == want


@pytest.mark.parametrize(
    "text", ["", "cpu", "cpu:", "cpu:3-1", "cpu:0,0", "cpu:0-99999", "cpu:4096", "gpu:0,1", "tpu:0"]
)
def test_what_is_none(text):
    with pytest.raises(ValueError, match=r"^must "):
        parse_device(text)


@given(st.sets(st.integers(0, 200), min_size=1))
def test_ranges_are_read_back(cores):
    assert parse_device(f"cpu:{ranges(cores)}") == (tuple(sorted(cores)), None)
