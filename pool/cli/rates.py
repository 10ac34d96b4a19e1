"""What a server did between two status documents: rates, shares, quantiles. Pure; the commands' process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

STAGES = ("total", "receive", "queue", "run", "reply")


@dataclass(frozen=True)
class WorkerRates:
    """One worker.

    Attributes:
        name: `MODEL/INDEX`, or `MODEL/quarantine`.
        state: As in the status document.
        busy: Share of the time with a batch; 0 to 1.
        cpu: Cores it used.
        batches_s: Batches a second.
        private_bytes: Of its process.
        restarts: So far.
    """

    name: str
    state: str
    busy: float
    cpu: float
    batches_s: float
    private_bytes: int
    restarts: int


@dataclass(frozen=True)
class ModelRates:
    """One model.

    Attributes:
        name: In the configuration.
        state: As in the status document, with the reason of a failure.
        results_s: Results a second.
        errors_s: Errors a second.
        queue_rows: Waiting now.
        rows_per_batch: Mean; None if there was no batch.
        max_batch_size: As configured; None until the model is loaded.
        closed: Shares of the batches by why they went, largest first.
        quantiles: By stage: p50 and p99 in seconds; None if there was no request.
        workers: Its workers, and the quarantine worker while there is one.
    """

    name: str
    state: str
    results_s: float
    errors_s: float
    queue_rows: int
    rows_per_batch: float | None
    max_batch_size: int | None
    closed: list[tuple[str, float]]
    quantiles: dict[str, tuple[float, float] | None]
    workers: list[WorkerRates]


@dataclass(frozen=True)
class PipelineRates:
    """One pipeline.

    Attributes:
        name: In the configuration.
        state: As in the status document.
        results_s: Results a second.
        errors_s: Errors a second.
        under_way: Requests admitted and not answered.
        waiting: Of those, how many wait for room in a step's model, by step; steps without any left out.
        quantiles: p50 and p99 of the whole in seconds; None if there was no result.
    """

    name: str
    state: str
    results_s: float
    errors_s: float
    under_way: int
    waiting: dict[str, int]
    quantiles: tuple[float, float] | None


@dataclass(frozen=True)
class Rates:
    """A server.

    Attributes:
        elapsed_s: Between the two documents; since its start if there is only one.
        is_since_start: Whether there is only one.
        uptime_s: Since its start.
        clients: Connected.
        requests_s: Answers to predictions a second, errors included.
        errors_s: Errors a second.
        front_cpu: Cores that the front used; all of them, if there are several.
        memory_bytes: Of all processes, shared pages once.
        models: The busiest first.
        pipelines: The busiest first.
        last_errors: Of its log, oldest first.
        fronts: How many there are.
    """

    elapsed_s: float
    is_since_start: bool
    uptime_s: float
    clients: int
    requests_s: float
    errors_s: float
    front_cpu: float
    memory_bytes: int
    models: list[ModelRates]
    pipelines: list[PipelineRates]
    last_errors: list[dict[str, Any]]
    fronts: int = 1


def compare(before: Mapping[str, Any] | None, after: Mapping[str, Any]) -> Rates:
    """The rates between two documents of one server.

    Args:
        before: The earlier one. None, or one of a process that has ended since: the rates are those since
            the start.
        after: The later one.
    """
    front = after["front"]
    if before is not None and not _is_same_server(before["front"], front):
        before = None
    earlier = before or {"front": {}, "models": {}}
    elapsed_s = max(front["uptime_s"] - earlier["front"].get("uptime_s", 0.0), 1e-9)
    bounds = after["stage_bounds_s"]
    models = [
        _model(name, earlier["models"].get(name, {}), model, elapsed_s, bounds)
        for name, model in after["models"].items()
    ]
    pipelines = [
        _pipeline(name, earlier.get("pipelines", {}).get(name, {}), pipeline, elapsed_s, bounds)
        for name, pipeline in after.get("pipelines", {}).items()
    ]
    models.sort(key=lambda model: -(model.results_s + model.errors_s))
    pipelines.sort(key=lambda pipeline: -(pipeline.results_s + pipeline.errors_s))
    # What came through a pipeline counts for that alone.
    answered = sum(model.results_s + model.errors_s for model in models)
    answered += sum(pipeline.results_s + pipeline.errors_s for pipeline in pipelines)
    errors_s = (sum(front["errors"].values()) - sum(earlier["front"].get("errors", {}).values())) / elapsed_s
    processes = [*_fronts(after), *after["zygotes"]]
    for model in after["models"].values():
        processes += _workers(model)
    return Rates(
        elapsed_s=elapsed_s,
        is_since_start=before is None,
        uptime_s=front["uptime_s"],
        clients=front["clients"],
        requests_s=answered,
        errors_s=errors_s,
        fronts=len(_fronts(after)),
        front_cpu=front_cpu_s(earlier, after) / elapsed_s,
        memory_bytes=sum(process["pss_bytes"] for process in processes),
        models=models,
        pipelines=pipelines,
        last_errors=front.get("last_errors", []),
    )


def front_cpu_s(before: Mapping[str, Any], after: Mapping[str, Any]) -> float:
    """CPU seconds that the fronts of a server took between two status documents.

    Args:
        before: The earlier one; of another server, or nothing, for all since the start.
        after: The later one.
    """
    earlier = {front.get("pid"): front["cpu_s"] for front in _fronts(before)}
    return float(sum(front["cpu_s"] - earlier.get(front.get("pid"), 0.0) for front in _fronts(after)))


def _fronts(document: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """The processes of the fronts; an application that embeds its pool has one."""
    alone = [document["front"]] if "cpu_s" in document.get("front", {}) else []
    found: Sequence[Mapping[str, Any]] = document.get("fronts", alone)
    return found


def _is_same_server(before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    return bool(before["pid"] == after["pid"] and before["uptime_s"] <= after["uptime_s"])


def _workers(model: Mapping[str, Any]) -> list[dict[str, Any]]:
    aside = model.get("quarantine")
    return [*model.get("workers", ()), *([] if aside is None else [aside])]


def _model(
    name: str,
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    elapsed_s: float,
    bounds: Sequence[float],
) -> ModelRates:
    if _has_begun_anew(before, after):
        before = {}
    answers = _rise(before.get("answers", {}), after["answers"])
    batches = after["batches"] - before.get("batches", 0)
    closed = _rise(before.get("closed", {}), after["closed"])
    quantiles = {stage: _quantiles(before, after, stage, bounds) for stage in STAGES}
    workers = {worker["index"]: worker for worker in _workers(before)}
    state = after["state"] + (f": {after['failure']}" if after["failure"] else "")
    return ModelRates(
        name=name,
        state=state,
        results_s=answers.pop("OK", 0) / elapsed_s,
        errors_s=sum(answers.values()) / elapsed_s,
        queue_rows=after.get("queue_rows", 0),
        rows_per_batch=(after["rows"] - before.get("rows", 0)) / batches if batches else None,
        max_batch_size=after.get("max_batch_size"),
        closed=sorted(
            ((reason, count / sum(closed.values())) for reason, count in closed.items() if count),
            key=lambda share: -share[1],
        ),
        quantiles=quantiles,
        workers=[
            _worker(
                f"{name}/{'quarantine' if worker is after.get('quarantine') else worker['index']}",
                workers.get(worker["index"]),
                worker,
                elapsed_s,
            )
            for worker in _workers(after)
        ],
    )


def _pipeline(
    name: str,
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    elapsed_s: float,
    bounds: Sequence[float],
) -> PipelineRates:
    if _has_begun_anew(before, after):
        before = {}
    answers = _rise(before.get("answers", {}), after["answers"])
    return PipelineRates(
        name=name,
        state=after["state"],
        results_s=answers.pop("OK", 0) / elapsed_s,
        errors_s=sum(answers.values()) / elapsed_s,
        under_way=after["under_way"],
        waiting={step["name"]: step["waiting"] for step in after["steps"] if step["waiting"]},
        quantiles=_quantiles(before, after, "total", bounds),
    )


def _quantiles(
    before: Mapping[str, Any], after: Mapping[str, Any], stage: str, bounds: Sequence[float]
) -> tuple[float, float] | None:
    """p50 and p99 of a stage in seconds; None if there was nothing."""
    counts = list(after["stages"][stage]["counts"])
    if before:
        counts = [now - then for now, then in zip(counts, before["stages"][stage]["counts"], strict=True)]
    p50, p99 = quantile(bounds, counts, 0.5), quantile(bounds, counts, 0.99)
    return None if p50 is None or p99 is None else (p50, p99)


def _has_begun_anew(before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    """Whether it was removed and added again meanwhile, and counts from 0."""
    answers = _rise(before.get("answers", {}), after["answers"])
    return after.get("batches", 0) < before.get("batches", 0) or min(answers.values(), default=0) < 0


def _rise(before: Mapping[str, int], after: Mapping[str, int]) -> dict[str, int]:
    return {key: count - before.get(key, 0) for key, count in after.items()}


def _worker(
    name: str, before: Mapping[str, Any] | None, after: Mapping[str, Any], elapsed_s: float
) -> WorkerRates:
    busy_s, batches, cpu_s = 0.0, 0, 0.0
    if before is not None and before["batches"] <= after["batches"]:
        busy_s, batches = before["busy_s"], before["batches"]
        if before["pid"] == after["pid"]:
            cpu_s = before["cpu_s"]
    return WorkerRates(
        name=name,
        state=after["state"],
        # A batch that failed took time that is not counted once its worker is gone.
        busy=min(1.0, max(0.0, (after["busy_s"] - busy_s) / elapsed_s)),
        cpu=max(0.0, (after["cpu_s"] - cpu_s) / elapsed_s),
        batches_s=(after["batches"] - batches) / elapsed_s,
        private_bytes=after["uss_bytes"],
        restarts=after["restarts"],
    )


def quantile(bounds: Sequence[float], counts: Sequence[int], share: float) -> float | None:
    """The value that `share` of all do not exceed, taking those of a bucket as evenly spread.

    Args:
        bounds: Upper ends of the buckets, rising.
        counts: One more than bounds.
        share: 0 to 1.

    Returns:
        None if there is none; the last bound for what lies beyond it.
    """
    total = sum(counts)
    if not total:
        return None
    wanted = share * total
    seen = 0
    for bucket, count in enumerate(counts[:-1]):
        if count and seen + count >= wanted:
            low = bounds[bucket - 1] if bucket else 0.0
            return low + (bounds[bucket] - low) * max(0.0, wanted - seen) / count
        seen += count
    return bounds[-1]
