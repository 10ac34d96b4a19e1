"""When a row will be answered: what is predicted, what is learnt from being wrong."""

import random
from collections import deque
from types import SimpleNamespace

import pytest

from pool.front.batcher import Batcher
from pool.front.forecast import Forecast
from pool.front.slots import Account, Ticket


def batch(forecast, *, run_s, waits=True, late_s=0.0):
    """A batch that comes at 100.0, takes so long, and is done so much later than that."""
    slot = SimpleNamespace(runs=1, dispatched_at=100.0 + late_s)
    forecast.begin(slot, 0, 0 if waits else 1, [], 100.0)
    forecast.learn(slot, 100.0 + late_s + run_s)


def wait_s(forecast):
    return forecast.done_at(0, 0, [], 0.0) + forecast.margin_s


def test_nothing_is_known_before_a_batch_is_done():
    assert wait_s(Forecast()) == 0.0


def test_batches_that_are_on_time_need_no_margin():
    forecast = Forecast()
    for _ in range(10):
        batch(forecast, run_s=2.0)
    assert wait_s(forecast) == pytest.approx(2.0)
    assert forecast.margin_s == pytest.approx(0.0)


def test_batches_that_are_late_alike_are_late_the_next_time():
    forecast = Forecast()
    batch(forecast, run_s=2.0, waits=False)
    for _ in range(100):
        batch(forecast, run_s=2.0, late_s=0.5)
    assert forecast.margin_s == pytest.approx(0.5, abs=0.01)


def test_batches_that_are_early_make_no_negative_margin():
    forecast = Forecast()
    for _ in range(100):
        batch(forecast, run_s=2.0)
        batch(forecast, run_s=2.0, late_s=-0.5)
    assert forecast.margin_s >= 0.0


def test_what_went_at_once_tells_little_of_what_waited():
    forecast = Forecast()
    for _ in range(10):
        batch(forecast, run_s=2.0)
    batch(forecast, run_s=0.5, waits=False)
    assert forecast.done_at(0, 0, [], 0.0) == pytest.approx(2.0, rel=0.02)


def test_one_long_stop_does_not_count_as_such():
    forecast = Forecast()
    for _ in range(10):
        batch(forecast, run_s=2.0)
    batch(forecast, run_s=1000.0)
    assert wait_s(forecast) < 2.0 * 2


def test_slow_times_are_forgotten_though_nothing_waits_any_more():
    forecast = Forecast()
    for _ in range(100):
        batch(forecast, run_s=10.0)
    for _ in range(300):
        batch(forecast, run_s=1.0, waits=False)
    assert wait_s(forecast) < 1.2


def test_what_ran_twice_teaches_nothing():
    forecast = Forecast()
    forecast.learn(SimpleNamespace(runs=2, dispatched_at=0.0), 9.0)
    assert wait_s(forecast) == 0.0


def overload(patience_s, workers, factor, is_given_up=True, seed=1):
    """Ten times what can be done, batches of 64 that take 64 ms and more, by a factor; time in milliseconds.

    Returns:
        Rows answered in time, and too late, in eight seconds.
    """
    chance = random.Random(seed)
    batcher = Batcher(16)
    account = Account()
    running = [deque() for _ in range(workers)]  # when it is done, and with what
    in_time = late = 0
    for worker in range(workers):
        batcher.worker_ready(worker)
    for step in range(10_000):
        now = step / 1e3
        for worker, batches in enumerate(running):
            if batches and batches[0][0] <= now:
                _, slot = batches.popleft()
                if step > 2_000:
                    answered = sum(ticket.deadline >= now for ticket in slot.tickets)
                    in_time += answered
                    late += len(slot.tickets) - answered
                batcher.finish(slot, now)
                batcher.release(slot)
                batcher.worker_ready(worker)
        for _ in range(10 * workers):
            batcher.expect(now)
            slot = batcher.open_slot(4, 64) if batcher.expected_s <= patience_s else None
            if slot is not None:
                ticket = Ticket(None, None, 0, None, 1, now + patience_s, now, 4, account)
                batcher.commit(slot, ticket, now)
        if is_given_up:
            batcher.give_up(now)
        for slot, worker in batcher.dispatch(now):
            took_s = (0.032 + len(slot.tickets) * 0.0005) * factor(chance)
            began = running[worker][-1][0] if running[worker] else now
            running[worker].append((began + took_s, slot))
    return in_time, late


def possible(workers):
    """Rows of full batches one after the other in eight seconds."""
    return workers * 8.0 * 64 / 0.0645


@pytest.mark.parametrize("patience_s", [0.16, 0.25, 0.4])
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_under_overload_few_of_those_admitted_are_late_and_workers_stay_busy(patience_s, workers):
    in_time, late = overload(patience_s, workers, lambda chance: chance.uniform(0.875, 1.125))
    assert late < 0.02 * in_time
    assert in_time > 0.95 * possible(workers)


def test_where_some_batches_take_twice_as_long_to_give_up_what_would_be_late_saves_others():
    def factor(chance):
        return chance.uniform(0.95, 1.05) * (2 if chance.random() < 0.05 else 1)

    seeds = range(3)
    with_, without = (
        [sum(figures) for figures in zip(*(overload(0.3, 1, factor, how, n) for n in seeds), strict=True)]
        for how in (True, False)
    )
    assert with_[0] > 1.02 * without[0]
    assert with_[1] < 0.7 * without[1]
