"""`pool status`: what a server is doing, as `Client.status()` tells it."""

from __future__ import annotations

import argparse
from datetime import timedelta
from typing import Any

from pool.cli.arguments import add_endpoint, connect
from pool.cli.output import console, print_json, size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add_endpoint(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")


def run(args: argparse.Namespace) -> int:
    """Ask once and show the answer.

    Raises:
        Unavailable: no server answers there.
    """
    with connect(args) as client:
        status = client.status()
    if args.json:
        print_json(status)
    else:
        show(status)
    return 0


def show(status: dict[str, Any]) -> None:
    """Print a status document as tables."""
    from rich.table import Table

    out = console()
    front = status["front"]
    out.print(
        f"front {front['pid']}, up {timedelta(seconds=int(front['uptime_s']))}, "
        f"{front['requests']} requests, {front['replies']} replies"
    )
    for endpoint in front["endpoints"]:
        out.print(f"  {endpoint}")
    for code, count in sorted(front["errors"].items()):
        out.print(f"  {count} x {code}")

    models = Table(
        "model", "version", "state", "waiting rows", "batches", "rows", "rows/batch", "weights", "arena"
    )
    for name, model in status["models"].items():
        models.add_row(name, *_served(model))
    out.print(models)
    for name, model in status["models"].items():
        if model["failure"]:
            out.print(f"{name}: {model['failure']}")

    if status["pipelines"]:
        out.print(_pipelines(status["pipelines"]))

    processes = Table(
        "process", "pid", "state", "device", "batches", "rows", "restarts", "CPU s", "private", "share of all"
    )
    processes.add_row(
        "front", str(front["pid"]), "", "", "", "", "", f"{front['cpu_s']:.1f}", *_memory(front)
    )
    for other in status.get("fronts", ())[1:]:
        name, restarts = f"front {other['index']}", str(other["restarts"])
        usage = (f"{other['cpu_s']:.1f}", *_memory(other))
        processes.add_row(name, str(other["pid"] or ""), other["state"], "", "", "", restarts, *usage)
    for zygote in status["zygotes"]:
        name = f"zygote ({zygote['backend']})"
        processes.add_row(name, str(zygote["pid"]), "", "", "", "", "", "", *_memory(zygote))
    for name, model in status["models"].items():
        for worker in model.get("workers", ()):
            processes.add_row(
                f"{name} worker {worker['index']}",
                str(worker["pid"] or ""),
                worker["state"],
                worker["device"],
                str(worker["batches"]),
                str(worker["rows"]),
                str(worker["restarts"]),
                f"{worker['cpu_s']:.1f}",
                *_memory(worker),
            )
    out.print(processes)
    for name, model in status["models"].items():
        for worker in model.get("workers", ()):
            if worker.get("piece_rows"):
                out.print(
                    f"{name} worker {worker['index']}: batches in pieces of {worker['piece_rows']} rows"
                )
            if worker["last_error"]:
                told = f"{name} worker {worker['index']}, the one before: {worker['last_error']}"
                out.print(told, markup=False, highlight=False)
    for other in status.get("fronts", ())[1:]:
        if other["last_error"]:
            told = f"front {other['index']}, the one before: {other['last_error']}"
            out.print(told, markup=False, highlight=False)
    refused = front.get("reload", {}).get("error")
    if refused:
        out.print(f"the last reload was refused: {refused}", markup=False, highlight=False)


def _served(model: dict[str, Any]) -> list[str]:
    """The columns of a model; one that has not been loaded has few."""
    batches, rows = model["batches"], model["rows"]
    columns = [
        str(model.get("version") or ""),
        model["state"],
        str(model.get("queue_rows", "")),
        str(batches),
        str(rows),
        f"{rows / batches:.1f}" if batches else "",
    ]
    if "slots" in model:
        shared = "shared" if model["weights_shared"] else "a copy each"
        columns.append(f"{size(model['weights_bytes'])}, {shared}")
        columns.append(f"{size(model['arena_bytes'])}, {model['slots']} slots")
    return columns


def _pipelines(pipelines: dict[str, Any]) -> Any:
    from rich.table import Table

    table = Table("pipeline", "steps", "under way", "waiting for room", "answers")
    for name, pipeline in pipelines.items():
        waiting = [f"{step['name']}: {step['waiting']}" for step in pipeline["steps"] if step["waiting"]]
        table.add_row(
            name,
            " > ".join(step["name"] for step in pipeline["steps"]) or pipeline["state"],
            str(pipeline["under_way"]),
            ", ".join(waiting),
            ", ".join(f"{count} x {code}" for code, count in sorted(pipeline["answers"].items())),
        )
    return table


def _memory(process: dict[str, Any]) -> list[str]:
    return [size(process["uss_bytes"]), size(process["pss_bytes"])]
