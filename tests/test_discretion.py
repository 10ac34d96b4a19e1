"""What of the server's files and memory an error tells a client: nothing."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pool import wire
from pool.errors import CODES, InternalError, ModelError, WorkerLost
from pool.front.discretion import discreet
from pool.front.outbound import Refusal


@pytest.mark.parametrize(
    ("sentence", "told"),
    [
        ('File "/srv/models/m/7/model.py", line 3, in f', 'File "…/model.py", line 3, in f'),
        ("/srv/models/m: no saved_model.pb", "…/m: no saved_model.pb"),
        ("cannot open '/dev/shm/pool-1' (in /dev/shm/)", "cannot open '…/pool-1' (in …/)"),
        ("mapped file:///a/b.c at 0x7f0123456789", "mapped …/b.c at 0x…"),
        ("<object at 0x55d0c0ffee00>", "<object at 0x…>"),
        ("memfd:pool-arena (deleted)", "memfd:… (deleted)"),
        ("/proc/self/fd/12", "…/12"),
        ("2 / 3 rows and/or 1/2 of x/y", "2 / 3 rows and/or 1/2 of x/y"),
        ("{{node model/dense/MatMul}} In[0]: [1,2]", "{{node model/dense/MatMul}} In[0]: [1,2]"),
        ("0x1f is a flag", "0x1f is a flag"),
        ("no answer within timeout_ms = 500", "no answer within timeout_ms = 500"),
    ],
)
def test_directories_addresses_and_names_of_memory_are_taken_out(sentence, told):
    assert discreet("MODEL_ERROR", sentence) == told


@pytest.mark.parametrize("code", sorted(CODES))
def test_sentences_about_the_request_are_left_as_they_are(code):
    sentence = "no input '/conv/weight'"
    has_foreign_words = code in {"INTERNAL", "MODEL_ERROR", "MODEL_LOAD", "UNAVAILABLE", "WORKER_LOST"}
    assert (discreet(code, sentence) != sentence) == has_foreign_words


NAME = st.text(
    st.characters(categories=("L", "N"), include_characters="._-+@ "), min_size=1, max_size=8
).filter(lambda name: " " not in name)


@given(st.lists(NAME, min_size=2, max_size=5), st.text(" '\"(:,", max_size=2), st.text(max_size=20))
def test_no_directory_is_left(names, before, after):
    path = "/" + "/".join(names)
    told = discreet("INTERNAL", f"x{before or ' '}{path} {after}")
    assert path not in told
    assert f"/{names[0]}/" not in told


def test_an_error_on_the_wire_is_discreet():
    for error in (
        ModelError("boom in /srv/secret/model.py"),
        WorkerLost("killed: /srv/secret/x"),
        InternalError("OSError: /srv/secret/arena at 0x7f0123456789"),
    ):
        meta = wire.decode_meta(wire.ErrorMeta, Refusal(error, None).meta)
        assert meta.code == error.code
        assert not re.search(r"srv|secret/|0x7f", meta.message)
    long = wire.decode_meta(wire.ErrorMeta, Refusal(ModelError("/a/b " * 100_000), None).meta).message
    assert len(long) <= wire.MAX_MESSAGE_CHARS
    assert "/a/" not in long
