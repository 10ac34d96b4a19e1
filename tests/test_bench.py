"""The arithmetic of `pool bench`, and its load client against servers that do as they are told."""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pool import wire
from pool.cli.bench import share, summarize
from pool.cli.load_client import LoadClient, Result, Task, instants, make_inputs
from pool.errors import ModelNotFound, Overloaded, Unavailable
from pool.sample import Recipe
from pool.signature import Signature
from pool.wire import Header
from tests import scripted_server as scripted
from tests.scripted_server import SIGNATURES, Answer, ScriptedServer, scripted_server

Prepared = Callable[[Task], LoadClient]

PAIR: Signature = SIGNATURES[1]
WHOLE: Signature = SIGNATURES[2]


def task(endpoint: str = "ipc:///nowhere", **fields: Any) -> Task:
    defaults: dict[str, Any] = {
        "model": "m",
        "requests": 100,
        "rows": 1,
        "window": 10,
        "rate": None,
        "input": None,
        "recipe": Recipe(),
        "seed": 0,
        "timeout_s": 10.0,
    }
    return Task(endpoint=endpoint, **(defaults | fields))


@pytest.fixture(autouse=True)
def _collecting_goes_on() -> Iterator[None]:
    """A load client is a process of its own, and collects no garbage while it measures; this process does."""
    yield
    gc.enable()


class Script:
    """Answers properly until told otherwise; what the load client does first is not counted."""

    def __init__(self) -> None:
        self.answer: Answer = scripted.answer_properly

    def __call__(self, header: Header, tensors: list[bytes]) -> list[list[bytes]] | None:
        return self.answer(header, tensors)


@pytest.fixture
def script() -> Script:
    return Script()


@pytest.fixture
def server(tmp_path: Path, script: Script) -> Iterator[ScriptedServer]:
    with scripted_server(f"ipc://{tmp_path}/s", script) as running:
        yield running


@pytest.fixture
def prepared() -> Iterator[Prepared]:
    """A function that gives a load client that is ready to run; closes it at the end."""
    with contextlib.ExitStack() as stack:

        def prepare(what: Task) -> LoadClient:
            client = stack.enter_context(LoadClient(what))
            client.prepare()
            return client

        yield prepare


# -- the load client -------------------------------------------------------------------------------


def test_every_request_is_sent_and_timed(server: ScriptedServer, prepared: Prepared) -> None:
    client = prepared(task(server.endpoint, rows=3))
    before = len(server.requests)
    result, (latencies_s, answered_s) = client.run()
    assert result.answered == len(latencies_s) == 100
    assert result.errors == {}
    assert (latencies_s > 0).all()
    assert latencies_s.max() <= result.ended_s - result.started_s
    assert (np.diff(answered_s) >= 0).all()
    assert result.started_s <= answered_s[0] <= answered_s[-1] <= result.ended_s
    sent = server.requests[before:]
    assert [header.id for header in sent] == list(range(100))
    assert {header.rows for header in sent} == {3}


@pytest.mark.parametrize("window", [1, 7, 64, 300])
def test_a_closed_loop_keeps_its_window_full_and_no_fuller(
    server: ScriptedServer, script: Script, window: int, prepared: Prepared
) -> None:
    """Answers are held back until the window is full: sending less would wait for ever."""
    client = prepared(task(server.endpoint, window=window, requests=2 * window))
    held: list[list[bytes]] = []
    most = 0

    def hold(header: Header, tensors: list[bytes]) -> list[list[bytes]] | None:
        nonlocal most
        held.append(scripted.result(header, tensors))
        most = max(most, len(held))
        if len(held) < window:
            return None
        out, held[:] = list(held), []
        return out

    script.answer = hold
    result, _ = client.run()
    assert result.answered == 2 * window
    assert most == window


def test_an_open_loop_does_not_wait_for_answers(
    server: ScriptedServer, script: Script, prepared: Prepared
) -> None:
    client = prepared(task(server.endpoint, window=None, rate=1e5, requests=500))
    held: list[list[bytes]] = []

    def hold(header: Header, tensors: list[bytes]) -> list[list[bytes]] | None:
        held.append(scripted.result(header, tensors))
        return held if len(held) == 500 else None

    script.answer = hold
    result, _ = client.run()
    assert result.answered == 500


def test_an_open_loop_times_from_the_instant_that_was_meant(
    server: ScriptedServer, script: Script, prepared: Prepared
) -> None:
    """A stall of the first request is charged to those that could not be sent meanwhile."""
    client = prepared(task(server.endpoint, window=1, rate=1e5, requests=10))

    def stalled(header: Header, tensors: list[bytes]) -> list[list[bytes]]:
        if header.id == 0:
            threading.Event().wait(0.2)
        return [scripted.result(header, tensors)]

    script.answer = stalled
    _, (latencies_s, _) = client.run()
    assert (latencies_s > 0.1).all()


@pytest.mark.parametrize(("patience_s", "told_ms"), [(None, 0), (0.0605, 60), (3600.0, 3_600_000)])
def test_the_server_is_told_the_timeout(
    server: ScriptedServer, prepared: Prepared, patience_s: float | None, told_ms: int
) -> None:
    client = prepared(task(server.endpoint, patience_s=patience_s))
    before = len(server.requests)
    result, _ = client.run()
    assert result.answered == 100
    assert {header.millis for header in server.requests[before:]} == {told_ms}


def test_an_open_loop_tells_what_remains_of_the_timeout(
    server: ScriptedServer, script: Script, prepared: Prepared
) -> None:
    """The first request's answer is held back until the others are overdue."""
    client = prepared(task(server.endpoint, window=1, rate=1e5, requests=10, patience_s=0.1))
    before = len(server.requests)

    def stalled(header: Header, tensors: list[bytes]) -> list[list[bytes]]:
        if header.id == 0:
            threading.Event().wait(0.2)
        return [scripted.result(header, tensors)]

    script.answer = stalled
    client.run()
    first, *others = [header.millis for header in server.requests[before:]]
    assert 1 <= first <= 100
    assert set(others) == {1}


def test_errors_are_counted_and_not_timed(server: ScriptedServer, script: Script, prepared: Prepared) -> None:
    client = prepared(task(server.endpoint))

    def some(header: Header, tensors: list[bytes]) -> list[list[bytes]]:
        if header.id % 4 == 0:
            return [[wire.encode_error(header.id, Overloaded("full"))]]
        return [scripted.result(header, tensors)]

    script.answer = some
    result, (latencies_s, _) = client.run()
    assert result.errors == {"OVERLOADED": 25}
    assert result.answered == len(latencies_s) == 75


def test_silence_ends_the_run(server: ScriptedServer, script: Script, prepared: Prepared) -> None:
    client = prepared(task(server.endpoint, timeout_s=0.2))
    script.answer = lambda header, tensors: [scripted.result(header, tensors)] if header.id < 30 else None
    result, _ = client.run()
    assert result.answered == 30
    assert result.errors == {"DEADLINE_EXCEEDED": 70}


def test_a_server_that_goes_away_ends_the_run(
    server: ScriptedServer, script: Script, prepared: Prepared
) -> None:
    client = prepared(task(server.endpoint))
    script.answer = lambda _header, _tensors: None
    run = threading.Thread(target=lambda: outcome.append(client.run()))
    outcome: list[tuple[Result, Any]] = []
    while server.predicted.acquire(blocking=False):
        pass
    run.start()
    server.predicted.acquire()
    server.stop()
    run.join()
    assert outcome[0][0].errors == {"UNAVAILABLE": 100}


def test_what_fails_before_the_run_is_raised(
    server: ScriptedServer, tmp_path: Path, prepared: Prepared
) -> None:
    with pytest.raises(ModelNotFound):
        prepared(task(server.endpoint, model="absent"))
    with pytest.raises(Unavailable, match="no server at"):
        prepared(task(f"ipc://{tmp_path}/none", timeout_s=0.1))


# -- inputs ----------------------------------------------------------------------------------------


def test_a_file_is_cut_into_requests(tmp_path: Path) -> None:
    a = np.arange(7)
    b = np.array([[b"x", b"%d" % i] for i in range(7)])
    np.savez(tmp_path / "x.npz", a=a, b=b)
    cut = make_inputs(task(input=str(tmp_path / "x.npz"), rows=3), PAIR)
    assert [inputs["a"].tolist() for inputs in cut] == [[0, 1, 2], [3, 4, 5]]
    assert cut[1]["b"][:, 1].tolist() == [b"3", b"4", b"5"]
    with pytest.raises(ValueError, match="has 7 rows; wanted at least 8"):
        make_inputs(task(input=str(tmp_path / "x.npz"), rows=8), PAIR)


def test_a_file_for_an_unbatched_signature_is_one_request(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.ones((2, 3), np.float32))
    (inputs,) = make_inputs(task(input=str(tmp_path / "x.npy")), WHOLE)
    assert inputs["x"].shape == (2, 3)


def test_clients_make_up_different_inputs() -> None:
    seen = {
        inputs["x"].tobytes()
        for seed in range(3)
        for inputs in make_inputs(task(rows=2, seed=seed), SIGNATURES[0])
    }
    assert len(seen) == 48


def test_instants_are_a_poisson_process() -> None:
    due_s = instants(1000.0, 20_000, seed=1)
    gaps_s = np.diff(due_s)
    assert (gaps_s > 0).all()
    assert gaps_s.mean() == pytest.approx(1e-3, rel=0.05)
    assert gaps_s.std() == pytest.approx(1e-3, rel=0.05)
    assert not np.array_equal(due_s, instants(1000.0, 20_000, seed=2))


# -- the report ------------------------------------------------------------------------------------


@given(st.integers(0, 10_000), st.integers(1, 50))
def test_shares_add_up_and_differ_by_one_at_most(total: int, parts: int) -> None:
    shares = [share(total, parts, i) for i in range(parts)]
    assert sum(shares) == total
    assert max(shares) - min(shares) <= 1


def status(front_s: float, batches: int, rows: int, **workers_s: float) -> dict[str, Any]:
    workers = [{"pid": int(pid[1:]), "cpu_s": cpu_s} for pid, cpu_s in workers_s.items()]
    return {
        "front": {"cpu_s": front_s},
        "models": {"m": {"batches": batches, "rows": rows, "workers": workers}},
    }


def result(answered: int, started_s: float, ended_s: float, **errors: int) -> Result:
    return Result(answered=answered, errors=errors, started_s=started_s, ended_s=ended_s, cpu_s=0.5)


def test_the_report_is_exact() -> None:
    latencies_s = np.arange(1, 1001) / 1000
    answers = np.stack([latencies_s, 10 + 4 * latencies_s**2])  # ever fewer in the same time
    report = summarize(
        [
            (result(400, 10.0, 12.0, OVERLOADED=1), answers[:, :400]),
            (result(600, 10.5, 14.0, OVERLOADED=2, MODEL_ERROR=1), answers[:, 400:]),
        ],
        status(1.0, 10, 100, p1=5.0, p2=7.0),
        status(1.5, 20, 350, p1=5.5, p3=0.25),  # worker 2 was replaced by 3
        "m",
    )
    assert report == {
        "requests_per_s": 250.0,
        "steady_per_s": 249.5,
        "goodput_per_s": 250.0,
        "p50_ms": 500.5,
        "p90_ms": 900.1,
        "p99_ms": 990.01,
        "p999_ms": 999.001,
        "errors": {"MODEL_ERROR": 1, "OVERLOADED": 3},
        "mean_batch_rows": 25.0,
        "client_cpu_us_per_request": 1000.0,
        "server_cpu_us_per_request": {"front": 500.0, "workers": 750.0},
    }


def test_answers_after_the_timeout_are_no_goodput() -> None:
    latencies_s = np.arange(1, 1001) / 1000
    results = [(result(1000, 10.0, 14.0), np.stack([latencies_s, latencies_s]))]
    report = summarize(results, status(0.0, 0, 0), status(1.0, 1, 9), "m", patience_s=0.5)
    assert (report["requests_per_s"], report["goodput_per_s"]) == (250.0, 125.0)


def test_a_report_without_an_answer() -> None:
    report = summarize(
        [(result(0, 1.0, 2.0, UNAVAILABLE=5), np.empty((2, 0)))], status(0.0, 0, 0), status(0.0, 0, 0), "m"
    )
    assert report["requests_per_s"] == report["goodput_per_s"] == 0
    assert (
        report["steady_per_s"]
        is report["p50_ms"]
        is report["mean_batch_rows"]
        is report["client_cpu_us_per_request"]
        is None
    )
    assert report["errors"] == {"UNAVAILABLE": 5}
