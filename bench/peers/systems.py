"""The peers, and pool: how each is started for a task, and the ways into it.

A recipe gives the command of a server and what it needs beside it; `running` starts one, waits until it
answers rightly, and ends it.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bench.peers import doors, environments
from bench.peers.doors import Array, Door
from bench.peers.load import LoadFailed, run
from bench.peers.trees import Tree
from pool import Client, PoolError

SERVERS = Path(__file__).with_name("servers")
READY_TIMEOUT_S = 120.0
_LOOK_S = 0.1
# A batch of another size rounds in another order.
_TOLERANCE = 1e-3


class Task(NamedTuple):
    """What a server is to do.

    Attributes:
        path: The model's versioned directory.
        x: Rows to ask for, float32 [rows, ...].
        y: What the answers must be.
        batch: Most rows of a batch.
        workers: Processes that run the model.
        wait_ms: Longest a batch waits for more rows.
        under_way: Most requests at once.
        is_pinned: Whether pool gives each worker a core.
    """

    path: Path
    x: Array
    y: Array
    batch: int
    workers: int
    wait_ms: float
    under_way: int
    is_pinned: bool = False


class Site(NamedTuple):
    """Where a server runs.

    Attributes:
        python: The interpreter of its environment.
        folder: Its own, empty.
        port: For HTTP.
        grpc_port: For gRPC.
    """

    python: str
    folder: Path
    port: int
    grpc_port: int


class Start(NamedTuple):
    """A command, and what of the environment it needs."""

    command: list[str]
    environment: dict[str, str]


class System(NamedTuple):
    """A peer, or pool.

    Attributes:
        name: Of the server.
        environment: The peer's, see `environments`; empty for pool.
        recipe: Writes its files and gives its command.
        doors: The ways in, by the name that results have.
        waits_ms: Batch waits to try, of which the better counts.
        workers: That it does best with where there are enough cores for two, by small models.
    """

    name: str
    environment: str
    recipe: Callable[[Task, Site], Start]
    doors: dict[str, Door]
    waits_ms: tuple[float, ...] = (2.0, 0.0)
    workers: int = 1


# -- recipes -------------------------------------------------------------------------------------------


def _flask(task: Task, site: Site) -> Start:
    command = [site.python, "-m", "gunicorn", "flask_server:app", "--chdir", str(SERVERS)]
    command += [
        "--bind",
        f"127.0.0.1:{site.port}",
        "--workers",
        str(task.workers),
        "--worker-class",
        "gthread",
    ]
    command += ["--threads", "16", "--worker-connections", "4096", "--keep-alive", "75", "--timeout", "120"]
    return Start([*command, "--log-level", "warning"], {})


def _fastapi(task: Task, site: Site) -> Start:
    command = [site.python, "-m", "uvicorn", "fastapi_server:app", "--app-dir", str(SERVERS)]
    command += ["--host", "127.0.0.1", "--port", str(site.port), "--workers", str(task.workers)]
    command += ["--loop", "uvloop", "--http", "httptools", "--no-access-log", "--log-level", "warning"]
    return Start(command, {})


def _fastapi_frozen(task: Task, site: Site) -> Start:
    return Start(_fastapi(task, site).command, {"BENCH_FREEZE": "1"})


def _mosec(_: Task, site: Site) -> Start:
    command = [site.python, str(SERVERS / "mosec_server.py"), "--address", "127.0.0.1", "--timeout", "60000"]
    # More than the largest body, 25 MB.
    return Start([*command, "--port", str(site.port), "--max-request-size", str(64 << 20)], {})


def _script(name: str) -> Callable[[Task, Site], Start]:
    def start(_: Task, site: Site) -> Start:
        return Start([site.python, str(SERVERS / f"{name}.py")], {})

    return start


def _pytriton(task: Task, site: Site) -> Start:
    library = {"LD_LIBRARY_PATH": str(_shared_python(site.python))}
    return Start(_script("pytriton_server")(task, site).command, library)


def _bentoml(_: Task, site: Site) -> Start:
    command = [site.python, "-m", "bentoml", "serve", "bentoml_server:Model"]
    command += ["--host", "127.0.0.1", "--port", str(site.port), "--working-dir", str(SERVERS)]
    return Start(command, {"BENTOML_HOME": str(site.folder), "BENTOML_DO_NOT_TRACK": "true"})


def _mlserver(task: Task, site: Site) -> Start:
    settings = {
        "host": "127.0.0.1",
        "http_port": site.port,
        "grpc_port": site.grpc_port,
        "metrics_port": free_port(),
        "parallel_workers": task.workers,
        "grpc_max_message_length": 64 << 20,
        "debug": False,
    }
    model = {
        "name": "model",
        "implementation": "mlserver_runtime.Runtime",
        "max_batch_size": task.batch,
        # No wait at all would be no batches.
        "max_batch_time": max(task.wait_ms, 0.01) / 1e3,
    }
    (site.folder / "settings.json").write_text(json.dumps(settings))
    (site.folder / "model-settings.json").write_text(json.dumps(model))
    command = [str(Path(site.python).with_name("mlserver")), "start", str(site.folder)]
    return Start(command, {"MLSERVER_LOGGING_SETTINGS": ""})


def _triton(task: Task, site: Site) -> Start:
    package = environments.packages(Path(site.python).parent.parent) / "pytriton"
    base = environments.packages(environments.FOLDER / "base-3.10")
    backend = site.folder / "backends" / "python"
    backend.mkdir(parents=True)
    for file in (package / "tritonserver" / "backends" / "python").iterdir():
        (backend / file.name).symlink_to(file)
    stub = package / "tritonserver" / "python_backend_stubs" / "3.10" / "triton_python_backend_stub"
    (backend / stub.name).unlink(missing_ok=True)
    (backend / stub.name).symlink_to(stub)
    version = site.folder / "models" / "model" / "1"
    version.mkdir(parents=True)
    shutil.copy(SERVERS / "triton_model.py", version / "model.py")
    shutil.copy(SERVERS / "saved_model.py", version)
    (version.parent / "config.pbtxt").write_text(_triton_config(task))
    command = [str(package / "tritonserver" / "bin" / "tritonserver")]
    command += ["--model-repository", str(site.folder / "models"), "--allow-metrics=false"]
    command += ["--backend-directory", str(site.folder / "backends"), "--log-verbose=0"]
    command += ["--http-address=127.0.0.1", f"--http-port={site.port}"]
    command += ["--grpc-address=127.0.0.1", f"--grpc-port={site.grpc_port}"]
    libraries = [str(package.parent / "nvidia_pytriton.libs"), str(_shared_python(site.python))]
    environment = {
        "PYTHONPATH": f"{package.parent}:{base}",
        "LD_LIBRARY_PATH": ":".join(libraries),
        "PATH": f"{Path(site.python).parent}:{os.environ['PATH']}",
    }
    return Start(command, environment)


def _shared_python(python: str) -> Path:
    """Where the interpreter's shared library is."""
    return Path(python).resolve().parent.parent / "lib"


def _triton_config(task: Task) -> str:
    shape, output = (list(array.shape[1:]) for array in (task.x, task.y))
    delay_us = round(task.wait_ms * 1e3)
    batching = f"dynamic_batching {{ max_queue_delay_microseconds: {delay_us} }}" if task.batch > 1 else ""
    return f"""
backend: "python"
max_batch_size: {task.batch}
input [ {{ name: "x" data_type: TYPE_FP32 dims: {shape} }} ]
output [ {{ name: "y" data_type: TYPE_FP32 dims: {output} }} ]
instance_group [ {{ count: {task.workers} kind: KIND_CPU }} ]
{batching}
"""


def _pool(task: Task, site: Site) -> Start:
    cores = sorted(os.sched_getaffinity(0))
    settings = f"workers = {task.workers}\nthreads = 1\nmax_batch_size = {task.batch}\n"
    if task.is_pinned:
        # From the last on: the first has more of the kernel's own work.
        devices = [f"cpu:{cores[-1 - index % len(cores)]}" for index in range(task.workers)]
        settings = (
            f"workers = {task.workers}\ndevices = {json.dumps(devices)}\nmax_batch_size = {task.batch}\n"
        )
    # Room for what the load has under way: none is to be refused here.
    settings += f"slots = {max(4, 2 * task.under_way // task.batch)}\n"
    config = site.folder / "pool.toml"
    config.write_text(
        f'[server]\nendpoints = ["{pool_endpoint(site)}"]\nlog_level = "warning"\n'
        f'[models.model]\npath = "{task.path}"\n{settings}'
    )
    return Start([site.python, "-m", "pool", "serve", str(config)], {})


def pool_endpoint(site: Site) -> str:
    """Where pool listens."""
    return f"ipc://{site.folder}/s"


SYSTEMS = (
    System("pool", "", _pool, {"pool": doors.POOL}, (0.0,)),
    System("flask", "flask", _flask, {"Flask, gunicorn": doors.RAW}, (0.0,), 2),
    System("fastapi", "fastapi", _fastapi, {"FastAPI": doors.RAW}, workers=2),
    System("fastapi-frozen", "fastapi", _fastapi_frozen, {"FastAPI, gc.freeze()": doors.RAW}, workers=2),
    System("mosec", "mosec", _mosec, {"mosec": doors.MOSEC}),
    System(
        "triton",
        "pytriton",
        _triton,
        {
            "Triton HTTP": doors.V2_HTTP,
            "Triton gRPC": doors.V2_GRPC,
            "Triton gRPC, shared memory": doors.V2_SHM,
        },
    ),
    System("pytriton", "pytriton", _pytriton, {"PyTriton": doors.V2_HTTP}),
    System("litserve", "litserve", _script("litserve_server"), {"LitServe": doors.LITSERVE}),
    System("bentoml", "bentoml", _bentoml, {"BentoML": doors.BENTOML}, (0.0,), 2),
    System("mlserver", "mlserver", _mlserver, {"MLServer gRPC": doors.V2_GRPC}),
    System("ray", "ray", _script("ray_server"), {"Ray Serve": doors.RAW}),
)


# -- running -------------------------------------------------------------------------------------------


class Failed(Exception):
    """A server did not start, or does not answer rightly; the sentence says why."""


class EndedEarly(Failed):
    """A server ended before it was ready, which may not happen the next time."""


class Running:
    """A server that has answered.

    Attributes:
        tree: Its processes.
        site: Where it runs.
        ready_s: How long it took from its start to its first answer.
    """

    def __init__(self, system: System, task: Task, tree: Tree, site: Site, log: Path) -> None:
        self.tree = tree
        self.site = site
        self.ready_s = 0.0
        self._system = system
        self._task = task
        self._log = log

    def endpoint(self, door: Door) -> str:
        """Where a way in leads to."""
        if door.protocol == "pool":
            return pool_endpoint(self.site)
        return f"127.0.0.1:{self.port(door)}"

    def port(self, door: Door) -> int:
        """Of a way in."""
        return self.site.port if door.protocol == "http" else self.site.grpc_port

    def await_ready(self) -> None:
        """Wait for an answer, and check all ways in.

        Raises:
            Failed: there is none in time, or it is wrong; EndedEarly: the server ended.
        """
        began = time.monotonic()
        first = next(iter(self._system.doors.values()))
        reason = ""
        while time.monotonic() - began < READY_TIMEOUT_S:
            if self.tree.process.poll() is not None:
                code = self.tree.process.returncode
                raise EndedEarly(f"ended with exit code {code} before it was ready: {self.last_words()}")
            try:
                self._ask(first, 0)
            except (OSError, ValueError, RuntimeError, HTTPException, PoolError) as e:
                reason = str(e)
                time.sleep(_LOOK_S)
                continue
            self.ready_s = time.monotonic() - began
            self.check()
            return
        raise Failed(f"no answer within {READY_TIMEOUT_S:g} s ({reason}): {self.last_words()}")

    def check(self) -> None:
        """Compare the answers of all ways in with the model's own.

        Raises:
            Failed: one is wrong, or there is none.
        """
        for name, door in self._system.doors.items():
            try:
                self._check(door)
            except (OSError, ValueError, RuntimeError, HTTPException, PoolError, LoadFailed) as e:
                raise Failed(f"{name} gives no right answer: {e}"[:400]) from None

    def _check(self, door: Door) -> None:
        if door.protocol == "shm":
            python = environments.python("triton-client")
            file = self.site.folder / "rows.npz"
            np.savez(file, x=self._task.x, y=self._task.y)
            script = str(SERVERS / "ask_shm.py")
            said = run([python, script, self.endpoint(door), str(file)], 60)
            if said.strip():
                raise RuntimeError(said.strip()[-300:])
            return
        for at in range(len(self._task.x)):
            got = self._ask(door, at)
            want = self._task.y[at].ravel()
            if got.shape != want.shape or not np.allclose(got, want, rtol=_TOLERANCE, atol=_TOLERANCE):
                raise RuntimeError(f"row {at} is answered {got[:10].tolist()}")

    def _ask(self, door: Door, at: int) -> Array:
        if door.protocol == "pool":
            with Client(self.endpoint(door), timeout=15.0, connect_timeout=1.0) as client:
                (output,) = client.predict("model", self._task.x[at : at + 1]).values()
                return np.asarray(output).ravel()
        return doors.ask(door, self.port(door), self._task.x[at])

    def last_words(self) -> str:
        """The end of what it wrote."""
        text = self._log.read_text(errors="replace")
        return " ".join(text[-1500:].split())[-500:]


@contextmanager
def running(system: System, task: Task) -> Iterator[Running]:
    """Start a server, wait until it answers rightly, and end it and all its processes.

    Raises:
        Missing: the peer cannot be had here.
        Failed: it does not start, or answers wrongly.
    """
    python = environments.python(system.environment) if system.environment else sys.executable
    # A short name: sockets lie in there.
    with tempfile.TemporaryDirectory(prefix="pb-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        site = Site(python, folder, free_port(), free_port())
        log = folder / "log"
        before = set(os.listdir("/dev/shm"))
        start = system.recipe(task, site)
        environment = _environment(task, site) | start.environment
        if not system.environment:
            environment = {"TF_CPP_MIN_LOG_LEVEL": "3"} | start.environment
        with log.open("w") as output:
            tree = Tree(start.command, environment, folder, output)
            try:
                server = Running(system, task, tree, site, log)
                server.await_ready()
                yield server
            finally:
                tree.end()
                _clear_shared_memory(before, system.name)


def _environment(task: Task, site: Site) -> dict[str, str]:
    return {
        "BENCH_MODEL": str(task.path / "1"),
        "BENCH_SHAPE": ",".join(map(str, task.x.shape[1:])),
        "BENCH_OUTPUT_SHAPE": ",".join(map(str, task.y.shape[1:])),
        "BENCH_BATCH": str(task.batch),
        "BENCH_WAIT_MS": str(task.wait_ms),
        "BENCH_WORKERS": str(task.workers),
        "BENCH_PORT": str(site.port),
        "BENCH_GRPC_PORT": str(site.grpc_port),
        "BENCH_FOLDER": str(site.folder),
        "PYTHONPATH": str(SERVERS),
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }


def _clear_shared_memory(before: set[str], name: str) -> None:
    """Remove what a peer that was ended leaves in /dev/shm; pool leaves nothing there."""
    if name == "pool":
        return
    for left in set(os.listdir("/dev/shm")) - before:
        if left.startswith(("pytrtion", "triton", "sem.mp", "psm_", "perf_")):
            with suppress(OSError):
                Path("/dev/shm", left).unlink()


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
