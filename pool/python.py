"""Python functions as models: `@model` declares one, `FILE.py:FUNCTION` names one. Pure; all processes.

    from pool.python import model

    @model(
        inputs={"jpeg": "string [any]"},
        outputs={"label": "string [any]", "score": "float32 [any]"},
    )
    def classify(jpeg):
        ...
        return {"label": labels, "score": scores}

A tensor is declared as `pool check` shows it: its dtype and all of its axes, the rows first; `any` for an
axis of any length. The file is imported in the loader and in each worker, never in the front: what it does
when it is imported (load weights, open files) is done once for each of them, before the first batch.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from pool.errors import ModelLoadError
from pool.signature import DEFAULT_SIGNATURE, DTYPES, Shape, Signature, TensorSpec

# What `model` leaves at the function it declares.
DECLARATION = "__pool_signature__"

_PATH = re.compile(r"(?P<file>.+\.py):(?P<function>[A-Za-z_][A-Za-z0-9_]*)", re.DOTALL)
_TENSOR = re.compile(r"(?P<dtype>[a-z0-9]+) \[(?P<axes>[a-z0-9, ]*)\]")
_AXIS = re.compile(r"any|0|[1-9][0-9]{0,9}")

Function = TypeVar("Function", bound=Callable[..., Any])


def model(
    *, inputs: Mapping[str, str], outputs: Mapping[str, str], batched: bool = True
) -> Callable[[Function], Function]:
    """Declare what a function takes and gives, so that it can be served.

    The function is called with a keyword for each input: a numpy array, read-only and valid until it
    returns, strings as object arrays of `bytes`. It returns a dict of arrays by output, or the array itself
    where there is one output; strings may be `bytes` or `str`, in an array or a list. It is left as it is.

    Args:
        inputs: By name, in the order that clients see: `"float32 [any, 224, 224, 3]"`.
        outputs: The same.
        batched: Whether axis 0 of every tensor is the rows of a batch, in which rows of several requests may
            be joined. If not, a call gets the tensors of one request, and its outputs may have any number
            of rows.

    Raises:
        ModelLoadError: a declaration is not well formed.
    """
    if not inputs:
        raise ModelLoadError("inputs: must name at least one tensor, got none")
    if not outputs:
        raise ModelLoadError("outputs: must name at least one tensor, got none")
    signature = Signature(
        DEFAULT_SIGNATURE,
        tuple(_tensor("inputs", name, text, batched) for name, text in inputs.items()),
        tuple(_tensor("outputs", name, text, batched) for name, text in outputs.items()),
        batched,
        "" if batched else "it is declared with batched=False",
    )

    def declare(function: Function) -> Function:
        setattr(function, DECLARATION, signature)
        return function

    return declare


def _tensor(where: str, name: str, text: str, batched: bool) -> TensorSpec:
    wanted = '"DTYPE [AXES]", such as "float32 [any, 28, 28]" or "string [any]"'
    match = _TENSOR.fullmatch(text)
    if match is None:
        raise ModelLoadError(f"{where}.{name}: must read {wanted}, got {text!r}")
    if match["dtype"] not in DTYPES:
        raise ModelLoadError(f"{where}.{name}: must have a dtype of {', '.join(DTYPES)}, got {text!r}")
    axes = [axis.strip() for axis in match["axes"].split(",")] if match["axes"].strip() else []
    if not all(map(_AXIS.fullmatch, axes)):
        raise ModelLoadError(f"{where}.{name}: must have axes of numbers or `any`, got {text!r}")
    shape: Shape = tuple(None if axis == "any" else int(axis) for axis in axes)
    if batched and shape[:1] != (None,):
        raise ModelLoadError(f"{where}.{name}: must begin with the rows, [any, ...], got {text!r}")
    return TensorSpec(name, match["dtype"], shape)


def split_path(path: str) -> tuple[str, str] | None:
    """The file and the function of `FILE.py:FUNCTION`; None if it does not read so."""
    match = _PATH.fullmatch(path)
    return None if match is None else (match["file"], match["function"])


def source_version(source: bytes) -> int:
    """The version of a model in this file: another one whenever the file is."""
    return zlib.crc32(source)
