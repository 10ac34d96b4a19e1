"""`pool chaos`: load with checked answers while a server's processes are killed, stopped, crashed and hung.

    chaos_tally    what became of the requests
    chaos_client   one client process: asks, checks, accounts
    chaos_crew     the client processes, as the command sees them
    chaos_faults   what is done to the server and to the clients, and how long each took to get over it

The server must run on this machine, as this user, a model of the drill backend (`configs/drill.toml`).
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import cycle, islice
from typing import Any

import psutil

from pool.backends import drill
from pool.cli.arguments import add_endpoint, connect, count
from pool.cli.chaos_client import GRACE, LINGER_S, PLAYERS, Task
from pool.cli.chaos_crew import Crew
from pool.cli.chaos_faults import BACKEND, KINDS, Injector, Plan, Target, is_whole, plans
from pool.cli.chaos_tally import Tally
from pool.cli.output import console, print_json, progress, size
from pool.client.sync import Client
from pool.endpoints import default_endpoint
from pool.errors import ConfigError, ModelNotFound, PoolError, SignatureNotFound, Unavailable

# A reply may be late by as many hangs as it takes to find the row at fault; this is beyond any such.
PATIENCE_S = 30.0
WINDOW = 32  # requests of one client under way at most: two usual batches
BLOCKING_WINDOW = 4  # a thread each
LEAVE_S = 5.0  # for a client process to end, once all it sent is settled
RSS_INTERVAL_S = 1.0
MINUTE_S = 60.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "--minutes", metavar="N", type=_positive, default=1.0, help="how long to go on (default: 1)"
    )
    parser.add_argument(
        "--seed",
        metavar="S",
        type=int,
        help="the faults and requests to repeat (default: a new one, which is told)",
    )
    parser.add_argument("--model", metavar="MODEL", help="a model of the drill backend (default: the first)")
    parser.add_argument(
        "--faults",
        metavar="KINDS",
        type=_kinds,
        default=tuple(KINDS),
        help=f"what to do, separated by commas (default: all): {', '.join(KINDS)}",
    )
    parser.add_argument(
        "--interval",
        metavar="S",
        type=_positive,
        default=1.0,
        help="seconds between a recovery and the next fault, on average (default: 1)",
    )
    parser.add_argument(
        "--rate",
        metavar="RPS",
        type=_positive,
        default=900.0,
        help="requests per second, of all clients together (default: 900)",
    )
    parser.add_argument(
        "--clients", metavar="K", type=count, default=2 * len(PLAYERS), help="client processes (default: 6)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    add_endpoint(parser, PATIENCE_S)


def run(args: argparse.Namespace) -> int:
    """Drill and show; exit code 1 if an answer was wrong, missing or doubled, or a fault was not got over.

    Raises:
        ConfigError: the server is not this user's, on this machine.
        ModelNotFound: it has no model of the drill backend.
        PoolError: no server, or a client process failed.
    """
    endpoint = args.endpoint or default_endpoint()
    check_local(endpoint)
    seed = random.SystemRandom().getrandbits(32) if args.seed is None else args.seed
    with connect(args) as client:
        target, max_rows = find_target(client, args.model)
        front = own_front(client.status())
        tasks = [
            Task(
                kind=kind,
                # Of six, three talk past ZeroMQ as clients on this machine do, and three as others have to.
                is_local=i % (2 * len(PLAYERS)) < len(PLAYERS),
                endpoint=endpoint,
                model=target.model,
                version=target.version,
                row_items=target.row_items,
                max_rows=max_rows,
                rate=args.rate / args.clients,
                window=BLOCKING_WINDOW if kind == "blocking" else WINDOW,
                patience_s=args.timeout,
                seed=seed + i,
                server_key=args.server_key,
                secret_key=args.key,
            )
            for i, kind in enumerate(islice(cycle(PLAYERS), args.clients))
        ]
        with Crew(tasks) as crew, Memory(front) as memory:
            injector = Injector(client, target, crew, args.timeout)
            try:
                schedule = plans(args.faults, args.interval, seed)
                drill_for(args.minutes * MINUTE_S, schedule, injector, crew, front)
            except KeyboardInterrupt:
                pass  # it ends early, and tells what was seen so far
            except PoolError:
                if is_alive(front):
                    raise  # else it follows from that, which is told below
            finally:
                injector.release()
            failures = crew.finish(args.timeout * GRACE + LINGER_S + LEAVE_S)
            if not is_alive(front):
                failures.append(f"the front, process {front.pid}, is gone")
            tally = crew.total()
            tally.add(injector.tally)
    report = summarize(seed, tally, injector.recoveries_s, memory.samples_bytes, failures)
    if args.json:
        print_json(report)
    else:
        show(report)
    is_clean = not (tally.wrong or tally.lost or tally.duplicated or failures)
    return 0 if is_clean and all(fault["unrecovered"] == 0 for fault in report["faults"].values()) else 1


# -- whom to drill ---------------------------------------------------------------------------------


def find_target(client: Client, wanted: str | None) -> tuple[Target, int]:
    """The model to drill, and the most rows of a request to it.

    Raises:
        ModelNotFound: none is of the drill backend, or the one wanted is not.
        Unavailable: not all of its workers are at work.
    """
    for name in sorted(client.models()) if wanted is None else [wanted]:
        info = client.signature(name)
        try:
            signature = info.signature()
        except SignatureNotFound:
            continue
        shape = signature.inputs[0].shape
        items = shape[-1] if shape else None
        if items is None or signature != drill.signature(items):
            continue
        status = client.status()
        target = Target(name, info.version, items, len(status["models"][name]["workers"]))
        if not is_whole(status, target):
            raise Unavailable(f"not all workers of model {name!r} are at work; see pool status")
        return target, info.max_rows or max(status["models"][name]["max_batch_size"], 1)
    which = "no model" if wanted is None else f"model {wanted!r} is none"
    raise ModelNotFound(f"{which} of the drill backend is served; wanted one as in configs/drill.toml")


def check_local(endpoint: str) -> None:
    """Make sure that a server there is on this machine.

    Raises:
        ConfigError: it may be another.
    """
    if not endpoint.startswith(("ipc://", "tcp://127.", "tcp://[::1]:", "tcp://localhost:")):
        raise ConfigError(f"pool chaos: {endpoint} may be another machine; wanted ipc:// or loopback")


def own_front(status: dict[str, Any]) -> psutil.Process:
    """The server's front, if it is a process of this machine and user, with the children it tells of.

    Raises:
        ConfigError: it is not: what is killed here must be what is meant.
    """
    front_pid = status["front"]["pid"]
    pids = [worker["pid"] for model in status["models"].values() for worker in model.get("workers", ())]
    zygotes = [zygote["pid"] for zygote in status["zygotes"] if zygote["backend"] == BACKEND]
    for pid in (front_pid, *zygotes, *filter(None, pids)):
        try:
            uid = psutil.Process(pid).uids().real
        except psutil.Error:
            raise ConfigError(f"pool chaos: the server's process {pid} is not on this machine") from None
        if uid != os.getuid():
            raise ConfigError(f"pool chaos: process {pid} is of user {uid}; wanted a server of your own")
    if any(psutil.Process(pid).ppid() != front_pid for pid in zygotes):
        raise ConfigError(f"pool chaos: processes {front_pid} and {zygotes} are not a server of this machine")
    return psutil.Process(front_pid)


# -- the drill -------------------------------------------------------------------------------------


class Memory:
    """Looks at a process's resident memory each second, in a thread, until left.

    Args:
        process: Whose.

    Attributes:
        samples_bytes: What it was, a number for each look.
    """

    def __init__(self, process: psutil.Process) -> None:
        self._process = process
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self.samples_bytes: list[int] = []

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _look(self) -> None:
        with suppress(psutil.NoSuchProcess):
            while True:
                self.samples_bytes.append(self._process.memory_info().rss)
                if self._is_over.wait(RSS_INTERVAL_S):
                    return


def is_alive(front: psutil.Process) -> bool:
    """Whether it runs; one that has ended may not have been waited for yet."""
    try:
        return bool(front.is_running() and front.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def drill_for(
    seconds: float, schedule: Iterable[Plan], injector: Injector, crew: Crew, front: psutil.Process
) -> None:
    """One fault after the other for so long, or until the front is gone."""
    end = time.monotonic() + seconds
    with progress() as bars:
        bar = bars.add_task("drilling", total=round(seconds), note="")
        for plan in schedule:
            now = time.monotonic()
            total = crew.total()
            amiss = total.wrong + total.lost + total.duplicated
            note = f"{total.requests:,} requests, {amiss} amiss; {plan.kind}"
            bars.update(bar, completed=min(round(seconds), round(seconds - (end - now))), note=note)
            threading.Event().wait(max(0.0, min(plan.pause_s, end - now)))
            if time.monotonic() >= end or not is_alive(front):
                return
            injector.inject(plan)


# -- the figures -----------------------------------------------------------------------------------


def summarize(
    seed: int,
    tally: Tally,
    recoveries_s: dict[str, list[float | None]],
    rss_bytes: Sequence[int],
    failures: Sequence[str],
) -> dict[str, Any]:
    """The report.

    Args:
        seed: What to give to do the same again.
        tally: Of all requests.
        recoveries_s: Of each kind of fault, how long each took to get over; None: not got over.
        rss_bytes: Resident memory of the front, each second.
        failures: What kept the drill itself from its end.
    """
    faults = {}
    for kind in sorted(recoveries_s):
        times = [took_s for took_s in recoveries_s[kind] if took_s is not None]
        faults[kind] = {
            "count": len(recoveries_s[kind]),
            "unrecovered": len(recoveries_s[kind]) - len(times),
            "median_s": round(statistics.median(times), 4) if times else None,
            "worst_s": round(max(times), 4) if times else None,
        }
    minute = int(MINUTE_S / RSS_INTERVAL_S)
    second, last = rss_bytes[minute : 2 * minute], rss_bytes[-minute:]
    return {
        "seed": seed,
        "requests": tally.requests,
        "answered": tally.answered,
        "wrong": tally.wrong,
        "lost": tally.lost,
        "duplicated": tally.duplicated,
        "harmed": dict(sorted(tally.harmed.items())),
        "errors": dict(sorted(tally.errors.items())),
        "faults": faults,
        "front_rss": {
            "second_minute_bytes": round(statistics.mean(second)) if len(second) == minute else None,
            "last_minute_bytes": round(statistics.mean(last)) if last else None,
        },
        "examples": tally.examples,
        "failures": list(failures),
    }


def show(report: dict[str, Any]) -> None:
    """Print the report as tables."""
    from rich.table import Table

    out = console()
    table = Table.grid(padding=(0, 2))
    for name in ("requests", "answered", "wrong", "lost", "duplicated"):
        table.add_row(name, f"{report[name]:,}")
    for name in ("harmed", "errors"):
        for code, number in report[name].items():
            table.add_row(f"{name.removesuffix('s')} {code}", f"{number:,}")
    rss = report["front_rss"]
    for name, key in (("second", "second_minute_bytes"), ("last", "last_minute_bytes")):
        table.add_row(f"front's memory, {name} minute", "" if rss[key] is None else size(rss[key]))
    table.add_row("seed", str(report["seed"]))
    out.print(table)
    faults = Table("fault", "times", "not got over", "recovery, median", "recovery, worst")
    for kind, fault in report["faults"].items():
        times = ["" if fault[key] is None else f"{fault[key]:.2f} s" for key in ("median_s", "worst_s")]
        faults.add_row(kind, str(fault["count"]), str(fault["unrecovered"] or ""), *times)
    out.print(faults)
    for sentence in (*report["examples"], *report["failures"]):
        out.print(sentence)


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1e6:
        raise argparse.ArgumentTypeError(f"wanted a number from above 0 to 1000000, got {text}")
    return value


def _kinds(text: str) -> tuple[str, ...]:
    kinds = tuple(text.split(","))
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise argparse.ArgumentTypeError(
            f"no fault is called {unknown[0]!r}; wanted some of {', '.join(KINDS)}"
        )
    return kinds
