"""`pool top`: a live view of a server in a terminal, from one status document to the next."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import select
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from pool.cli.arguments import add_endpoint, connect, seconds
from pool.cli.output import console, size
from pool.cli.rates import STAGES, ModelRates, PipelineRates, Rates, WorkerRates, compare
from pool.endpoints import default_endpoint
from pool.errors import PoolError

if TYPE_CHECKING:
    from rich.text import Text

_WIDTH = 80  # of what is shown, at least: narrower terminals cut it
_ERRORS_SHOWN = 3
_FIELDS_LEFT_OUT = ("role", "pid", "last_words")
_BAR = 8
_NAME = 24  # columns of a name where its line has much else to tell
_STAGES = "{:<6}" + "{:>13}" * len(STAGES)
_WORKER = "{:<20}{:<10}{:<13}{:>8}{:>10}{:>10}{:>9}"
# Seconds that the view stands still for an answer. After these it says so and goes on.
_PATIENCE_S = 0.25
_QUIT = ("q", "Q", "\x03", "\x04")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add_endpoint(parser)
    parser.add_argument(
        "--interval", metavar="S", type=seconds, default=1.0, help="seconds between looks (default: 1)"
    )
    parser.add_argument("--once", action="store_true", help="look twice, print one table, and end")


def run(args: argparse.Namespace) -> int:
    """Show it until `q` is pressed.

    Raises:
        Unavailable: no server answers there (`--once`, and at the first look).
    """
    where = args.endpoint or default_endpoint()
    # Left first, the client ends the call that the thread may be in.
    with ThreadPoolExecutor(1) as asker, connect(args) as client:
        before = client.status()
        if args.once or not sys.stdout.isatty():
            time.sleep(args.interval)
            out = console()
            for line in draw(compare(before, client.status()), where, max(_WIDTH, out.width), None):
                out.print(line)
            return 0
        return _show(client.status, asker, before, where, args.interval)


def _show(ask: Any, asker: Executor, before: dict[str, Any], where: str, interval_s: float) -> int:
    from rich.console import Group
    from rich.live import Live

    out = console()
    rates, trouble = compare(None, before), ""
    asked: Future[dict[str, Any]] | None = None
    with Live(console=out, screen=True, auto_refresh=False) as live, _keys() as keys:
        while True:
            width, height = out.size
            lines = draw(rates, where, width, height, trouble)
            live.update(Group(*lines), refresh=True)
            if _is_quit(keys, interval_s):
                return 0
            asked = asked or asker.submit(ask)
            if not wait([asked], _PATIENCE_S).done:
                trouble = trouble or "no answer yet"
                continue
            try:
                after = asked.result()
            except PoolError as e:
                trouble = e.message
            else:
                rates, trouble = compare(before, after), ""
                before = after
            asked = None


@contextlib.contextmanager
def _keys() -> Iterator[int | None]:
    """The terminal's keys, as they are pressed; None where there is none to read."""
    import termios
    import tty

    if not sys.stdin.isatty():
        yield None
        return
    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)
    try:
        tty.setcbreak(fd)
        yield fd
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


def _is_quit(keys: int | None, wait_s: float) -> bool:
    """Wait; whether it was cut short by a key that ends the view."""
    deadline = time.monotonic() + wait_s
    while (left := deadline - time.monotonic()) > 0:
        if keys is None:
            time.sleep(left)
        elif select.select([keys], [], [], left)[0]:
            pressed = os.read(keys, 64)
            if not pressed or any(key in _QUIT for key in pressed.decode("latin-1")):
                return True
    return False


# -- drawing -----------------------------------------------------------------------------------------


def draw(rates: Rates, where: str, width: int, height: int | None, trouble: str = "") -> list[Text]:
    """The lines of the view.

    Args:
        rates: What to show.
        where: The endpoint.
        width: Columns there are.
        height: Lines there are; None for as many as it takes.
        trouble: Why there is nothing newer, if so.
    """
    workers = [worker for model in rates.models for worker in model.workers]
    head, errors = _head(rates, where if height is None else f"{where}  (q quits)", trouble), _errors(rates)
    pipeline_blocks = [[_pipeline(pipeline)] for pipeline in rates.pipelines]
    model_blocks = [[_model(model), *_stages(model)] for model in rates.models]
    worker_blocks = [[_worker(worker)] for worker in workers]
    if height is not None:
        room = height - len(head) - len(errors) - (1 if workers else 0)
        pipeline_blocks = _fit(pipeline_blocks, room // 3, "pipelines")
        room -= sum(map(len, pipeline_blocks))
        # Pipelines have a third at most. Models have what the workers leave, and half of it in any case. The
        # last ones are told in one line each before any is left out.
        models_room = max(room // 2, room - len(workers))
        for i in reversed(range(len(model_blocks))):
            if sum(map(len, model_blocks)) > models_room:
                model_blocks[i] = [_model(rates.models[i], is_alone=True)]
        model_blocks = _fit(model_blocks, models_room, "models")
        worker_blocks = _fit(worker_blocks, room - sum(map(len, model_blocks)), "workers")
    lines = [*head, *itertools.chain.from_iterable((*pipeline_blocks, *model_blocks))]
    if worker_blocks:
        lines.append(
            _text(_WORKER.format("WORKER", "STATE", "BUSY", "CPU", "BATCH/S", "PRIVATE", "RESTARTS"), "bold")
        )
        lines += itertools.chain.from_iterable(worker_blocks)
    lines += errors
    for line in lines:
        line.truncate(width, overflow="ellipsis")
    return lines if height is None else lines[:height]


def _fit(blocks: list[list[Text]], room: int, what: str) -> list[list[Text]]:
    """As many of the first blocks as fit in so many lines, and how many do not."""
    if sum(map(len, blocks)) <= room:
        return blocks
    kept: list[list[Text]] = []
    used = 1
    for block in blocks:
        used += len(block)
        if used > room:
            break
        kept.append(block)
    return [*kept, [_text(f"... {len(blocks) - len(kept)} more {what}", "dim")]] if room > 0 else []


def _head(rates: Rates, where: str, trouble: str) -> list[Text]:
    up = timedelta(seconds=int(rates.uptime_s))
    first = _text("pool top", "bold")
    first.append(f"  {where}  up {up}  {time.strftime('%H:%M:%S')}")
    since = "since its start" if rates.is_since_start else f"in {rates.elapsed_s:.1f} s"
    front = "front" if rates.fronts == 1 else f"{rates.fronts} fronts"
    second = _text(
        f"{rates.requests_s:,.0f} requests/s {since}, {rates.clients} clients, "
        f"{front} {rates.front_cpu:.0%} CPU, {size(rates.memory_bytes)} in all"
    )
    if rates.errors_s:
        second.append(f", {rates.errors_s:,.1f} errors/s", "red")
    return [first, second, *([_text(trouble, "bold red")] if trouble else [])]


def _pipeline(pipeline: PipelineRates) -> Text:
    """The line of a pipeline; what its models do for it is in theirs."""
    name, total = _cut(pipeline.name, _NAME), pipeline.quantiles
    line = _head_of(name, pipeline.state, pipeline.results_s, pipeline.errors_s, total)
    line.append(f"  {pipeline.under_way:,} under way")
    if pipeline.waiting:
        waiting = " ".join(f"{step} {count:,}" for step, count in pipeline.waiting.items())
        line.append_text(_text(f"  waiting: {waiting}", "yellow"))
    return line


def _model(model: ModelRates, is_alone: bool = False) -> Text:
    """The line of a model; with p50 and p99 of the whole where the stages are not shown."""
    total = model.quantiles[STAGES[0]] if is_alone else None
    shown = _cut(model.name, _NAME) if is_alone else model.name
    name = _head_of(shown, model.state, model.results_s, model.errors_s, total)
    name.append(f"  {model.queue_rows:,} waiting")
    if model.rows_per_batch is not None and model.max_batch_size:
        fill = model.rows_per_batch / model.max_batch_size
        name.append(f"  {model.rows_per_batch:.1f} rows/batch {fill:.0%}")
        shares = " ".join(f"{reason} {share:.0%}" for reason, share in model.closed[:2])
        name.append_text(_text(f"  {shares}", "dim"))
    return name


def _head_of(
    name: str, state: str, results_s: float, errors_s: float, total: tuple[float, float] | None
) -> Text:
    """How the line of a model or pipeline begins; `total` is p50 and p99 of the whole, if they are shown."""
    line = _text(f"{name} ", "bold")
    line.append_text(_text(state, "" if state == "ready" else "bold red"))
    line.append(f"  {results_s:,.0f}/s")
    if total is not None:
        line.append(f"  p50 {_duration(total[0])} p99 {_duration(total[1])}")
    if errors_s:
        line.append(f"  {errors_s:,.1f} errors/s", "red")
    return line


def _stages(model: ModelRates) -> list[Text]:
    """Where a model's time goes; nothing if nobody asked."""
    if not any(model.quantiles.values()):
        return []
    quantiles = [model.quantiles[stage] for stage in STAGES]
    table = [
        ["", *STAGES],
        ["  p50", *[_duration(pair and pair[0]) for pair in quantiles]],
        ["  p99", *[_duration(pair and pair[1]) for pair in quantiles]],
    ]
    styles = ("dim", "", "")
    return [_text(_STAGES.format(*row), style) for row, style in zip(table, styles, strict=True)]


def _worker(worker: WorkerRates) -> Text:
    model, _, index = worker.name.rpartition("/")
    line = _text(f"{_cut(model, 18 - len(index))}/{index}".ljust(20))
    line.append_text(_text(f"{worker.state:<10}", "" if worker.state in ("ready", "busy") else "bold red"))
    filled = round(worker.busy * _BAR)
    line.append("█" * filled, "green")
    line.append("░" * (_BAR - filled), "dim")
    line.append(
        f"{worker.busy:5.0%}{worker.cpu:8.0%}{worker.batches_s:10,.0f}{size(worker.private_bytes):>10}"
    )
    line.append(f"{worker.restarts:9}", "red" if worker.restarts else "")
    return line


def _errors(rates: Rates) -> list[Text]:
    lines = []
    for error in rates.last_errors[-_ERRORS_SHOWN:]:
        when = time.strftime("%H:%M:%S", time.localtime(error["time_s"]))
        fields = " ".join(
            f"{key}={value}" for key, value in error["fields"].items() if key not in _FIELDS_LEFT_OUT
        )
        lines.append(
            _text(f"{when} {error['event']} {fields}", "red" if error["level"] == "error" else "yellow")
        )
    return lines


def _duration(seconds_: float | None) -> str:
    if seconds_ is None:
        return "-"
    for factor, unit in ((1e6, "µs"), (1e3, "ms")):
        if seconds_ * factor < 999.5:
            value = seconds_ * factor
            return f"{value:.0f} {unit}" if value >= 99.5 or unit == "µs" else f"{value:.1f} {unit}"
    return f"{seconds_:.1f} s"


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _text(words: str, style: str = "") -> Text:
    from rich.text import Text

    # What a server says is shown as it is, but for what a terminal would obey.
    return Text("".join(c if c.isprintable() else "?" for c in words), style=style, no_wrap=True)
