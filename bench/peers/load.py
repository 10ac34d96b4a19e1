"""Load in a closed loop, by the generator that each protocol has, and what it came to.

A rate is that at which the middle half of the answers came: before, connections are made, and after, some
clients have nothing left to send.

h2load for HTTP and gRPC (it costs the client least), Triton's perf_analyzer for its shared memory,
`pool bench` for pool. What they print is read by pure functions.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bench.peers import environments
from bench.peers.doors import Array, Door

# Streams of a connection: gRPC clients share few.
_GRPC_CONNECTIONS = 8
_GRACE_S = 45.0
_MANY = 256
_INACTIVE_S = 5  # an answer that takes longer is a failure


class Load(NamedTuple):
    """What a run of a load generator came to.

    Attributes:
        requests: Answered, well or not.
        requests_per_s: Answered well.
        p50_ms: Of those, NaN if there are none.
        p99_ms: Likewise.
        failures: Answered otherwise, or not at all.
    """

    requests: int
    requests_per_s: float
    p50_ms: float
    p99_ms: float
    failures: int


class LoadFailed(Exception):
    """The generator gave no figures; the sentence says why."""


def generate(door: Door, endpoint: str, row: Array, in_flight: int, seconds: float) -> Load:
    """Keep so many requests under way for so long.

    Args:
        door: The way in.
        endpoint: `host:port`, or pool's endpoint.
        row: To send.
        in_flight: Requests under way.
        seconds: About as long.

    Raises:
        LoadFailed: there are no figures.
        Missing: perf_analyzer cannot be had here.
    """
    if door.protocol == "pool":
        return _pool(endpoint, in_flight, seconds)
    if door.protocol == "shm":
        return _perf_analyzer(endpoint, in_flight, seconds)
    return _h2load(door, endpoint, row, in_flight, seconds)


# -- h2load ------------------------------------------------------------------------------------------


def _h2load(door: Door, endpoint: str, row: Array, in_flight: int, seconds: float) -> Load:
    assert door.encode is not None
    headers, body = door.encode(row)
    with tempfile.TemporaryDirectory(prefix="pool-bench-") as folder:
        file, log = Path(folder, "body"), Path(folder, "log")
        file.write_bytes(body)
        command = ["h2load", "-d", str(file), "--log-file", str(log)]
        if door.protocol == "grpc":
            connections = min(in_flight, _GRPC_CONNECTIONS)
            command += ["-c", str(connections), "-m", str(math.ceil(in_flight / connections))]
        else:
            command += ["--h1", "-c", str(in_flight)]
        for name, value in headers.items():
            command += ["-H", f"{name}: {value}"]
        command += ["-N", str(_INACTIVE_S), f"http://{endpoint}{door.path}"]

        def read(out: str) -> Load:
            return read_h2load(out, log.read_text() if log.exists() else "")

        if in_flight < _MANY:
            timed = ["-D", f"{round(seconds * 1000)}ms"]
            return read(run([*command, *timed], seconds + _GRACE_S))
        # With many connections h2load may wait for ever when its time is up: it is told a number then.
        few = read(run([*command, "-n", str(16 * in_flight)], _GRACE_S))
        log.unlink(missing_ok=True)
        requests = max(16 * in_flight, int(few.requests_per_s * seconds))
        load = read(run([*command, "-n", str(requests)], seconds + _GRACE_S))
        # What the first ones cost is in the server's account.
        return load._replace(requests=load.requests + few.requests)


def read_h2load(output: str, log: str) -> Load:
    """What h2load says, and its log of requests.

    Args:
        output: What it printed.
        log: A line a request: start in µs, HTTP status (-1 if it failed), µs until its end.

    Raises:
        LoadFailed: it does not look like h2load's.
    """
    counts = re.search(r"requests: (\d+) total.*?(\d+) failed, (\d+) errored", output)
    if counts is None:
        raise LoadFailed(f"h2load says: {' '.join(output.split())[-200:]}")
    fields = [line.split("\t") for line in log.splitlines()]
    good = np.array([int(f[2]) for f in fields if f[1] == "200"], np.float64)
    bad = sum(f[1] != "200" for f in fields)
    failures = max(bad, int(counts[2]))
    if not len(good):
        return Load(bad, 0.0, math.nan, math.nan, failures)
    p50, p99 = np.percentile(good, [50, 99]) / 1e3
    return Load(len(good) + bad, _steady_per_s(fields), float(p50), float(p99), failures)


def _steady_per_s(fields: list[list[str]]) -> float:
    """The rate of the middle half of the answers, as `pool bench` has it."""
    ends = np.sort([int(f[0]) + int(f[2]) for f in fields if f[1] == "200"]) / 1e6
    first, last = len(ends) // 4, 3 * len(ends) // 4
    return float((last - first) / (ends[last] - ends[first])) if ends[last] > ends[first] else 0.0


# -- perf_analyzer -------------------------------------------------------------------------------------


def _perf_analyzer(endpoint: str, in_flight: int, seconds: float) -> Load:
    analyzer, environment = environments.analyzer()
    with tempfile.TemporaryDirectory(prefix="pool-bench-") as folder:
        file = Path(folder, "figures.csv")
        # Three windows, of which none is found unstable.
        window_ms = max(300, round(seconds * 1000 / 3))
        command = [
            analyzer, "-m", "model", "-u", endpoint, "-i", "grpc", "--async", "--shared-memory", "system",
            "--concurrency-range", f"{in_flight}:{in_flight}", "-p", str(window_ms), "-r", "3", "-s", "999",
            "-f", str(file),
        ]  # fmt: skip
        out = run(command, 6 * seconds + _GRACE_S, environment)
        return read_perf_analyzer(out, file.read_text() if file.exists() else "")


def read_perf_analyzer(output: str, figures: str) -> Load:
    """What perf_analyzer says, and the CSV file it writes.

    Raises:
        LoadFailed: it measured nothing.
    """
    rows = list(csv.DictReader(io.StringIO(figures)))
    if not rows:
        raise LoadFailed(f"perf_analyzer says: {' '.join(output.split())[-200:]}")
    (row,) = rows
    counted = sum(int(n) for n in re.findall(r"Request count: (\d+)", output))
    failed = sum(int(n) for n in re.findall(r"Failed Request Count: (\d+)", output, re.IGNORECASE))
    return Load(
        counted,
        float(row["Inferences/Second"]),
        float(row["p50 latency"]) / 1e3,
        float(row["p99 latency"]) / 1e3,
        failed,
    )


# -- pool ----------------------------------------------------------------------------------------------


def _pool(endpoint: str, in_flight: int, seconds: float) -> Load:
    # It takes a number of requests: a short run tells how many fit.
    few = _pool_bench(endpoint, in_flight, 8 * in_flight, seconds)
    load = _pool_bench(endpoint, in_flight, max(2 * in_flight, int(few.requests_per_s * seconds)), seconds)
    # What the first ones cost is in the server's account.
    return load._replace(requests=load.requests + few.requests)


def _pool_bench(endpoint: str, in_flight: int, requests: int, seconds: float) -> Load:
    command = [sys.executable, "-m", "pool", "bench", "model", "--endpoint", endpoint, "--json"]
    out = run([*command, "--concurrency", str(in_flight), "--requests", str(requests)], seconds + _GRACE_S)
    return read_pool(out, requests)


def read_pool(output: str, requests: int) -> Load:
    """What `pool bench --json` says of so many requests.

    Raises:
        LoadFailed: it is no such document.
    """
    try:
        report = json.loads(output[output.index("{") :])
    except ValueError:
        raise LoadFailed(f"pool bench says: {' '.join(output.split())[-200:]}") from None
    failures = sum(report["errors"].values())
    rate = report["steady_per_s"] or report["requests_per_s"]
    return Load(requests, rate, report["p50_ms"], report["p99_ms"], failures)


def run(command: list[str], timeout_s: float, environment: dict[str, str] | None = None) -> str:
    """What a command prints; it is ended when it takes too long.

    Args:
        command: To run.
        timeout_s: Longest it may take.
        environment: More of it than this process has.

    Raises:
        LoadFailed: it is not there, or takes too long.
    """
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=timeout_s,
            check=False,
            env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"} | (environment or {}),
        )
    except FileNotFoundError:
        raise LoadFailed(f"{command[0]} is not installed") from None
    except subprocess.TimeoutExpired:
        raise LoadFailed(f"{Path(command[0]).name} did not end within {timeout_s:g} s") from None
    return done.stdout
