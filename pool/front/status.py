"""The status document: what is served, by which processes, at what cost. Runs in the front.

Read by `pool status`, `pool check` and `Client.status()`; its fields are told in `docs/operations.md`.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import msgspec

from pool.front.metrics import BOUNDS_S
from pool.front.processes import Usage, measure_processes, no_usage
from pool.front.zygotes import Zygote
from pool.shm.control import LoadReport

if TYPE_CHECKING:
    from pool.front.served import ServedModel
    from pool.front.workers import Worker


async def read_status(models: Iterable[ServedModel], zygotes: Iterable[Zygote]) -> dict[str, Any]:
    """The part of the document that the engine knows.

    Reading a process's memory map takes the kernel milliseconds, so it is done in a thread.
    """
    models = list(models)
    # By the time that they are measured they may have ended, or others be in their place.
    zygote_pids = [(zygote.backend, zygote.pid) for zygote in zygotes if zygote.pid is not None]
    pids: list[int | None] = [os.getpid(), *(pid for _, pid in zygote_pids)]
    for model in models:
        if model.serving is not None:
            pids += [worker.pid for worker in model.serving.replicas.everyone()]
    known = [pid for pid in pids if pid is not None]
    usage = await asyncio.get_running_loop().run_in_executor(None, measure_processes, known)
    return {
        "front": usage[os.getpid()],
        "stage_bounds_s": BOUNDS_S,
        "zygotes": [{"backend": backend, **usage[pid]} for backend, pid in zygote_pids],
        "models": {model.name: _model_status(model, usage) for model in models},
    }


def _model_status(model: ServedModel, usage: dict[int, Usage]) -> dict[str, Any]:
    document: dict[str, Any] = {
        "state": model.state,
        "failure": model.failure,
        "batches": model.metrics.batches,
        "rows": model.metrics.rows,
        "answers": dict(model.metrics.answers),
        "stages": {stage: histogram.describe() for stage, histogram in model.metrics.stages.items()},
        "closed": dict(model.metrics.closed),
        "restarts": dict(model.metrics.restarts),
        "batch_sizes": {str(rows): n for rows, n in sorted(model.metrics.batch_sizes.items())},
    }
    if model.serving is None:
        return document
    generation, replicas, trials = model.serving.generation, model.serving.replicas, model.serving.trials
    aside = replicas.quarantine
    return (
        document
        | describe_report(generation.report, len(generation.batcher.slots), generation.arena.slot_bytes)
        | {
            "max_batch_size": generation.config.max_batch_size,
            "queue_rows": generation.batcher.queue_rows,
            "workers": [_worker_status(worker, usage) for worker in replicas.workers],
            "quarantine": None if aside is None else _worker_status(aside, usage),
            "recycled": replicas.recycled,
            "retried_runs": trials.runs,
            "blamed_requests": trials.blamed,
        }
    )


def _worker_status(worker: Worker, usage: dict[int, Usage]) -> dict[str, Any]:
    return {
        "index": worker.index,
        "state": worker.state.value,
        "device": worker.device,
        "batches": worker.batches,
        "rows": worker.rows,
        "busy_s": worker.busy_until(time.monotonic()),
        "piece_rows": worker.piece_rows or None,
        "restarts": worker.restarts,
        "ready_s": worker.ready_s,
        "last_error": worker.last_error,
        **(usage.get(worker.pid or 0) or no_usage(None)),
    }


def describe_report(report: LoadReport, slots: int, slot_bytes: int) -> dict[str, Any]:
    """What is known of a loaded model."""
    return {
        "version": report.version,
        "signatures": [msgspec.to_builtins(signature) for signature in report.signatures],
        "skipped": report.skipped,
        "unobserved": report.unobserved,
        "weights_bytes": report.weights_bytes,
        "weights_shared": report.weights_shared,
        "unshared_reason": report.unshared_reason,
        "arena_bytes": slots * slot_bytes,
        "slots": slots,
        "slot_bytes": slot_bytes,
    }
