"""Several fronts that share their workers, on real servers: who is reached, who answers, and who dies.

A client is held to one front by its endpoint: `PATH` is the lead's, `PATH.1` the follower's. What chooses
among them is switched off here (`connection.choose_front`) but where it is what is tested.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from pool import AsyncClient, Client, DeadlineExceeded, PoolError, Retry, Unavailable, WorkerLost
from pool.backends import drill
from pool.backends.drill import Fault
from pool.client import connection
from pool.endpoints import side_path
from tests.raw import await_that
from tests.test_access import NOBODY, another_user, as_root, forbidden, set_uids
from tests.test_server import free_port

CHOOSE_FRONT = connection.choose_front

MODELS = """
[models.one]
backend = "drill"
path = "{folder}/one"
version = 1
workers = 2
max_batch_size = 8
timeout_ms = 500

[models.slow]
backend = "drill"
path = "{folder}/slow.toml"
max_batch_size = 1
timeout_ms = 500

[models.wide]
backend = "drill"
path = "{folder}/wide.toml"
max_batch_size = 4
slots = 6

[models.lent]
backend = "python"
path = "{folder}/lent.py:double"
max_batch_size = 1
slots = 6
"""
FUNCTION = """
from pool.python import model


@model(inputs={"x": "float32 [any, 50000]"}, outputs={"y": "float32 [any, 50000]"})
def double(x):
    return x * 2
"""
GONE_S = 5.0  # far more than it takes, on a machine that does much else


@pytest.fixture(autouse=True)
def _nothing_is_left_behind():
    """Here workers and fronts are replaced within a test: those who start servers look for what is left."""
    return


@pytest.fixture(scope="module", autouse=True)
def _clients_are_held():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(connection, "choose_front", lambda endpoint: endpoint)
        yield


def write_models(folder):
    for version in ("1", "2"):
        (folder / "one" / version).mkdir(parents=True)
        (folder / "one" / version / "drill.toml").write_text("batch_s = 0.001\n")
    (folder / "wide.toml").write_text("row_items = 50000\n")
    (folder / "slow.toml").write_text("batch_s = 0.3\n")
    (folder / "lent.py").write_text(FUNCTION)
    return MODELS.format(folder=folder)


def inputs(x, fault=Fault.NONE, argument=0.0):
    rows = len(x)
    return {"x": x, "fault": np.full(rows, fault, np.int32), "argument": np.full(rows, argument, np.float32)}


class Load:
    """Clients that ask without end, over lines and through ZeroMQ by turns, and check every answer.

    Args:
        endpoints: One client each.
        versions: Of the model; the answers of any of them are right.
        retry: Of the clients.
    """

    def __init__(self, *endpoints, versions=(1,), retry=None):
        self.answered = [0] * len(endpoints)
        self.failures = []
        self._versions = versions
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._ask, args=(i, endpoint, retry), daemon=True)
            for i, endpoint in enumerate(endpoints)
        ]
        for thread in self._threads:
            thread.start()

    def _ask(self, number, endpoint, retry):
        with (
            Client(endpoint, retry=retry) as local,
            Client(endpoint, retry=retry, share_memory=False) as plain,
        ):
            n = 0
            while not self._stop.is_set():
                n += 1
                client = (local, plain)[n % 2]
                x = np.full((1 + n % 3, 4), number * 100_000 + n % 100_000, np.float32)
                try:
                    got = client.predict("one", inputs(x))["y"]
                    if not any(np.array_equal(got, drill.answer(x, v)) for v in self._versions):
                        self.failures.append(f"client {number}: wrong")
                except Exception as e:
                    self.failures.append(f"client {number}: {e!r}")
                self.answered[number] += 1

    def go_on(self, count=30):
        """Wait for some more answers of each client."""
        wanted = [n + count for n in self.answered]

        def is_there():
            assert not self.failures, self.failures[:3]
            time.sleep(0.005)
            return all(n >= w for n, w in zip(self.answered, wanted, strict=True))

        await_that(is_there)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._stop.set()
        for thread in self._threads:
            thread.join()
        assert self.failures == []


class Site:
    """A server with two fronts."""

    def __init__(self, server, text):
        self.server = server
        self.text = text
        self.lead = server.endpoint
        self.other = f"{server.endpoint}.1"
        self.client = Client(self.lead)
        await_that(self.is_whole)

    def fronts(self):
        return self.client.status()["fronts"]

    def is_whole(self):
        """Whether all fronts and all workers are there."""
        status = self.client.status()
        workers = [worker for model in status["models"].values() for worker in model["workers"]]
        return [f["state"] for f in status["fronts"]] == ["serving"] * 2 and all(
            worker["state"] in ("ready", "busy") for worker in workers
        )

    def model(self, name="one"):
        return self.client.status()["models"][name]

    def pids(self, name="one"):
        return [worker["pid"] for worker in self.model(name)["workers"]]


@pytest.fixture(scope="module")
def site(start_server, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fronts")
    text = write_models(folder)
    endpoints = [f"ipc://{folder}/pool.sock", f"tcp://127.0.0.1:{free_port()}"]
    keys = 'fronts = 2\nmetrics = "127.0.0.1:*"'
    with start_server(folder, text, server=keys, endpoints=endpoints) as server:
        made = Site(server, text)
        yield made
        made.client.close()
        left = psutil.Process(server.process.pid).children(recursive=True)
    _, alive = psutil.wait_procs(left, GONE_S)
    assert not alive, "processes left behind"
    assert not list(folder.glob("pool.sock*")), "socket files left behind"


@contextlib.contextmanager
def alone(start_server, folder, keys="fronts = 2"):
    """A server of its own."""
    text = write_models(folder)
    with start_server(folder, text, server=keys) as server:
        made = Site(server, text)
        processes = psutil.Process(server.process.pid).children(recursive=True)
        try:
            yield made, processes
        finally:
            made.client.close()


# -- who is reached ----------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [0, 1], ids=["ipc", "tcp"])
def test_clients_are_spread_over_the_fronts(site, monkeypatch, place):
    monkeypatch.setattr(connection, "choose_front", CHOOSE_FRONT)
    before = [front["requests"] for front in site.fronts()]
    clients = []

    def are_both_reached():
        clients.append(Client(site.server.endpoints[place]))
        x = np.full((1, 4), len(clients), np.float32)
        assert clients[-1].predict("one", inputs(x))["y"].tolist() == drill.answer(x, 1).tolist()
        return all(now["requests"] > then for now, then in zip(site.fronts(), before, strict=True))

    await_that(are_both_reached)
    for client in clients:
        client.close()
    assert len(clients) < 40


def test_a_question_to_a_follower_is_answered_as_by_the_lead(site):
    with Client(site.other) as client:
        status = client.status()
        assert status["front"]["pid"] == site.server.process.pid
        assert client.ready()
        assert client.models() == site.client.models()
        assert client.signature("one") == site.client.signature("one")
        assert status["fronts"][1]["pid"] != site.server.process.pid
        assert status["fronts"][1]["endpoints"][0] == site.other


def test_a_port_that_is_taken_is_an_error(site, tmp_path):
    config = tmp_path / "second.toml"
    port = site.server.endpoints[1]
    config.write_text(f'[server]\nendpoints = ["{port}"]\nfronts = 2\n{site.text}')
    command = [sys.executable, "-m", "pool", "serve", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert "Address already in use" in done.stderr


# -- answers -----------------------------------------------------------------------------------------


def test_answers_are_right_and_add_up(site):
    def counted():
        status = site.client.status()
        model = status["models"]["one"]
        return model["answers"].get("OK", 0), status["front"]["requests"], model["stages"]["total"]["counts"]

    before = counted()
    with Load(site.lead, site.lead, site.other, site.other) as load:
        load.go_on(100)
    asked = sum(load.answered)
    after = counted()
    assert after[0] - before[0] == asked
    assert after[1] - before[1] == asked
    assert sum(after[2]) - sum(before[2]) == asked
    status = site.client.status()
    assert sum(front["requests"] for front in status["fronts"]) == status["front"]["requests"]
    model = status["models"]["one"]
    assert sum(worker["rows"] for worker in model["workers"]) == model["rows"]


def test_metrics_are_of_all_fronts(site):
    with Load(site.lead, site.other) as load:
        load.go_on()
    address = site.client.status()["front"]["metrics"]
    samples = {}

    def is_all_counted():
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=20) as answer:
            text = answer.read().decode()
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                samples[(sample.name, *(v for _, v in sorted(sample.labels.items())))] = sample.value
        status = site.client.status()
        return samples["pool_admitted_requests_total",] == status["front"]["requests"]

    await_that(is_all_counted)
    by_front = [samples["pool_front_requests_total", number] for number in ("0", "1")]
    assert all(by_front)
    assert sum(by_front) == samples["pool_admitted_requests_total",]
    assert samples["pool_front_up", "1"] == 1
    assert samples["pool_process_cpu_seconds_total", "", "front", "1"] > 0


def test_tensors_of_a_clients_memory_come_to_a_follower(site):
    before = site.client.status()["front"]["regions"]["requests"]
    with Client(site.other) as client:
        for n in range(8):
            x = np.full((4, 50_000), n, np.float32)
            np.testing.assert_array_equal(client.predict("wide", inputs(x))["y"], drill.answer(x, 1))
    assert site.client.status()["front"]["regions"]["requests"] > before


def test_lines_are_of_one_front_each_and_counted_together(site):
    await_that(lambda: site.client.status()["front"]["lines"] <= 1)
    with Client(site.lead) as one, Client(site.other) as other:
        for n in range(6):
            x = np.full((1, 4), n, np.float32)
            for client in (one, other):
                np.testing.assert_array_equal(client.predict("one", inputs(x))["y"], drill.answer(x, 1))
        had = site.client.status()["front"]["lines"]
        assert had >= 2
        for client in (one, other):
            assert client._idle[0].line is not None
    await_that(lambda: site.client.status()["front"]["lines"] == had - 2)


def test_workers_run_on_the_memory_of_a_followers_client(site):
    worker = Path(f"/proc/{site.pids('lent')[0]}/maps")
    with Client(site.other) as client:
        for n in range(8):
            x = np.full((1, 50_000), n, np.float32)
            np.testing.assert_array_equal(client.predict("lent", x)["y"], x * 2)
        assert "memfd:pool-region" in worker.read_text()
    await_that(lambda: "memfd:pool-region" not in worker.read_text())


def test_deadlines_and_cancels_hold_at_a_follower(site):
    with Client(site.other) as client, pytest.raises(DeadlineExceeded):
        client.predict("one", inputs(np.ones((1, 4), np.float32), Fault.SLEEP, 0.3), timeout=0.05)

    async def cancel():
        async with AsyncClient(site.other) as client:
            x = np.ones((1, 4), np.float32)
            task = asyncio.ensure_future(client.predict("one", inputs(x, Fault.SLEEP, 0.3)))
            await asyncio.sleep(0.05)
            task.cancel()
            await asyncio.wait([task])
            assert task.cancelled()
            return await client.predict("one", inputs(x))

    before = site.model()["answers"].get("CANCELLED", 0)
    assert asyncio.run(cancel())["y"].tolist() == [[3.0] * 4]
    await_that(lambda: site.model()["answers"].get("CANCELLED", 0) == before + 1)


# -- workers that die --------------------------------------------------------------------------------


def test_a_worker_that_is_killed_costs_nobody_an_answer(site):
    with Load(site.lead, site.lead, site.other, site.other) as load:
        load.go_on()
        for pid in site.pids():
            os.kill(pid, signal.SIGKILL)
            load.go_on()
            await_that(lambda pid=pid: pid not in site.pids() and site.is_whole())
        load.go_on()


@pytest.mark.parametrize("fault", [Fault.SEGFAULT, Fault.HANG_NATIVE], ids=["crash", "hang"])
@pytest.mark.parametrize("guilty", ["lead", "other"])
def test_the_row_of_a_client_that_kills_costs_those_of_another_front_nothing(site, fault, guilty):
    innocent = site.other if guilty == "lead" else site.lead
    with Load(innocent, innocent) as load, Client(getattr(site, guilty)) as client:
        load.go_on()
        x = np.full((1, 4), 1000 * time.monotonic() % 100_000, np.float32)
        with pytest.raises(WorkerLost):
            client.predict("one", inputs(x, fault))
        load.go_on()
        with pytest.raises(WorkerLost, match="the same request came before"):
            client.predict("one", inputs(x, fault))
    await_that(site.is_whole)


def test_workers_that_are_stopped_for_good_are_replaced(site):
    before = site.pids()
    with Load(site.lead, site.lead, site.other, site.other) as load:
        load.go_on()
        for pid in before:
            os.kill(pid, signal.SIGSTOP)
        load.go_on()
    await_that(lambda: not set(before) & set(site.pids()) and site.is_whole())


def test_what_a_dead_front_left_a_worker_with_does_not_hold_up_others(site):
    before, pid = site.pids("slow"), site.fronts()[1]["pid"]
    x = np.full((1, 4), 77, np.float32)
    with Client(site.other) as client, ThreadPoolExecutor(1) as threads:
        hanging = threads.submit(client.predict, "slow", inputs(x, Fault.HANG_NATIVE))
        await_that(lambda: site.model("slow")["workers"][0]["state"] == "ready")
        time.sleep(0.1)  # until it hangs
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(Unavailable):
            hanging.result()
    assert site.client.predict("slow", inputs(x))["y"].tolist() == drill.answer(x, 1).tolist()
    await_that(lambda: site.pids("slow") != before and site.is_whole())


def test_one_bad_row_of_a_batch_is_found_at_a_follower(site):
    async def ask():
        async with AsyncClient(site.other) as client:
            busy = [
                asyncio.ensure_future(
                    client.predict("one", inputs(np.full((1, 4), i, np.float32), Fault.SLEEP, 0.1))
                )
                for i in range(2)
            ]
            await asyncio.sleep(0.03)
            rows = [np.full((1, 4), 5000 + i, np.float32) for i in range(8)]
            faults = [Fault.ABORT if i == 3 else Fault.NONE for i in range(8)]
            answers = await asyncio.gather(
                *(client.predict("one", inputs(x, fault)) for x, fault in zip(rows, faults, strict=True)),
                return_exceptions=True,
            )
            await asyncio.gather(*busy)
            return rows, answers

    rows, answers = asyncio.run(ask())
    for i, (x, answer) in enumerate(zip(rows, answers, strict=True)):
        if i == 3:
            assert isinstance(answer, WorkerLost)
        else:
            assert answer["y"].tolist() == drill.answer(x, 1).tolist()
    await_that(site.is_whole)


def test_the_time_of_a_batch_begins_when_its_worker_begins(site):
    before = site.model("slow")["restarts"]

    def ask(endpoint):
        with Client(endpoint) as client:
            return client.predict("slow", inputs(np.ones((1, 4), np.float32)))["y"].tolist()

    # The last one waits for 1.5 s, of which its worker has three batches of other fronts, or its own.
    with ThreadPoolExecutor(6) as threads:
        answers = list(threads.map(ask, [site.lead, site.other] * 3))
    assert answers == [[[3.0] * 4]] * 6
    assert site.model("slow")["restarts"] == before


# -- fronts that die ---------------------------------------------------------------------------------


def test_a_follower_that_is_killed_comes_back_and_others_notice_nothing(site):
    before = site.fronts()[1]
    counted = site.client.status()["front"]["requests"]
    with Load(site.lead) as load:
        with Load(site.other, retry=Retry(attempts=100, longest_pause=0.2)) as retrying:
            retrying.go_on()
            os.kill(before["pid"], signal.SIGKILL)
            load.go_on()
            await_that(site.is_whole)
            retrying.go_on()
        load.go_on()
    after = site.fronts()[1]
    assert after["pid"] != before["pid"]
    assert after["restarts"] == before["restarts"] + 1
    assert "SIGKILL" in after["last_error"]
    assert site.client.status()["front"]["requests"] > counted
    assert not psutil.pid_exists(before["pid"])


def test_clients_go_to_another_front_when_theirs_is_gone(site, monkeypatch):
    monkeypatch.setattr(connection, "choose_front", CHOOSE_FRONT)
    retry = Retry(attempts=20, longest_pause=0.1)
    with Load(*[site.lead] * 4, retry=retry) as load:
        load.go_on()
        os.kill(site.fronts()[1]["pid"], signal.SIGKILL)
        load.go_on()
    await_that(site.is_whole)


def test_a_follower_that_hangs_is_replaced(site):
    before = site.fronts()[1]
    with Load(site.lead) as load:
        os.kill(before["pid"], signal.SIGSTOP)
        await_that(lambda: site.fronts()[1]["pid"] not in (None, before["pid"]) and site.is_whole())
        load.go_on()
    assert "front hangs" in site.server.log.read_text()
    with Load(site.other) as load:
        load.go_on()


def test_no_memory_of_a_dead_front_stays_with_the_workers(site):
    def arenas():
        found = []
        for pid in site.pids():
            lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
            found.append(len({line.split()[4] for line in lines if "memfd:pool-arena" in line}))
        return found

    await_that(lambda: arenas() == [2, 2])


def test_when_the_lead_is_killed_all_are_gone(tmp_path):
    config = tmp_path / "pool.toml"
    config.write_text(
        f'[server]\nendpoints = ["ipc://{tmp_path}/pool.sock"]\nfronts = 3\n{write_models(tmp_path)}'
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "pool", "serve", str(config)], stderr=subprocess.DEVNULL
    )
    endpoint = f"ipc://{tmp_path}/pool.sock"
    with Client(endpoint) as client:

        def is_whole():
            return client.ready() and [f["state"] for f in client.status()["fronts"]] == ["serving"] * 3

        await_that(is_whole)
        others = psutil.Process(process.pid).children(recursive=True)
        os.kill(others[0].pid, signal.SIGSTOP)
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(others, GONE_S)
    assert not alive
    # Its file is there, as ever after such an end, and perhaps those of others. They hold nobody up.
    assert Path(endpoint.removeprefix("ipc://")).exists()
    assert CHOOSE_FRONT(endpoint) == endpoint


def test_a_start_with_fewer_fronts_removes_the_files_of_those_that_were_killed(tmp_path, start_server):
    (tmp_path / "one.toml").write_text("")
    text = f'[models.one]\nbackend = "drill"\npath = "{tmp_path}/one.toml"\nworkers = 1\n'
    config = tmp_path / "pool.toml"
    config.write_text(f'[server]\nendpoints = ["ipc://{tmp_path}/pool.sock"]\nfronts = 4\n{text}')

    def files():
        return sorted(path.name.removeprefix("pool.sock") for path in tmp_path.glob("pool.sock*"))

    process = subprocess.Popen(
        [sys.executable, "-m", "pool", "serve", str(config)], stderr=subprocess.DEVNULL
    )
    with Client(f"ipc://{tmp_path}/pool.sock") as client:
        await_that(lambda: client.ready() and {f["state"] for f in client.status()["fronts"]} == {"serving"})
        others = psutil.Process(process.pid).children(recursive=True)
        fronts = [front["pid"] for front in client.status()["fronts"]]
    for pid in fronts:
        os.kill(pid, signal.SIGSTOP)  # so that none removes its files when another ends
    for pid in reversed(fronts):
        os.kill(pid, signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs(others, GONE_S)
    assert not alive
    left = ["", ".1", ".1.fd", ".2", ".2.fd", ".3", ".3.fd", ".fd"]
    assert files() == left
    with start_server(tmp_path, text, server="fronts = 2") as server, Client(server.endpoint) as client:
        await_that(lambda: {f["state"] for f in client.status()["fronts"]} == {"serving"})
        assert files() == ["", ".1", ".1.fd", ".fd"]
    assert files() == []


@as_root
def test_users_who_are_not_listed_are_refused_by_a_follower_too(start_server):
    with tempfile.TemporaryDirectory(prefix="pool-fronts-") as directory:
        folder = Path(directory)
        folder.chmod(0o755)  # for whoever that is
        (folder / "one.toml").write_text("")
        text = f'[models.one]\nbackend = "drill"\npath = "{folder}/one.toml"\nworkers = 1\n'
        keys = 'fronts = 2\nipc_mode = "0666"\nipc_uids = [4711]'
        with start_server(folder, text, server=keys) as server, Client(server.endpoint) as own:

            def refused():
                return own.status()["front"]["refused_connections"]

            await_that(lambda: {f["state"] for f in own.status()["fronts"]} == {"serving"})
            for count, place in enumerate((server.endpoint, f"{server.endpoint}.1"), 1):
                with another_user(), Client(place) as client, forbidden():
                    client.predict("one", inputs(np.ones((1, 4), np.float32)))
                assert refused() == count
            place = f"{server.endpoint}.1"
            with Client(place) as client:  # the server's own user
                assert client.live()
            set_uids(server, [NOBODY])
            with another_user(), Client(place) as client:
                assert client.predict("one", inputs(np.ones((1, 4), np.float32)))["y"].tolist() == [[3.0] * 4]
            set_uids(server, [4711])
            with another_user(), Client(place) as client, forbidden():
                client.live()


# -- reloads and the end -----------------------------------------------------------------------------


def test_a_reload_is_followed(tmp_path, start_server):
    with alone(start_server, tmp_path) as (site, _):

        def reload(change):
            text = change(site.server.config.read_text())
            site.server.config.write_text(text)
            command = [sys.executable, "-m", "pool", "reload", "--endpoint", site.lead]
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
            return done.returncode, done.stderr

        with Load(site.lead, site.other, versions=(1, 2)) as load:
            load.go_on()
            old = site.pids()
            assert reload(lambda text: text.replace("version = 1", "version = 2")) == (0, "")
            load.go_on()
            x = np.ones((1, 4), np.float32)
            for endpoint in (site.lead, site.other):
                with Client(endpoint) as client:
                    assert client.predict("one", inputs(x))["y"].tolist() == drill.answer(x, 2).tolist()
            await_that(lambda: not any(psutil.pid_exists(pid) for pid in old))
            assert reload(lambda text: text.replace("workers = 2", "workers = 3")) == (0, "")
            await_that(lambda: len(site.pids()) == 3 and site.is_whole())
            load.go_on()
            assert reload(lambda text: text.replace("workers = 3", "workers = 1")) == (0, "")
            load.go_on()
            await_that(lambda: len(site.pids()) == 1 and site.is_whole())
            assert reload(lambda text: text.split("[models.slow]")[0]) == (0, "")
            with Client(site.other) as client:
                assert set(client.models()) == {"one"}
            code, error = reload(lambda text: text.replace("fronts = 2", "fronts = 3"))
            assert code != 0
            assert "server.fronts: 2 -> 3: needs a restart" in error
            load.go_on()
        os.kill(site.fronts()[1]["pid"], signal.SIGKILL)  # its successor is told what is served now
        await_that(site.is_whole)
        with Load(site.other, versions=(2,)) as load:
            load.go_on()


def test_what_was_admitted_is_answered_when_the_server_is_told_to_stop(tmp_path, start_server):
    with alone(start_server, tmp_path) as (site, processes):
        outcomes = []

        def ask(endpoint, number):
            with Client(endpoint) as client:
                x = np.full((1, 4), number, np.float32)
                try:
                    outcomes.append(client.predict("one", inputs(x, Fault.SLEEP, 0.2))["y"].tolist())
                except Unavailable as e:
                    outcomes.append(e)

        threads = [
            threading.Thread(target=ask, args=(endpoint, number))
            for number in range(3)
            for endpoint in (site.lead, site.other)
        ]
        admitted = site.client.status()["front"]["requests"]
        for thread in threads:
            thread.start()
        await_that(lambda: site.client.status()["front"]["requests"] == admitted + len(threads))
        assert site.server.stop() == 0
        for thread in threads:
            thread.join()
        assert not [outcome for outcome in outcomes if isinstance(outcome, PoolError)]
        assert len(outcomes) == len(threads)
        _, alive = psutil.wait_procs(processes, GONE_S)
        assert not alive
        assert not list(tmp_path.glob("pool.sock*"))


def test_one_front_is_one_process_and_one_file(tmp_path, start_server):
    text = write_models(tmp_path)
    with start_server(tmp_path, text) as server, Client(server.endpoint) as client:
        status = client.status()
        assert [front["index"] for front in status["fronts"]] == [0]
        names = {path.name for path in tmp_path.glob("pool.sock*")}
        side = side_path(server.endpoint)
        assert names == {"pool.sock", Path(side).name}
        children = psutil.Process(server.process.pid).children(recursive=True)
        workers = sum(len(model["workers"]) for model in status["models"].values())
        assert len(children) == len(status["zygotes"]) + workers
        assert not any("follower" in " ".join(child.cmdline()) for child in children)
