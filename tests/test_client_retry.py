"""When to try again: properties of the policy, without a clock."""

from __future__ import annotations

import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from pool import errors
from pool.client.retry import Attempts, Retry
from pool.errors import ConfigError, InvalidInput, Overloaded, PoolError, Unavailable, WorkerLost

NOW = 1_000.0

SECONDS = st.floats(0.001, 100)
RANDOM = st.floats(0, 1, exclude_max=True)
ADVICE = st.one_of(st.none(), st.integers(0, 100_000))
FAILURES = st.builds(
    lambda kind, advice: kind("x", retry_after_ms=advice), st.sampled_from([Overloaded, Unavailable]), ADVICE
)


@st.composite
def policies(draw):
    first = draw(SECONDS)
    return Retry(
        attempts=draw(st.integers(1, 20)),
        first_pause=first,
        longest_pause=first * draw(st.floats(1, 1e6)),
        multiplier=draw(st.floats(1, 1e3)),
        worker_lost=draw(st.booleans()),
    )


@given(policies(), FAILURES, st.integers(1, 25), st.floats(-10, 1e4), RANDOM)
def test_a_pause_ends_before_the_deadline_and_not_before_the_server_s_advice(
    retry, error, attempt, left, random
):
    deadline = NOW + left
    pause = retry.pause(error, attempt, NOW, deadline, random)
    advice = (error.retry_after_ms or 0) / 1000
    if pause is None:
        assert attempt >= retry.attempts or left - advice < 1e-6 or random > 1 - 1e-6
    else:
        assert attempt < retry.attempts
        assert NOW + pause < deadline
        assert advice <= pause <= advice + retry.longest_pause


@given(policies(), FAILURES, RANDOM, st.integers(2, 20))
def test_pauses_grow_up_to_the_longest(retry, error, random, attempt):
    assume(attempt < retry.attempts)
    before = retry.pause(error, attempt - 1, NOW, math.inf, random)
    after = retry.pause(error, attempt, NOW, math.inf, random)
    assert before <= after
    advice = (error.retry_after_ms or 0) / 1000
    assert retry.pause(error, 1, NOW, math.inf, random) == pytest.approx(advice + random * retry.first_pause)


def test_pauses_double_and_are_spread():
    retry = Retry(attempts=8, first_pause=0.1, longest_pause=1.0)
    full = Overloaded("x", retry_after_ms=20)
    pauses = [retry.pause(full, attempt, NOW, math.inf, 0.5) for attempt in range(1, 9)]
    assert pauses[:-1] == pytest.approx([0.07, 0.12, 0.22, 0.42, 0.52, 0.52, 0.52])
    assert pauses[-1] is None
    assert retry.pause(full, 1, NOW, math.inf, 0.0) == pytest.approx(0.02)
    # What is left of the time is all that is spread over.
    assert retry.pause(full, 1, NOW, NOW + 0.06, 0.5) == pytest.approx(0.04)
    assert retry.pause(full, 1, NOW, NOW + 0.02, 0.0) is None


def test_a_great_many_attempts_do_not_overflow():
    retry = Retry(attempts=10**6, multiplier=10.0)
    assert retry.pause(Overloaded("x"), 10**6 - 1, NOW, math.inf, 0.5) == retry.longest_pause / 2


@pytest.mark.parametrize(
    "kind", [each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, PoolError)]
)
def test_only_what_may_succeed_later_is_tried_again(kind):
    failure = kind("x", retry_after_ms=5)
    is_tried = Retry().pause(failure, 1, NOW, math.inf, 0.5) is not None
    assert is_tried is kind.retryable is (kind in (Overloaded, Unavailable))
    eager = Retry(worker_lost=True)
    assert (eager.pause(failure, 1, NOW, math.inf, 0.5) is not None) is (kind.retryable or kind is WorkerLost)


@given(policies(), st.lists(FAILURES, min_size=25, max_size=25), st.floats(0.001, 1e4), RANDOM)
def test_a_call_ends_in_time_with_its_last_error(retry, failures, timeout, random):
    attempts = Attempts(retry, NOW, NOW + timeout)
    now = NOW
    last, number = None, 0
    for failure in failures:
        number += 1
        try:
            now += attempts.pause_after(failure, now, random)
        except PoolError as e:
            last = e
            break
        assert now < NOW + timeout
    assert number <= retry.attempts
    assert type(last) is type(failure)
    assert last.retry_after_ms == failure.retry_after_ms
    if number == 1:
        assert last is failure
    else:
        assert last.message.startswith(f"x; gave up after {number} attempts over ")
        assert last.__cause__ is failures[number - 2]


def test_the_story_of_a_call():
    attempts = Attempts(Retry(), NOW, NOW + 60)
    assert attempts.pause_after(Overloaded("full"), NOW + 1, 0.5) == pytest.approx(0.025)
    assert attempts.pause_after(Unavailable("gone"), NOW + 2, 0.5) == pytest.approx(0.05)
    with pytest.raises(InvalidInput) as caught:
        attempts.pause_after(InvalidInput("wrong"), NOW + 2.5, 0.5)
    assert caught.value.message == "wrong; gave up after 3 attempts over 2.5 s"
    assert caught.value.__cause__.message == "gone"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attempts": 0}, "attempts is 0; wanted 1 or more"),
        ({"first_pause": 0.0}, "first_pause is 0 s and longest_pause 2 s; wanted 0 < first_pause"),
        ({"first_pause": 3.0}, "first_pause is 3 s and longest_pause 2 s"),
        ({"longest_pause": math.inf}, "longest_pause inf s"),
        ({"longest_pause": math.nan}, "longest_pause nan s"),
        ({"multiplier": 0.5}, "multiplier is 0.5; wanted 1 or more"),
        ({"multiplier": math.nan}, "multiplier is nan"),
    ],
)
def test_policies_that_are_none(arguments, message):
    with pytest.raises(ConfigError, match=message):
        Retry(**arguments)


def test_a_policy_cannot_be_changed():
    with pytest.raises(AttributeError):
        Retry().attempts = 3
