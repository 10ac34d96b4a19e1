"""`pool check CONFIG`: what a configuration file would serve, without serving it."""

from __future__ import annotations

import argparse
from typing import Any

import msgspec

from pool.cli.output import console, print_json, size
from pool.config import load_config
from pool.signature import Signature


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("config", metavar="CONFIG", help="the configuration file (TOML)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")


def run(args: argparse.Namespace) -> int:
    """Check the file, load each model in a process of its own, and tell what it takes and costs.

    Raises:
        ConfigError: a mistake in the file.
        ModelLoadError: a model cannot be loaded.
    """
    config = load_config(args.config)
    from pool.front.server import check

    report = check(config, args.config)
    report["config"] = args.config
    if args.json:
        print_json(report)
    else:
        for name, model in report["models"].items():
            _show(name, model, report["fronts"])
        for name, pipeline in report["pipelines"].items():
            _show_pipeline(name, pipeline)
    return 0


def _show(name: str, model: dict[str, Any], fronts: int) -> None:
    from rich.table import Table

    out = console()
    head = f"{name}, version {model['version']}" if model["version"] is not None else name
    out.print(head, style="bold")
    out.print(model["path"], style="dim")
    facts = Table.grid(padding=(0, 2))
    shared = "one copy for all workers" if model["weights_shared"] else "a copy for each worker"
    if model["unshared_reason"]:
        shared += f": {model['unshared_reason']}"
    facts.add_row("weights", f"{size(model['weights_bytes'])}, {shared}")
    facts.add_row(
        "arena",
        f"{size(model['arena_bytes'])} in {model['slots']} slots of {size(model['slot_bytes'])}, "
        f"up to {model['max_batch_size']} rows each"
        + (f"; for {fronts} fronts {size(fronts * model['arena_bytes'])}" if fronts > 1 else ""),
    )
    facts.add_row("loaded in", f"{model['load_s']:.1f} s")
    for skipped, reason in model["skipped"].items():
        facts.add_row("not served", f"{skipped}: {reason}")
    for signature, message in model["unobserved"].items():
        facts.add_row("not tried", f"{signature}: it raised on all inputs made up for it: {message}")
    out.print(facts)
    out.print(signature_table(msgspec.convert(model["signatures"], list[Signature])))
    out.print()


def _show_pipeline(name: str, pipeline: dict[str, Any]) -> None:
    out = console()
    out.print(f"{name}, pipeline", style="bold")
    steps = (
        step["name"] if step["name"] == step["model"] else f"{step['name']} ({step['model']})"
        for step in pipeline["steps"]
    )
    out.print(" > ".join(steps), markup=False)
    out.print(signature_table(msgspec.convert(pipeline["signatures"], list[Signature])))
    out.print()


def signature_table(signatures: list[Signature]) -> Any:
    """The inputs and outputs of each signature, as a rich table."""
    from rich.table import Table

    table = Table("signature", "inputs", "outputs", "batched")
    for signature in signatures:
        table.add_row(
            signature.name,
            "\n".join(f"{spec.name}: {spec.describe()}" for spec in signature.inputs),
            "\n".join(f"{spec.name}: {spec.describe()}" for spec in signature.outputs),
            "yes" if signature.batched else f"no: {signature.unbatched_reason}",
        )
    return table
