"""The processes a measurement needs: a server, `pool bench` against it, and the model without pool."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pool import Client
from pool.errors import Unavailable

READY_TIMEOUT_S = 300.0


class Server:
    """A running `pool serve` with one model named `model`."""

    def __init__(self, process: subprocess.Popen[bytes], endpoint: str) -> None:
        self._process = process
        self.endpoint = endpoint
        self.client = Client(endpoint, timeout=60.0)

    def load(self, *arguments: object) -> dict[str, Any]:
        """Run `pool bench model ARGUMENTS --json`."""
        command = [sys.executable, "-m", "pool", "bench", "model", "--endpoint", self.endpoint, "--json"]
        done = subprocess.run([*command, *map(str, arguments)], check=True, stdout=subprocess.PIPE)
        figures: dict[str, Any] = json.loads(done.stdout)
        if figures["errors"]:
            raise RuntimeError(f"pool bench met errors: {figures['errors']}")
        return figures

    def tree_pss_bytes(self) -> int:
        """PSS of front, zygote and workers together."""
        status = self.client.status()
        workers = status["models"]["model"]["workers"]
        return sum(p["pss_bytes"] for p in (status["front"], *status["zygotes"], *workers))


@contextmanager
def server(path: Path, **settings: object) -> Iterator[Server]:
    """Serve one model until the block ends.

    Args:
        path: Of the model.
        settings: Keys of its `[models.model]` table.
    """
    with tempfile.TemporaryDirectory(prefix="pool-bench-") as folder:
        endpoint = f"ipc://{folder}/pool.sock"
        table = "".join(f"{key} = {json.dumps(value)}\n" for key, value in settings.items())
        config = Path(folder, "bench.toml")
        config.write_text(
            f'[server]\nendpoints = ["{endpoint}"]\nlog_level = "warning"\n'
            f'[models.model]\npath = "{path}"\n{table}'
        )
        process = subprocess.Popen([sys.executable, "-m", "pool", "serve", str(config)])
        try:
            running = Server(process, endpoint)
            _await_ready(running, process)
            yield running
            running.client.close()
        finally:
            process.terminate()
            process.wait(60)


def _await_ready(running: Server, process: subprocess.Popen[bytes]) -> None:
    while True:
        try:
            if running.client.ready():
                return
        except Unavailable:
            pass
        try:
            raise RuntimeError(f"the server ended with exit code {process.wait(0.2)}")
        except subprocess.TimeoutExpired:
            continue


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
