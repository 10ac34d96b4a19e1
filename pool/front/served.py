"""One model of a config: what is served of it now, and what was counted. Runs in the front."""

from __future__ import annotations

from typing import Any

from pool.front.metrics import ModelMetrics
from pool.front.serving import Serving
from pool.front.states import WorkerState

READY = (WorkerState.READY, WorkerState.BUSY)  # a worker that can take a batch, or runs one


class ServedModel:
    """One model of the config.

    Attributes:
        name: In the config.
        serving: None until it is loaded.
        state: `loading`, `ready`, `failed` or `stopped`.
        failure: Why, when failed.
        metrics: What was counted, of all its generations.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.serving: Serving | None = None
        self.state = "loading"
        self.failure = ""
        self.metrics = ModelMetrics(name)

    @property
    def is_ready(self) -> bool:
        """Whether it has a worker that answered its canary."""
        return (
            self.state == "ready"
            and self.serving is not None
            and any(worker.state in READY for worker in self.serving.replicas.workers)
        )

    def describe(self, is_ready: bool) -> dict[str, Any]:
        """For whoever asks which models there are (`docs/wire.md` 3.3)."""
        generation = None if self.serving is None else self.serving.generation
        return {
            "version": None if generation is None else generation.version,
            "ready": is_ready,
            "signatures": [] if generation is None else sorted(generation.signatures),
        }
