"""Declaring a Python function as a model, and how a configuration names one."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pool.errors import ModelLoadError
from pool.python import DECLARATION, model, source_version, split_path
from pool.signature import DTYPES, TensorSpec


def declared(**keys):
    def function():
        raise AssertionError("declaring does not call")

    assert model(**keys)(function) is function
    return getattr(function, DECLARATION)


@given(
    name=st.text(min_size=1),
    dtype=st.sampled_from(DTYPES),
    axes=st.lists(st.none() | st.integers(0, 10**9), max_size=5),
)
def test_a_tensor_is_declared_as_it_is_described(name, dtype, axes):
    spec = TensorSpec(name, dtype, (None, *axes))
    text = spec.describe()
    signature = declared(inputs={name: text}, outputs={name: text})
    assert (signature.inputs, signature.outputs, signature.batched) == ((spec,), (spec,), True)


def test_tensors_keep_their_order_and_one_request_may_be_whole():
    signature = declared(
        inputs={"b": "uint8 [any, any, 3]", "a": "float32 []"}, outputs={"y": "string [2]"}, batched=False
    )
    assert [spec.name for spec in signature.inputs] == ["b", "a"]
    assert [spec.shape for spec in signature.inputs] == [(None, None, 3), ()]
    assert (signature.batched, signature.unbatched_reason) == (False, "it is declared with batched=False")


ROWS = {"x": "float32 [any]"}


@pytest.mark.parametrize(
    ("inputs", "outputs", "message"),
    [
        ({}, ROWS, "inputs: must name at least one tensor, got none"),
        (ROWS, {}, "outputs: must name at least one tensor, got none"),
        ({"x": "float32"}, ROWS, 'inputs.x: must read "DTYPE [AXES]", such as'),
        ({"x": "float32 [any"}, ROWS, "got 'float32 [any'"),
        ({"x": "float [any]"}, ROWS, "inputs.x: must have a dtype of bool, int8, "),
        (ROWS, {"y": "float32 [any, n]"}, "outputs.y: must have axes of numbers or `any`, got"),
        (ROWS, {"y": "float32 [any, 03]"}, "outputs.y: must have axes of numbers or `any`, got"),
        (ROWS, {"y": "float32 [any,]"}, "outputs.y: must have axes of numbers or `any`, got"),
        (ROWS, {"y": "float32 [4]"}, "outputs.y: must begin with the rows, [any, ...], got"),
        (ROWS, {"y": "float32 []"}, "outputs.y: must begin with the rows, [any, ...], got"),
    ],
)
def test_what_is_wrong_with_a_declaration(inputs, outputs, message):
    with pytest.raises(ModelLoadError, match=re.escape(message)):
        model(inputs=inputs, outputs=outputs)


@pytest.mark.parametrize(
    ("path", "want"),
    [
        ("glue.py:crop", ("glue.py", "crop")),
        ("/a b/c:d/glue.py:_crop2", ("/a b/c:d/glue.py", "_crop2")),
        ("glue.py", None),
        ("glue.py:", None),
        ("glue.py:crop.x", None),
        ("glue:crop", None),
        (".py:crop", None),
    ],
)
def test_a_path_names_file_and_function(path, want):
    assert split_path(path) == want


def test_another_file_is_another_version():
    assert source_version(b"x = 1") == source_version(b"x = 1") != source_version(b"x = 2")
