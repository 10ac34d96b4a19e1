"""`pool predict MODEL`: one request from files or literals, its answer shown or saved."""

from __future__ import annotations

import argparse
import json
import re
import zipfile
import zlib
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from pool.cli.arguments import add_endpoint, connect
from pool.cli.output import jsonable, print_json
from pool.client.timeline import Answer, Timeline
from pool.errors import InvalidInput

_BAR = 48  # columns
_EIGHTHS = ("▏", "▏", "▎", "▍", "▌", "▋", "▊", "▉")  # that something took no time is shown too

Array = npt.NDArray[Any]


class Given(msgspec.Struct, frozen=True):
    """One `--input`: arrays of a file, or a literal whose dtype the signature will tell.

    Attributes:
        name: The input it is for; None for the only one, or for those that a `.npz` names.
        arrays: By the name in the file; `""` for a `.npy`. None for a literal.
        literal: The JSON value, where `arrays` is None.
    """

    name: str | None
    arrays: dict[str, Array] | None = None
    literal: Any = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("model", metavar="MODEL", help="the model's name")
    parser.add_argument(
        "--input",
        metavar="NAME=VALUE",
        action="append",
        type=parse_input,
        required=True,
        help="@FILE.npy, @FILE.npz or a JSON literal; an only input needs no NAME=; may be repeated",
    )
    parser.add_argument("--signature", metavar="NAME", help="the signature (default: the model's own)")
    parser.add_argument(
        "--version", metavar="N", type=int, dest="model_version", help="the version (default: the one served)"
    )
    parser.add_argument(
        "--cast",
        choices=["safe", "same_kind"],
        default="safe",
        help="casts of inputs that are made (default: only lossless ones)",
    )
    parser.add_argument("--timeline", action="store_true", help="show where the time went")
    add_endpoint(parser)
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--output", metavar="DIR", type=Path, help="save each output as DIR/NAME.npy")
    shown.add_argument("--json", action="store_true", help="print one JSON object: the outputs by name")


def run(args: argparse.Namespace) -> int:
    """Send the request and show or save the answer.

    Raises:
        PoolError: the model is not there, does not take the inputs, or failed.
    """
    with connect(args) as client:
        outputs = client.predict(
            args.model,
            assemble(args.input),
            version=args.model_version,
            signature=args.signature,
            timeout=args.timeout,
            cast=args.cast,
            timeline=args.timeline,
        )
    timeline = outputs.timeline if isinstance(outputs, Answer) else None
    if args.output is not None:
        save(outputs, args.output)
    elif args.json:
        document = {name: jsonable(array) for name, array in outputs.items()}
        if timeline is not None:
            document = {"outputs": document, "timeline": describe(timeline)}
        print_json(document)
    else:
        for name, array in outputs.items():
            print(f"{name}: {'string' if array.dtype == object else array.dtype} {list(array.shape)}")
            print(array)
    if timeline is not None and not args.json:
        for line in draw(timeline):
            print(line)
    return 0


def describe(timeline: Timeline) -> dict[str, Any]:
    """A time line as a JSON object, with its total."""
    return {**msgspec.to_builtins(timeline), "total_ns": timeline.total_ns}


def draw(timeline: Timeline) -> list[str]:
    """A time line as text: how long each stage took, and when, as a bar below the others."""
    total = timeline.total_ns
    batch = f"batch of {timeline.batch_rows} rows" if timeline.batch_rows else "several batches"
    worker = f"worker {timeline.worker}" if timeline.worker >= 0 else "several workers"
    lines = [f"{total / 1e6:.3f} ms: {batch}, {worker}, {timeline.model_ns / 1e6:.3f} ms of it the model"]
    since = 0
    for name, ns in timeline.stages.items():
        # In eighths of a column, so that what is short can be seen.
        start, end = round(since / total * _BAR * 8), round((since + ns) / total * _BAR * 8)
        since += ns
        bar = "█" * (end // 8 - start // 8) or _EIGHTHS[end - start]
        lines.append(f"  {name:<9}{ns / 1e3:>11,.1f} µs{ns / total:>6.0%}  {' ' * (start // 8)}{bar}")
    if not timeline.is_one_clock:
        lines.append("  inbound and outbound are halves of both: the server has another clock")
    return lines


def parse_input(text: str) -> Given:
    """Read one `--input` argument, and the file it names.

    Raises:
        argparse.ArgumentTypeError: the file cannot be read as arrays, or the literal is not JSON.
    """
    name: str | None = None
    value = text
    if not re.match(r'[@\[{"0-9-]', text):
        name, equals, value = text.partition("=")
        if not equals:
            raise argparse.ArgumentTypeError(f"wanted NAME=@FILE, NAME=LITERAL or @FILE, got {text!r}")
    if value.startswith("@"):
        return Given(name, arrays=read_arrays(value[1:]))
    try:
        return Given(name, literal=json.loads(value))
    except ValueError as e:
        raise argparse.ArgumentTypeError(f"wanted @FILE or a JSON literal, got {value!r} ({e})") from None


def read_arrays(file: str) -> dict[str, Array]:
    """The arrays of a `.npz` by name, or of a `.npy` under the name `""`.

    Raises:
        argparse.ArgumentTypeError: there is no such file, or it is neither.
    """
    try:
        # Opened here, since numpy leaves a broken archive open.
        with open(file, "rb") as opened:
            # Object arrays would be pickles: running them is what a file of numbers must never do.
            loaded = np.load(opened, allow_pickle=False)
            if isinstance(loaded, np.ndarray):
                return {"": loaded}
            with loaded:
                return {name: loaded[name] for name in loaded.files}
    except OSError as e:
        raise argparse.ArgumentTypeError(f"{file}: {e.strerror or e}") from None
    except (ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as e:
        raise argparse.ArgumentTypeError(
            f"{file}: wanted a .npy or .npz file of arrays without objects ({e})"
        ) from None


def assemble(given: list[Given]) -> Any:
    """The inputs of a request, as `Client.predict` takes them; literals stay lists, for it to convert.

    Raises:
        InvalidInput: an input is given twice, has no name beside others, or is not in the file.
    """
    if len(given) == 1 and given[0].name is None and set(given[0].arrays or {""}) == {""}:
        return given[0].literal if given[0].arrays is None else given[0].arrays[""]
    inputs: dict[str, Any] = {}
    for one in given:
        for name, value in _named(one):
            if name in inputs:
                raise InvalidInput(f"input {name!r} is given twice")
            inputs[name] = value
    return inputs


def _named(one: Given) -> list[tuple[str, Any]]:
    if one.arrays is None or "" in one.arrays:
        if one.name is None:
            raise InvalidInput("an input has no name; wanted NAME=VALUE for each of several inputs")
        return [(one.name, one.literal if one.arrays is None else one.arrays[""])]
    if one.name is None:
        return list(one.arrays.items())
    if one.name in one.arrays:
        return [(one.name, one.arrays[one.name])]
    if len(one.arrays) == 1:
        return [(one.name, next(iter(one.arrays.values())))]
    raise InvalidInput(
        f"the file for input {one.name!r} has no array of that name; it has {', '.join(one.arrays)}"
    )


def save(outputs: dict[str, Array], folder: Path) -> None:
    """Write `NAME.npy` for each output; a name's slashes become underscores.

    bfloat16, which `.npy` lacks, is saved as float32. Byte strings are saved as numpy's `S`.

    Raises:
        InvalidInput: a byte string ends in zero bytes, which numpy's `S` would drop.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in outputs.items():
        if array.dtype == object:
            saved = array.astype(bytes)
            if not np.array_equal(saved.astype(object), array):
                raise InvalidInput(
                    f"output {name!r} has strings that end in zero bytes; wanted --json for it"
                )
            array = saved
        elif array.dtype.kind == "V":
            array = array.astype(np.float32)
        file = folder / f"{name.replace('/', '_')}.npy"
        np.save(file, array, allow_pickle=False)
        print(file)
