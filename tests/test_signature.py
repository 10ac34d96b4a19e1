"""Dtypes, tensor specs and signatures."""

from __future__ import annotations

import ml_dtypes
import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pool.errors import InvalidInput, SignatureNotFound
from pool.signature import (
    DTYPES,
    ITEM_BYTES,
    Signature,
    TensorSpec,
    choose_signature,
    dtype_name,
    numpy_dtype,
    row_items,
)

X = TensorSpec("x", "float32", (None, 784))


@pytest.mark.parametrize("name", DTYPES)
def test_numpy_dtype_and_back(name):
    dtype = numpy_dtype(name)
    assert dtype_name(dtype) == name
    if name != "string":
        assert dtype.itemsize == ITEM_BYTES[name]


def test_bfloat16_is_that_of_ml_dtypes():
    assert numpy_dtype("bfloat16") == ml_dtypes.bfloat16


def test_unknown_dtype_names_those_there_are():
    with pytest.raises(InvalidInput, match=r"'float8' is not supported; wanted one of bool, int8, .*string"):
        numpy_dtype("float8")


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        ("S5", "string"),
        ("U5", "string"),
        ("O", "string"),
        ("datetime64[s]", None),
        ("V8", None),
        (">f4", "float32"),
        ("longdouble", None),
    ],
)
def test_dtype_name_of_other_numpy_dtypes(dtype, name):
    assert dtype_name(np.dtype(dtype)) == name


@pytest.mark.parametrize(
    ("shape", "text"),
    [((None, 784), "float32 [any, 784]"), ((), "float32 []"), (None, "float32 of any rank")],
)
def test_describe(shape, text):
    assert TensorSpec("x", "float32", shape).describe() == text


@pytest.mark.parametrize(
    ("spec", "shape", "accepted"),
    [
        ((None, 784), (1, 784), True),
        ((None, 784), (0, 784), True),
        ((None, 784), (1, 783), False),
        ((None, 784), (784,), False),
        ((None, 784), (1, 784, 1), False),
        ((), (), True),
        ((), (1,), False),
        (None, (), True),
        (None, (1, 2, 3), True),
    ],
)
def test_accepts_shape(spec, shape, accepted):
    assert TensorSpec("x", "float32", spec).accepts_shape(shape) is accepted


@given(st.lists(st.integers(0, 9), max_size=6))
def test_a_shape_accepts_itself_and_so_does_every_generalisation(shape):
    shape = tuple(shape)
    assert TensorSpec("x", "int8", shape).accepts_shape(shape)
    for axis in range(len(shape)):
        wider = (*shape[:axis], None, *shape[axis + 1 :])
        assert TensorSpec("x", "int8", wider).accepts_shape(shape)
    assert row_items(shape) == np.prod(shape, dtype=int)


def test_input_by_name():
    signature = Signature("s", (X, TensorSpec("y", "int8", (None,))), ())
    assert signature.input("x") is X
    with pytest.raises(InvalidInput, match=r"signature 's' has no input 'z'; wanted 'x', 'y'"):
        signature.input("z")


def named(*names):
    return [Signature(name, (X,), (X,)) for name in names]


def test_default_signature():
    assert choose_signature(named("a", "serving_default"), None).name == "serving_default"
    assert choose_signature(named("only"), None).name == "only"
    assert choose_signature(named("a", "b"), "b").name == "b"


def test_no_default_signature_to_choose():
    with pytest.raises(SignatureNotFound, match="none is the default; wanted one of 'a', 'b'"):
        choose_signature(named("a", "b"), None)
    with pytest.raises(SignatureNotFound, match="no signature 'c'; wanted one of 'a', 'b'"):
        choose_signature(named("a", "b"), "c")
    with pytest.raises(SignatureNotFound, match="none"):
        choose_signature([], None)


def test_signature_survives_its_plain_form():
    signature = Signature(
        "s", (X,), (TensorSpec("y", "string", None),), False, "the first dimension is fixed"
    )
    assert msgspec.convert(msgspec.to_builtins(signature), Signature) == signature
    assert msgspec.to_builtins(X) == {"name": "x", "dtype": "float32", "shape": (None, 784)}
