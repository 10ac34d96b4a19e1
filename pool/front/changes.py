"""What differs between two configurations, and what it costs to change it. Pure; front and commands."""

from __future__ import annotations

import enum
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from pool.config import Config, ModelConfig, ServerConfig
from pool.pipelines import PipelineConfig, StepConfig


class Cost(enum.Enum):
    """What a change takes. No request is lost or refused for any of them but removals and a restart."""

    IN_PLACE = "in place"
    WORKERS = "workers are started or leave"
    GENERATION = "new arena and workers, beside the old ones until they are ready"
    ADD = "a model is loaded"
    AGAIN = "it is loaded anew"
    REMOVE = "a model answers what it admitted, and ends"
    ADD_PIPELINE = "its models are wired"
    REWIRE = "wired anew; what was admitted goes on as it began"
    REMOVE_PIPELINE = "a pipeline answers what it admitted, and ends"
    RESTART = "needs a restart"


class Change(NamedTuple):
    """One difference.

    Attributes:
        key: As in the file: `models.NAME.workers`; of a whole model `models.NAME`.
        before: Its value now; None of a model that is added.
        after: Its value then; None of a model that is removed.
        cost: What it takes.
        model: Whose, by name, which the key alone does not tell: names have dots. Empty for what is of none.
    """

    key: str
    before: Any
    after: Any
    cost: Cost
    model: str = ""

    def __str__(self) -> str:
        if self.cost in (Cost.ADD, Cost.ADD_PIPELINE):
            return f"{self.key}: added: {self.cost.value}"
        if self.cost in (Cost.REMOVE, Cost.REMOVE_PIPELINE):
            return f"{self.key}: removed: {self.cost.value}"
        if self.cost is Cost.AGAIN:
            return f"{self.key}: failed: {self.cost.value}"
        return f"{self.key}: {_shown(self.before)} -> {_shown(self.after)}: {self.cost.value}"


# What is read anew each time it is needed, or can be put where it is kept.
_SERVER_IN_PLACE = frozenset(
    {
        "access_log",
        "authorized_keys",
        "awake_us",
        "drain_timeout_s",
        "insecure",
        "ipc_uids",
        "log_level",
        "start_timeout_s",
    }
)
_MODEL_IN_PLACE = frozenset(
    {
        "max_batches_per_worker",
        "max_inflight_rows",
        "max_queue_delay_ms",
        "max_worker_memory_mb",
        "poison_memory_s",
        "priority",
        "priority_ageing_ms",
        "request_timeout_ms",
        "retry",
        "timeout_ms",
    }
)


def compare(
    now: Config,
    then: Config,
    slots: dict[str, int],
    versions: dict[str, tuple[int, int]],
    failed: Collection[str] = (),
) -> list[Change]:
    """Every difference, in the order of the structs' fields, models in the order of the new file.

    Args:
        now: What is served.
        then: What is to be.
        slots: By model: how many slots its arena has now.
        versions: By model that serves its highest version: that, and the highest there is now.
        failed: Models that were given up. Asked to reload, they are tried again as they are.
    """
    changes = []
    for key in ServerConfig.__struct_fields__:
        before, after = getattr(now.server, key), getattr(then.server, key)
        if before != after:
            cost = Cost.IN_PLACE if key in _SERVER_IN_PLACE else Cost.RESTART
            changes.append(Change(f"server.{key}", before, after, cost))
    for name, model in then.models.items():
        if name in now.models:
            mine = _compare_model(name, now.models[name], model, slots.get(name, 0))
            if name in versions and not any(c.key.endswith((".path", ".version")) for c in mine):
                mine.append(Change(f"models.{name}.version", *versions[name], Cost.GENERATION, name))
            if name in failed and not mine:
                mine.append(Change(f"models.{name}", model, model, Cost.AGAIN, name))
            changes += mine
        else:
            changes.append(Change(f"models.{name}", None, model, Cost.ADD, name))
    for name, model in now.models.items():
        if name not in then.models:
            changes.append(Change(f"models.{name}", model, None, Cost.REMOVE, name))
    return changes + _compare_pipelines(now.pipelines, then.pipelines)


def _compare_pipelines(now: Mapping[str, PipelineConfig], then: Mapping[str, PipelineConfig]) -> list[Change]:
    changes = []
    for name, pipeline in then.items():
        if name not in now:
            changes.append(Change(f"pipelines.{name}", None, pipeline, Cost.ADD_PIPELINE))
            continue
        for key in PipelineConfig.__struct_fields__:
            before, after = getattr(now[name], key), getattr(pipeline, key)
            if key == "steps":
                changes += _compare_steps(f"pipelines.{name}.steps", before, after)
            elif before != after:
                changes.append(Change(f"pipelines.{name}.{key}", before, after, Cost.REWIRE))
    return changes + [
        Change(f"pipelines.{name}", pipeline, None, Cost.REMOVE_PIPELINE)
        for name, pipeline in now.items()
        if name not in then
    ]


def _compare_steps(key: str, now: Sequence[StepConfig], then: Sequence[StepConfig]) -> list[Change]:
    """That there are others; or where there are the same, which of them do something else."""
    if [step.label for step in now] != [step.label for step in then]:
        return [Change(key, now, then, Cost.REWIRE)]
    return [
        Change(f"{key}[{i}]", before, after, Cost.REWIRE)
        for i, (before, after) in enumerate(zip(now, then, strict=True))
        if before != after
    ]


def _compare_model(name: str, now: ModelConfig, then: ModelConfig, slots: int) -> list[Change]:
    changes = []
    for key in ModelConfig.__struct_fields__:
        before, after = getattr(now, key), getattr(then, key)
        if before == after:
            continue
        cost = Cost.IN_PLACE if key in _MODEL_IN_PLACE else Cost.GENERATION
        # An arena holds a running and a waiting batch for each worker, one that fills, one being answered.
        if key == "workers" and now.devices == then.devices and slots >= 2 * then.workers + 2:
            cost = Cost.WORKERS
        changes.append(Change(f"models.{name}.{key}", before, after, cost, name))
    return changes


def of_model(changes: list[Change], name: str) -> list[Change]:
    """Those of one model."""
    return [change for change in changes if change.model == name]


def _shown(value: Any) -> str:
    if value is None or value == ():
        return "none"
    if isinstance(value, dict):
        return ", ".join(f"{key} = {item}" for key, item in value.items())
    if isinstance(value, StepConfig):
        signature = "" if value.signature is None else f", signature {value.signature}"
        return f"{value.model}({_shown(value.inputs)}){signature}"
    if isinstance(value, tuple) and isinstance(value[0], StepConfig):
        return " > ".join(step.label for step in value)
    if isinstance(value, tuple):
        return "[" + ", ".join(map(str, value)) + "]"
    return str(value).lower() if isinstance(value, bool) else str(value)
