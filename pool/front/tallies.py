"""What one front has counted, as a tree of numbers, so that those of several add up. Runs in each front.

    requests, replies, …      of its endpoint
    errors                    by code
    unknown                   answers to predictions of no model, by code
    models, pipelines         by name
    now                       what is the case now, and of a front that has ended is the case no more

A leaf is a number or a list of numbers; two trees are added leaf by leaf, and what is in one alone stays.
`show` puts the sums into a status document in place of the lead's own.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from pool.front.led import LedReplicas
from pool.front.metrics import ModelMetrics
from pool.front.states import SlotState

if TYPE_CHECKING:
    from pool.front.engine import Engine
    from pool.front.pipeline import PipelineMetrics
    from pool.front.serving import Serving

Tally = dict[Any, Any]

_OF_ENDPOINT = ("requests", "replies", "dropped_replies", "refused_connections", "errors")
_OF_MODEL = ("batches", "rows", "answers", "closed", "stages", "retried_runs", "blamed_requests")
_OF_STEP = ("requests", "rows", "waited", "errors", "seconds")


def count(engine: Engine, endpoint: Tally) -> Tally:
    """What a front has counted.

    Args:
        engine: Its engine.
        endpoint: What its endpoint describes.
    """
    models, models_now = {}, {}
    for name, model in engine.models.items():
        models[name] = _of_metrics(model.metrics) | {
            "batches": model.metrics.batches,
            "rows": model.metrics.rows,
            "closed": dict(model.metrics.closed),
            "batch_sizes": dict(model.metrics.batch_sizes),
        }
        if model.serving is not None and model.state != "stopped":
            models[name] |= _of_serving(model.serving)
            models_now[name] = _now_of_serving(model.serving)
    pipelines, pipelines_now = {}, {}
    for name, metrics in engine.pipelines.metrics.items():
        pipelines[name] = _of_pipeline(metrics)
        waiting = engine.pipelines.waiting.of(name)
        pipelines_now[name] = {
            "under_way": metrics.under_way,
            "waiting": {step: waiting.get(step, 0) for step in metrics.steps},
        }
    regions = endpoint.get("regions", {})
    return {
        **{key: endpoint.get(key, {} if key == "errors" else 0) for key in _OF_ENDPOINT},
        "region_requests": regions.get("requests", 0),
        "unknown": dict(engine.unknown.answers),
        "models": models,
        "pipelines": pipelines,
        "now": {
            "clients": endpoint.get("clients", 0),
            "lines": endpoint.get("lines", 0),
            "regions": {"open": regions.get("open", 0), "bytes": regions.get("bytes", 0)},
            "models": models_now,
            "pipelines": pipelines_now,
        },
    }


def _of_metrics(metrics: ModelMetrics) -> Tally:
    return {
        "answers": dict(metrics.answers),
        "stages": {stage: histogram.describe() for stage, histogram in metrics.stages.items()},
    }


def _of_serving(serving: Serving) -> Tally:
    now = time.monotonic()
    replicas = serving.replicas
    if isinstance(replicas, LedReplicas):
        work = replicas.work(now)
    else:
        work = {each.index: (each.batches, each.rows, each.busy_until(now)) for each in replicas.workers}
    return {
        "retried_runs": serving.trials.runs,
        "blamed_requests": serving.trials.blamed,
        "poison_refusals": serving.generation.poison.refused,
        "workers": {
            index: {"batches": batches, "rows": rows, "busy_s": busy_s}
            for index, (batches, rows, busy_s) in work.items()
        },
    }


def _now_of_serving(serving: Serving) -> Tally:
    slots = dict.fromkeys((state.value for state in SlotState), 0)
    rows = dict(slots)
    for slot in serving.generation.batcher.slots:
        slots[slot.state.value] += 1
        rows[slot.state.value] += slot.rows
    return {
        "queue_rows": serving.generation.batcher.queue_rows,
        "arena_bytes": serving.generation.arena.size_bytes,
        "poison_remembered": len(serving.generation.poison),
        "slots": slots,
        "slot_rows": rows,
    }


def _of_pipeline(metrics: PipelineMetrics) -> Tally:
    return _of_metrics(metrics) | {
        "steps": {
            name: {
                "requests": step.requests,
                "rows": step.rows,
                "waited": step.waited,
                "errors": step.errors,
                "seconds": step.seconds.describe(),
            }
            for name, step in metrics.steps.items()
        }
    }


def add(first: Any, second: Any) -> Any:
    """Two trees, or parts of them, in one; neither is changed."""
    if isinstance(first, dict):
        both = dict(first)
        for key, value in second.items():
            both[key] = add(both[key], value) if key in both else value
        return both
    if isinstance(first, list):
        return [a + b for a, b in zip(first, second, strict=True)]
    return first + second


def add_all(tallies: Iterable[Tally]) -> Tally:
    """Several trees in one."""
    total: Tally = {}
    for tally in tallies:
        total = add(total, tally)
    return total


def past(tally: Tally, models: Iterable[str], pipelines: Iterable[str]) -> Tally:
    """What stays of a front that has ended: what it has counted, of what is still served."""
    kept = {key: value for key, value in tally.items() if key != "now"}
    for key, names in (("models", set(models)), ("pipelines", set(pipelines))):
        kept[key] = {name: of for name, of in kept.get(key, {}).items() if name in names}
    return kept


def show(document: Tally, total: Tally) -> None:
    """Put the sums into a status document, in place of the lead's own figures.

    Args:
        document: Of the lead, with the part of its endpoint; changed.
        total: Of all fronts.
    """
    front, now = document["front"], total["now"]
    for key in _OF_ENDPOINT:
        front[key] = total[key]
    front["clients"], front["lines"] = now["clients"], now["lines"]
    front["regions"] = now["regions"] | {"requests": total["region_requests"]}
    for name, model in document["models"].items():
        counted = total["models"].get(name)
        if counted is None:  # it came meanwhile
            continue
        model.update({key: counted[key] for key in _OF_MODEL if key in counted and key in model})
        model["batch_sizes"] = {str(rows): n for rows, n in sorted(counted.get("batch_sizes", {}).items())}
        if "queue_rows" in model and name in now["models"]:
            model["queue_rows"] = now["models"][name]["queue_rows"]
        for worker in model.get("workers", ()):
            worker.update(counted.get("workers", {}).get(worker["index"], {}))
    for name, pipeline in document["pipelines"].items():
        counted = total["pipelines"].get(name)
        if counted is None:
            continue
        pipeline["answers"] = counted["answers"]
        for stage in pipeline["stages"]:
            pipeline["stages"][stage] = counted["stages"][stage]
        current = now["pipelines"].get(name, {"under_way": pipeline["under_way"], "waiting": {}})
        pipeline["under_way"] = current["under_way"]
        for step in pipeline["steps"]:
            step.update({key: counted["steps"][step["name"]][key] for key in _OF_STEP})
            step["waiting"] = current["waiting"].get(step["name"], 0)
