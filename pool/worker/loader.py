"""The loader: loads a model once, before any worker does, to learn what it is. A fork of the zygote.

It finds out what the model's files do not tell: which signatures treat axis 0 as rows, how many bytes an
answer has, and whether workers that share one copy of the weights answer as those with their own would. In
this order:

    resolve the path  ->  load  ->  write the weights to the memfd (nothing has run: they are untouched)
    ->  probe every signature  ->  load again on the shared weights, lean  ->  repeat the probes, compare bit
    by bit; if they differ, the same with a load in full
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import msgspec
import numpy as np

from pool.backends import Array, Backend, BrokenPromise, Model, find_backend
from pool.errors import ModelError, ModelLoadError, PoolError
from pool.sample import Recipe, aligned_empty, recipes, sample_inputs
from pool.shm import weights as weights_memory
from pool.shm.control import LoaderOrder, LoadFailure, LoadOutcome, LoadReport, encode_outcome
from pool.shm.weights import Weight
from pool.signature import Signature

Views = Callable[[], Sequence[Array]]  # the weights, mapped anew


def run_loader(order: LoaderOrder, report_fd: int, weights_fd: int) -> None:
    """Load the model an order names and write the outcome, as msgpack, to a pipe.

    Args:
        order: What to load.
        report_fd: Write end of a pipe; closed when the outcome is written.
        weights_fd: Empty memfd, filled when the weights can be shared.
    """
    outcome: LoadOutcome
    try:
        backend = find_backend(order.backend)
        backend.prepare(order.placement)
        outcome = load_model(backend, order.path, weights_fd, order.share_weights)
    except PoolError as error:
        outcome = LoadFailure(error.message)
    with os.fdopen(report_fd, "wb") as pipe:
        pipe.write(encode_outcome(outcome))


def load_model(backend: Backend, path: str, weights_fd: int, share: bool) -> LoadReport:
    """Load, observe and, if asked to, share a model.

    Args:
        backend: Prepared; nothing loaded yet.
        path: As configured.
        weights_fd: Empty memfd (`pool.shm.weights.create`). Filled and sealed if the weights are shared,
            else left empty. The caller keeps it.
        share: Whether workers are to share the weights.

    Raises:
        ModelLoadError: the model cannot be loaded; the sentence says why.
    """
    try:
        return _load_model(backend, path, weights_fd, share)
    except ModelLoadError:
        raise
    except Exception as error:
        raise ModelLoadError(f"{path}: {type(error).__name__}: {error}") from error


def _load_model(backend: Backend, path: str, weights_fd: int, share: bool) -> LoadReport:
    version, concrete = backend.resolve(path)
    model = backend.load(concrete, None)
    weights: tuple[Weight, ...] = ()
    weights_bytes = 0
    unshared_reason = "" if share else "not asked to (share_weights = false)"
    try:
        named = model.weights()
        weights_bytes = sum(array.nbytes for _, array in named)
        if share:
            weights = weights_memory.write(weights_fd, named)
        del named
    except ModelLoadError as error:
        unshared_reason = unshared_reason or error.message

    probes = {signature.name: _Probe(signature) for signature in model.signatures}
    for probe in probes.values():
        probe.run(model)
    signatures, skipped = model.signatures, model.skipped
    # The first copy of the weights goes before the second load comes.
    del model
    gc.collect()

    is_lean = False
    if not unshared_reason:
        views = partial(weights_memory.map_private, weights_fd, weights)
        is_lean = _is_same_when_lean(backend, concrete, views, signatures, probes)
        if not is_lean:
            unshared_reason = _difference_when_shared(backend, concrete, views, probes)
    if unshared_reason:
        weights = ()
        weights_memory.clear(weights_fd)
    else:
        weights_memory.seal(weights_fd)
    return LoadReport(
        version=version,
        path=concrete,
        signatures=tuple(probe.settled() for probe in probes.values()),
        skipped=skipped,
        unobserved={name: probe.message for name, probe in probes.items() if probe.recipe is None},
        recipes={name: probe.recipe for name, probe in probes.items() if probe.recipe is not None},
        output_row_bytes={name: probe.output_row_bytes() for name, probe in probes.items()},
        weights=weights,
        weights_bytes=weights_bytes,
        weights_shared=not unshared_reason,
        unshared_reason=unshared_reason,
        is_lean=is_lean,
    )


def _is_same_when_lean(
    backend: Backend, path: str, views: Views, signatures: tuple[Signature, ...], probes: dict[str, _Probe]
) -> bool:
    """Whether workers may load lean: only if all they would answer was compared."""
    if any(probe.recipe is None for probe in probes.values()):
        return False
    try:
        model = backend.load(path, views(), is_lean=True)
        return model.signatures == signatures and _first_difference(model, probes) is None
    except Exception:  # whatever it is: if a load in full has the same, that tells
        return False


def _difference_when_shared(backend: Backend, path: str, views: Views, probes: dict[str, _Probe]) -> str:
    """Why workers on shared weights would not answer as those with their own do; '' if they would."""
    try:
        model = backend.load(path, views())
        name = _first_difference(model, probes)
    except PoolError as error:
        return f"a load on shared weights fails: {error.message}"
    if name is None:
        return ""
    del model
    gc.collect()
    if _first_difference(backend.load(path, None), probes) is not None:
        return f"signature {name!r} answers differently after each load, so that sharing cannot be checked"
    return f"signature {name!r} answers differently on shared weights"


def _first_difference(model: Model, probes: dict[str, _Probe]) -> str | None:
    for name, probe in probes.items():
        if not probe.repeats_on(model):
            return name
    return None


# -- probing a signature ---------------------------------------------------------------------------

Run = tuple[list[Array], list[Array]]  # inputs in the signature's order, outputs in theirs

# Row counts of the two probes: different, neither 1 (which broadcasts) nor a size a graph likely has.
_ROWS = (2, 3)

# Rounding changes with the batch size (other kernels, other summation order); companions that matter
# change much more. Relative to the largest value of the output; half-precision floats have 3 digits.
_TOLERANCE = 1e-3
_TOLERANCE_HALF = 3e-2


class _Probe:
    """Runs one signature on generated inputs and keeps what came out.

    Attributes:
        recipe: The one whose inputs the model took; None when it took none.
        message: The model's complaint when it took none.
    """

    def __init__(self, signature: Signature) -> None:
        self.signature = signature
        self.recipe: Recipe | None = None
        self.message = ""
        self._reason = signature.unbatched_reason
        self._runs: list[Run] = []

    def run(self, model: Model) -> None:
        """Find inputs the model takes, then find out whether axis 0 is a row axis."""
        texts = model.texts(self.signature.name)
        if not self.signature.batched:
            self._find_recipe(model, rows=1, texts=texts)
        elif self._find_recipe(model, rows=_ROWS[0], texts=texts):
            self._observe_rows(model)
        elif self._find_recipe(model, rows=1, texts=texts):
            self._reason = f"it takes one row, but not {_ROWS[0]}: {self.message}"

    def settled(self) -> Signature:
        """The signature as observed."""
        return msgspec.structs.replace(
            self.signature, batched=not self._reason, unbatched_reason=self._reason
        )

    def output_row_bytes(self) -> int | None:
        """Most bytes of outputs per row seen; per call where rows mean nothing; None if never run."""
        if not self._runs:
            return None
        sizes = []
        for inputs, outputs in self._runs:
            size = sum(_payload_bytes(output) for output in outputs)
            sizes.append(size if self._reason else -(-size // len(inputs[0])))
        return max(sizes)

    def repeats_on(self, model: Model) -> bool:
        """Whether a freshly loaded model gives the same bits for the same calls in the same order."""
        for inputs, outputs in self._runs:
            try:
                again = _call(model, self.signature, inputs)
            except ModelError:
                return False
            if not all(map(_same_bits, outputs, again)):
                return False
        return True

    def _find_recipe(self, model: Model, rows: int, texts: tuple[bytes, ...]) -> bool:
        for recipe in recipes(self.signature, texts):
            inputs = list(sample_inputs(self.signature, rows, seed=rows, recipe=recipe).values())
            try:
                self._record(model, inputs)
            except ModelError as error:
                # The first recipe is the plainest: what the model says of it tells the most.
                self.message = self.message or error.message
            else:
                self.recipe = recipe
                return True
        return False

    def _record(self, model: Model, inputs: list[Array]) -> list[Array]:
        outputs = _call(model, self.signature, inputs)
        self._runs.append((inputs, outputs))
        return outputs

    def _observe_rows(self, model: Model) -> None:
        assert self.recipe is not None
        few_inputs, few = self._runs[-1]
        many_inputs = list(
            sample_inputs(self.signature, _ROWS[1], seed=_ROWS[1], recipe=self.recipe).values()
        )
        try:
            many = self._record(model, many_inputs)
        except ModelError as error:
            self._reason = f"it takes {_ROWS[0]} rows, but not {_ROWS[1]}: {error.message}"
            return
        for spec, a, b in zip(self.signature.outputs, few, many, strict=True):
            for rows, output in zip(_ROWS, (a, b), strict=True):
                if output.shape[:1] != (rows,):
                    self._reason = (
                        f"output {spec.name!r} does not follow the rows: "
                        f"{rows} rows gave shape {list(output.shape)}"
                    )
                    return
            if a.shape[1:] != b.shape[1:]:
                self._reason = (
                    f"the shape of a row of output {spec.name!r} depends on the batch: "
                    f"{list(a.shape[1:])}, then {list(b.shape[1:])}"
                )
                return
        self._observe_company(model, (few_inputs, few), (many_inputs, many))

    def _observe_company(self, model: Model, few: Run, many: Run) -> None:
        """Whether rows influence each other: f(a + b) must be f(a) + f(b) but for rounding."""
        try:
            if not all(map(_same_bits, few[1], self._record(model, few[0]))):
                return  # not a function of its inputs: nothing can be concluded
            together = self._record(model, [_joined(a, b) for a, b in zip(few[0], many[0], strict=True)])
        except ModelError as error:
            self._reason = f"it takes {_ROWS[1]} rows, but not {sum(_ROWS)}: {error.message}"
            return
        apart = [np.concatenate([a, b]) for a, b in zip(few[1], many[1], strict=True)]
        differing = [
            spec
            for spec, a, b in zip(self.signature.outputs, together, apart, strict=True)
            if not _close(a, b)
        ]
        # An index or label alone may flip when two scores are equal but for rounding.
        if any(spec.dtype.startswith(("float", "bfloat", "complex")) for spec in self.signature.outputs):
            differing = [s for s in differing if s.dtype.startswith(("float", "bfloat", "complex"))]
        if differing:
            self._reason = f"rows influence each other in output {differing[0].name!r}"


def _call(model: Model, signature: Signature, inputs: Sequence[Array]) -> list[Array]:
    """Run once; the outputs are copies, since the framework may reuse its memory.

    Raises:
        ModelError: the model does not take these inputs.
        ModelLoadError: it breaks its own promise, and would for anybody.
    """
    try:
        return [np.array(output) for output in model.bind(signature.name, inputs)()]
    except BrokenPromise as e:
        raise ModelLoadError(e.message) from None


def _joined(a: Array, b: Array) -> Array:
    if a.dtype == object:
        return np.concatenate([a, b])
    both = aligned_empty((len(a) + len(b), *a.shape[1:]), a.dtype)
    return np.concatenate([a, b], out=both)


def _payload_bytes(array: Array) -> int:
    """Size on the wire: items, or offsets and bytes of strings (`pool.wire.encode_strings`)."""
    if array.dtype != object:
        return int(array.nbytes)
    return 8 * (array.size + 1) + sum(len(item) for item in array.flat)


def _same_bits(a: Array, b: Array) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return bool(a.tolist() == b.tolist()) if a.dtype == object else a.tobytes() == b.tobytes()


def _close(a: Array, b: Array) -> bool:
    if a.shape != b.shape:
        return False
    if a.dtype == object or a.dtype.kind in "biu":
        return bool(np.all(a == b))
    tolerance = _TOLERANCE_HALF if a.dtype.itemsize == 2 else _TOLERANCE
    wide: Any = complex if a.dtype.kind == "c" else float
    with np.errstate(all="ignore"):  # overflow and NaN are legal answers
        x, y = a.astype(wide), b.astype(wide)
        finite = np.abs(y[np.isfinite(y)])
        scale = float(finite.max()) if finite.size else 0.0
        return bool(np.allclose(x, y, rtol=tolerance, atol=tolerance * scale, equal_nan=True))
