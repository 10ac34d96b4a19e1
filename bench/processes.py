"""The processes a measurement needs: a server, load of two kinds, and the model without pool."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import msgspec
import numpy as np

from pool import Client
from pool.cli.chaos_tally import Tally
from pool.errors import Unavailable

READY_TIMEOUT_S = 300.0


class Log:
    """What a server writes to its standard error, and when each line came."""

    def __init__(self, pipe: IO[str]) -> None:
        self._lines: list[tuple[float, str]] = []
        self._news = threading.Condition()
        self._reader = threading.Thread(target=self._read, args=(pipe,), daemon=True)
        self._reader.start()

    def wait_for(self, pattern: str, since: float, timeout_s: float) -> float:
        """When the first line came that matches, of those since an instant (monotonic); waits for one."""
        deadline = time.monotonic() + timeout_s
        seen = 0
        with self._news:
            while True:
                for at, line in self._lines[seen:]:
                    if at >= since and re.search(pattern, line):
                        return at
                seen = len(self._lines)
                if not self._news.wait(deadline - time.monotonic()):
                    raise RuntimeError(
                        f"no line {pattern!r} in the log within {timeout_s:g} s:\n{self.tail()}"
                    )

    def tail(self) -> str:
        """The last lines."""
        return "".join(line for _, line in self._lines[-20:])

    def _read(self, pipe: IO[str]) -> None:
        with pipe:
            for line in pipe:
                with self._news:
                    self._lines.append((time.monotonic(), line))
                    self._news.notify_all()


class Server:
    """A running `pool serve` with one model named `model`.

    Attributes:
        endpoint: Where it listens.
        client: Of it.
        log: What it writes, if it was started with `logs`.
    """

    def __init__(self, process: subprocess.Popen[str], endpoint: str) -> None:
        self._process = process
        self.endpoint = endpoint
        self.client = Client(endpoint, timeout=60.0)
        if process.stderr is not None:
            self.log = Log(process.stderr)

    def load(self, *arguments: object) -> dict[str, Any]:
        """Run `pool bench model ARGUMENTS --json`, in which no request may fail."""
        figures = self.flood(*arguments)
        if figures["errors"]:
            raise RuntimeError(f"pool bench met errors: {figures['errors']}")
        return figures

    def flood(self, *arguments: object) -> dict[str, Any]:
        """The same, and requests may be refused."""
        command = [sys.executable, "-m", "pool", "bench", "model", "--endpoint", self.endpoint, "--json"]
        done = subprocess.run([*command, *map(str, arguments)], check=True, stdout=subprocess.PIPE)
        figures: dict[str, Any] = json.loads(done.stdout)
        return figures

    @contextmanager
    def apart_from(self, core: int) -> Iterator[None]:
        """Leave a core to the worker that is pinned to it: front and load keep to the others meanwhile."""
        every = os.sched_getaffinity(0)
        for thread in (0, *map(int, os.listdir(f"/proc/{self._process.pid}/task"))):
            os.sched_setaffinity(thread, every - {core})  # 0 is this thread, whose children the load will be
        try:
            yield
        finally:
            os.sched_setaffinity(0, every)

    def status(self) -> dict[str, Any]:
        """The model's part of the status document."""
        document: dict[str, Any] = self.client.status()["models"]["model"]
        return document

    def tree_pss_bytes(self) -> int:
        """PSS of front, zygote and workers together."""
        status = self.client.status()
        workers = status["models"]["model"]["workers"]
        return sum(p["pss_bytes"] for p in (status["front"], *status["zygotes"], *workers))


@contextmanager
def server(path: Path, *, logs: bool = False, fronts: int = 1, **settings: object) -> Iterator[Server]:
    """Serve one model until the block ends.

    Args:
        path: Of the model.
        logs: Whether to keep what the server writes, from level `info` on, rather than show its warnings.
        fronts: Processes that serve the endpoint.
        settings: Keys of its `[models.model]` table.
    """
    with tempfile.TemporaryDirectory(prefix="pool-bench-") as folder:
        endpoint = f"ipc://{folder}/pool.sock"
        table = "".join(f"{key} = {json.dumps(value)}\n" for key, value in settings.items())
        config = Path(folder, "bench.toml")
        config.write_text(
            f'[server]\nendpoints = ["{endpoint}"]\nlog_level = "{"info" if logs else "warning"}"\n'
            f'fronts = {fronts}\n[models.model]\npath = "{path}"\n{table}'
        )
        process = subprocess.Popen(
            [sys.executable, "-m", "pool", "serve", str(config)],
            stderr=subprocess.PIPE if logs else None,
            text=True,
        )
        try:
            running = Server(process, endpoint)
            _await_ready(running, process)
            yield running
            running.client.close()
        finally:
            process.terminate()
            process.wait(60)


def drill_model(folder: Path, **keys: float) -> Path:
    """A model file of the drill backend with these keys."""
    file = folder / f"{'-'.join(f'{key}={value}' for key, value in keys.items())}.toml"
    file.write_text("".join(f"{key} = {value}\n" for key, value in keys.items()))
    return file


def _await_ready(running: Server, process: subprocess.Popen[str]) -> None:
    while True:
        try:
            if running.client.ready() and all(
                front["state"] == "serving" for front in running.client.status()["fronts"]
            ):
                return
        except Unavailable:
            pass
        try:
            raise RuntimeError(f"the server ended with exit code {process.wait(0.2)}")
        except subprocess.TimeoutExpired:
            continue


class Checked:
    """Load whose every answer is checked, in a process of its own: `bench.checked`. Ends it on leaving.

    Args:
        endpoint: Of a server.
        inputs: Rows to send, by input.
        want: What the first output must be for each.
        concurrency: Requests under way.
    """

    def __init__(
        self,
        endpoint: str,
        inputs: dict[str, np.ndarray[Any, Any]],
        want: np.ndarray[Any, Any],
        concurrency: int,
    ) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="pool-bench-")
        file = Path(self._folder.name, "rows.npz")
        arrays: dict[str, Any] = {f"in.{name}": array for name, array in inputs.items()}
        np.savez(file, out=want, **arrays)
        command = [sys.executable, "-m", "bench.checked", endpoint, str(file), str(concurrency)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> Checked:
        assert self._process.stdout is not None
        if not self._process.stdout.readline():
            raise RuntimeError(f"the load ended with exit code {self._process.wait()}")
        return self

    def finish(self) -> tuple[Tally, float]:
        """Ask no more; what became of all requests, and the longest time that one took, in seconds."""
        out, _ = self._process.communicate()
        document = json.loads(out)
        return msgspec.convert(document["tally"], Tally), document["slowest_s"]

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._folder.cleanup()


class Bare:
    """The model in a process of its own, without pool: `bench.bare`."""

    def __init__(self, path: Path, rows: int, threads: int, core: int | None = None) -> None:
        where = [] if core is None else ["--core", str(core)]
        command = [
            sys.executable,
            "-m",
            "bench.bare",
            str(path),
            "--rows",
            str(rows),
            "--threads",
            str(threads),
        ]
        self._process = subprocess.Popen(
            [*command, *where], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        self._read()  # it says when it is warm

    def start(self, call: str, seconds: float) -> None:
        """Begin a measurement of a call (`documented` or `cheapest`); `result` waits for it."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{call} {seconds}\n")

    def result(self) -> dict[str, float]:
        """`rows_per_s` and `p50_ms` of a call."""
        return self._read()

    def measure(self, call: str, seconds: float) -> dict[str, float]:
        """Call the model for so long."""
        self.start(call, seconds)
        return self.result()

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)

    def _read(self) -> dict[str, float]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the bare process ended with exit code {self._process.wait()}")
        figures: dict[str, float] = json.loads(line)
        return figures
