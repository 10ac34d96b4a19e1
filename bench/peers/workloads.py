"""What is measured of each system, and how: throughput and latency, memory, large rows, a killed worker."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np

from bench import models as bench_models
from bench.peers.doors import POOL, Array, Door
from bench.peers.environments import Missing
from bench.peers.expected import rows_of
from bench.peers.load import LoadFailed, generate
from bench.peers.steady import Orders
from bench.peers.summary import Row, recovery
from bench.peers.systems import SYSTEMS, EndedEarly, Failed, Running, System, Task, running
from bench.peers.trees import spent_us
from tests import models as test_models

MIB = 2**20

# PyTriton with four workers of a large model failed in its own handshake in two of three starts.
_STARTS = 3


class Pace(NamedTuple):
    """How long things are measured, in seconds.

    Attributes:
        level: One number of requests in flight.
        warm_up: Before the first of them.
        before_kill: Steady load before a worker is killed.
        after_kill: And after.
    """

    level: float
    warm_up: float
    before_kill: float
    after_kill: float


FULL = Pace(1.2, 1.0, 6.0, 14.0)
QUICK = Pace(0.5, 0.5, 4.0, 8.0)


class Workload(NamedTuple):
    """One model under one kind of load.

    Attributes:
        name: In the results.
        what: In words.
        path: Of the model; builds it.
        shape: Of a row.
        batch: Most rows of a batch.
        levels: Requests in flight.
        workers: Numbers of workers, or None for what the system does best with.
        is_kill: Whether a worker is killed, rather than load measured.
        is_wait_tried: Whether to try different batch waits.
        deciding: Requests in flight where the two best go into the further rounds; empty for everywhere.
        length: Of a measurement, against one with small rows: slow requests need longer.
        servers: Those it is for; empty for all.
    """

    name: str
    what: str
    path: Callable[[], Path]
    shape: tuple[int, ...]
    batch: int
    levels: tuple[int, ...]
    workers: tuple[int, ...] | None = None
    is_kill: bool = False
    is_wait_tried: bool = False
    deciding: tuple[int, ...] = ()
    length: float = 1.0
    servers: tuple[str, ...] = ()


def _test_model(name: str) -> Callable[[], Path]:
    return lambda: test_models.path(name)


_CORES = len(os.sched_getaffinity(0))
_IMAGE = (224, 224, 3)
# `gc.freeze()` changes neither what a worker takes nor how it is replaced.
_UNALIKE = tuple(system.name for system in SYSTEMS if system.name != "fastapi-frozen")
_RAW_BODIES = ("pool", "flask", "fastapi", "mosec", "triton", "pytriton")

WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload(
            "mlp", "MLP 784-256-10, one row a request", _test_model("mlp"), (784,), 64,
            (1, 16, 64, 256, 1024), is_wait_tried=True, deciding=(1, 256),
        ),
        Workload(
            "mobilenet", "MobileNetV2 224x224x3, one image a request", _test_model("mobilenet"), _IMAGE, 8,
            (1, 4, 16, 32), workers=(_CORES,), is_wait_tried=True, deciding=(32,), length=3.0,
        ),
        Workload(
            "memory", "805 MB model, memory of the whole tree", _test_model("big"), (4096,), 8,
            (4,), workers=(1, 2, 4), servers=_UNALIKE,
        ),
        Workload(
            "large", "1080p float32 images, 25 MB a request, cropped", lambda: bench_models.path("crop"),
            (1080, 1920, 3), 1, (1, 2), workers=(1,), servers=_RAW_BODIES, length=2.0,
        ),
        Workload(
            "kill", "a worker of two killed, MobileNetV2, 16 clients", _test_model("mobilenet"), _IMAGE, 8,
            (16,), workers=(2,), is_kill=True, servers=_UNALIKE,
        ),
    )
}  # fmt: skip


class Prepared(NamedTuple):
    """A workload with its model built and its answers known."""

    workload: Workload
    path: Path
    x: Array
    y: Array


def prepare(workload: Workload) -> Prepared:
    """Build the model and work out what is right."""
    path = workload.path()
    rows = 2 if workload.name in ("large", "memory") else 4
    return Prepared(workload, path, *rows_of(path, rows, workload.shape))


def variants(workload: Workload, names: list[str], is_quick: bool) -> list[tuple[System, float]]:
    """The servers that a workload's first round is of, with their batch waits."""
    found = []
    for system in SYSTEMS:
        if system.name not in names or (workload.servers and system.name not in workload.servers):
            continue
        # Memory, bytes and kills do not depend on it.
        tried = system.waits_ms if workload.is_wait_tried and not is_quick else system.waits_ms[:1]
        if not workload.is_wait_tried:
            tried = system.waits_ms[-1:]
        found += [(system, wait_ms) for wait_ms in tried]
    return found


def measure(prepared: Prepared, system: System, wait_ms: float, pace: Pace) -> list[Row]:
    """One round of a workload with one server; what fails is told in the rows, not raised."""
    workload = prepared.workload
    rows: list[Row] = []
    for workers in workload.workers or (system.workers,):
        task = Task(
            prepared.path, prepared.x, prepared.y, workload.batch, workers, wait_ms, max(workload.levels),
            is_pinned=workload.name in ("mlp", "mobilenet", "kill"),
        )  # fmt: skip
        common: Row = {
            "workload": workload.name, "server": system.name, "wait_ms": wait_ms, "workers": workers
        }  # fmt: skip
        try:
            with _started(system, task) as server:
                for name, door in system.doors.items():
                    if workload.name in ("memory", "kill") and rows_of_server(rows, workers):
                        break  # one way in is enough
                    for row in _through(server, door, prepared, pace, system):
                        rows.append(common | {"system": name} | row)
        except (Failed, Missing, OSError, subprocess.SubprocessError) as e:
            for name in system.doors:
                rows.append(common | {"system": name, "in_flight": 0, "error": str(e), "failures": 0})
    return rows


@contextmanager
def _started(system: System, task: Task) -> Iterator[Running]:
    """A running server. One that ends before it is ready is started again, `_STARTS` times in all."""
    with ExitStack() as stack:
        for left in reversed(range(_STARTS)):
            try:
                server = stack.enter_context(running(system, task))
                break
            except EndedEarly:
                if not left:
                    raise
        yield server


def rows_of_server(rows: list[Row], workers: int) -> list[Row]:
    """Those measured with so many workers."""
    return [row for row in rows if row["workers"] == workers]


def _through(server: Running, door: Door, prepared: Prepared, pace: Pace, system: System) -> list[Row]:
    if prepared.workload.is_kill:
        return [_killed(server, door, prepared, pace)]
    rows = []
    with_warm_up = True
    for level in prepared.workload.levels:
        try:
            rows.append(_level(server, door, prepared, level, pace, with_warm_up))
        except LoadFailed as e:
            rows.append({"in_flight": level, "error": str(e), "failures": 0})
        with_warm_up = False
        if server.tree.process.poll() is not None:
            raise Failed(f"{system.name} ended under load: {server.last_words()}")
    return rows


def _level(
    server: Running, door: Door, prepared: Prepared, in_flight: int, pace: Pace, with_warm_up: bool
) -> Row:
    endpoint, row = server.endpoint(door), prepared.x[0]
    if with_warm_up:
        generate(door, endpoint, row, prepared.workload.batch, pace.warm_up)
    before = server.tree.cpu_s()
    load = generate(door, endpoint, row, in_flight, pace.level * prepared.workload.length)
    spent = spent_us(before, server.tree.cpu_s())
    if not load.requests_per_s:
        raise LoadFailed(f"none of {load.failures} requests was answered well")
    return {
        "in_flight": in_flight,
        "requests_per_s": load.requests_per_s,
        "p50_ms": load.p50_ms,
        "p99_ms": load.p99_ms,
        "cpu_us": spent / max(1, load.requests),
        "pss_mib": server.tree.pss_bytes() / MIB,
        "ready_s": server.ready_s,
        "gb_per_s": load.requests_per_s * row.nbytes / 1e9,
        "failures": load.failures,
    }


def _replaced_at(server: Running, before: set[int], until: float) -> float:
    """When there is a worker that was not there before; infinity if none comes."""
    while (now := time.monotonic()) < until:
        if set(server.tree.workers()) - before:
            return now
        time.sleep(0.05)
    return math.inf


def _killed(server: Running, door: Door, prepared: Prepared, pace: Pace) -> Row:
    (in_flight,) = prepared.workload.levels
    with tempfile.TemporaryDirectory(prefix="pool-bench-") as name:
        folder = Path(name)
        log = folder / "log"
        row = prepared.x[:1]
        headers: dict[str, str] = {}
        if door == POOL:
            body = folder / "row.npy"
            np.save(body, row)
        else:
            assert door.encode is not None
            headers, data = door.encode(row[0])
            # gRPC's own client puts the frame in front by itself.
            body = folder / "body"
            body.write_bytes(data[5:] if door.protocol == "grpc" else data)
        seconds = pace.before_kill + pace.after_kill
        orders = Orders(
            door.protocol, server.endpoint(door), door.path, headers, str(body), in_flight, seconds, str(log)
        )
        file = folder / "orders"
        file.write_bytes(msgspec.json.encode(orders))
        command = [sys.executable, "-m", "bench.peers.steady", str(file)]
        before = server.tree.cpu_s()
        with subprocess.Popen(command, stdin=subprocess.DEVNULL) as load:
            try:
                time.sleep(pace.before_kill)
                spent = server.tree.cpu_s()
                # The worker that did the most for this load, not the one that took longest to start.
                workers = server.tree.workers()
                victim = max(workers, key=lambda pid: spent.get(pid, 0.0) - before.get(pid, 0.0))
                killed_at = time.monotonic()
                os.kill(victim, signal.SIGKILL)
                replaced_at = _replaced_at(server, set(workers), killed_at + pace.after_kill)
                load.wait(pace.after_kill + 40)
            except (subprocess.TimeoutExpired, ValueError, ProcessLookupError) as e:
                raise Failed(f"no worker was killed under load: {e}") from None
            finally:
                load.kill()
        recovery_s, lost = recovery(log.read_text(), killed_at, replaced_at, killed_at + pace.after_kill)
    return {"in_flight": in_flight, "recovery_s": recovery_s, "lost": lost, "failures": 0}
