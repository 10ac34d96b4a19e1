"""The Python backend: a function of the user's own, on arrays. Runs in the zygote's forks only.

A path is `FILE.py:FUNCTION`; the function is declared with `pool.python.model`. The file is imported once in
the loader, which reads the declaration and tries the function, and once in each worker, which runs it. Its
folder comes first in `sys.path`, as for a script. State is the module's: each worker has its own.

A version is a number made of the file's bytes. What `resolve` gives ends with it (`...:FUNCTION@VERSION`), so
that no worker runs another file than the one that was looked at.
"""

from __future__ import annotations

import inspect
import os
import sys
import traceback
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pool.backends import Array, BoundCall, BrokenPromise, Model
from pool.backends.pinning import pin
from pool.config import Placement
from pool.errors import ModelError, ModelLoadError
from pool.python import DECLARATION, source_version, split_path
from pool.signature import Signature, TensorSpec, dtype_name, numpy_dtype

# By which dataclasses, pickle and the like find what the file defines. It can shadow no other module.
_MODULE = "pool_model"

_SHOWN_MAX = 8  # declared functions shown of a file that lacks the one wanted


def preload() -> None:
    """Nothing is left to import: what functions need differs, and their files import it."""


def prepare(placement: Placement) -> None:
    """Pin this process, and tell what the file imports how many threads and which GPU it may use.

    Raises:
        ModelLoadError: a core is not there.
    """
    pin(placement)
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1" if placement.gpu is None else str(placement.gpu)
    os.environ["OMP_NUM_THREADS"] = str(placement.threads)


def resolve(path: str) -> tuple[int, str]:
    """The version of a file as it is now, and the path with it.

    Raises:
        ModelLoadError: the path is not well formed, or the file cannot be read.
    """
    split = split_path(path)
    if split is None:
        raise ModelLoadError(f'{path}: must read "FILE.py:FUNCTION"')
    file, function = str(Path(split[0]).expanduser().resolve()), split[1]
    version = source_version(_read(file))
    return version, f"{file}:{function}@{version}"


def _read(file: str) -> bytes:
    try:
        return Path(file).read_bytes()
    except OSError as e:
        raise ModelLoadError(f"{file}: must be readable, got {e.strerror}") from None


def load(path: str, weights: Sequence[Array] | None, is_lean: bool = False) -> Model:
    """Import the file and find the function; `path` is what `resolve` gave.

    Raises:
        ModelLoadError: `FILE: KEY: rule, got value`; of whatever the file raises, type, message and line.
    """
    assert weights is None, "there are none to share"
    assert not is_lean, "which is for shared ones"
    whole, _, version = path.rpartition("@")
    split = split_path(whole)
    assert split is not None, "as `resolve` gave it"
    file, name = split
    source = _read(file)
    if source_version(source) != int(version):
        raise ModelLoadError(
            f"{file}: must be as it was loaded (version {version}), got version {source_version(source)}; "
            "`pool reload` serves it as it is now"
        )
    names = _import(file, source)
    function = names.get(name)
    if function is None:
        declared = [n for n, value in names.items() if hasattr(value, DECLARATION)]
        there = ", ".join(declared[:_SHOWN_MAX]) or "none that is declared with @model"
        raise ModelLoadError(f"{file}: {name}: must be a function of the file, got {there}")
    if not callable(function):
        raise ModelLoadError(f"{file}: {name}: must be a function, got {type(function).__name__}")
    signature = getattr(function, DECLARATION, None)
    if not isinstance(signature, Signature):
        raise ModelLoadError(
            f"{file}: {name}: must be declared with @model (pool.python), got an undeclared one"
        )
    _check_parameters(f"{file}: {name}", function, signature)
    return _PythonModel(f"{os.path.basename(file)}: {name}", file, function, signature)


def _import(file: str, source: bytes) -> dict[str, Any]:
    module = types.ModuleType(_MODULE)
    module.__file__ = file
    sys.modules[_MODULE] = module
    sys.path.insert(0, os.path.dirname(file))
    try:
        exec(compile(source, file, "exec", dont_inherit=True), module.__dict__)
    except ModelLoadError as e:  # of `model`
        raise ModelLoadError(f"{file}: {_line(e, file)}{e.message}") from None
    except (Exception, SystemExit) as e:
        raise ModelLoadError(
            f"{file}: {_line(e, file)}must be importable, got {type(e).__name__}: {e}"
        ) from None
    return module.__dict__


def _line(error: BaseException, file: str) -> str:
    """`line N: ` of the file, the innermost that the error passed through."""
    if isinstance(error, SyntaxError) and error.filename == file:
        return f"line {error.lineno}: "
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return f"line {lines[-1]}: " if lines else ""


def _check_parameters(who: str, function: Callable[..., Any], signature: Signature) -> None:
    names = [spec.name for spec in signature.inputs]
    parameters = inspect.signature(function)
    try:
        parameters.bind(**dict.fromkeys(names))
    except TypeError:
        raise ModelLoadError(
            f"{who}: must take its inputs as keywords ({', '.join(names)}), got {parameters}"
        ) from None


class _PythonModel:
    """A declared function.

    Args:
        name: For messages to clients: without the file's directory.
        file: Where it lies.
        function: Called with the inputs.
        signature: As declared.
    """

    def __init__(self, name: str, file: str, function: Callable[..., Any], signature: Signature) -> None:
        self.signatures = (signature,)
        self.skipped: dict[str, str] = {}
        self._name = name
        self._file = file
        self._function = function
        self._signature = signature

    def texts(self, _signature: str) -> tuple[bytes, ...]:
        return ()

    def runs(self, signature: str) -> str:
        return signature

    def weights(self) -> list[tuple[str, Array]]:
        raise ModelLoadError("what a Python function keeps is its own")

    def bind(self, signature: str, inputs: Sequence[Array]) -> BoundCall:
        declared = self._signature
        assert signature == declared.name, "there is no other"
        rows = len(inputs[0]) if declared.batched else None
        arguments = {}
        for spec, array in zip(declared.inputs, inputs, strict=True):
            view = array.view()
            view.flags.writeable = False  # a failed batch runs again on what lies in the slot
            arguments[spec.name] = view

        def call() -> list[Array]:
            try:
                got = self._function(**arguments)
            except ModelError:
                raise
            except Exception as e:
                at = _line(e, self._file).removesuffix(": ")
                where = f" ({os.path.basename(self._file)}, {at})" if at else ""
                raise ModelError(f"{type(e).__name__}: {e}{where}") from None
            return self._outputs(got, rows)

        return call

    def _outputs(self, got: Any, rows: int | None) -> list[Array]:
        """What was returned, in the declared order.

        Raises:
            BrokenPromise: it is not what was declared.
        """
        specs = self._signature.outputs
        if not isinstance(got, Mapping):
            if len(specs) > 1 or got is None:
                names = ", ".join(spec.name for spec in specs)
                raise BrokenPromise(f"{self._name}: must return a dict of {names}, got {type(got).__name__}")
            got = {specs[0].name: got}
        missing = [spec.name for spec in specs if spec.name not in got]
        if missing or len(got) > len(specs):
            wanted = ", ".join(spec.name for spec in specs)
            there = ", ".join(map(str, got)) or "nothing"
            raise BrokenPromise(f"{self._name}: must return {wanted}, got {there}")
        return [self._output(spec, got[spec.name], rows) for spec in specs]

    def _output(self, spec: TensorSpec, value: Any, rows: int | None) -> Array:
        # Numpy's own strings lose the zero bytes that they end in.
        kind = object if spec.dtype == "string" and not isinstance(value, np.ndarray) else None
        try:
            array = np.asarray(value, kind)
        except ValueError as e:  # lists of unequal lengths
            raise BrokenPromise(f"{self._name}: output {spec.name!r}: must be an array, got {e}") from None
        wanted = numpy_dtype(spec.dtype)
        # An empty list has no dtype of its own.
        if array.size == 0 and not isinstance(value, np.ndarray):
            array = array.astype(wanted)
        is_right = array.dtype == wanted or (spec.dtype == "string" and array.dtype.kind in "SU")
        if not (is_right and spec.accepts_shape(array.shape) and rows in (None, *array.shape[:1])):
            assert spec.shape is not None, "a declaration has a rank"
            shape = spec.shape if rows is None else (rows, *spec.shape[1:])
            described = TensorSpec(spec.name, spec.dtype, shape).describe()
            of_rows = "" if rows is None else f" for {rows} row{'s' * (rows != 1)}"
            raise BrokenPromise(
                f"{self._name}: output {spec.name!r}: must be {described}{of_rows}, "
                f"got {dtype_name(array.dtype) or array.dtype} {list(array.shape)}"
            )
        return self._strings(spec, array) if spec.dtype == "string" else array

    def _strings(self, spec: TensorSpec, array: Array) -> Array:
        strings = np.empty(array.shape, object)
        for place, item in np.ndenumerate(array):
            if isinstance(item, str):
                strings[place] = item.encode()
            elif isinstance(item, bytes):
                strings[place] = bytes(item)
            else:
                raise BrokenPromise(
                    f"{self._name}: output {spec.name!r}: must hold bytes or str, got {type(item).__name__}"
                )
        return strings
