"""`pool bench MODEL`: requests from several client processes, and what they and the server saw.

Closed loop: as many requests under way as `--concurrency` says, one sent for each answer. Open loop
(`--rate`): requests at random instants whatever the server does, each timed from when it was to be sent,
so that a server that stalls is charged for everyone it kept waiting. With `--request-timeout-ms` requests
carry a deadline, and what was answered within it is the goodput.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import IO, Any

import msgspec
import numpy as np
import numpy.typing as npt

from pool.cli.arguments import add_endpoint, connect, count
from pool.cli.load_client import Answers, Result, Task
from pool.cli.output import console, print_json, progress
from pool.cli.rates import front_cpu_s
from pool.client.sync import Client
from pool.endpoints import default_endpoint
from pool.errors import ConfigError, InternalError, InvalidInput, ModelError, error_from_code
from pool.sample import Recipe, recipes, sample_inputs

PERCENTILES = {"p50_ms": 50, "p90_ms": 90, "p99_ms": 99, "p999_ms": 99.9}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("model", metavar="MODEL", help="the model's name")
    parser.add_argument(
        "--requests", metavar="N", type=count, default=10_000, help="requests to send (default: 10000)"
    )
    parser.add_argument(
        "--concurrency",
        metavar="C",
        type=count,
        help="most requests under way, of all clients together (default: 32; with --rate: no limit)",
    )
    parser.add_argument(
        "--rows", metavar="R", type=count, default=1, help="rows of each request (default: 1)"
    )
    parser.add_argument(
        "--input",
        metavar="FILE",
        type=_file,
        help=".npz (or .npy) of inputs, taken R rows at a time (default: made up)",
    )
    parser.add_argument(
        "--rate",
        metavar="RPS",
        type=_rate,
        help="requests per second, of all clients together, at random instants",
    )
    parser.add_argument(
        "--request-timeout-ms",
        metavar="MS",
        type=_patience,
        help="timeout of each request, which the server is told (default: none)",
    )
    parser.add_argument("--clients", metavar="K", type=count, default=1, help="client processes (default: 1)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    add_endpoint(parser)


def run(args: argparse.Namespace) -> int:
    """Measure and show; exit code 1 if not one request succeeded.

    Raises:
        ConfigError: arguments that do not go together.
        PoolError: no server, no such model, or the inputs do not suit it.
    """
    window = args.concurrency or (None if args.rate else 32)
    patience_s = None if args.request_timeout_ms is None else args.request_timeout_ms / 1e3
    if args.requests < args.clients or (window is not None and window < args.clients):
        raise ConfigError(
            "pool bench: wanted at least one request, and one of --concurrency, for each of --clients"
        )
    with connect(args) as client:
        recipe = Recipe() if args.input else find_recipe(client, args.model, args.rows)
        tasks = [
            Task(
                endpoint=args.endpoint or default_endpoint(),
                model=args.model,
                requests=share(args.requests, args.clients, i),
                rows=args.rows,
                window=None if window is None else share(window, args.clients, i),
                rate=None if args.rate is None else args.rate / args.clients,
                input=args.input,
                recipe=recipe,
                seed=i,
                timeout_s=args.timeout,
                patience_s=patience_s,
                server_key=args.server_key,
                secret_key=args.key,
            )
            for i in range(args.clients)
        ]
        with Clients(tasks) as clients:
            before = client.status()
            results = clients.run()
            after = client.status()
    report = summarize(results, before, after, args.model, patience_s)
    if args.json:
        print_json(report)
    else:
        show(report)
    return 0 if any(answers.size for _, answers in results) else 1


def share(total: int, parts: int, index: int) -> int:
    """Part `index` of a total shared out as evenly as integers allow."""
    return total // parts + (index < total % parts)


def find_recipe(client: Client, model: str, rows: int) -> Recipe:
    """How to make up inputs that the model takes: the first way of several that it has an answer for.

    Raises:
        InvalidInput: it takes none.
        PoolError: there is no such model, or no server.
    """
    signature = client.signature(model).signature()
    refusal = ""
    for recipe in recipes(signature):
        try:
            client.predict(model, sample_inputs(signature, rows, recipe=recipe))
        except (InvalidInput, ModelError) as e:
            refusal = refusal or e.message
        else:
            return recipe
    raise InvalidInput(
        f"model {model!r} takes none of the inputs made up for it; wanted --input FILE ({refusal})"
    )


# -- the client processes --------------------------------------------------------------------------

Results = list[tuple[Result, Answers]]


class Clients:
    """Client processes that are connected and ready; ends them on leaving.

    Raises (on entering): the first client's failure.
    """

    def __init__(self, tasks: list[Task]) -> None:
        self._tasks = tasks
        self._children: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Clients:
        # One thread each for numpy's libraries: a client is one core's worth of load.
        environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        try:
            for _ in self._tasks:
                self._children.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "pool.cli.load_client"],
                        env=environment,
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                    )
                )
            for task, child in zip(self._tasks, self._children, strict=True):
                _write(child, msgspec.json.encode(task))
            for child in self._children:
                _read_line(child)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for child in self._children:
            child.kill()
        for child in self._children:
            child.wait()
            for pipe in (child.stdin, child.stdout):
                assert pipe is not None
                pipe.close()

    def run(self) -> Results:
        """Let all run at once; their results, in order."""
        done = [0] * len(self._children)
        results: list[tuple[Result, Answers] | Exception | None] = [None] * len(done)
        with progress() as bars:
            bar = bars.add_task("asking", total=sum(task.requests for task in self._tasks), note="")

            def follow(i: int, child: subprocess.Popen[bytes]) -> None:
                try:
                    while "done" in (line := _read_line(child)):
                        done[i] = line["done"]
                        bars.update(bar, completed=sum(done))
                    result = msgspec.convert(line, Result)
                    results[i] = result, np.frombuffer(_stdout(child).read(), np.float64).reshape(2, -1)
                    done[i] = self._tasks[i].requests
                    bars.update(bar, completed=sum(done))
                except Exception as e:
                    results[i] = e

            threads = [
                threading.Thread(target=follow, args=(i, child), daemon=True)
                for i, child in enumerate(self._children)
            ]
            for thread in threads:
                thread.start()
            for child in self._children:
                _write(child, b"go")
            for thread in threads:
                thread.join()
        finished: Results = []
        for one in results:
            if isinstance(one, tuple):
                finished.append(one)
            else:
                assert one is not None
                raise one
        return finished


def _stdout(child: subprocess.Popen[bytes]) -> IO[bytes]:
    assert child.stdout is not None
    return child.stdout


def _write(child: subprocess.Popen[bytes], line: bytes) -> None:
    assert child.stdin is not None
    child.stdin.write(line + b"\n")
    child.stdin.flush()


def _read_line(child: subprocess.Popen[bytes]) -> dict[str, Any]:
    """The next line a client printed.

    Raises:
        PoolError: the failure it tells of; InternalError if it ended without a word.
    """
    line = _stdout(child).readline()
    if not line:
        raise InternalError(f"a client process ended with {child.wait()}")
    document: dict[str, Any] = msgspec.json.decode(line)
    if "code" in document:
        raise error_from_code(document["code"], document["message"])
    return document


# -- the figures -----------------------------------------------------------------------------------


def summarize(
    results: Results,
    before: dict[str, Any],
    after: dict[str, Any],
    model: str,
    patience_s: float | None = None,
) -> dict[str, Any]:
    """The report: exact percentiles over all answers, and what the server spent in between.

    Args:
        results: Of each client.
        before: The server's status when the clients were ready.
        after: The same when they had ended.
        model: Whose batches count.
        patience_s: Timeout of the requests: answers that took longer are no goodput.
    """
    latencies_s, answered_s = np.concatenate([answers for _, answers in results], axis=1)
    latencies_ms = latencies_s * 1000
    answered = len(latencies_ms)
    in_time = answered if patience_s is None else int((latencies_ms <= patience_s * 1000).sum())
    elapsed_s = max(r.ended_s for r, _ in results) - min(r.started_s for r, _ in results)
    errors: Counter[str] = Counter()
    for result, _ in results:
        errors.update(result.errors)

    def per_request(seconds: float) -> float | None:
        return round(seconds * 1e6 / answered, 2) if answered else None

    # A pipeline's batches and workers are those of its models.
    steps = after.get("pipelines", {}).get(model, {}).get("steps")
    names = [model] if steps is None else sorted({step["model"] for step in steps})
    models_before, models_after = ([status["models"][name] for name in names] for status in (before, after))
    batches = sum(m["batches"] for m in models_after) - sum(m["batches"] for m in models_before)
    rows = sum(m["rows"] for m in models_after) - sum(m["rows"] for m in models_before)
    # A worker that was started anew in between counts from nothing.
    worker_s = {worker["pid"]: worker["cpu_s"] for m in models_before for worker in m.get("workers", ())}
    workers_s = sum(
        worker["cpu_s"] - worker_s.get(worker["pid"], 0.0) for m in models_after for worker in m["workers"]
    )
    return {
        "requests_per_s": round(answered / elapsed_s, 1),
        "steady_per_s": steady_per_s(answered_s),
        "goodput_per_s": round(in_time / elapsed_s, 1),
        **{
            name: round(float(np.percentile(latencies_ms, percent)), 4) if answered else None
            for name, percent in PERCENTILES.items()
        },
        "errors": dict(sorted(errors.items())),
        "mean_batch_rows": round(rows / batches, 2) if batches else None,
        "client_cpu_us_per_request": per_request(sum(r.cpu_s for r, _ in results)),
        "server_cpu_us_per_request": {
            "front": per_request(front_cpu_s(before, after)),
            "workers": per_request(workers_s),
        },
    }


def steady_per_s(answered_s: npt.NDArray[np.float64]) -> float | None:
    """The rate at which the middle half of the answers came: at the beginning and the end less is under way.

    Args:
        answered_s: When, in any order; shape [answered].
    """
    ended = np.sort(answered_s)
    first, last = len(ended) // 4, 3 * len(ended) // 4
    took_s = float(ended[last] - ended[first]) if last > first else 0.0
    return round((last - first) / took_s, 1) if took_s else None


def show(report: dict[str, Any]) -> None:
    """Print the report as a table."""
    from rich.table import Table

    def shown(value: float | None, unit: str) -> str:
        return "no answer" if value is None else f"{value:,.2f} {unit}"

    server = report["server_cpu_us_per_request"]
    table = Table.grid(padding=(0, 2))
    table.add_row("throughput", f"{report['requests_per_s']:,.0f} requests/s")
    table.add_row("  of the middle half", shown(report["steady_per_s"], "requests/s"))
    if report["goodput_per_s"] != report["requests_per_s"]:
        table.add_row("answered in time", f"{report['goodput_per_s']:,.0f} requests/s")
    for name, percent in PERCENTILES.items():
        table.add_row(f"latency, {percent} %", shown(report[name], "ms"))
    table.add_row("rows in a batch, mean", shown(report["mean_batch_rows"], "").strip())
    table.add_row("CPU per request, clients", shown(report["client_cpu_us_per_request"], "µs"))
    table.add_row("CPU per request, front", shown(server["front"], "µs"))
    table.add_row("CPU per request, workers", shown(server["workers"], "µs"))
    for code, number in report["errors"].items():
        table.add_row(f"error {code}", str(number))
    console().print(table)


def _file(text: str) -> str:
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"{text}: no such file")
    return str(Path(text).absolute())


def _rate(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1e7:
        raise argparse.ArgumentTypeError(f"wanted requests per second from above 0 to 10000000, got {text}")
    return value


def _patience(text: str) -> float:
    value = float(text)
    if not 1 <= value < 1 << 32:
        raise argparse.ArgumentTypeError(f"wanted milliseconds from 1 to below 2^32, got {text}")
    return value
