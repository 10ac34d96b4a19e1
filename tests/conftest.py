"""What tests share: real servers, and the check that no test leaves anything behind."""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis
import psutil
import pytest

from pool import Client, backends
from pool.backends import find_backend
from pool.config import Placement
from pool.signature import Signature
from tests.rig import NumpyModel, Rig, generation

# Every process that a test starts inherits this, and so is found even if its parent is gone; those of another
# process of tests have another one.
MARK = "POOL_TEST_RUN"
os.environ[MARK] = f"{os.getpid()}"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
# A test's server must not be that of whoever runs the tests, nor speak to their service manager.
for name in ("RUNTIME_DIRECTORY", "XDG_RUNTIME_DIR", "NOTIFY_SOCKET", "WATCHDOG_USEC", "LISTEN_FDS"):
    os.environ.pop(name, None)
for name in ("POOL_KEY", "POOL_SERVER_KEY"):
    os.environ.pop(name, None)

# Started in the background by a shell, this process would have its children ignore Ctrl-C, too.
signal.signal(signal.SIGINT, signal.default_int_handler)

# An example's time says how busy the machine is.
hypothesis.settings.register_profile("pool", deadline=None)
hypothesis.settings.load_profile("pool")

# Only what hangs takes so long: on two busy cores a server of twenty models takes a minute.
START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 30.0
LEAVE_TIMEOUT_S = 5.0  # for children of children: whoever reaps them does so a little later


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Two processes run the whole suite, much of which is waiting; some files run in this process."""
    return 2 if all(Path(given).is_dir() for given in config.args) else 0


def pytest_collection_finish() -> None:
    """Tests that collect garbage, to see what is left of their own, need not look through all tests' code."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tensorflow_backend() -> backends.Backend:
    """The TensorFlow backend, preloaded and prepared in this process."""
    found = find_backend("tensorflow")
    found.preload()
    found.prepare(Placement())
    gc.collect()
    gc.freeze()  # every later collection would look at TensorFlow's 350,000 objects again
    return found


@dataclass
class Server:
    """A `pool serve` process that is ready.

    Attributes:
        process: The front.
        endpoints: Where it listens, as configured.
        config: Its configuration file.
        log: What it wrote, so far.
    """

    process: subprocess.Popen[bytes]
    endpoints: list[str]
    config: Path
    log: Path

    @property
    def endpoint(self) -> str:
        """The first endpoint."""
        return self.endpoints[0]

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal and give the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(STOP_TIMEOUT_S)


StartServer = Callable[..., AbstractContextManager[Server]]


def _limit_descriptors(most: int) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


@contextmanager
def _server(
    folder: Path,
    models: str,
    *,
    server: str = "",
    endpoints: list[str] | None = None,
    descriptors: int | None = None,
) -> Iterator[Server]:
    endpoints = endpoints or [f"ipc://{folder}/pool.sock"]
    config = folder / "pool.toml"
    listed = ", ".join(f'"{endpoint}"' for endpoint in endpoints)
    config.write_text(f"[server]\nendpoints = [{listed}]\n{server}\n{models}\n")
    log = folder / "server.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "pool", "serve", str(config)],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            preexec_fn=None if descriptors is None else lambda: _limit_descriptors(descriptors),
        )
    running = Server(process, endpoints, config, log)
    try:
        with Client(endpoints[0], connect_timeout=START_TIMEOUT_S) as client:
            deadline = time.monotonic() + START_TIMEOUT_S
            while not client.ready():
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(0.1)
        yield running
        code = running.stop()
        assert code == 0, log.read_text()
        for endpoint in endpoints:
            assert not endpoint.startswith("ipc://") or not Path(endpoint[6:]).exists(), "socket file left"
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


@pytest.fixture(scope="session")
def start_server() -> StartServer:
    """`with start_server(folder, "[models.m] ...") as server`: ready inside, stopped cleanly after.

    Keywords: `server`, more lines for the `[server]` table; `endpoints`, other than one ipc socket;
    `descriptors`, how many its process may have.
    """
    return _server


def _pids() -> set[int]:
    return {int(name) for name in os.listdir("/proc") if name.isdecimal()}


def _own(pids: set[int]) -> list[psutil.Process]:
    """Those of this test run."""
    found = []
    for pid in pids:
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(pid)
            if process.environ().get(MARK) == os.environ[MARK]:
                found.append(process)
    return found


def _memfds() -> set[str]:
    found = set()
    for number in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{number}")
        except OSError:
            continue
        if target.startswith("/memfd:"):
            found.add(f"{number} {target}")
    return found


@pytest.fixture(autouse=True)
def _nothing_is_left_behind() -> Iterator[None]:
    """No process, and no shared memory of this process, outlives the test (or fixture) that made it."""
    pids, memfds = _pids(), _memfds()
    yield
    _, alive = psutil.wait_procs(_own(_pids() - pids), LEAVE_TIMEOUT_S)
    left = []
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            left.append(f"{process.pid}: {' '.join(process.cmdline())}")
            process.kill()
    assert not left, "processes left behind"
    assert not _memfds() - memfds, "memory left behind"


@pytest.fixture
def rig_of() -> Iterator[Callable[..., Rig]]:
    """Makes rigs of signatures: `rig_of(*signatures, model=None, **config)`, closed in the end."""
    made: list[Rig] = []

    def make(*signatures: Signature, model: NumpyModel | None = None, **config: Any) -> Rig:
        made.append(Rig(generation(*signatures, **config), model))
        return made[-1]

    yield make
    for rig in made:
        rig.close()
