"""`pool demo`: train a model, serve it, ask it everything at once, check every answer.

What is trained is kept and used again. The server is a real one, `pool serve` on the shipped
`configs/demo.toml`, with a runtime directory of its own, so that several demos can run side by side.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pool.cli import digits
from pool.cli.digits import Digits
from pool.cli.output import console, print_json, progress, size
from pool.client.aio import AsyncClient
from pool.client.sync import Client
from pool.errors import ConfigError, DeadlineExceeded, InternalError, ModelLoadError, PoolError, Unavailable

MODEL = "digits"
PICTURE = "demo.png"  # in the current directory
TOLERANCE = 1e-5  # of a probability: batches of other sizes sum in another order
IN_FLIGHT = 96  # of the asyncio client: more than one batch waits while two run
START_TIMEOUT_S = 120.0  # importing TensorFlow is most of it
STOP_TIMEOUT_S = 30.0
READY_ASK_S = 0.2  # between two questions whether the server is ready
REQUEST_TIMEOUT_S = 60.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of sentences")
    parser.add_argument(
        "--dir",
        metavar="DIR",
        type=Path,
        default=Path("demo"),
        help="where the trained model is kept (default: demo)",
    )


def run(args: argparse.Namespace) -> int:
    """Run the demo.

    Raises:
        ConfigError: what the demo needs is not installed.
        PoolError: training or serving failed.
    """
    missing = [
        name for name in ("tensorflow", "sklearn", "matplotlib") if importlib.util.find_spec(name) is None
    ]
    if missing:
        raise ConfigError(
            f"pool demo needs {', '.join(missing)}, which is not installed; "
            "wanted pip install 'poolserve[tensorflow,demo]'"
        )
    # Told to stop, the demo must stop its server, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    data = digits.load()
    say = console(stderr=args.json)
    learned = len(data.digits) - int(data.held_out.sum())
    say.print(f"scans     {len(data.digits)}: {learned} to learn from, {int(data.held_out.sum())} held out")
    models = args.dir.absolute() / "models" / MODEL
    started = time.monotonic()
    reused = (models / str(digits.VERSION)).exists()
    if not reused:
        _train(models)
    how = "trained before, used again" if reused else f"trained in {time.monotonic() - started:.1f} s"
    say.print(f"model     {models}, {how}")
    expected = _expected(models)

    with tempfile.TemporaryDirectory(prefix="pool-demo-") as folder:
        started = time.monotonic()
        with _server(Path(folder), args.dir.absolute()) as endpoint:
            say.print(f"server    ready after {time.monotonic() - started:.1f} s")
            load = Load(data.images)
            load.run(endpoint)
            with Client(endpoint, timeout=REQUEST_TIMEOUT_S) as client:
                status = client.status()
    report = _report(load, expected, data, status)
    headline = (
        f"{report['accuracy']:.1%} of the held-out scans read right; {report['requests']} requests, "
        f"{report['requests_per_s']:,.0f} requests/s, p50 {report['p50_ms']:.1f} ms, "
        f"p99 {report['p99_ms']:.1f} ms"
    )
    from pool.cli import picture

    sizes = {int(rows): count for rows, count in report["batch_sizes"].items()}
    picture.draw(Path(PICTURE), data, load.probabilities, sizes, headline)
    if args.json:
        print_json(report)
    else:
        _show(report, headline)
    if report["mismatches"]:
        raise InternalError(
            f"{report['mismatches']} answers differ from the in-process model's by over {TOLERANCE}"
        )
    return 0


# -- the model, in a child each --------------------------------------------------------------------


def _train(models: Path) -> None:
    models.mkdir(parents=True, exist_ok=True)
    with progress() as bars:
        bar = bars.add_task("training", total=None, note="")
        for line in _digits("train", models):
            bars.update(
                bar,
                total=line["epochs"],
                completed=line["epoch"],
                note=f"{line['accuracy']:.1%} of the learnt scans right",
            )


def _expected(models: Path) -> npt.NDArray[np.float32]:
    """What the model answers where nothing of pool is between: probabilities, [scan, digit]."""
    (line,) = _digits("answer", models)
    return np.array(line["probabilities"], np.float32)


def _digits(task: str, models: Path) -> Iterator[dict[str, Any]]:
    """Run a task of `pool.cli.digits` and give each line it prints."""
    command = [sys.executable, "-m", "pool.cli.digits", task, str(models)]
    environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=log, text=True) as child,
    ):
        try:
            assert child.stdout is not None
            for line in child.stdout:
                yield json.loads(line)
            if child.wait() != 0:
                log.seek(0)
                raise ModelLoadError(
                    f"the demo's model: {task} ended with {child.returncode}\n{log.read().strip()}"
                )
        finally:
            child.kill()


# -- the server ------------------------------------------------------------------------------------


@contextmanager
def _server(folder: Path, kept: Path) -> Iterator[str]:
    """A server child on `demo.toml`; gives its endpoint once it is ready, stops it at the end.

    Raises:
        Unavailable: it ended, was not ready in time, or did not stop as it should.
    """
    # The configuration names its model as ../demo/models/digits, which a checkout has beside configs/.
    (folder / "configs").mkdir()
    (folder / "demo").symlink_to(kept, target_is_directory=True)
    config = folder / "configs" / "demo.toml"
    shutil.copyfile(_config_file(), config)
    environment = os.environ | {"RUNTIME_DIRECTORY": str(folder), "TF_CPP_MIN_LOG_LEVEL": "3"}
    environment.pop("NOTIFY_SOCKET", None)  # the demo's server is no service of whoever runs the demo
    with (folder / "server.log").open("w+") as log:
        # A session of its own: Ctrl-C at the terminal reaches the demo, which then stops the server.
        server = subprocess.Popen(
            [sys.executable, "-m", "pool", "serve", str(config)],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )

        def failure(what: str) -> Unavailable:
            log.seek(0)
            return Unavailable(f"the demo's server {what}\n{log.read().strip()}")

        try:
            endpoint = f"ipc://{folder}/pool.sock"
            _await_ready(server, endpoint, failure)
            yield endpoint
        finally:
            server.terminate()
            try:
                code = server.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()
                raise failure(f"did not stop in {STOP_TIMEOUT_S:g} s") from None
        if code != 0:
            raise failure(f"ended with {code}")


def _await_ready(
    server: subprocess.Popen[bytes], endpoint: str, failure: Callable[[str], Unavailable]
) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    with progress() as bars, Client(endpoint, timeout=READY_ASK_S) as client:
        bars.add_task("starting the server", total=None, note="")
        while True:
            if server.poll() is not None:
                raise failure(f"ended with {server.returncode}")
            if time.monotonic() > deadline:
                raise failure(f"was not ready in {START_TIMEOUT_S:g} s")
            try:
                if client.ready():
                    return
                server.wait(READY_ASK_S)
            except (DeadlineExceeded, Unavailable, subprocess.TimeoutExpired):
                continue


def _config_file() -> Path:
    """`demo.toml` as installed with the package, or in the checkout that the package is run from."""
    installed = Path(__file__).with_name("demo.toml")
    return installed if installed.exists() else Path(__file__).parents[2] / "configs" / "demo.toml"


# -- the load --------------------------------------------------------------------------------------


class Load:
    """Every scan as a request of its own, from an asyncio client and from a thread with the sync client.

    Both take the next scan that nobody has asked for yet.

    Attributes:
        probabilities: The answers, [scan, digit].
        latencies_s: Seconds from call to answer, in the order of the answers.
        elapsed_s: Seconds from the first call to the last answer.
    """

    def __init__(self, images: npt.NDArray[np.float32]) -> None:
        self._images = images
        self._next = iter(range(len(images)))  # one step is one bytecode: threads may share it
        self.probabilities = np.full((len(images), 10), np.nan, np.float32)
        self.latencies_s: list[float] = []
        self.elapsed_s = 0.0
        self._tell: Callable[[], None] = lambda: None  # of the progress

    def run(self, endpoint: str) -> None:
        """Ask everything.

        Raises:
            PoolError: the first request that failed.
        """
        failures: list[BaseException] = []

        def in_thread() -> None:
            try:
                self._ask_sync(endpoint)
            except PoolError as e:
                failures.append(e)

        with progress() as bars:
            bar = bars.add_task("asking", total=len(self._images), note="")
            self._tell = lambda: bars.update(bar, completed=len(self.latencies_s))
            thread = threading.Thread(target=in_thread, name="sync client")
            started = time.monotonic()
            thread.start()
            try:
                asyncio.run(self._ask_async(endpoint))
            finally:
                for _ in self._next:  # after a failure nothing more is asked
                    pass
                thread.join()
            self.elapsed_s = time.monotonic() - started
            self._tell()
        if failures:
            raise failures[0]

    def _ask_sync(self, endpoint: str) -> None:
        with Client(endpoint, timeout=REQUEST_TIMEOUT_S) as client:
            for scan in self._next:
                started = time.monotonic()
                outputs = client.predict(MODEL, self._images[scan : scan + 1])
                self._take(scan, started, outputs)

    async def _ask_async(self, endpoint: str) -> None:
        async with AsyncClient(endpoint, timeout=REQUEST_TIMEOUT_S) as client:

            async def ask() -> None:
                for scan in self._next:
                    started = time.monotonic()
                    outputs = await client.predict(MODEL, self._images[scan : scan + 1])
                    self._take(scan, started, outputs)

            await asyncio.gather(*(ask() for _ in range(IN_FLIGHT)))

    def _take(self, scan: int, started: float, outputs: dict[str, npt.NDArray[Any]]) -> None:
        self.probabilities[scan] = outputs["probabilities"][0]
        self.latencies_s.append(time.monotonic() - started)
        if len(self.latencies_s) % 50 == 0:
            self._tell()


# -- the report ------------------------------------------------------------------------------------


def _report(
    load: Load, expected: npt.NDArray[np.float32], data: Digits, status: dict[str, Any]
) -> dict[str, Any]:
    is_right = load.probabilities.argmax(axis=1) == data.digits
    is_near = np.abs(load.probabilities - expected) <= TOLERANCE  # never true of a NaN
    p50_ms, p99_ms = np.percentile(np.array(load.latencies_s) * 1000, [50, 99])
    model = status["models"][MODEL]
    processes = [
        {"role": role, "pid": one["pid"], "uss_bytes": one["uss_bytes"], "pss_bytes": one["pss_bytes"]}
        for role, group in (
            ("front", [status["front"]]),
            ("zygote", status["zygotes"]),
            ("worker", model["workers"]),
        )
        for one in group
    ]
    return {
        "accuracy": round(float(is_right[data.held_out].mean()), 4),
        "requests": len(load.latencies_s),
        "mismatches": int((~is_near.all(axis=1)).sum()),
        "requests_per_s": round(len(load.latencies_s) / load.elapsed_s, 1),
        "p50_ms": round(float(p50_ms), 3),
        "p99_ms": round(float(p99_ms), 3),
        "batch_sizes": model["batch_sizes"],
        "processes": processes,
    }


def _show(report: dict[str, Any], headline: str) -> None:
    from rich.table import Table

    out = console()
    out.print(
        f"answers   {report['requests'] - report['mismatches']} of {report['requests']} "
        f"within {TOLERANCE:g} of the in-process model"
    )
    out.print(f"result    {headline}")
    batches = Table("rows in the batch", "batches", "", title="batches", title_justify="left")
    sizes = {int(rows): count for rows, count in report["batch_sizes"].items()}
    for low, high, count in histogram(sizes):
        bar = "█" * round(30 * count / sum(sizes.values()))
        batches.add_row(str(low) if low == high else f"{low} to {high}", str(count), bar)
    out.print(batches)
    processes = Table(
        "process", "pid", "private (USS)", "share of all (PSS)", title="memory", title_justify="left"
    )
    for process in report["processes"]:
        processes.add_row(
            process["role"], str(process["pid"]), size(process["uss_bytes"]), size(process["pss_bytes"])
        )
    out.print(processes)
    out.print(f"picture   {PICTURE}")


def histogram(sizes: dict[int, int]) -> list[tuple[int, int, int]]:
    """Batches by size, in ranges that double: (first size, last size, batches), the empty ones left out."""
    ranges: dict[tuple[int, int], int] = {}
    for rows in sorted(sizes):
        low = 1 << (rows.bit_length() - 1) if rows else 0
        key = (low, min(max(2 * low - 1, 0), max(sizes)))
        ranges[key] = ranges.get(key, 0) + sizes[rows]
    return [(low, high, count) for (low, high), count in ranges.items()]
