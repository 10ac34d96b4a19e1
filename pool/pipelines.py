"""Pipelines of models: how a configuration writes one down, and what it comes to once the models are known.

Used by the front and the commands. Pure: `pipeline_mistakes` needs the file alone, `wire` the signatures too.

    [pipelines.faces]
    steps = [
        { name = "decode", model = "decode", inputs = { jpeg = "request.jpeg" } },
        { name = "find", model = "pnet", inputs = { pixels = "decode.pixels" } },
    ]
    outputs = { boxes = "find.boxes" }

A tensor is written SOURCE.TENSOR: an input of the request, or an output of an earlier step.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, NamedTuple

import msgspec
from msgspec import Meta

from pool.config_mistakes import MISSING, Mistake
from pool.errors import SignatureNotFound
from pool.signature import DEFAULT_SIGNATURE, Shape, Signature, TensorSpec, choose_signature

REQUEST = "request"
STEP_NAME = re.compile(r"[A-Za-z0-9_-]+")  # no dot: the first one of a reference ends it
VERSION = 1  # of every pipeline; its models have their own


class StepConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One step of a pipeline.

    Attributes:
        name: What later steps call it; None for the name of the model.
        model: A model of the same file.
        signature: Which of the model's; None for `serving_default`, or the only one.
        inputs: For each input of the model, where it comes from.
    """

    name: Annotated[str, Meta(min_length=1)] | None = None
    model: str
    signature: str | None = None
    inputs: dict[str, str]

    @property
    def label(self) -> str:
        """What later steps call it."""
        return self.model if self.name is None else self.name


class PipelineConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A `[pipelines.NAME]` table.

    Attributes:
        outputs: For each output of the pipeline, where it comes from; None for all of the last step.
        max_requests: Most requests under way at a time.
        priority: Of requests that carry none: 0 (first) to 3.
        request_timeout_ms: Deadline of requests that carry none; None for none.
        steps: In the order in which they run.
    """

    outputs: dict[str, str] | None = None
    max_requests: Annotated[int, Meta(ge=1, le=1_000_000)] = 1024
    priority: Annotated[int, Meta(ge=0, le=3)] = 1
    request_timeout_ms: Annotated[float, Meta(ge=1, le=2**32 - 1)] | None = None
    steps: tuple[StepConfig, ...]


class Source(NamedTuple):
    """Where a tensor comes from: the outputs of a step, by its place; or the request, which is step -1."""

    step: int
    tensor: str


class WiredStep(NamedTuple):
    """A step and the models it is for.

    Attributes:
        name: What it is called.
        model: Which model it runs.
        signature: Of that.
        sources: Of each input, in the signature's order.
        outputs: Those that anybody uses, in the signature's order.
    """

    name: str
    model: str
    signature: Signature
    sources: tuple[Source, ...]
    outputs: tuple[str, ...]


class Wiring(NamedTuple):
    """A pipeline that fits its models.

    Attributes:
        signature: What clients see.
        steps: In order.
        outputs: Where each output of the signature comes from.
        last_use: For each tensor that is used: the place of the last step that does; the number of steps if
            it is an output.
    """

    signature: Signature
    steps: tuple[WiredStep, ...]
    outputs: tuple[Source, ...]
    last_use: dict[Source, int]


def _split(reference: str) -> tuple[str, str] | None:
    source, dot, tensor = reference.partition(".")
    return (source, tensor) if source and dot and tensor else None


# -- the file alone --------------------------------------------------------------------------------


def pipeline_mistakes(key: str, pipeline: PipelineConfig, models: Sequence[str]) -> Iterator[Mistake]:
    """What is wrong with a pipeline whatever its models take and give.

    Args:
        key: Of its table.
        pipeline: Each key is right by itself.
        models: Names of those in the same file.
    """
    if not pipeline.steps:
        yield Mistake(f"{key}.steps", "must hold at least one step", ())
        return
    if pipeline.outputs == {}:
        yield Mistake(f"{key}.outputs", "must name at least one, or be left out", {})
    names: list[str] = []
    used: set[str] = set()
    for i, step in enumerate(pipeline.steps):
        here = f"{key}.steps[{i}]"
        if step.model not in models:
            there = ", ".join(models) or "none"
            yield Mistake(f"{here}.model", f"must be a model of this file ({there})", step.model)
        if STEP_NAME.fullmatch(step.label) is None:
            rule = "must be of letters, digits, '_' and '-'"
            yield Mistake(f"{here}.name", rule, step.label if step.name is not None else MISSING)
        if step.label == REQUEST:
            yield Mistake(f"{here}.name", f"must not be {REQUEST!r}, which stands for the inputs", step.label)
        if step.label in names:
            yield Mistake(f"{here}.name", "must be another one for each step", step.label)
        for name, reference in step.inputs.items():
            yield from _reference_mistakes(f"{here}.inputs.{name}", reference, names, used)
        names.append(step.label)
    for name, reference in (pipeline.outputs or {}).items():
        yield from _reference_mistakes(f"{key}.outputs.{name}", reference, names, used)
    if pipeline.outputs is None:
        used.add(names[-1])
    for i, name in enumerate(names):
        if name not in used:
            yield Mistake(f"{key}.steps[{i}]", "must be used by a later step or by `outputs`", name)
    if REQUEST not in used:
        yield Mistake(f"{key}.steps", f'must use an input, "{REQUEST}.NAME", somewhere', MISSING)


def _reference_mistakes(key: str, reference: str, names: Sequence[str], used: set[str]) -> Iterator[Mistake]:
    split = _split(reference)
    if split is None:
        yield Mistake(key, f'must read "{REQUEST}.INPUT" or "STEP.OUTPUT"', reference)
    elif split[0] != REQUEST and split[0] not in names:
        earlier = ", ".join((REQUEST, *names))
        yield Mistake(key, f"must come from the request or an earlier step ({earlier})", reference)
    else:
        used.add(split[0])


# -- with the models -------------------------------------------------------------------------------


def wire(
    key: str, pipeline: PipelineConfig, signatures: Mapping[str, Sequence[Signature]], mistakes: list[Mistake]
) -> Wiring | None:
    """Fit a pipeline to its models.

    Args:
        key: Of its table.
        pipeline: Without `pipeline_mistakes`.
        signatures: Of each of its models.
        mistakes: Those found are added to it.

    Returns:
        None if there are any.
    """
    return _Wirer(key, pipeline, signatures, mistakes).wire()


class _Wirer:
    """See `wire`."""

    def __init__(
        self,
        key: str,
        pipeline: PipelineConfig,
        signatures: Mapping[str, Sequence[Signature]],
        mistakes: list[Mistake],
    ) -> None:
        self._key = key
        self._pipeline = pipeline
        self._signatures = signatures
        self._mistakes = mistakes
        self._places = {step.label: i for i, step in enumerate(pipeline.steps)} | {REQUEST: -1}
        self._inputs: dict[str, TensorSpec] = {}
        self._chosen: list[Signature] = []
        self._last_use: dict[Source, int] = {}

    def wire(self) -> Wiring | None:
        """As the function."""
        before = len(self._mistakes)
        sources: list[tuple[Source, ...]] = []
        for i, step in enumerate(self._pipeline.steps):
            try:
                signature = choose_signature(self._signatures[step.model], step.signature)
            except SignatureNotFound as e:
                rule = f"must be a signature of the model ({e.message})"
                got = MISSING if step.signature is None else step.signature
                self._mistakes.append(Mistake(f"{self._key}.steps[{i}].signature", rule, got))
                return None  # nothing that comes after it can be looked at
            self._chosen.append(signature)
            sources.append(self._wire_step(i, signature))
        last = len(self._chosen) - 1
        references = self._pipeline.outputs or {
            spec.name: f"{self._pipeline.steps[last].label}.{spec.name}"
            for spec in self._chosen[last].outputs
        }
        outputs = [self._wire_output(name, reference) for name, reference in references.items()]
        if len(self._mistakes) > before:
            return None
        steps = tuple(
            WiredStep(step.label, step.model, signature, wired, self._used_outputs(i, signature))
            for i, (step, signature, wired) in enumerate(
                zip(self._pipeline.steps, self._chosen, sources, strict=True)
            )
        )
        reason = self._unbatched_reason()
        signature = Signature(
            DEFAULT_SIGNATURE,
            tuple(self._inputs.values()),
            tuple(spec for spec, _ in outputs if spec is not None),
            not reason,
            reason,
        )
        return Wiring(signature, steps, tuple(source for _, source in outputs), self._last_use)

    def _unbatched_reason(self) -> str:
        for step, signature in zip(self._pipeline.steps, self._chosen, strict=True):
            if not signature.batched:
                return f"its step {step.label!r} runs one request at a time: {signature.unbatched_reason}"
        return ""

    def _used_outputs(self, at: int, signature: Signature) -> tuple[str, ...]:
        return tuple(spec.name for spec in signature.outputs if Source(at, spec.name) in self._last_use)

    def _wire_step(self, at: int, signature: Signature) -> tuple[Source, ...]:
        step = self._pipeline.steps[at]
        key = f"{self._key}.steps[{at}].inputs"
        wanted = {spec.name: spec for spec in signature.inputs}
        for name, reference in step.inputs.items():
            if name not in wanted:
                rule = f"must be an input of model {step.model!r} ({', '.join(wanted)})"
                self._mistakes.append(Mistake(f"{key}.{name}", rule, reference))
        sources = []
        for name, spec in wanted.items():
            reference = step.inputs.get(name, "")
            if not reference:
                rule = f"must say where the input ({spec.describe()}) comes from"
                self._mistakes.append(Mistake(f"{key}.{name}", rule, MISSING))
                continue
            source = self._source(reference)
            self._last_use[source] = at
            self._connect(f"{key}.{name}", spec, source, reference)
            sources.append(source)
        return tuple(sources)

    def _source(self, reference: str) -> Source:
        split = _split(reference)
        assert split is not None, "no pipeline_mistakes"
        return Source(self._places[split[0]], split[1])

    def _connect(self, key: str, spec: TensorSpec, source: Source, reference: str) -> None:
        """Note that a tensor is to be `spec`; of the request's, that it is from now on."""
        given = self._given(source)
        if given is None and source.step >= 0:
            self._no_such_output(key, source, reference)
            return
        if given is None:
            self._inputs[source.tensor] = TensorSpec(source.tensor, spec.dtype, spec.shape)
            return
        if given.dtype != spec.dtype or not _can_meet(given.shape, spec.shape):
            self._mistakes.append(
                Mistake(key, f"must be {spec.describe()}", f"{reference}: {given.describe()}")
            )
        elif source.step < 0:
            met = _meet(given.shape, spec.shape)
            self._inputs[source.tensor] = TensorSpec(source.tensor, spec.dtype, met)

    def _given(self, source: Source) -> TensorSpec | None:
        if source.step < 0:
            return self._inputs.get(source.tensor)
        outputs = self._chosen[source.step].outputs
        return next((spec for spec in outputs if spec.name == source.tensor), None)

    def _no_such_output(self, key: str, source: Source, reference: str) -> None:
        if source.step < 0:
            rule = "must be an input that a step uses"
        else:
            names = ", ".join(spec.name for spec in self._chosen[source.step].outputs)
            rule = f"must be an output of that step ({names})"
        self._mistakes.append(Mistake(key, rule, reference))

    def _wire_output(self, name: str, reference: str) -> tuple[TensorSpec | None, Source]:
        source = self._source(reference)
        self._last_use[source] = len(self._chosen)
        given = self._given(source)
        if given is None:
            self._no_such_output(f"{self._key}.outputs.{name}", source, reference)
            return None, source
        return TensorSpec(name, given.dtype, given.shape), source


def _can_meet(a: Shape | None, b: Shape | None) -> bool:
    """Whether a tensor may have both shapes."""
    if a is None or b is None:
        return True
    return len(a) == len(b) and all(m is None or n is None or m == n for m, n in zip(a, b, strict=True))


def _meet(a: Shape | None, b: Shape | None) -> Shape | None:
    """What both shapes say of a tensor that has both."""
    if a is None or b is None:
        return b if a is None else a
    return tuple(n if m is None else m for m, n in zip(a, b, strict=True))
