from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pool.sample import ALIGNMENT_BYTES, Recipe, recipes, sample_inputs
from pool.signature import DTYPES, Signature, TensorSpec, numpy_dtype

shapes = st.none() | st.lists(st.none() | st.integers(0, 5), max_size=4).map(tuple)
specs = st.builds(
    TensorSpec, name=st.text("abcdef", min_size=1, max_size=4), dtype=st.sampled_from(DTYPES), shape=shapes
)
signatures = st.lists(specs, min_size=1, max_size=4, unique_by=lambda spec: spec.name).map(
    lambda inputs: Signature("s", tuple(inputs), ())
)
some_recipes = st.builds(
    Recipe, axis=st.integers(1, 5), rank=st.integers(1, 4), text=st.none() | st.binary(max_size=4)
)


def signature(*inputs: TensorSpec) -> Signature:
    return Signature("s", inputs, ())


@given(signatures, st.integers(0, 5), st.integers(0, 99), some_recipes)
def test_samples_fit_their_signature(signature, rows, seed, recipe):
    sample = sample_inputs(signature, rows, seed, recipe)
    assert list(sample) == [spec.name for spec in signature.inputs]
    for spec in signature.inputs:
        array = sample[spec.name]
        assert spec.accepts_shape(array.shape)
        assert array.dtype == numpy_dtype(spec.dtype)
        assert array.flags.c_contiguous
        if spec.shape is None or spec.shape[:1] == (None,):
            assert len(array) == rows
        if spec.dtype == "string":
            assert all(type(item) is bytes for item in array.flat)
        elif array.size:
            assert array.ctypes.data % ALIGNMENT_BYTES == 0
            magnitudes = np.abs(array.astype(complex))
            assert magnitudes.max() <= 2**0.5
            assert magnitudes.min() >= 0


@given(signatures, st.integers(0, 5), st.integers(0, 99))
def test_the_same_arguments_give_the_same_samples(signature, rows, seed):
    first, second = (sample_inputs(signature, rows, seed) for _ in range(2))
    for name, array in first.items():
        assert array.tolist() == second[name].tolist()


def test_seeds_differ():
    wanted = signature(TensorSpec("x", "float32", (None, 8)))
    assert not np.array_equal(sample_inputs(wanted, 2, 0)["x"], sample_inputs(wanted, 2, 1)["x"])


def test_integers_are_rows_of_any_table():
    wanted = signature(TensorSpec("x", "int64", (None, 100)))
    assert set(sample_inputs(wanted, 3)["x"].flat) == {0, 1}


def test_open_axes_have_one_length():
    wanted = signature(TensorSpec("ids", "int32", (None, None)), TensorSpec("mask", "int32", (None, None)))
    sample = sample_inputs(wanted, 2, recipe=Recipe(axis=7))
    assert sample["ids"].shape == sample["mask"].shape == (2, 7)


def test_words_differ_unless_the_recipe_says_what_to_say():
    wanted = signature(TensorSpec("x", "string", (None,)))
    assert len(set(sample_inputs(wanted, 8)["x"])) > 1
    assert set(sample_inputs(wanted, 8, recipe=Recipe(text=b"a\0"))["x"]) == {b"a\0"}


def test_every_array_can_be_written_to():
    wanted = signature(TensorSpec("x", "bfloat16", (None, 2)))
    array = sample_inputs(wanted, 2)["x"]
    array[...] = 3
    assert array.astype(float).tolist() == [[3, 3], [3, 3]]


@pytest.mark.parametrize(
    ("spec", "want"),
    [
        (TensorSpec("x", "float32", (None, 4)), [Recipe()]),
        (TensorSpec("x", "float32", (None, None)), [Recipe(axis=n) for n in (4, 32, 224, 1)]),
        (TensorSpec("x", "float32", (2,)), [Recipe()]),
    ],
)
def test_only_recipes_that_differ_are_offered(spec, want):
    assert list(recipes(signature(spec))) == want


def test_recipes_stay_within_memory():
    five = signature(TensorSpec("x", "float32", (None,) * 6))
    assert [recipe.axis for recipe in recipes(five)] == [4, 1]


def test_unknown_ranks_and_known_texts_come_first():
    numbers = list(recipes(signature(TensorSpec("x", "float32", None))))
    assert list(dict.fromkeys(recipe.rank for recipe in numbers)) == [2, 1, 4, 3]
    strings = list(recipes(signature(TensorSpec("x", "string", None)), (b"example",)))
    assert strings[0] == Recipe(rank=1, text=b"example")
    assert len(set(strings)) == len(strings)
