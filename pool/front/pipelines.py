"""The pipelines of one engine, and the requests under way in them. Runs in the front."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from pool.config_mistakes import Mistake, quoted, raise_all
from pool.errors import Unavailable, VersionNotFound
from pool.front.execution import Execution
from pool.front.generation import Generation
from pool.front.pipeline import Pipeline, PipelineMetrics, StepMetrics
from pool.front.slots import Turn
from pool.front.waiting import WaitingRoom
from pool.pipelines import VERSION, PipelineConfig, Wiring, wire

if TYPE_CHECKING:
    from pool.shm.control import LoadReport


class Host(Protocol):
    """What pipelines ask of the engine."""

    @property
    def is_stopping(self) -> bool:
        """Whether nothing is to run again."""

    def advance(self, generation: Generation, now: float) -> None:
        """Rows were placed: start what can start."""

    def reason_lost(self, generation: Generation) -> str | None:
        """Why a generation has no workers any more; None if it has."""

    def freed(self) -> None:
        """Perhaps all is done that was admitted."""


class Pipelines:
    """All pipelines of one engine. Make it inside a running event loop.

    Args:
        host: The engine.
        names: Of those that the config has.

    Attributes:
        served: By name.
        metrics: By name, also of those that are not served yet.
        executions: Requests under way, of all pipelines, also those that are served no more.
        waiting: Those of them that wait for room.
    """

    def __init__(self, host: Host, names: Sequence[str]) -> None:
        self._host = host
        self._loop = asyncio.get_running_loop()
        self.served: dict[str, Pipeline] = {}
        self.metrics = {name: PipelineMetrics(name) for name in names}
        self.executions: dict[Execution, None] = {}
        self.waiting = WaitingRoom(lambda: self.clock())
        self._touched: set[Generation] = set()
        self._turn: Turn | None = None

    # -- which there are ----------------------------------------------------------------------------

    def wire(
        self, configs: Mapping[str, PipelineConfig], generations: Mapping[str, Generation]
    ) -> dict[str, Pipeline]:
        """Pipelines on these generations, which `serve` has served.

        Raises:
            ConfigError: they do not fit; every mistake is a line.
        """
        reports = {name: generation.report for name, generation in generations.items()}
        made = {}
        for name, wiring in wire_all(configs, reports).items():
            metrics = self.metrics.get(name) or PipelineMetrics(name)
            for step in wiring.steps:
                metrics.steps.setdefault(step.name, StepMetrics())
            on = [generations[step.model] for step in wiring.steps]
            made[name] = Pipeline(name, configs[name], wiring, on, metrics, self)
        return made

    def serve(self, pipelines: dict[str, Pipeline]) -> None:
        """Serve these and no others; what was admitted goes on where it was."""
        self.served = pipelines
        self.metrics = {name: pipeline.metrics for name, pipeline in pipelines.items()}

    def find(self, name: str, version: int | None) -> Pipeline:
        """The pipeline of that name, which the config has.

        Raises:
            Unavailable: its models are not loaded. VersionNotFound: another version is wanted.
        """
        pipeline = self.served.get(name)
        if pipeline is None:
            raise Unavailable(f"pipeline {name!r} is loading")
        if version not in (None, VERSION):
            raise VersionNotFound(f"pipeline {name!r} has no version {version}; wanted {VERSION}")
        return pipeline

    def forget(self) -> None:
        """Settings of models have changed."""
        for pipeline in self.served.values():
            pipeline.forget()

    def uses(self, generation: Generation) -> bool:
        """Whether a request under way may still come to a generation."""
        return any(generation in execution.pipeline.generations for execution in self.executions)

    # -- what executions tell -----------------------------------------------------------------------

    @staticmethod
    def clock() -> float:
        """Monotonic seconds."""
        return time.monotonic()

    def reason_lost(self, generation: Generation) -> str | None:
        """As the host's."""
        return self._host.reason_lost(generation)

    def check_running(self) -> None:
        """Make sure that another step may begin.

        Raises:
            Unavailable: the server stops.
        """
        if self._host.is_stopping:
            raise Unavailable("the server is stopping")

    def turn(self, now: float) -> Turn:
        """Of rows placed now: one for all until they are told to their models."""
        if self._turn is None:
            self._turn = Turn(now)
        return self._turn

    def touch(self, generation: Generation) -> None:
        """Rows were placed there: its batches are looked at in the next turn, when others have come too."""
        if not self._touched:
            self._loop.call_soon(self._flush)
        self._touched.add(generation)

    def _flush(self) -> None:
        touched, self._touched, self._turn = self._touched, set(), None
        now = self.clock()
        for generation in touched:
            self._host.advance(generation, now)

    def began(self, execution: Execution) -> None:
        """It is about to enter its first step."""
        self.executions[execution] = None
        execution.pipeline.metrics.under_way += 1

    def ended(self, execution: Execution) -> None:
        """It is answered, or not wanted any more."""
        del self.executions[execution]
        execution.pipeline.metrics.under_way -= 1
        self.waiting.leave(execution)
        self._host.freed()

    # -- looking ------------------------------------------------------------------------------------

    def readiness(self, models: Mapping[str, bool]) -> dict[str, bool]:
        """Per pipeline: whether all its models are ready.

        Args:
            models: Per model: whether it is.
        """
        return {
            name: name in self.served
            and all(models.get(step.model, False) for step in self.served[name].wiring.steps)
            for name in self.metrics
        }

    def describe_models(self, ready: Mapping[str, bool]) -> dict[str, Any]:
        """Per pipeline, for whoever asks which models there are (`docs/wire.md` 3.3).

        Args:
            ready: Per pipeline: whether it is.
        """
        return {
            name: {
                "version": VERSION,
                "ready": ready[name],
                "signatures": [self.served[name].wiring.signature.name] if name in self.served else [],
            }
            for name in self.metrics
        }

    def describe(self) -> dict[str, Any]:
        """The pipelines' part of the status document."""
        return {name: self._describe(name, metrics) for name, metrics in self.metrics.items()}

    def _describe(self, name: str, metrics: PipelineMetrics) -> dict[str, Any]:
        pipeline = self.served.get(name)
        document: dict[str, Any] = {
            "state": "loading" if pipeline is None else "ready",
            "under_way": metrics.under_way,
            "answers": dict(metrics.answers),
            "stages": {stage: metrics.stages[stage].describe() for stage in ("receive", "total")},
            "steps": [],
        }
        if pipeline is None:
            return document
        waiting = self.waiting.of(name)
        document["max_requests"] = pipeline.config.max_requests
        document["signatures"] = [msgspec.to_builtins(pipeline.wiring.signature)]
        for step in pipeline.wiring.steps:
            counted = metrics.steps[step.name]
            document["steps"].append(
                {
                    "name": step.name,
                    "model": step.model,
                    "requests": counted.requests,
                    "rows": counted.rows,
                    "waited": counted.waited,
                    "waiting": waiting.get(step.name, 0),
                    "errors": counted.errors,
                    "seconds": counted.seconds.describe(),
                }
            )
        return document


def wire_all(
    configs: Mapping[str, PipelineConfig], reports: Mapping[str, LoadReport], file: str = ""
) -> dict[str, Wiring]:
    """Fit pipelines to models.

    Args:
        configs: By name.
        reports: Of all their models.
        file: The name the messages begin with.

    Raises:
        ConfigError: they do not fit; every mistake is a line.
    """
    mistakes: list[Mistake] = []
    found = {}
    for name, config in configs.items():
        signatures = {step.model: reports[step.model].signatures for step in config.steps}
        wiring = wire(f"pipelines.{quoted(name)}", config, signatures, mistakes)
        if wiring is not None:
            found[name] = wiring
    raise_all(file, mistakes)
    return found
