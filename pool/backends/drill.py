"""The drill backend: a stand-in for a framework that does harm on request. Runs in the zygote's forks only.

Real zygotes, loaders and workers run it as they run TensorFlow, but it loads in milliseconds, its answers
can be checked to the bit, its capacity is set to the row, and a row can tell it to raise, hang or die. It
is for fault drills (`pool chaos`) and for tests, never for users.

A model is a small TOML file, or a directory that holds one named `drill.toml`, or a directory of numbered
versions of such directories (the highest is served). Every key may be left out:

    version = 1          in a numbered directory: that number, and no other
    row_items = 4        floats in a row of `x`
    weights_bytes = 0    size of a weight that only takes room
    batch_s = 0.0        seconds that a batch takes, asleep
    row_s = 0.0          seconds that each row adds
    lean = "right"       what a lean load gives: "wrong" answers, or none ("fails")

It has one signature, `serving_default`:

    inputs    x         float32 [any, row_items]
              fault     int32 [any]                what the row does beside being answered: `Fault`
              argument  float32 [any]              how long, how much, which: see there
    outputs   y         float32 [any, row_items]   `answer(x, version)`
              pid       int64 [any]                the process that ran the row
"""

from __future__ import annotations

import ctypes
import enum
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import numpy as np

from pool.backends import Array, BoundCall, Model
from pool.backends.pinning import pin
from pool.config import Placement
from pool.errors import ModelError, ModelLoadError
from pool.signature import DEFAULT_SIGNATURE, Signature, TensorSpec

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MODEL_FILE = "drill.toml"

# Scale and offset are weights, so a worker whose weights are not those of its version answers wrongly.
SCALE = 2.0
_OFFSETS = 1000  # the offset is a small integer, whatever the version: exact in float32

_VERSION_MAX = 2**63 - 1
_SHOWN_MAX = 8  # names shown of a directory that holds no model


class Fault(enum.IntEnum):
    """What a row's `fault` asks for. Below 1000 is nothing: inputs made up for probes are small numbers.

    The faults of a batch happen in the order of its rows, after the batch took its time.
    """

    NONE = 0
    SLEEP = 1000  # `argument` seconds; the batch sleeps for the longest of its rows
    RAISE = 1001  # a ModelError for the whole batch
    EXIT = 1002  # leaves with the exit code `argument`
    SEGFAULT = 1003  # reads address 0
    ABORT = 1004  # abort(3)
    SIGNAL = 1005  # sends itself the signal `argument`, such as SIGKILL
    STOP = 1006  # sends itself SIGSTOP, and goes on when it is continued
    HANG = 1007  # a loop in Python without end; it sleeps, so that a hang costs no core
    HANG_NATIVE = 1008  # a call into C that never returns and holds the interpreter's lock
    LEAK = 1009  # keeps `argument` MiB, all written to, for ever
    SCRIBBLE = 1010  # writes `argument` lines to the standard error


def signature(row_items: int) -> Signature:
    """The signature of a drill model; by it a client knows one."""
    return Signature(
        DEFAULT_SIGNATURE,
        (
            TensorSpec("x", "float32", (None, row_items)),
            TensorSpec("fault", "int32", (None,)),
            TensorSpec("argument", "float32", (None,)),
        ),
        (
            TensorSpec("y", "float32", (None, row_items)),
            TensorSpec("pid", "int64", (None,)),
        ),
    )


def answer(x: Array, version: int) -> Array:
    """What a right answer's `y` is, to the bit: float32 of the shape of `x`."""
    y: Array = np.asarray(x, np.float32) * np.float32(SCALE) + _offset(version)
    return y


def _offset(version: int) -> np.float32:
    return np.float32(version % _OFFSETS)


class _Recipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The keys of a model file."""

    version: Annotated[int, msgspec.Meta(ge=0, le=_VERSION_MAX)] | None = None
    row_items: Annotated[int, msgspec.Meta(ge=1, le=2**28)] = 4
    weights_bytes: Annotated[int, msgspec.Meta(ge=0, le=2**40)] = 0
    batch_s: Annotated[float, msgspec.Meta(ge=0, le=3600)] = 0.0
    row_s: Annotated[float, msgspec.Meta(ge=0, le=3600)] = 0.0
    lean: Literal["right", "wrong", "fails"] = "right"


# -- the backend -----------------------------------------------------------------------------------


def preload() -> None:
    """Nothing is left to import."""


def prepare(placement: Placement) -> None:
    """Pin this process.

    Raises:
        ModelLoadError: a core is not there, or a GPU was asked for.
    """
    if placement.gpu is not None:
        raise ModelLoadError(f"gpu:{placement.gpu} was asked for, and the drill backend uses none")
    pin(placement)


def resolve(path: str) -> tuple[int, str]:
    """The version and the model file that a configured path means.

    Raises:
        ModelLoadError: there is no model at `path`; the sentence names what is there instead.
    """
    given = Path(path).expanduser().resolve()
    if not given.exists():
        raise ModelLoadError(f"{given} does not exist")
    file = given if given.is_file() else given / MODEL_FILE
    if not file.is_file():
        file = _highest(given) / MODEL_FILE
    version, _ = _read(file)
    return version, str(file)


def _highest(directory: Path) -> Path:
    names = sorted(entry.name for entry in directory.iterdir())
    numbered = [(number, name) for name in names if (number := _number(name)) is not None]
    for _, name in sorted(numbered, reverse=True):
        if (directory / name / MODEL_FILE).is_file():
            return (directory / name).resolve()
    found = ", ".join(names[:_SHOWN_MAX]) + (", ..." if len(names) > _SHOWN_MAX else "")
    raise ModelLoadError(
        f"{directory} holds neither a {MODEL_FILE} nor a numbered version with one; "
        f"found {found or 'nothing'}"
    )


def _number(name: str) -> int | None:
    number = int(name) if name.isascii() and name.isdigit() else _VERSION_MAX + 1
    return number if number <= _VERSION_MAX else None


def _read(file: Path) -> tuple[int, _Recipe]:
    try:
        recipe = msgspec.convert(tomllib.loads(file.read_text("utf-8")), _Recipe)
    except OSError as e:
        raise ModelLoadError(f"{file} cannot be read: {e.strerror}") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, msgspec.ValidationError) as e:
        raise ModelLoadError(f"{file}: {e}") from None
    number = _number(file.parent.name) if file.name == MODEL_FILE else None
    if number is None:
        return 1 if recipe.version is None else recipe.version, recipe
    if recipe.version not in (None, number):
        raise ModelLoadError(f"{file}: version is {recipe.version}; wanted that of the directory, {number}")
    return number, recipe


def load(path: str, weights: Sequence[Array] | None, is_lean: bool = False) -> Model:
    """Load the model file at `path`; see `pool.backends.Backend.load`.

    Raises:
        ModelLoadError: it is not a valid model file, or is not to be loaded lean; the sentence says why.
    """
    version, recipe = _read(Path(path))
    if is_lean and recipe.lean == "fails":
        raise ModelLoadError(f"{path}: told not to load lean")
    if weights is None:
        ballast = np.full(recipe.weights_bytes, 1, np.uint8)
        weights = [np.array([SCALE], np.float32), np.array([_offset(version)], np.float32), ballast]
    if is_lean and recipe.lean == "wrong":
        weights = [np.array([-SCALE], np.float32), *weights[1:]]
    return _DrillModel(recipe, weights)


class _DrillModel:
    """A model file, loaded."""

    def __init__(self, recipe: _Recipe, weights: Sequence[Array]) -> None:
        self.skipped: dict[str, str] = {}
        self._recipe = recipe
        self._weights = list(weights)
        self._leaked: list[Array] = []
        self.signatures = (signature(recipe.row_items),)

    def texts(self, _signature: str) -> tuple[bytes, ...]:
        return ()

    def runs(self, signature: str) -> str:
        return signature

    def weights(self) -> list[tuple[str, Array]]:
        return list(zip(("scale", "offset", "ballast"), self._weights, strict=True))

    def bind(self, signature: str, inputs: Sequence[Array]) -> BoundCall:
        assert signature == DEFAULT_SIGNATURE, "there is no other"
        x, faults, arguments = inputs
        scale, offset, _ = self._weights
        time_s = self._recipe.batch_s + len(x) * self._recipe.row_s
        y = np.empty(x.shape, np.float32)
        pids = np.empty(len(x), np.int64)

        def call() -> list[Array]:
            told = np.flatnonzero(faults >= Fault.SLEEP)
            naps = arguments[faults == Fault.SLEEP]
            nap_s = time_s + float(max(naps, default=0.0))
            if nap_s > 0:
                time.sleep(nap_s)
            for row in told:
                self._do(int(row), int(faults[row]), float(arguments[row]))
            np.multiply(x, scale, out=y)
            np.add(y, offset, out=y)
            pids[...] = os.getpid()
            return [y, pids]

        return call

    def _do(self, row: int, fault: int, argument: float) -> None:
        match fault:
            case Fault.SLEEP:
                pass  # the whole batch has slept
            case Fault.RAISE:
                raise ModelError(f"row {row} of the batch told the drill model to raise")
            case Fault.EXIT:
                os._exit(int(argument))
            case Fault.SEGFAULT:
                ctypes.string_at(0)
            case Fault.ABORT:
                os.abort()
            case Fault.SIGNAL:
                os.kill(os.getpid(), int(argument))
            case Fault.STOP:
                os.kill(os.getpid(), signal.SIGSTOP)
            case Fault.HANG:
                while True:
                    time.sleep(0.1)
            case Fault.HANG_NATIVE:
                _hang_native()
            case Fault.LEAK:
                self._leaked.append(np.full(int(argument * 2**20), 1, np.uint8))
            case Fault.SCRIBBLE:
                for line in range(1, int(argument) + 1):
                    print(f"drill worker {os.getpid()}, line {line}", file=sys.stderr, flush=True)
            case _:
                raise ModelError(f"row {row} of the batch has fault {fault}; wanted one of drill.Fault")


def _hang_native() -> None:
    """Lock a mutex twice. `PyDLL` keeps the interpreter's lock meanwhile; no signal ends the wait."""
    mutex = (ctypes.c_char * 64)()  # zeros: PTHREAD_MUTEX_INITIALIZER, and room for any libc's mutex
    lock = ctypes.PyDLL(None).pthread_mutex_lock
    lock(mutex)
    lock(mutex)
