"""What a real server does when its processes are killed, stopped, asked to leave, or have no room.

A worker that got SIGSTOP stands for one that is slow: it holds its batch until SIGCONT, however fast or
slow the machine is.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from pool import (
    Client,
    DeadlineExceeded,
    Overloaded,
    PoolError,
    Unavailable,
)
from pool.backends import drill
from pool.backends.drill import Fault
from tests.raw import Raw
from tests.raw import drill as drill_request

MODELS = """
[models.one]
backend = "drill"
path = "{path}"
slots = 2
max_batch_size = 4
max_inflight_rows = 8

[models.two]
backend = "drill"
path = "{path}"
workers = 2

[models.doomed]
backend = "drill"
path = "{path}"

[models.broken]
backend = "drill"
path = "{broken}"
"""
PATIENCE_S = 40.0
X = np.arange(8, dtype=np.float32).reshape(2, 4)
ANSWER = drill.answer(X, 1)


@pytest.fixture(autouse=True)
def _nothing_is_left_behind():
    """Here workers and zygotes are replaced within a test: `Front.stop` looks for what is left instead."""
    return


def await_that(condition):
    """Wait until a condition of another process holds; gives its value."""
    deadline = time.monotonic() + PATIENCE_S
    while not (value := condition()):
        assert time.monotonic() < deadline, "it never came true"
        threading.Event().wait(0.01)
    return value


def rows_of(rows, fault):
    """Inputs of rows that all do the same."""
    x = np.resize(X, (rows, 4))
    return {"x": x, "fault": np.full(rows, fault, np.int32), "argument": np.zeros(rows, np.float32)}


def harmless(rows):
    """Inputs of rows that are only answered."""
    return rows_of(rows, Fault.NONE)


class Call(threading.Thread):
    """A request under way."""

    def __init__(self, endpoint, model="one", rows=1, timeout=60.0, fault=Fault.NONE):
        super().__init__(daemon=True)
        self._arguments = (endpoint, model, rows, timeout, fault)
        self._answer = None
        self.start()

    def run(self):
        endpoint, model, rows, timeout, fault = self._arguments
        try:
            with Client(endpoint) as client:
                self._answer = client.predict(model, rows_of(rows, fault), timeout=timeout)
        except PoolError as e:
            self._answer = e

    def result(self):
        self.join(PATIENCE_S)
        assert not self.is_alive(), "no answer"
        if isinstance(self._answer, PoolError):
            raise self._answer
        np.testing.assert_array_equal(self._answer["y"], np.resize(ANSWER, self._answer["y"].shape))
        return len(self._answer["y"])


class Front:
    """A server started by hand, in a process group of its own."""

    def __init__(self, folder, text, server=""):
        folder.mkdir(parents=True, exist_ok=True)
        self.endpoint = f"ipc://{folder}/pool.sock"
        self.config = folder / "pool.toml"
        self.config.write_text(f'[server]\nendpoints = ["{self.endpoint}"]\n{server}\n{text}')
        self.log = folder / "server.log"
        with self.log.open("ab") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "pool", "serve", str(self.config)],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        self.client = Client(self.endpoint, connect_timeout=1.0)
        self._seen = set()

    def await_ready(self):
        def is_ready():
            assert self.process.poll() is None, self.log.read_text()
            return self.client.ready()

        await_that(is_ready)
        return self

    def model(self, name="one"):
        return self.client.status()["models"][name]

    def worker(self, name="one", index=0):
        return self.model(name)["workers"][index]

    def send(self, pid, number):
        """Signal one of the server's processes."""
        self.descendants()
        assert pid in {process.pid for process in self._seen}
        os.kill(pid, number)

    def descendants(self):
        with contextlib.suppress(psutil.NoSuchProcess):
            self._seen |= set(psutil.Process(self.process.pid).children(recursive=True))
        return self._seen

    def wait(self):
        """The exit code, once the front and everything it started are gone."""
        self.descendants()
        code = self.process.wait(PATIENCE_S)
        _, alive = psutil.wait_procs(self._seen, PATIENCE_S)
        assert not alive, f"left behind: {alive}"
        return code

    def close(self):
        self.client.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGCONT)
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        psutil.wait_procs(self._seen, PATIENCE_S)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name in ("path", "broken"):
        (folder / f"{name}.toml").write_text("")
    return MODELS.format(path=folder / "path.toml", broken=folder / "broken.toml")


@pytest.fixture
def start(tmp_path, text):
    made = []

    def launch(models_text=text, server=""):
        made.append(Front(tmp_path, models_text, server))
        return made[-1]

    yield launch
    for front in made:
        front.close()


@pytest.fixture(scope="module")
def shared(tmp_path_factory, text):
    front = Front(tmp_path_factory.mktemp("faults"), text).await_ready()
    yield front
    front.descendants()
    front.process.send_signal(signal.SIGTERM)
    code = front.wait()
    front.close()
    assert code == 0, front.log.read_text()
    assert not Path(front.endpoint[6:]).exists()


@contextlib.contextmanager
def stopped(front, name="one"):
    """A model whose only worker does not run; gives the worker's pid."""
    pid = front.worker(name)["pid"]
    front.send(pid, signal.SIGSTOP)
    await_that(lambda: psutil.Process(pid).status() == psutil.STATUS_STOPPED)
    try:
        yield pid
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def works(front, name="one"):
    return front.client.predict(name, harmless(2))["y"].tolist() == ANSWER.tolist()


# -- workers -----------------------------------------------------------------------------------------


def test_the_batch_of_a_worker_that_is_killed_runs_again(shared):
    before = shared.worker()
    with stopped(shared) as pid:
        running = Call(shared.endpoint)
        await_that(lambda: shared.worker()["state"] == "busy")
        waiting = Call(shared.endpoint)
        await_that(lambda: shared.model()["queue_rows"] == 1)
        assert works(shared, "two")
        shared.send(pid, signal.SIGKILL)
    assert running.result() == 1
    assert waiting.result() == 1
    after = shared.worker()
    assert after["pid"] != pid
    assert after["restarts"] == before["restarts"] + 1
    assert "SIGKILL" in after["last_error"]
    assert not psutil.pid_exists(pid)


def test_a_worker_killed_at_rest_is_replaced_unnoticed(shared):
    pid = shared.worker("two", 0)["pid"]
    other = shared.worker("two", 1)["pid"]
    shared.send(pid, signal.SIGKILL)
    await_that(lambda: shared.worker("two", 0)["state"] == "ready" and shared.worker("two", 0)["pid"] != pid)
    assert shared.worker("two", 1)["pid"] == other
    assert works(shared, "two")


def test_a_worker_that_segfaults_is_told_by_its_signal(shared):
    pid = shared.worker("two", 0)["pid"]
    shared.send(pid, signal.SIGSEGV)
    await_that(lambda: shared.worker("two", 0)["state"] == "ready" and shared.worker("two", 0)["pid"] != pid)
    assert shared.worker("two", 0)["last_error"] == "killed by SIGSEGV"


def test_a_worker_that_keeps_dying_is_given_up_and_its_model_answers_so(shared):
    seen = set()
    while (worker := shared.worker("doomed"))["state"] != "failed":
        if worker["pid"] in (None, *seen) or worker["state"] != "ready":
            continue
        seen.add(worker["pid"])
        shared.send(worker["pid"], signal.SIGKILL)
    for _ in range(2):
        with pytest.raises(Unavailable, match="model 'doomed' is failed: its workers keep ending"):
            shared.client.predict("doomed", harmless(1))
    assert shared.model("doomed")["state"] == "failed"
    assert not shared.client.ready("doomed")
    assert works(shared)
    assert len(seen) == 5


def test_what_waits_for_a_model_that_can_not_be_loaded_again_is_answered(shared, text):
    path = Path(text.split('path = "')[-1].split('"')[0])
    with stopped(shared, "broken") as pid:
        running = Call(shared.endpoint, "broken")
        await_that(lambda: shared.worker("broken")["state"] == "busy")
        waiting = Call(shared.endpoint, "broken", rows=64)
        await_that(lambda: shared.model("broken")["queue_rows"] == 64)
        path.write_text("no TOML")
        shared.send(pid, signal.SIGKILL)
    for call in (running, waiting):
        with pytest.raises(Unavailable, match="model 'broken' is failed"):
            call.result()
    assert works(shared)
    path.write_text("")


# -- the zygote --------------------------------------------------------------------------------------


def test_a_killed_zygote_is_replaced_while_its_workers_serve_on(shared):
    (zygote,) = shared.client.status()["zygotes"]
    pids = [worker["pid"] for worker in shared.model("two")["workers"]]
    shared.send(zygote["pid"], signal.SIGKILL)
    assert works(shared)
    assert works(shared, "two")
    assert [worker["pid"] for worker in shared.model("two")["workers"]] == pids
    await_that(lambda: [z for z in shared.client.status()["zygotes"] if z["pid"] != zygote["pid"]])
    # An orphan that is killed is noticed too, its batch answered, and a fork of the new one takes its place.
    with stopped(shared) as pid:
        running = Call(shared.endpoint)
        await_that(lambda: shared.worker()["state"] == "busy")
        shared.send(pid, signal.SIGKILL)
    assert running.result() == 1
    await_that(lambda: shared.worker()["state"] == "ready")
    assert shared.worker()["pid"] != pid
    assert works(shared)


def test_a_zygote_that_is_stopped_is_replaced_when_it_is_needed(shared):
    (zygote,) = shared.client.status()["zygotes"]
    shared.send(zygote["pid"], signal.SIGSTOP)
    assert works(shared)
    before = shared.worker()
    with stopped(shared) as pid:
        running = Call(shared.endpoint)
        await_that(lambda: shared.worker()["state"] == "busy")
        shared.send(pid, signal.SIGKILL)
    assert running.result() == 1
    await_that(lambda: shared.worker()["state"] == "ready" and shared.worker()["pid"] != before["pid"])
    (after,) = shared.client.status()["zygotes"]
    assert after["pid"] != zygote["pid"]
    assert "zygote hangs" in shared.log.read_text()


# -- time and room -----------------------------------------------------------------------------------


def test_a_request_that_runs_too_long_is_answered_at_its_deadline(shared):
    # A client gives up by its own clock, too; this one has none, so the answers are the server's.
    def expired():
        return shared.client.status()["front"]["errors"].get("DEADLINE_EXCEEDED", 0)

    before = expired()
    with stopped(shared), Raw(shared.endpoint) as client:
        running = client.send(drill_request("one", millis=300))
        assert isinstance(client.collect(1)[running], DeadlineExceeded)
        await_that(lambda: shared.worker()["state"] == "busy")
        waiting = client.send(drill_request("one", millis=300))
        assert isinstance(client.collect(1)[waiting], DeadlineExceeded)
        # The one that never started leaves the queue; the one that runs keeps its slot until it is done.
        await_that(lambda: shared.model()["queue_rows"] == 0)
        assert expired() == before + 2
        assert shared.worker()["state"] == "busy"
    await_that(lambda: shared.worker()["state"] == "ready")
    assert works(shared)


def test_a_full_arena_refuses_at_once_and_answers_what_it_admitted(shared):
    with stopped(shared):
        admitted = [Call(shared.endpoint, rows=4)]
        await_that(lambda: shared.worker()["state"] == "busy")
        admitted.append(Call(shared.endpoint, rows=4))
        await_that(lambda: shared.model()["queue_rows"] == 4)
        with pytest.raises(
            Overloaded, match="no room for 1 rows: model 'one' has 0 of 8 rows free"
        ) as caught:
            shared.client.predict("one", harmless(1))  # the worker is still stopped: nothing was waited for
        assert caught.value.retry_after_ms
        assert works(shared, "two")
    assert [call.result() for call in admitted] == [4, 4]
    assert works(shared)


# -- leaving -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("to_all", [False, True], ids=["SIGTERM", "Ctrl-C"])
def test_asked_to_leave_it_answers_what_it_admitted_and_nothing_more(start, to_all):
    front = start().await_ready()
    with stopped(front):
        running = Call(front.endpoint, rows=3)
        await_that(lambda: front.worker()["state"] == "busy")
        waiting = Call(front.endpoint, rows=2)
        await_that(lambda: front.model()["queue_rows"] == 2)
        front.descendants()
        if to_all:
            os.killpg(front.process.pid, signal.SIGINT)
        else:
            front.process.send_signal(signal.SIGTERM)
        await_that(lambda: not front.client.ready())
        with pytest.raises(Unavailable, match="the server is stopping"):
            front.client.predict("two", harmless(1))
        assert front.client.live()
    assert running.result() == 3
    assert waiting.result() == 2
    assert front.wait() == 0, front.log.read_text()
    assert not Path(front.endpoint[6:]).exists()
    assert "Traceback" not in front.log.read_text()


def test_what_cannot_be_finished_in_time_is_answered_too(start):
    front = start(server="drain_timeout_s = 0.2").await_ready()
    pid = front.worker()["pid"]
    front.send(pid, signal.SIGSTOP)
    running = Call(front.endpoint)
    await_that(lambda: front.worker()["state"] == "busy")
    waiting = Call(front.endpoint)
    await_that(lambda: front.model()["queue_rows"] == 1)
    front.process.send_signal(signal.SIGTERM)
    for call in (running, waiting):
        with pytest.raises(Unavailable, match="the server is stopping"):
            call.result()
    assert front.wait() == 1
    assert "Traceback" not in front.log.read_text()


def test_asked_to_leave_while_it_starts_it_leaves(start):
    front = start()
    await_that(lambda: "listening" in front.log.read_text())
    await_that(front.descendants)
    assert front.client.live()
    with pytest.raises(Unavailable, match="model 'one' is loading"):
        front.client.predict("one", harmless(1))
    front.process.send_signal(signal.SIGTERM)
    assert front.wait() == 0
    assert "Traceback" not in front.log.read_text()


def test_asked_to_leave_while_a_worker_is_replaced_it_leaves(start):
    front = start().await_ready()
    (zygote,) = front.client.status()["zygotes"]
    front.send(zygote["pid"], signal.SIGKILL)
    front.send(front.worker()["pid"], signal.SIGKILL)
    await_that(lambda: front.worker()["pid"] is None)
    front.process.send_signal(signal.SIGTERM)
    assert front.wait() == 0
    assert "Traceback" not in front.log.read_text()


# -- the front ---------------------------------------------------------------------------------------


def test_a_killed_front_takes_all_along_and_the_next_one_starts_where_it_was(start):
    first = start().await_ready()
    # A second server for the same socket is refused, and the first goes on.
    second = subprocess.run(
        [sys.executable, "-m", "pool", "serve", str(first.config)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert second.returncode == 2
    assert "another server is listening there" in second.stderr
    assert works(first)
    # Killed in the middle of a request, it takes its children along: none is left to hold memory.
    with stopped(first, "one"):
        running = Call(first.endpoint)
        await_that(lambda: first.worker()["state"] == "busy")
        busy = first.descendants()
        assert len(busy) == 6
        first.process.kill()
        with pytest.raises(Unavailable, match="went away before it answered"):
            running.result()
    assert first.wait() == -signal.SIGKILL
    # Its socket file is still there, and in nobody's way.
    assert Path(first.endpoint[6:]).is_socket()
    next_one = start().await_ready()
    assert works(next_one)
    next_one.process.send_signal(signal.SIGTERM)
    assert next_one.wait() == 0


@pytest.mark.parametrize("fault", [Fault.HANG_NATIVE, Fault.STOP])
def test_a_killed_front_takes_along_even_an_orphan_that_can_not_hear(start, fault):
    front = start().await_ready()
    hung = Call(front.endpoint, fault=fault)
    await_that(lambda: front.worker()["state"] == "busy")
    (zygote,) = front.client.status()["zygotes"]
    front.send(zygote["pid"], signal.SIGKILL)
    await_that(lambda: [z for z in front.client.status()["zygotes"] if z["pid"] != zygote["pid"]])
    front.process.kill()
    with pytest.raises(Unavailable):
        hung.result()
    assert front.wait() == -signal.SIGKILL


def test_a_front_killed_while_it_starts_leaves_nothing(start):
    front = start()
    await_that(front.descendants)
    front.process.kill()
    assert front.wait() == -signal.SIGKILL


def test_a_model_that_does_not_load_ends_the_start_with_its_reason(start, text):
    front = start(text + f'\n[models.bad]\nbackend = "drill"\npath = "{__file__}"\n')
    assert front.wait() == 1
    log = front.log.read_text()
    assert "MODEL_LOAD" in log
    assert "model 'bad'" in log
    assert "Traceback" not in log
    assert not Path(front.endpoint[6:]).exists()


def test_a_file_where_the_socket_should_be_is_left_alone(start, tmp_path):
    (tmp_path / "pool.sock").write_text("precious")
    front = start()
    assert front.wait() == 2
    assert "a file that is not a socket is there" in front.log.read_text()
    assert (tmp_path / "pool.sock").read_text() == "precious"
