"""What this machine could do at most: the model without a server, frames without a model, memory copied."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from bench.peers.doors import Array
from bench.peers.load import LoadFailed, run
from bench.processes import Bare

_START_S = 120.0
_ECHO_ANSWER_BYTES = 40  # ten floats, as the MLP gives


def bare(path: Path, batch: int, cores: list[int], seconds: float) -> dict[str, float]:
    """The model in a process for each core, all at once.

    Returns:
        `requests_per_s`: rows/s of all together in full batches, by the call that pool's workers make.
        `p50_ms`: of that call with one row, in a process alone; `documented_p50_ms`: of the documented one.
    """
    processes = [Bare(path, batch, 1, core) for core in cores]
    try:
        for process in processes:
            process.start("cheapest", seconds)
        rows_per_s = sum(process.result()["rows_per_s"] for process in processes)
    finally:
        for process in processes:
            process.close()
    alone = Bare(path, 1, 1, cores[0])
    try:
        cheapest, documented = (alone.measure(call, seconds / 2) for call in ("cheapest", "documented"))
    finally:
        alone.close()
    return {
        "requests_per_s": rows_per_s,
        "p50_ms": cheapest["p50_ms"],
        "documented_p50_ms": documented["p50_ms"],
    }


def echo(row_bytes: int, in_flight: int, seconds: float, rows: int = 1) -> dict[str, float]:
    """A ROUTER that answers and does nothing else; messages of so many rows of so many bytes.

    Returns:
        `requests_per_s`, counted in rows; `p50_ms` of a message.
    """
    with tempfile.TemporaryDirectory(prefix="pb-") as folder:
        endpoint = f"ipc://{folder}/s"
        command = [sys.executable, "-m", "bench.peers.echo"]
        message = [endpoint, str(rows), str(row_bytes)]
        server = subprocess.Popen([*command, "serve", *message, str(_ECHO_ANSWER_BYTES)])
        try:
            words = [str(max(1, in_flight // rows)), str(seconds)]
            report = json.loads(run([*command, "load", *message, *words], seconds + 30))
        finally:
            server.kill()
            server.wait()
    return {"requests_per_s": report["messages_per_s"] * rows, "p50_ms": report["p50_ms"]}


def naked(
    path: Path | str,
    x: Array,
    y: Array,
    in_flight: int,
    rows: int,
    seconds: float,
    backend: str = "tensorflow",
) -> dict[str, dict[str, float]]:
    """The whole data path with nothing in it but its I/O (`bench.peers.naked`).

    Args:
        path: Of the model.
        x: Rows to ask for.
        y: What the answers must be.
        in_flight: Requests under way.
        rows: Of a bundle, and most of a batch.
        seconds: For each form of messages, each way.
        backend: That loads the model.

    Returns:
        `naked loop`, each row in a message of its own, and `naked loop bundled`, both through ZeroMQ; the
        same with `, line` past it. Of each `requests_per_s`, and CPU of client, front and worker in µs a
        request.

    Raises:
        LoadFailed: an answer was wrong, or none came.
    """
    with tempfile.TemporaryDirectory(prefix="pool-bench-") as folder:
        file = Path(folder, "rows.npz")
        np.savez(file, x=x, y=y)
        words = [backend, str(path), str(file), str(in_flight), str(rows), str(seconds)]
        out = run([sys.executable, "-m", "bench.peers.naked", *words], 4 * seconds + _START_S)
    try:
        found: dict[str, dict[str, float]] = json.loads(out.splitlines()[-1])
    except (ValueError, IndexError):
        raise LoadFailed(f"the naked loop says: {' '.join(out.split())[-400:]}") from None
    return found


def memcpy(size: int, seconds: float) -> float:
    """GB/s of one thread that copies so many bytes from one place to another, again and again."""
    source, target = np.ones(size, np.uint8), np.zeros(size, np.uint8)
    copies = 0
    began = time.perf_counter()
    while (took := time.perf_counter() - began) < seconds:
        np.copyto(target, source)
        copies += 1
    return copies * size / took / 1e9
