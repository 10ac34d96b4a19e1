"""The drill backend: which model a path means, what it answers, and that each fault does what it says."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from pool import Client, DeadlineExceeded, ModelError, WorkerLost
from pool.backends import drill, find_backend
from pool.backends.drill import Fault, answer
from pool.config import Placement
from pool.errors import ModelLoadError
from pool.sample import sample_inputs
from pool.shm import weights as weights_memory
from pool.worker.loader import load_model

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
PATIENCE_S = 40.0


@pytest.fixture(autouse=True)
def _nothing_is_left_behind():
    """Here workers are replaced within a test: `server` looks for what is left instead."""
    return


def model_file(folder, text=""):
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "drill.toml"
    file.write_text(text)
    return file


# -- which model a path means ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "path", "want"),
    [
        ({"m.toml": ""}, "m.toml", (1, "m.toml")),
        ({"m.toml": "version = 7"}, "m.toml", (7, "m.toml")),
        ({"m/drill.toml": "version = 7"}, "m", (7, "m/drill.toml")),
        ({"m/drill.toml": ""}, "m/drill.toml", (1, "m/drill.toml")),
        ({"m/2/drill.toml": "", "m/10/drill.toml": ""}, "m", (10, "m/10/drill.toml")),
        (
            {"m/2/drill.toml": "version = 2", "m/10/other": "", "m/x/drill.toml": ""},
            "m",
            (2, "m/2/drill.toml"),
        ),
        ({"m/2/drill.toml": "", "m/10/drill.toml": ""}, "m/2", (2, "m/2/drill.toml")),
    ],
)
def test_the_model_of_a_path(tmp_path, files, path, want):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert drill.resolve(str(tmp_path / path)) == (want[0], str(tmp_path / want[1]))


@pytest.mark.parametrize(
    ("files", "path", "message"),
    [
        ({}, "m", "m does not exist"),
        (
            {"m/a": "", "m/b": ""},
            "m",
            "m holds neither a drill.toml nor a numbered version with one; found a, b",
        ),
        ({"m.toml": "row_items = 0"}, "m.toml", "m.toml: Expected `int` >= 1 - at `$.row_items`"),
        ({"m.toml": "rows = 1"}, "m.toml", "unknown field `rows`"),
        ({"m.toml": "rows"}, "m.toml", "m.toml: Expected '=' after a key"),
        ({"m/2/drill.toml": "version = 3"}, "m", "version is 3; wanted that of the directory, 2"),
    ],
)
def test_what_is_wrong_with_a_path(tmp_path, files, path, message):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    with pytest.raises(ModelLoadError, match=re.escape(message)):
        drill.resolve(str(tmp_path / path))


def test_it_has_no_gpu_and_pins_to_cores_that_are_there():
    backend = find_backend("drill")
    with pytest.raises(ModelLoadError, match="gpu:1 was asked for, and the drill backend uses none"):
        backend.prepare(Placement(gpu=1))
    with pytest.raises(ModelLoadError, match=r"cores \[1000\] are not all there"):
        backend.prepare(Placement(cores=(1000,)))


# -- what it answers -------------------------------------------------------------------------------


def test_the_loader_finds_it_batched_with_shared_weights(tmp_path):
    file = model_file(tmp_path, "version = 3\nrow_items = 5\nweights_bytes = 1000")
    fd = weights_memory.create()
    report = load_model(find_backend("drill"), str(tmp_path), fd, True)
    assert (report.version, report.path) == (3, str(file))
    assert report.weights_shared, report.unshared_reason
    assert report.weights_bytes == 1008
    (signature,) = report.signatures
    assert signature.batched, signature.unbatched_reason
    assert report.output_row_bytes == {"serving_default": 5 * 4 + 8}
    # On the shared weights it answers as told, and made up inputs do no harm.
    model = drill.load(report.path, weights_memory.map_private(fd, report.weights))
    os.close(fd)
    inputs = sample_inputs(signature, 64)
    y, pids = model.bind("serving_default", list(inputs.values()))()
    np.testing.assert_array_equal(y, inputs["x"] * 2 + 3)
    np.testing.assert_array_equal(y, answer(inputs["x"], 3))
    assert set(pids.tolist()) == {os.getpid()}


def test_an_answer_depends_on_the_weights_and_on_the_version(tmp_path):
    first = drill.load(str(model_file(tmp_path / "1")), None)
    second = drill.load(str(model_file(tmp_path / "2")), None)
    inputs = [*sample_inputs(first.signatures[0], 2).values()]
    one, two = (np.array(model.bind("serving_default", inputs)()[0]) for model in (first, second))
    np.testing.assert_array_equal(one, answer(inputs[0], 1))
    np.testing.assert_array_equal(two, answer(inputs[0], 2))
    assert np.all(one != two)
    (_, scale), *_ = first.weights()
    scale[:] = 3
    assert np.all(first.bind("serving_default", inputs)()[0] != one)


def test_the_configuration_that_ships_is_in_order():
    done = subprocess.run(
        [sys.executable, "-m", "pool", "check", str(CONFIGS / "drill.toml"), "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    model = json.loads(done.stdout)["models"]["drill"]
    assert model["weights_shared"]
    assert [signature["name"] for signature in model["signatures"]] == ["serving_default"]


# -- faults, in a real worker ----------------------------------------------------------------------

# A row that fails may run once only, and again the next time it is sent: each test sees its own fault.
MODEL = """
[models.m]
backend = "drill"
path = "{path}"
max_batch_size = 8
retry = false
poison_memory_s = 0
"""


@pytest.fixture(scope="module")
def server(start_server, tmp_path_factory):
    folder = tmp_path_factory.mktemp("drill")
    model_file(folder / "model", "row_items = 3")
    with start_server(folder, MODEL.format(path=folder / "model")) as running:
        yield running
        children = psutil.Process(running.process.pid).children(recursive=True)
        assert {child.name() for child in children} == {"pool-zygote", "pool-0-m"}
        assert running.stop() == 0
        _, alive = psutil.wait_procs(children, PATIENCE_S)
        assert not alive


@pytest.fixture
def client(server):
    with Client(server.endpoint) as made:
        yield made
        assert ask(made, (Fault.NONE, 0)).tolist() == [worker(made)["pid"]], "it did not recover"


def await_that(condition):
    deadline = time.monotonic() + PATIENCE_S
    while not (value := condition()):
        assert time.monotonic() < deadline, "it never came true"
        threading.Event().wait(0.01)
    return value


def worker(client):
    return client.status()["models"]["m"]["workers"][0]


def ask(client, *rows, timeout=None):
    """Send rows of (fault, argument), check their answers, and give the pids that ran them."""
    x = np.random.default_rng().random((len(rows), 3), np.float32)
    faults = np.array([fault for fault, _ in rows], np.int32)
    arguments = np.array([argument for _, argument in rows], np.float32)
    outputs = client.predict("m", {"x": x, "fault": faults, "argument": arguments}, timeout=timeout)
    np.testing.assert_array_equal(outputs["y"], answer(x, 1))
    return outputs["pid"]


def await_recovery(client, pid):
    """The worker was replaced; how the one of that pid ended."""
    return await_that(
        lambda: (now := worker(client))["pid"] not in (pid, None) and now["ready_s"] and now["last_error"]
    )


def test_every_fault_is_out_of_the_reach_of_made_up_inputs():
    assert min(fault for fault in Fault if fault is not Fault.NONE) == 1000


def test_sleep_takes_the_longest_of_its_rows(client):
    began = time.monotonic()
    ask(client, (Fault.SLEEP, 0.01), (Fault.SLEEP, 0.1), (Fault.NONE, 5))
    assert time.monotonic() - began >= 0.1


def test_raise_fails_its_batch_and_not_the_worker(client):
    pid = worker(client)["pid"]
    with pytest.raises(ModelError, match="row 1 of the batch told the drill model to raise"):
        ask(client, (Fault.NONE, 0), (Fault.RAISE, 0))
    assert worker(client)["pid"] == pid


def test_a_fault_that_is_none_is_an_error(client):
    with pytest.raises(ModelError, match="fault 999999"):
        ask(client, (999_999, 0))
    ask(client, (999, 0), (-1, 0))


@pytest.mark.parametrize(
    ("fault", "argument", "how"),
    [
        (Fault.EXIT, 3, "exit code 3"),
        (Fault.SEGFAULT, 0, "killed by SIGSEGV"),
        (Fault.ABORT, 0, "killed by SIGABRT"),
        (Fault.SIGNAL, signal.SIGKILL, "killed by SIGKILL"),
    ],
)
def test_what_ends_the_worker(client, fault, argument, how):
    pid = worker(client)["pid"]
    with pytest.raises(WorkerLost):
        ask(client, (Fault.NONE, 0), (fault, argument))
    assert how in await_recovery(client, pid)


@pytest.mark.parametrize("fault", [Fault.HANG, Fault.HANG_NATIVE, Fault.STOP])
def test_what_never_ends(client, fault):
    process = psutil.Process(worker(client)["pid"])
    with pytest.raises(DeadlineExceeded):
        ask(client, (fault, 0), timeout=0.2)
    await_that(lambda: worker(client)["state"] == "busy")
    if fault is Fault.STOP:
        await_that(lambda: process.status() == psutil.STATUS_STOPPED)
    else:
        await_that(lambda: process.status() == psutil.STATUS_SLEEPING)
    process.kill()
    assert "SIGKILL" in await_recovery(client, process.pid)


LOCKED_UP = """
import os, sys, threading
from pathlib import Path
from pool.backends import drill
from pool.sample import sample_inputs
model = drill.load(sys.argv[1], None)
inputs = sample_inputs(model.signatures[0], 1)
inputs["fault"][:] = int(sys.argv[2])
call = model.bind("serving_default", [*inputs.values()])
begun = threading.Event()
threading.Thread(target=lambda: begun.wait() and threading.Event().wait(0.05) or os._exit(5)).start()
print("hangs", flush=True)
begun.set()
call()
"""


@pytest.mark.parametrize(("fault", "locks_up"), [(Fault.HANG, False), (Fault.HANG_NATIVE, True)])
def test_a_hang_in_native_code_stops_all_python_threads(tmp_path, fault, locks_up):
    command = [sys.executable, "-c", LOCKED_UP, str(model_file(tmp_path)), str(int(fault))]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout.readline() == b"hangs\n"
            if locks_up:
                with pytest.raises(subprocess.TimeoutExpired):
                    process.wait(0.3)
            else:
                assert process.wait(PATIENCE_S) == 5
        finally:
            process.kill()


def test_a_stopped_worker_goes_on_when_it_is_continued(client):
    pid = worker(client)["pid"]
    with pytest.raises(DeadlineExceeded):
        ask(client, (Fault.STOP, 0), timeout=0.1)
    await_that(lambda: psutil.Process(pid).status() == psutil.STATUS_STOPPED)
    os.kill(pid, signal.SIGCONT)
    assert ask(client, (Fault.NONE, 0)).tolist() == [pid]


def test_leak_keeps_memory(client):
    before = worker(client)["uss_bytes"]
    for _ in range(2):
        ask(client, (Fault.LEAK, 16), (Fault.LEAK, 4))
    assert worker(client)["uss_bytes"] - before >= 39 << 20


def test_scribble_writes_to_the_standard_error(server, client):
    pid = worker(client)["pid"]
    with contextlib.suppress(WorkerLost):
        ask(client, (Fault.SCRIBBLE, 2), (Fault.EXIT, 1))
    await_recovery(client, pid)
    assert f"drill worker {pid}, line 2\n" in server.log.read_text()


# -- what a batch takes ----------------------------------------------------------------------------


def test_a_batch_takes_its_time_and_that_of_its_rows(tmp_path):
    model = drill.load(str(model_file(tmp_path, "batch_s = 0.02\nrow_s = 0.01")), None)
    for rows, least_s in ((1, 0.03), (4, 0.06)):
        call = model.bind("serving_default", [*sample_inputs(model.signatures[0], rows).values()])
        began = time.monotonic()
        call()
        assert time.monotonic() - began >= least_s
