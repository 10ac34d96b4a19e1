"""Errors as codes: every exception has one, and survives the way over the wire as itself."""

from __future__ import annotations

import pytest

import pool
from pool import errors
from pool.errors import InternalError, PoolError, error_from_code


def every_error() -> list[type[PoolError]]:
    return [
        each
        for each in vars(errors).values()
        if isinstance(each, type) and issubclass(each, PoolError) and each is not PoolError
    ]


@pytest.mark.parametrize("kind", every_error())
def test_code_stands_for_exactly_one_exception(kind):
    error = error_from_code(kind.code, "a sentence", retry_after_ms=5)
    assert type(error) is kind
    assert error.message == str(error) == "a sentence"
    assert error.retry_after_ms == 5
    assert kind.code == kind.code.upper()


def test_codes_are_those_of_the_exceptions():
    assert {kind.code for kind in every_error()} == errors.CODES
    assert len(every_error()) == len(errors.CODES)


def test_unknown_code_keeps_its_name():
    error = error_from_code("FROM_THE_FUTURE", "no such thing yet")
    assert type(error) is InternalError
    assert str(error) == "FROM_THE_FUTURE: no such thing yet"
    assert error.retry_after_ms is None


def test_too_large_is_an_invalid_input():
    assert issubclass(errors.TooLarge, errors.InvalidInput)
    assert issubclass(errors.ProtocolVersionError, errors.WireError)


def test_every_error_is_a_public_name():
    for kind in (*every_error(), PoolError):
        assert getattr(pool, kind.__name__) is kind
        assert kind.__name__ in pool.__all__
