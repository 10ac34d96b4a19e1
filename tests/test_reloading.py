"""Serving another configuration without a stop, on a real server under load."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
from types import SimpleNamespace

import numpy as np
import psutil
import pytest

from pool import Client, ModelNotFound
from pool.__main__ import main
from pool.backends import drill
from pool.cli import reload as reload_command
from pool.config import Config
from pool.front import reloading
from pool.front.engine import Engine
from pool.front.reloading import Reloads

PATIENCE_S = 40.0

HEAD = '[server]\nendpoints = ["ipc://{folder}/pool.sock"]\n'
MODEL = '[models.{name}]\nbackend = "drill"\npath = "{folder}/{name}"\n'


@pytest.fixture(autouse=True)
def _nothing_is_left_behind():
    """Here workers come and go within a test: `site` looks for what is left instead."""
    return


class Site:
    """A server, its configuration, and load on it whose every answer is checked."""

    def __init__(self, folder, server):
        self.folder = folder
        self.server = server
        self.client = Client(server.endpoint)
        self.answered = 0
        self.failures = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(n,)) for n in range(3)]
        for thread in self._threads:
            thread.start()

    def _ask(self, number):
        with Client(self.server.endpoint, share_memory=number != 1) as client:
            n = 0
            while not self._stop.is_set():
                n += 1
                x = np.full((1 + n % 3, 4), number * 1000 + n % 1000, np.float32)
                fault = np.zeros(len(x), np.int32)
                try:
                    got = client.predict(
                        "a", {"x": x, "fault": fault, "argument": np.zeros(len(x), np.float32)}
                    )
                    versions = [v for v in (1, 2, 3) if np.array_equal(got["y"], drill.answer(x, v))]
                    if not versions:
                        self.failures.append("wrong")
                except Exception as e:
                    self.failures.append(repr(e))
                self.answered += 1

    def write(self, *models, server=""):
        text = HEAD.format(folder=self.folder) + server + "\n"
        for name, keys in models:
            text += MODEL.format(name=name, folder=self.folder) + keys + "\n"
        self.server.config.write_text(text)

    def reload(self, *arguments):
        done = subprocess.run(
            [sys.executable, "-m", "pool", "reload", "--endpoint", self.server.endpoint, *arguments],
            capture_output=True,
            text=True,
            check=False,
        )
        return done.returncode, done.stdout, done.stderr

    def changes(self, *arguments):
        code, out, err = self.reload("--json", *arguments)
        assert (code, err) == (0, "")
        return json.loads(out)["changes"]

    def model(self, name="a"):
        return self.client.status()["models"][name]

    def go_on(self):
        """Wait for some more answers."""
        target = self.answered + 30
        while self.answered < target:
            assert not self.failures, self.failures[:3]

    def close(self):
        self._stop.set()
        for thread in self._threads:
            thread.join()
        self.client.close()
        assert self.failures == []


@pytest.fixture(scope="module")
def site(start_server, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reloading")
    for name in ("a", "b", "bad"):
        version = folder / name / "1"
        version.mkdir(parents=True)
        (version / "drill.toml").write_text("no TOML" if name == "bad" else "batch_s = 0.001")
    with start_server(folder, MODEL.format(name="a", folder=folder)) as server:
        made = Site(folder, server)
        made.write(("a", ""))
        made.go_on()
        yield made
        made.close()
        left = psutil.Process(server.process.pid).children(recursive=True)
    _, alive = psutil.wait_procs(left, 5)
    assert not alive, "processes left behind"


def test_nothing_changes(site):
    assert site.changes() == []
    site.go_on()


def test_settings_change_in_place(site):
    before = [worker["pid"] for worker in site.model()["workers"]]
    site.write(("a", "timeout_ms = 5000\nmax_queue_delay_ms = 1\npriority = 2"), server="log_level = 'debug'")
    assert site.changes("--dry-run") == site.changes()
    assert site.client.status()["front"]["config"]["models"]["a"]["max_queue_delay_ms"] == 1.0
    site.go_on()
    assert [worker["pid"] for worker in site.model()["workers"]] == before


def test_workers_are_added_and_let_go(site):
    site.write(("a", "workers = 3\nthreads = 1"))
    site.changes()
    site.write(("a", "workers = 3\nthreads = 1\ntimeout_ms = 4000"))
    while [worker["state"] in ("ready", "busy") for worker in site.model()["workers"]] != [True] * 3:
        site.go_on()
    site.write(("a", "workers = 2\nthreads = 1"))
    changes = site.changes()
    assert "models.a.workers: 3 -> 2: workers are started or leave" in changes
    site.go_on()
    assert len(site.model()["workers"]) == 2


def test_a_new_arena_takes_over_from_the_old_one(site):
    before = site.model()
    site.write(("a", "workers = 2\nthreads = 1\nmax_batch_size = 8"))
    (change,) = site.changes()
    assert change.startswith("models.a.max_batch_size: 64 -> 8: new arena and workers")
    site.go_on()
    after = site.model()
    assert after["max_batch_size"] == 8
    assert after["batches"] > before["batches"]
    gone = {worker["pid"] for worker in before["workers"]} - {worker["pid"] for worker in after["workers"]}
    assert len(gone) == 2
    for pid in gone:
        while psutil.pid_exists(pid):
            site.go_on()


def test_a_new_version_is_found_and_an_old_one_can_be_named(site):
    version = site.folder / "a" / "2"
    version.mkdir()
    (version / "drill.toml").write_text("batch_s = 0.001")
    assert site.changes("--dry-run") == site.changes()
    assert site.model()["version"] == 2
    site.go_on()
    site.write(("a", "version = 1"))
    site.changes()
    assert site.model()["version"] == 1
    site.go_on()


def test_models_come_and_go(site):
    site.write(("a", "version = 1"), ("b", ""))
    assert site.changes() == ["models.b: added: a model is loaded"]
    x = np.ones((1, 4), np.float32)
    inputs = {"x": x, "fault": np.zeros(1, np.int32), "argument": np.zeros(1, np.float32)}
    assert site.client.predict("b", inputs)["y"].tolist() == drill.answer(x, 1).tolist()
    site.write(("a", "version = 1"))
    assert site.changes() == ["models.b: removed: a model answers what it admitted, and ends"]
    with pytest.raises(ModelNotFound, match="no model 'b'; wanted one of 'a'"):
        site.client.predict("b", inputs)
    site.go_on()


@pytest.mark.parametrize(
    ("models", "server", "code", "sentence"),
    [
        ([("a", "workers = 0")], "", 2, "models.a.workers: must be an integer from 1 to 1024, got 0"),
        ([("a", "max_batch_size = 4"), ("bad", "")], "", 1, "model 'bad'"),
        (
            [("a", "version = 1")],
            "max_message_bytes = 100000",
            1,
            "server.max_message_bytes: 1073741824 -> 100000",
        ),
    ],
)
def test_a_file_that_is_wrong_changes_nothing(site, capsys, models, server, code, sentence):
    before = site.client.status()["front"]["config"]
    pids = [worker["pid"] for worker in site.model()["workers"]]
    site.write(*models, server=server)
    got, _, err = site.reload()
    assert got == code
    assert sentence in err
    # The same by signal, which is how a service manager asks.
    count = site.client.status()["front"]["reload"]["count"]
    os.kill(site.server.process.pid, signal.SIGHUP)
    while site.client.status()["front"]["reload"]["count"] == count:
        site.go_on()
    refused = site.client.status()["front"]["reload"]["error"]
    assert sentence in refused
    capsys.readouterr()
    assert main(["status", "--endpoint", site.server.endpoint]) == 0
    told = "".join(capsys.readouterr().out.split())  # whose lines are broken where the terminal ends
    assert "".join(f"the last reload was refused: {refused}".split()) in told
    assert site.client.status()["front"]["config"] == before
    assert [worker["pid"] for worker in site.model()["workers"]] == pids
    site.go_on()


def reloads_of(site):
    return site.client.status()["front"]["reload"]


def by_another(site):
    """Somebody else's reload, to its end."""
    count = reloads_of(site)["count"]
    os.kill(site.server.process.pid, signal.SIGHUP)
    while reloads_of(site)["count"] == count:
        site.go_on()


def own_changes(capsys, site):
    """What `pool reload` in this process says that it has changed."""
    capsys.readouterr()
    assert main(["reload", "--json", "--endpoint", site.server.endpoint]) == 0
    return json.loads(capsys.readouterr().out)["changes"]


def test_what_was_under_way_is_not_taken_for_ones_own(site, capsys, monkeypatch):
    """Even if the signal comes to the server after that is over."""
    site.write(("a", "version = 1"))
    by_another(site)
    (zygote,) = site.client.status()["zygotes"]
    os.kill(zygote["pid"], signal.SIGSTOP)  # it loads nothing until it goes on
    site.write(("a", "version = 1"), ("b", ""))
    count = reloads_of(site)["count"]
    os.kill(site.server.process.pid, signal.SIGHUP)
    while not reloads_of(site)["is_reloading"]:
        site.go_on()
    kept = []

    def kill_later(pid, number):
        kept.append((pid, number))
        os.kill(zygote["pid"], signal.SIGCONT)
        while reloads_of(site)["count"] == count:
            site.go_on()

    def sleep(_):
        if kept:
            os.kill(*kept.pop())
        site.go_on()

    monkeypatch.setattr(reload_command, "os", SimpleNamespace(kill=kill_later, path=os.path))
    monkeypatch.setattr(reload_command, "time", SimpleNamespace(sleep=sleep))
    assert own_changes(capsys, site) == []
    assert reloads_of(site)["count"] == count + 2


def test_what_came_after_is_not_taken_for_ones_own(site, capsys, monkeypatch):
    site.write(("a", "version = 1"), ("b", ""))
    by_another(site)
    site.write(("a", "version = 1"))

    def kill(_pid, _number):
        by_another(site)  # for whoever asked, its own
        by_another(site)

    monkeypatch.setattr(reload_command, "os", SimpleNamespace(kill=kill, path=os.path))
    assert own_changes(capsys, site) == ["models.b: removed: a model answers what it admitted, and ends"]
    first, second = reloads_of(site)["outcomes"][-2:]
    assert second["number"] == first["number"] + 1 == reloads_of(site)["begun"]
    assert second["changes"] == []


def test_a_reload_that_fails_as_nobody_foresaw_is_not_the_last(tmp_path, monkeypatch):
    """The manager hears that it is over, whoever asked is told, and the next one is begun."""

    def fail(_):
        raise ZeroDivisionError("of the reader")

    async def main():
        told = []
        engine = Engine(Config(models={}))
        reloads = Reloads(engine, str(tmp_path / "none.toml"), told.append)
        with monkeypatch.context() as broken:
            broken.setattr(reloading, "load_config", fail)
            reloads.ask()
            while reloads.is_reloading:
                await asyncio.sleep(0.001)
        assert reloads.outcomes[-1].error == "ZeroDivisionError: of the reader"
        reloads.ask()
        while reloads.is_reloading:
            await asyncio.sleep(0.001)
        assert "none.toml: file: must be readable" in reloads.outcomes[-1].error
        assert (reloads.begun, told) == (2, [True, False, True, False])
        await engine.stop()

    asyncio.run(asyncio.wait_for(main(), PATIENCE_S))
