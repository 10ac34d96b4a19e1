"""The units under a real systemd: started, watched, reloaded, restarted, stopped, short of memory."""

from __future__ import annotations

import contextlib
import errno
import json
import re
import socket
import stat
import subprocess
import sys
import sysconfig
import threading
import time
import venv
from pathlib import Path

import numpy as np
import pytest

from pool import Client, WorkerLost
from pool.__main__ import main
from pool.backends.drill import Fault
from pool.cli.visibility import drop_in
from pool.client.retry import Retry
from tests.systemd import PATIENCE_S, Systemd, booted, memory_limit, why_not

pytestmark = pytest.mark.skipif(why_not() != "", reason=why_not() or "it can")

ROOT = Path(__file__).parents[1]

# What the tests need beyond the unit: to be quick, and to leave nothing in this checkout.
DROP_IN = """
[Service]
Environment=PYTHONDONTWRITEBYTECODE=1
StandardOutput=append:/run/log/%i
StandardError=append:/run/log/%i
RestartSec=100ms
"""


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """A `pool` command of this checkout, in a folder that the unit hides."""
    folder = tmp_path_factory.mktemp("installed") / "venv"  # what pytest makes is closed to others
    venv.create(folder, symlinks=True, with_pip=False)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    (packages / "checkout.pth").write_text(f"{ROOT}\n")
    theirs = [path for path in sys.path if path.endswith("-packages")]
    (packages / "packages.pth").write_text("".join(f"{path}\n" for path in theirs))
    script = folder / "bin/pool"
    script.write_text(
        f"#!{folder}/bin/python\nimport sys\nfrom pool.__main__ import main\nsys.exit(main())\n"
    )
    script.chmod(0o755)
    return script


@pytest.fixture(scope="module")
def etc(tmp_path_factory, command):
    """A root folder with what `pool install-service` wrote."""
    root = tmp_path_factory.mktemp("root")
    assert main(["install-service", "--root", str(root), "--executable", str(command)]) == 0
    (root / "etc/systemd/system/pool@.service.d/99-test.conf").write_text(DROP_IN)
    return root


@pytest.fixture(scope="module")
def systemd(etc, tmp_path_factory):
    with booted(etc, tmp_path_factory.mktemp("log") / "systemd") as running:
        running.run("systemd-sysusers")
        running.run("systemd-tmpfiles", "--create", "--prefix=/run/pool", "--prefix=/etc/pool")
        running.write("/etc/pool/model.toml", "row_items = 4\n")
        yield running


class Service:
    """One `pool@NAME`.

    Attributes:
        unit: Its name.
        endpoint: Its socket, as seen from outside.
    """

    def __init__(self, systemd: Systemd, name: str) -> None:
        self.systemd = systemd
        self.name = name
        self.unit = f"pool@{name}.service"
        self.socket = systemd.root / f"run/pool/{name}/pool.sock"
        self.endpoint = f"ipc://{self.socket}"

    def configure(self, config: str, service: str = "", listen: str = "") -> None:
        """Write its configuration, and drop-ins of the service and the socket."""
        self.systemd.write(f"/etc/pool/{self.name}.toml", config)
        if service:
            self.systemd.write(f"/etc/systemd/system/{self.unit}.d/x.conf", f"[Service]\n{service}\n")
        if listen:
            name = f"pool@{self.name}.socket"
            self.systemd.write(f"/etc/systemd/system/{name}.d/x.conf", f"[Socket]\n{listen}\n")
        self.systemd.systemctl("daemon-reload")

    def show(self) -> dict[str, str]:
        return self.systemd.show(self.unit)

    def log(self) -> str:
        return self.systemd.read(f"/run/log/{self.name}")

    def environment(self, pid: int) -> set[str]:
        """Names in a process's environment."""
        entries = (self.systemd.root / f"proc/{pid}/environ").read_bytes().split(b"\0")
        return {entry.partition(b"=")[0].decode() for entry in entries}


@pytest.fixture
def service(systemd, request):
    """A service that is stopped at the end of the test."""
    name = re.sub(r"\W", "", request.node.name)[5:25]
    made = Service(systemd, name)
    yield made
    systemd.systemctl("stop", f"pool@{name}.socket", made.unit, check=False)
    systemd.systemctl("reset-failed", check=False)


def drill(workers=1, more=""):
    return f'[models.m]\nbackend = "drill"\npath = "model.toml"\nworkers = {workers}\n{more}\n'


def ask(client, value=1.0, fault=Fault.NONE, argument=0.0, **keywords):
    x = np.full((1, 4), value, np.float32)
    inputs = {"x": x, "fault": np.array([fault], np.int32), "argument": np.array([argument], np.float32)}
    return client.predict("m", inputs, **keywords)["y"][0, 0]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# -- the files --------------------------------------------------------------------------------------


def test_the_units_are_what_systemd_understands(systemd):
    done = systemd.run("systemd-analyze", "verify", "pool@x.service", "pool@x.socket")
    assert "pool" not in done.stderr


@pytest.mark.parametrize("is_hidden", [False, True])
def test_the_exposure_is_small(tmp_path, command, is_hidden):
    path = str(command) if is_hidden else "/opt/nothing/bin/pool"
    assert main(["install-service", "--root", str(tmp_path), "--executable", path]) == 0
    analyze = [
        "systemd-analyze",
        "security",
        "--offline=true",
        f"--root={tmp_path}",
        "--no-pager",
        "pool@x.service",
    ]
    done = subprocess.run(analyze, capture_output=True, text=True, check=False)
    found = re.search(r"Overall exposure level for \S+: ([0-9.]+)", done.stdout)
    assert found is not None, done.stdout + done.stderr
    assert float(found[1]) <= 2.5


def test_a_drop_in_shows_what_is_hidden_and_nothing_beside_it(systemd, tmp_path):
    """A service of the same user that lists folders: of homes, temporary ones, and closed to the user."""
    outside = tmp_path / "shown"  # below one that pytest made for its user alone
    outside.mkdir()
    (outside / "file").write_text("x")
    for folder in ("/run/user/7/a b", "/run/closed/shown"):
        systemd.write(f"{folder}/file", "x")
        systemd.write(f"{Path(folder).parent}/secret", "x")
        (systemd.root / str(Path(folder).parent).lstrip("/")).chmod(0o700)
    paths = ["/run/closed/shown", "/run/user/7/a b", str(outside)]
    shown = drop_in("# x", paths, ["/run/closed"], must_exist=True)
    for line in ("ProtectHome=yes", "PrivateTmp=yes"):
        assert line in (ROOT / "systemd/pool@.service").read_text().splitlines()
    look = "ExecStart=/bin/sh -c 'cat /run/closed/*/file /run/user/7/*/file %s/file; ls %s'"
    systemd.write(
        "/etc/systemd/system/look.service",
        "[Service]\nType=oneshot\nUser=pool\nProtectSystem=strict\nProtectHome=yes\nPrivateTmp=yes\n"
        f"StandardOutput=append:/run/log/look\n{look % (outside, '/run/closed /run/user/7')}\n",
    )
    systemd.write("/etc/systemd/system/look.service.d/40-x.conf", shown)
    systemd.systemctl("daemon-reload")
    systemd.systemctl("start", "look.service")
    assert systemd.read("/run/log/look").split("\n", 1) == ["xxx/run/closed:", "shown\n\n/run/user/7:\na b\n"]


def test_the_gpu_drop_in_opens_its_devices_alone(systemd):
    """Without a GPU: of another driver, whose name is written as theirs are."""
    gpu = (ROOT / "systemd/gpu.conf").read_text()
    unit = (ROOT / "systemd/pool@.service").read_text().splitlines()
    assert {"PrivateDevices=yes", "DevicePolicy=closed"} < set(unit)
    look = "[Service]\nType=oneshot\nPrivateDevices=yes\nDevicePolicy=closed\n"
    look += "StandardOutput=append:/run/log/%n\n"
    look += "ExecStart=/bin/sh -c 'test -c /dev/kmsg && (: </dev/kmsg) 2>&1 && echo open; true'\n"
    other = gpu.replace("char-nvidia*", "char-me*")
    for name, text in (("hidden", ""), ("closed", gpu), ("open", other)):
        systemd.write(f"/etc/systemd/system/{name}.service", look)
        systemd.write(f"/etc/systemd/system/{name}.service.d/50-gpu.conf", text)
    systemd.write("/etc/systemd/system/pool@gpu.service.d/50-gpu.conf", gpu)
    systemd.systemctl("daemon-reload")
    systemd.systemctl("start", "hidden.service", "closed.service", "open.service")
    told = {name: systemd.read(f"/run/log/{name}.service") for name in ("hidden", "closed", "open")}
    assert told["hidden"] == ""
    assert told["open"] == "open\n"
    if told["closed"] == "open\n":
        pytest.skip("this kernel controls no devices")
    assert "Operation not permitted" in told["closed"]
    done = systemd.run("systemd-analyze", "verify", "pool@gpu.service")
    assert "pool" not in done.stderr
    assert systemd.show("pool@gpu.service")["DeviceAllow"] == "char-nvidia* rw"


# -- a life -----------------------------------------------------------------------------------------


def test_started_is_ready(systemd, service, command):
    port = free_port()
    endpoints = f'"ipc:///run/pool/{service.name}/pool.sock", "tcp://127.0.0.1:{port}"'
    config = f"[server]\nendpoints = [{endpoints}]\n"
    # In the home of somebody who lets nobody in.
    systemd.write("/run/user/7/models/model.toml", "row_items = 4\n")
    (systemd.root / "run/user/7").chmod(0o700)
    service.configure(config + drill(workers=2).replace("model.toml", "/run/user/7/models/model.toml"))
    assert main(["install-service", "--root", str(systemd.root), "--executable", str(command)]) == 0
    systemd.systemctl("daemon-reload")
    systemd.systemctl("start", service.unit)
    with Client(service.endpoint) as client:
        assert client.ready(), "at once: systemd waited for it"
        assert ask(client) == 3.0
        status = client.status()
        # What is for the front is not for its children.
        pids = [
            status["front"]["pid"],
            status["zygotes"][0]["pid"],
            status["models"]["m"]["workers"][0]["pid"],
        ]
        for pid in pids[1:]:
            names = service.environment(pid)
            assert "PYTHONDONTWRITEBYTECODE" in names
            assert not [n for n in names if n.startswith(("NOTIFY_", "LISTEN_", "WATCHDOG_"))]
        assert {"NOTIFY_SOCKET", "WATCHDOG_USEC"} <= service.environment(pids[0])
        for pid in pids:
            state = (systemd.root / f"proc/{pid}/status").read_text()
            assert re.search(r"^CapEff:\t0+$", state, re.MULTILINE)
            assert re.search(r"^NoNewPrivs:\t1$", state, re.MULTILINE)
            assert re.search(r"^Seccomp:\t2$", state, re.MULTILINE)
        scores = [int((systemd.root / f"proc/{pid}/oom_score_adj").read_text()) for pid in pids]
        assert scores == [scores[0], scores[0] + 300, scores[0] + 600]
    with Client(f"tcp://127.0.0.1:{port}") as client:
        assert ask(client, 2.0) == 5.0
    shown = systemd.until(
        service.unit, lambda p: p["StatusText"].startswith("1/1 models ready, 2/2 workers, ")
    )
    assert shown["SubState"] == "running"
    assert int(shown["MainPID"]) == pids[0]
    file = service.socket.stat()
    assert stat.S_IMODE(file.st_mode) == 0o660
    users = (systemd.root / "etc/passwd").read_text()
    assert re.search(rf"^pool:[^:]*:{file.st_uid}:{file.st_gid}:", users, re.MULTILINE)
    assert file.st_uid != 0


def test_a_model_that_is_not_ready_keeps_it_starting(systemd, service):
    systemd.write("/etc/pool/slow.toml", "batch_s = 0.6\n")  # a load takes some of these, asleep
    service.configure('[models.m]\nbackend = "drill"\npath = "slow.toml"\n', "TimeoutStartSec=3")
    systemd.systemctl("start", "--no-block", service.unit)
    shown = systemd.until(service.unit, lambda p: p["StatusText"].startswith("starting: 0/1 models ready"))
    assert shown["SubState"] == "start"
    shown = systemd.until(service.unit, lambda p: p["SubState"] != "start")
    assert shown["SubState"] == "running"
    took_us = int(shown["ActiveEnterTimestampMonotonic"]) - int(shown["InactiveExitTimestampMonotonic"])
    assert took_us > 3_200_000, "more than it had, were it not for what it asked"
    with Client(service.endpoint) as client:
        assert client.ready()


def test_stopped_it_finishes_what_it_has(systemd, service):
    service.configure(drill(), "TimeoutStopSec=1")
    systemd.systemctl("start", service.unit)
    answers = []
    with Client(service.endpoint) as client:
        slow = threading.Thread(target=lambda: answers.append(ask(client, 1.0, Fault.SLEEP, 1.8)))
        slow.start()
        with Client(service.endpoint) as other:
            while not any(w["state"] == "busy" for w in other.status()["models"]["m"]["workers"]):
                time.sleep(0.01)
        systemd.systemctl("stop", "--no-block", service.unit)
        shown = systemd.until(service.unit, lambda p: p["StatusText"].startswith("stopping"))
        assert shown["ActiveState"] == "deactivating"
        slow.join()
    assert answers == [3.0]
    shown = systemd.until(service.unit, lambda p: p["ActiveState"] == "inactive")
    assert (shown["Result"], shown["ExecMainStatus"]) == ("success", "0")
    assert not service.socket.exists()


def test_a_reload_is_reported_as_it_went(systemd, service):
    service.configure(drill(workers=1))
    systemd.systemctl("start", service.unit)
    systemd.write(f"/etc/pool/{service.name}.toml", drill(workers=2))
    systemd.systemctl("reload", service.unit)
    with Client(service.endpoint) as client:
        assert len(client.status()["models"]["m"]["workers"]) == 2
        systemd.write(f"/etc/pool/{service.name}.toml", drill(workers=0))
        assert systemd.systemctl("reload", service.unit, check=False).returncode != 0
        refused = client.status()["front"]["reload"]["error"]
        assert refused.endswith("models.m.workers: must be an integer from 1 to 1024, got 0")
        assert " reload refused, nothing was changed reason=" in service.log()
        assert ask(client) == 3.0
    shown = systemd.until(service.unit, lambda p: p["StatusText"].startswith("1/1 models ready, 2/2 workers"))
    assert (shown["ActiveState"], shown["SubState"]) == ("active", "running")


# -- what goes wrong --------------------------------------------------------------------------------


def test_a_front_that_stands_still_is_started_again(systemd, service):
    service.configure(drill(), "WatchdogSec=2")
    systemd.systemctl("start", service.unit)
    before = service.show()
    systemd.systemctl("kill", "--kill-whom=main", "--signal=STOP", service.unit)
    after = systemd.until(
        service.unit, lambda p: p["ActiveState"] == "active" and p["MainPID"] != before["MainPID"]
    )
    assert after["NRestarts"] == "1"
    assert "Fatal Python error: Aborted" in service.log(), "where it stood is in the log"
    with Client(service.endpoint) as client:
        assert ask(client) == 3.0


TO_JOURNAL = "StandardOutput=journal\nStandardError=journal"


def test_a_mistake_in_the_file_is_not_tried_again(systemd, service):
    service.configure(drill(workers=0), TO_JOURNAL)
    assert systemd.systemctl("start", service.unit, check=False).returncode != 0
    shown = service.show()
    assert (shown["ActiveState"], shown["ExecMainStatus"], shown["NRestarts"]) == ("failed", "2", "0")
    mistake = f"/etc/pool/{service.name}.toml: models.m.workers: must be an integer from 1 to 1024, got 0"
    assert shown["StatusText"] == mistake
    errors = [
        json.loads(line) for line in systemd.journal(service.unit, "--priority=err", "_TRANSPORT=stdout")
    ]
    assert [(e["event"], e["reason"]) for e in errors] == [("cannot serve", mistake)]


def test_a_model_that_does_not_load_is_tried_again_some_times(systemd, service):
    systemd.write("/etc/pool/damaged.toml", "no_such_key = 1\n")
    config = '[models.m]\nbackend = "drill"\npath = "damaged.toml"\n'
    service.configure(config, f"{TO_JOURNAL}\n[Unit]\nStartLimitBurst=2")
    systemd.systemctl("start", service.unit, check=False)
    shown = systemd.until(service.unit, lambda p: p["ActiveState"] == "failed")
    assert shown["ExecMainStatus"] == "1"
    events = {
        priority: [
            json.loads(line)["event"]
            for line in systemd.journal(
                service.unit, f"--priority={priority}..{priority}", "_TRANSPORT=stdout"
            )
        ]
        for priority in ("err", "warning", "info")
    }
    assert events["info"].count("listening") == 2
    assert events["err"].count("cannot serve") == 2
    assert not set(events["err"]) & set(events["info"])
    assert shown["StatusText"].startswith("MODEL_LOAD: model 'm': ")


def test_short_of_memory_one_worker_goes_and_comes_back(systemd, service):
    service.configure(drill(workers=2, more="retry = false"))
    systemd.systemctl("start", service.unit)
    with Client(service.endpoint, timeout=PATIENCE_S) as client:

        def processes():
            status = client.status()
            workers = status["models"]["m"]["workers"]
            kept = status["front"]["pid"], status["zygotes"][0]["pid"]
            return kept, [w["pid"] for w in workers], sum(w["restarts"] for w in workers)

        kept, before, _ = processes()
        with memory_limit(systemd, service.unit, 96 << 20) as is_limited:
            if not is_limited:
                pytest.skip("no memory controller is mounted here")
            with pytest.raises(WorkerLost, match="SIGKILL"):
                ask(client, 1.0, Fault.LEAK, 256.0)
            deadline = time.monotonic() + PATIENCE_S
            while processes()[2] < 1 or not client.ready() or None in processes()[1]:
                assert time.monotonic() < deadline
            assert ask(client) == 3.0
        assert processes()[0] == kept, "the front and the zygote live"
        assert len(set(before) & set(processes()[1])) == 1, "and so does the other worker"
    assert service.show()["NRestarts"] == "0"


# -- sockets ----------------------------------------------------------------------------------------


PATIENT = Retry(attempts=1000, first_pause=0.02, longest_pause=0.2)


def until(is_so):
    deadline = time.monotonic() + PATIENCE_S
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.001)


class Knocking(threading.Thread):
    """Connects to addresses without a pause, and keeps the errors."""

    def __init__(self, addresses):
        super().__init__()
        self.addresses = addresses
        self.errors = []
        self.count = 0
        self.is_over = threading.Event()

    def run(self):
        while not self.is_over.wait(0.005):
            for address in self.addresses:
                family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
                with socket.socket(family) as sock:
                    try:
                        sock.connect(address)
                        self.count += 1
                    except OSError as e:
                        self.errors.append(errno.errorcode[e.errno])


class Asking(threading.Thread):
    """Sends requests without a pause, with retries, and checks the answers."""

    def __init__(self, endpoint):
        super().__init__()
        self.endpoint = endpoint
        self.count = 0
        self.failures = []
        self.is_over = threading.Event()

    def run(self):
        with Client(self.endpoint, timeout=PATIENCE_S, retry=PATIENT) as client:
            while not self.is_over.is_set():
                try:
                    if ask(client, float(self.count)) != 2.0 * self.count + 1.0:
                        self.failures.append(f"wrong answer to request {self.count}")
                except Exception as e:
                    self.failures.append(repr(e))
                self.count += 1


@contextlib.contextmanager
def kept_going(*threads):
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        for thread in threads:
            thread.is_over.set()
        for thread in threads:
            thread.join()


def until_more(threads, more):
    wanted = [thread.count + more for thread in threads]
    until(lambda: all(thread.count >= want for thread, want in zip(threads, wanted, strict=True)))


def test_restarted_under_load_nothing_is_refused_or_lost(systemd, service):
    port = free_port()
    service.configure(drill(workers=2), listen=f"ListenStream=127.0.0.1:{port}\nSocketMode=0606")
    systemd.systemctl("start", f"pool@{service.name}.socket")
    file = service.socket.stat()
    assert (stat.S_IMODE(file.st_mode), service.show()["ActiveState"]) == (0o606, "inactive")
    tcp = f"tcp://127.0.0.1:{port}"
    asking = [Asking(service.endpoint), Asking(tcp)]
    knocking = Knocking([str(service.socket), ("127.0.0.1", port)])
    pids = set()
    with kept_going(*asking, knocking):  # whose first request starts the service
        for _ in range(2):
            until_more(asking, 20)
            pids.add(service.show()["MainPID"])
            systemd.systemctl("restart", service.unit)
        until_more(asking, 20)
        pids.add(service.show()["MainPID"])
    assert [thread.failures for thread in asking] == [[], []]
    assert knocking.errors == []
    assert len(pids) == 3
    with Client(service.endpoint) as client:
        assert set(client.status()["front"]["endpoints"]) == {
            f"ipc:///run/pool/{service.name}/pool.sock",
            tcp,
        }
    systemd.systemctl("stop", service.unit)
    now = service.socket.stat()
    assert (now.st_ino, now.st_mode, now.st_uid) == (file.st_ino, file.st_mode, file.st_uid), (
        "it is systemd's"
    )
    systemd.systemctl("stop", f"pool@{service.name}.socket")
    assert not service.socket.exists()


def test_short_of_descriptors_newcomers_wait_outside(systemd, service):
    service.configure(drill(), "LimitNOFILE=400")
    systemd.systemctl("start", f"pool@{service.name}.socket", service.unit)
    pid = service.show()["MainPID"]
    hidden = service.socket.with_name("pool.sock.full")
    with contextlib.ExitStack() as crowd, Client(service.endpoint) as client:
        assert ask(client) == 3.0

        def connect_many():
            for _ in range(600):  # as quickly as can be
                crowd.enter_context(socket.socket(socket.AF_UNIX)).connect(str(service.socket))

        with pytest.raises(FileNotFoundError):
            connect_many()
        assert hidden.exists()
        assert ask(client) == 3.0, "who is there is served"
        assert service.show()["MainPID"] == pid
        # Killed in this state, the next server puts the file back.
        systemd.systemctl("kill", "--kill-whom=main", "--signal=KILL", service.unit)
        until(service.socket.exists)
    assert not hidden.exists()
    with Client(service.endpoint, timeout=PATIENCE_S, connect_timeout=PATIENCE_S) as client:
        assert ask(client, retry=PATIENT) == 3.0
    assert service.show()["NRestarts"] == "1"


def test_a_socket_that_nobody_serves_is_a_mistake(systemd, service):
    config = '[server]\nendpoints = ["tcp://127.0.0.1:9"]\n' + drill()
    service.configure(config)
    systemd.systemctl("start", f"pool@{service.name}.socket")
    assert systemd.systemctl("start", service.unit, check=False).returncode != 0
    assert service.show()["ExecMainStatus"] == "2"
    assert (
        f"'pool@{service.name}.socket' from the service manager listens at ipc:///run/pool/" in service.log()
    )
