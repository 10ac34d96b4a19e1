"""`pool top` in a real terminal of 80 x 24, and what it draws in others."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time

import numpy as np
import pytest

from pool import Client
from pool.__main__ import main
from pool.cli.rates import STAGES, ModelRates, PipelineRates, Rates, WorkerRates
from pool.cli.top import draw

PATIENCE_S = 30.0
TMUX = shutil.which("tmux")


def worker(name, **more):
    values = {
        "name": name, "state": "busy", "busy": 0.72, "cpu": 0.5, "batches_s": 1234.4,
        "private_bytes": 28_100_000, "restarts": 1,
    }  # fmt: skip
    return WorkerRates(**values | more)


def model(name, workers=2, **more):
    values = {
        "name": name, "state": "ready", "results_s": 12345.6, "errors_s": 1.5, "queue_rows": 64,
        "rows_per_batch": 61.2, "max_batch_size": 64, "closed": [("full", 0.9), ("idle_worker", 0.1)],
        "quantiles": dict.fromkeys(STAGES, (0.00234, 1.5)),
        "workers": [worker(f"{name}/{i}") for i in range(workers)],
    }  # fmt: skip
    return ModelRates(**values | more)


def pipeline(name, **more):
    values = {
        "name": name, "state": "ready", "results_s": 123.4, "errors_s": 0.5, "under_way": 1017,
        "waiting": {"find": 3, "refine": 1001}, "quantiles": (0.00234, 1.5),
    }  # fmt: skip
    return PipelineRates(**values | more)


def error(n):
    fields = {"model": "m", "worker": str(n), "role": "serving", "last_words": "x\ny"}
    return {"time_s": 1e9, "level": "error", "event": "worker lost", "fields": fields}


def rates(*models, errors=1, pipelines=()):
    last_errors = [error(i) for i in range(errors)]
    return Rates(
        1.0, False, 3661.0, 4, 12347.1, 1.5, 0.43, 80_000_000, list(models), list(pipelines), last_errors
    )


def shown(*arguments):
    return [line.plain for line in draw(*arguments)]


def test_what_is_drawn():
    lines = shown(rates(model("digits")), "ipc:///s", 100, None)
    assert lines[0].startswith("pool top  ipc:///s  up 1:01:01  ")
    assert lines[1] == ("12,347 requests/s in 1.0 s, 4 clients, front 43% CPU, 80.0 MB in all, 1.5 errors/s")
    assert lines[2] == (
        "digits ready  12,346/s  1.5 errors/s  64 waiting  61.2 rows/batch 96%  full 90% idle_worker 10%"
    )
    assert lines[3].split() == list(STAGES)
    assert lines[4].split() == ["p50", *["2.3", "ms"] * 5]
    assert lines[5].split() == ["p99", *["1.5", "s"] * 5]
    assert lines[6].split() == ["WORKER", "STATE", "BUSY", "CPU", "BATCH/S", "PRIVATE", "RESTARTS"]
    assert lines[7].split() == ["digits/0", "busy", "██████░░", "72%", "50%", "1,234", "28.1", "MB", "1"]
    assert re.fullmatch(r"\d\d:\d\d:\d\d worker lost model=m worker=0", lines[9])
    assert len(lines) == 10


def test_a_model_that_nobody_asks_has_one_line():
    quiet = model("m", 0, quantiles=dict.fromkeys(STAGES), results_s=0.0, errors_s=0.0, rows_per_batch=None)
    assert shown(rates(quiet, errors=0), "ipc:///s", 80, None)[2:] == ["m ready  0/s  64 waiting"]


def test_pipelines_are_told_before_models():
    quiet = pipeline("q", quantiles=None, results_s=0.0, errors_s=0.0, under_way=0, waiting={})
    lines = shown(rates(model("m"), pipelines=[pipeline("faces"), quiet]), "ipc:///s", 120, None)
    assert lines[2:5] == [
        "faces ready  123/s  p50 2.3 ms p99 1.5 s  0.5 errors/s  1,017 under way  "
        "waiting: find 3 refine 1,001",
        "q ready  0/s  0 under way",
        "m ready  12,346/s  1.5 errors/s  64 waiting  61.2 rows/batch 96%  full 90% idle_worker 10%",
    ]
    lines = shown(rates(model("m"), pipelines=[pipeline(f"p{i}") for i in range(20)]), "ipc:///s", 80, 24)
    assert [line.split()[0] for line in lines[2:8]] == ["p0", "p1", "p2", "p3", "p4", "..."]
    assert lines[7] == "... 15 more pipelines"
    assert lines[8].startswith("m ready  ")


@pytest.mark.parametrize("height", [3, 5, 10, 24, 50])
@pytest.mark.parametrize("count", [1, 3, 20])
@pytest.mark.parametrize("workers", [0, 2, 30])
def test_it_fits_any_terminal(height, count, workers):
    name = "a-model-with-a-rather-long-name-" * 3
    many = [model(name, workers) for _ in range(count)]
    many = rates(*many, errors=9, pipelines=[pipeline(name)] * (count // 2))
    for width in (40, 80):
        lines = draw(many, "ipc:///" + "x" * 90, width, height, "the server went away")
        assert len(lines) <= height
        assert all(line.cell_len <= width for line in lines)


def test_models_and_workers_that_have_no_room_are_counted():
    lines = shown(rates(*[model(f"m{i}", 10) for i in range(15)]), "ipc:///s", 80, 24)
    assert "... 6 more models" in lines
    assert any(re.fullmatch(r"\.\.\. \d+ more workers", line) for line in lines)
    assert lines[-1].endswith("worker=0")


def test_models_are_told_shortly_before_they_are_left_out():
    name = "a-model-with-a-rather-long-name"
    lines = shown(rates(*[model(f"{i}-{name}", 2) for i in range(8)], errors=0), "ipc:///s", 80, 24)
    assert lines[2] == ("0-a-model-with-a-rather… ready  12,346/s  p50 2.3 ms p99 1.5 s  1.5 errors/s  6…")
    assert [line[0] for line in lines[2:10]] == list("01234567")
    assert lines[10].startswith("WORKER ")
    assert lines[12].startswith("0-a-model-with-a…/1 ")
    # The busiest come first, and keep their stages for longest.
    lines = shown(rates(*[model(f"m{i}", 2) for i in range(3)], errors=0), "ipc:///s", 80, 15)
    assert [line.split()[0] for line in lines[2:]][:6] == ["m0", "total", "p50", "p99", "m1", "m2"]


def test_what_a_server_says_cannot_steer_the_terminal():
    escape = "\x1b[2J"
    hostile = rates(
        model(f"{escape}m", state=f"failed: {escape}", closed=[(escape, 1.0)]),
        pipelines=[pipeline(escape, state=escape, waiting={escape: 1})],
    )
    hostile.models[0].workers[0] = worker(f"{escape}/0", state=escape)
    hostile.last_errors[0]["fields"]["model"] = "\x1b]0;title\x07"
    assert not any(ord(c) < 32 for line in shown(hostile, "w", 200, 24, "\x1b[31m") for c in line)


# -- real terminals ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(start_server, tmp_path_factory):
    folder = tmp_path_factory.mktemp("top")
    (folder / "drill.toml").write_text("")
    text = f'[models.digits]\nbackend = "drill"\npath = "{folder}"\nworkers = 2\n'
    with start_server(folder, text) as running, Client(running.endpoint) as client:
        inputs = {"x": np.zeros((8, 4), np.float32), "fault": np.zeros(8, np.int32)}
        for _ in range(20):
            client.predict("digits", inputs | {"argument": np.zeros(8, np.float32)})
        yield running


def check_screen(lines):
    assert lines[0].startswith("pool top  ipc://")
    assert re.match(
        r"[\d,.]+ requests/s (since its start|in \d\.\d s), \d clients, front \d+% CPU, ", lines[1]
    )
    assert any(line.startswith("digits ready  ") for line in lines)
    assert [line.split()[0] for line in lines if line.startswith("digits/")] == ["digits/0", "digits/1"]


def test_once_prints_a_table(server, capsys):
    assert main(["top", "--once", "--interval", "0.01", "--endpoint", server.endpoint]) == 0
    check_screen(capsys.readouterr().out.splitlines())


def test_without_a_server_it_says_so(tmp_path, capsys):
    code = main(["top", "--once", "--timeout", "0.1", "--endpoint", f"ipc://{tmp_path}/none"])
    assert code == 1
    assert "UNAVAILABLE" in capsys.readouterr().err


def command(server):
    return [sys.executable, "-m", "pool", "top", "--interval", "0.1", "--endpoint", server.endpoint]


@pytest.mark.skipif(TMUX is None, reason="tmux is not installed")
def test_in_tmux(server, tmp_path):
    def tmux(*arguments):
        socket = str(tmp_path / "t")
        return subprocess.run(
            [TMUX, "-S", socket, *arguments], check=True, capture_output=True, text=True
        ).stdout

    status = tmp_path / "status"
    line = " ".join(command(server)) + f"; echo $? > {status}.new; mv {status}.new {status}; sleep 60"
    stopped = False
    tmux("-f", "/dev/null", "new-session", "-d", "-x", "80", "-y", "24", line)
    try:
        deadline = time.monotonic() + PATIENCE_S
        while not (screen := tmux("capture-pane", "-p")).startswith("pool top") or " in 0." not in screen:
            assert time.monotonic() < deadline, screen
            time.sleep(0.05)
        lines = screen.splitlines()
        check_screen(lines)
        assert len(lines) <= 24
        # It stands still, and the view goes on.
        os.kill(server.process.pid, signal.SIGSTOP)
        try:
            while "no answer yet" not in tmux("capture-pane", "-p"):
                assert time.monotonic() < deadline
                time.sleep(0.05)
        finally:
            os.kill(server.process.pid, signal.SIGCONT)
        while "no answer yet" in tmux("capture-pane", "-p"):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(server.process.pid, signal.SIGSTOP)
        stopped = True
        tmux("send-keys", "q")
        while not status.exists():
            assert time.monotonic() < deadline, tmux("capture-pane", "-p")
            time.sleep(0.05)
        assert status.read_text() == "0\n"
        assert "pool top" not in tmux("capture-pane", "-p")  # the screen from before is back
    finally:
        tmux("kill-server")
        if stopped:
            os.kill(server.process.pid, signal.SIGCONT)


def test_in_a_terminal_it_goes_on_until_told_and_leaves_it_as_it_was(server):
    master, slave = pty.openpty()
    try:
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        before = termios.tcgetattr(slave)
        environment = os.environ | {"TERM": "xterm"}
        process = subprocess.Popen(command(server), stdin=slave, stdout=slave, stderr=slave, env=environment)
        seen = b""
        while seen.count(b"pool top") < 3:
            seen += os.read(master, 65536)
        assert b"digits/1" in seen
        os.write(master, b"xq")
        while b"\x1b[?1049l" not in seen:  # back to the screen from before
            seen += os.read(master, 65536)
        assert process.wait(PATIENCE_S) == 0
        assert termios.tcgetattr(slave) == before
    finally:
        os.close(master)
        os.close(slave)
