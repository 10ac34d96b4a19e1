"""Rates between two status documents."""

from __future__ import annotations

import copy

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pool.cli.rates import STAGES, compare, quantile

BOUNDS = [0.001, 0.002, 0.005]


def process(pid, cpu_s=1.0):
    return {"pid": pid, "cpu_s": cpu_s, "uss_bytes": 1000, "pss_bytes": 2000}


def worker(index, busy_s, batches, pid=50, **more):
    return process(pid) | {
        "index": index, "state": "ready", "busy_s": busy_s, "batches": batches, "rows": 8 * batches,
        "restarts": 2,
    } | more  # fmt: skip


def document(uptime_s=10.0, answers=None, counts=(0, 0, 0, 0), batches=0, workers=(), **more):
    model = {
        "state": "ready", "failure": "", "batches": batches, "rows": 32 * batches, "max_batch_size": 64,
        "answers": answers or {}, "closed": {"full": batches // 2, "idle_worker": batches - batches // 2},
        "stages": {stage: {"counts": list(counts), "sum_s": 0.0} for stage in STAGES},
        "queue_rows": 7, "quarantine": None, "workers": list(workers),
    }  # fmt: skip
    front = process(1, cpu_s=uptime_s / 4) | {
        "uptime_s": uptime_s, "clients": 3, "errors": {"OVERLOADED": (answers or {}).get("OVERLOADED", 0)},
        "last_errors": [],
    }  # fmt: skip
    return {"front": front, "zygotes": [process(2)], "stage_bounds_s": BOUNDS, "models": {"m": model}} | more


def test_what_came_in_between():
    before = document(10.0, {"OK": 100, "OVERLOADED": 1}, (4, 0, 0, 0), 10, [worker(0, 1.0, 10)])
    after = document(
        12.0, {"OK": 300, "OVERLOADED": 5}, (4, 100, 100, 0), 16, [worker(0, 2.5, 16, cpu_s=1.5)]
    )
    rates = compare(before, after)
    assert (rates.elapsed_s, rates.is_since_start, rates.uptime_s) == (2.0, False, 12.0)
    assert (rates.requests_s, rates.errors_s, rates.front_cpu) == (102.0, 2.0, 0.25)
    assert rates.memory_bytes == 3 * 2000
    (model,) = rates.models
    assert (model.results_s, model.errors_s, model.queue_rows) == (100.0, 2.0, 7)
    assert (model.rows_per_batch, model.max_batch_size) == (32.0, 64)
    assert model.closed == [("full", 0.5), ("idle_worker", 0.5)]
    assert model.quantiles["run"] == (0.002, pytest.approx(0.00494))
    (one,) = model.workers
    assert (one.name, one.busy, one.batches_s, one.cpu) == ("m/0", 0.75, 3.0, 0.25)


def flow(ok=0, late=0, counts=(0, 0, 0, 0), **more):
    return {
        "state": "ready", "under_way": 5, "answers": {"OK": ok, "DEADLINE_EXCEEDED": late},
        "stages": {stage: {"counts": list(counts), "sum_s": 0.0} for stage in ("receive", "total")},
        "steps": [{"name": "find", "waiting": 3}, {"name": "refine", "waiting": 0}],
    } | more  # fmt: skip


def test_what_came_through_pipelines():
    before = document(10.0, {"OK": 100}, pipelines={"p": flow(40, 2), "old": flow(7)})
    after = document(12.0, {"OK": 300}, pipelines={
        "loading": flow(0, state="loading", under_way=0, steps=[]), "p": flow(240, 4, (100, 100, 0, 0))
    })  # fmt: skip
    rates = compare(before, after)
    assert rates.requests_s == 100.0 + 100.0 + 1.0
    busy, loading = rates.pipelines  # the busiest first
    assert (busy.name, busy.state, busy.results_s, busy.errors_s) == ("p", "ready", 100.0, 1.0)
    assert (busy.under_way, busy.waiting) == (5, {"find": 3})
    assert busy.quantiles == (0.001, pytest.approx(0.00198))
    assert (loading.name, loading.state, loading.quantiles) == ("loading", "loading", None)
    again = compare(document(10.0, pipelines={"p": flow(240)}), document(12.0, pipelines={"p": flow(40)}))
    assert again.pipelines[0].results_s == 20.0, "it was removed and added again"


def test_without_an_earlier_document_it_is_since_the_start():
    rates = compare(None, document(10.0, {"OK": 100}, (10, 0, 0, 0), 5, [worker(0, 5.0, 5)]))
    assert (rates.elapsed_s, rates.is_since_start, rates.requests_s) == (10.0, True, 10.0)
    assert rates.models[0].workers[0].busy == 0.5


def test_another_server_is_a_new_start():
    old = document(1000.0, {"OK": 10**6})
    assert compare(old, document(10.0, {"OK": 10})).requests_s == 1.0
    young = document(5.0, {"OK": 10**6})
    young["front"]["pid"] = 99
    assert compare(young, document(10.0, {"OK": 10})).requests_s == 1.0


def test_models_that_come_load_fail_and_go():
    before, after = document(), document(11.0, {"OK": 5})
    loading = {
        key: after["models"]["m"][key]
        for key in ("answers", "closed", "stages", "batches", "rows", "failure")
    }
    after["models"]["new"] = copy.deepcopy(loading) | {
        "state": "failed",
        "failure": "no file",
        "answers": {"OK": 9},
    }
    before["models"]["gone"] = copy.deepcopy(loading)
    new, old = compare(before, after).models  # the busiest first
    assert (new.name, new.state, new.rows_per_batch, new.workers) == ("new", "failed: no file", None, [])
    assert old.name == "m"
    assert old.quantiles["total"] is None


def test_a_model_that_was_removed_and_added_again_counts_from_zero():
    before = document(10.0, {"OK": 256}, (200, 56, 0, 0), 4)
    after = document(12.0, {"OK": 4}, (4, 0, 0, 0), 4)
    before["models"]["m"]["closed"] = {"full": 3, "idle_worker": 1}
    after["models"]["m"]["closed"] = {"full": 1, "idle_worker": 3}
    (model,) = compare(before, after).models
    assert (model.results_s, model.rows_per_batch) == (2.0, 32.0)
    assert model.quantiles["total"] == (0.0005, pytest.approx(0.00099))
    assert model.closed == [("idle_worker", 0.75), ("full", 0.25)]


def test_a_worker_whose_process_is_new_counts_its_cpu_from_zero():
    before = document(10.0, workers=[worker(0, 9.0, 9, pid=50, cpu_s=8.0)])
    after = document(12.0, workers=[worker(0, 9.5, 10, pid=51, cpu_s=1.0)])
    after["models"]["m"]["quarantine"] = worker(1, 0.0, 0)
    one, aside = compare(before, after).models[0].workers
    assert (one.busy, one.cpu) == (0.25, 0.5)
    assert aside.name == "m/quarantine"


@given(st.lists(st.integers(0, 50), min_size=4, max_size=4), st.floats(0.0, 1.0), st.floats(0.0, 1.0))
def test_quantiles_rise_and_stay_within_the_bounds(counts, a, b):
    low, high = quantile(BOUNDS, counts, min(a, b)), quantile(BOUNDS, counts, max(a, b))
    if not sum(counts):
        assert low is high is None
    else:
        assert 0.0 <= low <= high <= BOUNDS[-1]


@pytest.mark.parametrize(
    ("counts", "share", "value"),
    [
        ((4, 0, 0, 0), 0.5, 0.0005),
        ((1, 1, 0, 0), 1.0, 0.002),
        ((0, 0, 2, 0), 0.5, 0.0035),
        ((0, 0, 0, 1), 0.5, 0.005),
    ],
)
def test_quantiles_lie_evenly_within_a_bucket(counts, share, value):
    assert quantile(BOUNDS, counts, share) == pytest.approx(value)
