"""What the HTTP server shows: counters as Prometheus text, live, ready (`docs/operations.md` 19). Front.

Everything is read when it is asked for, from the objects that have it. Processes are measured in a thread,
and their figures kept for some seconds. The text is made a metric at a time, and the loop runs in between.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import itertools
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.utils import floatToGoString

from pool.errors import CODES
from pool.front.http import Answer
from pool.front.metrics import BOUNDS_S, ModelMetrics
from pool.front.processes import GpuMemory, Member, Usage, measure_gpus, measure_processes
from pool.front.states import SlotState, WorkerState

if TYPE_CHECKING:
    from pool.front.engine import Engine
    from pool.front.serving import Serving

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4

# Figures of processes are as old as this at most, and the whole text as old as that: whoever asks without
# end must not keep the front from its work.
_MEASURED_FOR_S = 5.0
_FRESH_FOR_S = 0.25

_ROW_BOUNDS = tuple(float(1 << i) for i in range(17))  # 1 to 65,536, the largest batch there is
_CODES = ("OK", *sorted(CODES - {"CONFIG", "MODEL_LOAD"}))  # those two are never sent
_CLOSED = ("full", "idle_worker", "overdue", "no_room", "rerun")
_CAUSES = ("crashed", "hung", "killed", "not_started", "replaced")
_FIGURES = ("cpu_s", "uss_bytes", "pss_bytes")  # of a process

_Samples = Iterable[tuple[tuple[str, ...], float]]
_Figure = tuple[str, str, Callable[["Serving"], float]]

_SERVING_COUNTERS: tuple[_Figure, ...] = (
    ("pool_retried_runs", "Runs of parts of batches that failed.", lambda s: s.trials.runs),
    ("pool_blamed_requests", "Requests found guilty of a failure.", lambda s: s.trials.blamed),
    (
        "pool_poison_refusals",
        "Requests refused because the same killed a worker before.",
        lambda s: s.generation.poison.refused,
    ),
)
_SERVING_GAUGES: tuple[_Figure, ...] = (
    ("pool_arena_bytes", "Size of the arena.", lambda s: s.generation.arena.size_bytes),
    ("pool_weights_bytes", "Size of the weights.", lambda s: s.generation.report.weights_bytes),
    ("pool_queue_rows", "Rows that no worker has begun.", lambda s: s.generation.batcher.queue_rows),
    (
        "pool_expected_wait_seconds",
        "How long a row placed now will wait for its answer.",
        lambda s: s.generation.batcher.expected_s,
    ),
    ("pool_poison_remembered", "Requests barred now.", lambda s: len(s.generation.poison)),
)


class Exposition:
    """The pages.

    Args:
        engine: Has the models.
        describe_front: Gives the endpoint's part of the status document.
    """

    def __init__(self, engine: Engine, describe_front: Callable[[], dict[str, Any]]) -> None:
        self._engine = engine
        self._describe_front = describe_front
        self._lock = asyncio.Lock()
        self._text = b""
        self._made_at = self._measured_at = float("-inf")
        self._usage: dict[int, Usage] = {}
        self._gpus: list[GpuMemory] = []

    async def page(self, path: str) -> Answer:
        """What is at a path of the HTTP server."""
        if path == "/metrics":
            return Answer(200, await self.text(), CONTENT_TYPE)
        if path == "/live":
            return Answer(200, b"live\n")
        ready = self._engine.readiness()
        if path.startswith("/ready/"):
            name = path.removeprefix("/ready/")
            if name not in ready:
                return Answer(404, b"")
            ready = {name: ready[name]}
        elif path != "/ready":
            return Answer(404, b"")
        lines = [f"{name} {'ready' if is_ready else 'not ready'}\n" for name, is_ready in ready.items()]
        return Answer(200 if all(ready.values()) else 503, "".join(lines).encode())

    async def text(self) -> bytes:
        """The present text."""
        async with self._lock:
            if time.monotonic() - self._made_at > _FRESH_FOR_S:
                members = self._engine.members()
                await self._measure(members)
                parts = []
                for metric in self._collect(members):
                    parts.append(generate_latest(_Only(metric)))
                    await asyncio.sleep(0)
                self._text = b"".join(parts)
                self._made_at = time.monotonic()
            return self._text

    async def _measure(self, members: list[Member]) -> None:
        if time.monotonic() - self._measured_at > _MEASURED_FOR_S:
            pids = [member.pid for member in members]
            self._usage, self._gpus = await asyncio.get_running_loop().run_in_executor(
                None, lambda: (measure_processes(pids), measure_gpus())
            )
            self._measured_at = time.monotonic()

    # -- what is told -------------------------------------------------------------------------------

    def _collect(self, members: list[Member]) -> Iterator[Metric]:
        yield from self._of_front()
        yield from self._of_requests()
        yield from self._of_batches()
        yield from self._of_models()
        yield from self._of_pipelines()
        yield from self._of_workers()
        yield from self._of_processes(members)

    def _of_front(self) -> Iterator[Metric]:
        front = self._describe_front()
        yield _gauge("pool_build_info", "1; the version is the label.", ("version",), [((_version(),), 1)])
        yield _gauge("pool_uptime_seconds", "Time since the front started.", (), [((), front["uptime_s"])])
        yield _gauge("pool_clients", "Clients connected.", (), [((), front["clients"])])
        yield _counter("pool_admitted_requests", "Predictions admitted.", (), [((), front["requests"])])
        yield _counter("pool_replies", "Replies sent, of all kinds.", (), [((), front["replies"])])
        yield _counter(
            "pool_dropped_replies",
            "Replies whose client was gone or did not read.",
            (),
            [((), front["dropped_replies"])],
        )
        yield _counter(
            "pool_refused_connections",
            "Connections of those who may not use the server.",
            (),
            [((), front["refused_connections"])],
        )

    def _of_requests(self) -> Iterator[Metric]:
        pipelines = self._engine.pipelines.metrics
        counted = [*self._metrics(), *pipelines.items(), ("", self._engine.unknown)]
        yield _counter(
            "pool_requests",
            "Answers to predictions by code, of models and pipelines; without a name where it is not known.",
            ("model", "code"),
            [
                ((name, code), metrics.answers.get(code, 0))
                for name, metrics in counted
                for code in (_CODES if name else metrics.answers)
            ],
        )
        stages = HistogramMetricFamily(
            "pool_stage_seconds", "Time of requests in each stage.", labels=("model", "stage")
        )
        for name, metrics in (*self._metrics(), *pipelines.items()):
            for stage, histogram in metrics.stages.items():
                stages.add_metric((name, stage), _buckets(BOUNDS_S, histogram.counts), histogram.sum_s)
        yield stages

    def _of_batches(self) -> Iterator[Metric]:
        rows = HistogramMetricFamily("pool_batch_rows", "Rows of the batches that ran.", labels=("model",))
        for name, metrics in self._metrics():
            counts = [0] * (len(_ROW_BOUNDS) + 1)
            for size, count in metrics.batch_sizes.items():
                counts[bisect_left(_ROW_BOUNDS, size)] += count
            rows.add_metric((name,), _buckets(_ROW_BOUNDS, counts), metrics.rows)
        yield rows
        yield _counter(
            "pool_batches_closed",
            "Batches by why they took no more rows.",
            ("model", "reason"),
            [
                ((name, reason), metrics.closed.get(reason, 0))
                for name, metrics in self._metrics()
                for reason in _CLOSED
            ],
        )
        for metric, sentence, value in _SERVING_COUNTERS:
            yield _counter(metric, sentence, ("model",), self._of_each(value))

    def _of_models(self) -> Iterator[Metric]:
        ready = self._engine.readiness()
        yield _gauge(
            "pool_model_ready",
            "1 if a worker that answered its canary is there; of a pipeline, one of each of its models.",
            ("model",),
            [((name,), float(is_ready)) for name, is_ready in ready.items()],
        )
        served = list(self._servings())
        yield _gauge(
            "pool_model_info",
            "1; what is served is told by the labels.",
            ("model", "version", "backend"),
            [((name, str(s.generation.version), s.generation.config.backend), 1) for name, s in served],
        )
        slots: list[tuple[tuple[str, ...], float]] = []
        rows: list[tuple[tuple[str, ...], float]] = []
        for name, serving in served:
            for state in SlotState:
                found = [slot for slot in serving.generation.batcher.slots if slot.state is state]
                slots.append(((name, state.value), len(found)))
                if state is not SlotState.FREE:
                    rows.append(((name, state.value), sum(slot.rows for slot in found)))
        yield _gauge("pool_arena_slots", "Slots of the arena by state.", ("model", "state"), slots)
        yield _gauge("pool_arena_rows", "Rows in slots by state of the slot.", ("model", "state"), rows)
        for metric, sentence, value in _SERVING_GAUGES:
            yield _gauge(metric, sentence, ("model",), self._of_each(value))

    def _of_pipelines(self) -> Iterator[Metric]:
        pipelines = self._engine.pipelines
        under_way: list[tuple[tuple[str, ...], float]] = []
        waiting: list[tuple[tuple[str, ...], float]] = []
        requests: list[tuple[tuple[str, ...], float]] = []
        errors: list[tuple[tuple[str, ...], float]] = []
        labels = ("pipeline", "step")
        seconds = HistogramMetricFamily("pool_step_seconds", "Time of requests in each step.", labels=labels)
        for name, metrics in pipelines.metrics.items():
            under_way.append(((name,), metrics.under_way))
            parked = pipelines.waiting.of(name)
            for step, counted in metrics.steps.items():
                key = (name, step)
                waiting.append((key, parked.get(step, 0)))
                requests.append((key, counted.requests))
                errors.append((key, counted.errors))
                seconds.add_metric(key, _buckets(BOUNDS_S, counted.seconds.counts), counted.seconds.sum_s)
        sentence = "Requests admitted to a pipeline and not answered."
        yield _gauge("pool_pipeline_requests", sentence, ("pipeline",), under_way)
        yield _gauge("pool_step_waiting", "Requests that wait for room in a step's model.", labels, waiting)
        yield _counter("pool_step_requests", "Requests that came to a step.", labels, requests)
        yield _counter("pool_step_errors", "Requests that ended in a step with an error.", labels, errors)
        yield seconds

    def _of_workers(self) -> Iterator[Metric]:
        served = list(self._servings())
        states: list[tuple[tuple[str, ...], float]] = []
        wanted: list[tuple[tuple[str, ...], float]] = []
        busy: list[tuple[tuple[str, ...], float]] = []
        now = time.monotonic()
        for name, serving in served:
            workers = serving.replicas.workers
            wanted.append(((name,), len(workers)))
            for state in WorkerState:
                states.append(((name, state.value), sum(worker.state is state for worker in workers)))
            busy += [((name, str(worker.index)), worker.busy_until(now)) for worker in workers]
        yield _gauge("pool_workers", "Workers by state.", ("model", "state"), states)
        yield _gauge("pool_workers_wanted", "Workers that the configuration asks for.", ("model",), wanted)
        yield _counter("pool_worker_busy_seconds", "Time a worker had a batch.", ("model", "worker"), busy)
        yield _counter(
            "pool_worker_restarts",
            "Workers started again, by what became of the one before.",
            ("model", "cause"),
            [
                ((name, cause), metrics.restarts.get(cause, 0))
                for name, metrics in self._metrics()
                for cause in _CAUSES
            ],
        )
        yield _counter(
            "pool_zygotes_lost",
            "Zygotes that ended unasked.",
            ("backend",),
            [((backend,), count) for backend, count in self._engine.zygotes_lost.items()],
        )

    def _of_processes(self, members: list[Member]) -> Iterator[Metric]:
        # While a model is loaded again, two workers have the same place: the old one's and the new one's.
        by_place: dict[tuple[str, str, str], list[Usage]] = {}
        for member in members:
            if member.pid in self._usage:
                place = (member.role, member.model, member.place)
                by_place.setdefault(place, []).append(self._usage[member.pid])
        known = [
            (place, {figure: sum(usage[figure] for usage in usages) for figure in _FIGURES})
            for place, usages in by_place.items()
        ]
        labels = ("role", "model", "worker")
        yield _counter(
            "pool_process_cpu_seconds", "CPU time.", labels, [(key, usage["cpu_s"]) for key, usage in known]
        )
        yield _gauge(
            "pool_process_uss_bytes",
            "Private memory: what would be free if the process ended.",
            labels,
            [(key, usage["uss_bytes"]) for key, usage in known],
        )
        yield _gauge(
            "pool_process_pss_bytes",
            "Memory, shared pages divided among those that share them.",
            labels,
            [(key, usage["pss_bytes"]) for key, usage in known],
        )
        yield _gauge(
            "pool_gpu_memory_used_bytes",
            "Memory of a GPU in use.",
            ("gpu",),
            [((gpu.number,), gpu.used_bytes) for gpu in self._gpus],
        )
        yield _gauge(
            "pool_gpu_memory_total_bytes",
            "Memory of a GPU.",
            ("gpu",),
            [((gpu.number,), gpu.total_bytes) for gpu in self._gpus],
        )

    # -- where it is --------------------------------------------------------------------------------

    def _metrics(self) -> Iterator[tuple[str, ModelMetrics]]:
        for name, model in self._engine.models.items():
            yield name, model.metrics

    def _servings(self) -> Iterator[tuple[str, Serving]]:
        for name, model in self._engine.models.items():
            if model.serving is not None and model.state != "stopped":
                yield name, model.serving

    def _of_each(self, value: Callable[[Serving], float]) -> _Samples:
        return [((name,), value(serving)) for name, serving in self._servings()]


def _version() -> str:
    try:
        return importlib.metadata.version("poolserve")
    except importlib.metadata.PackageNotFoundError:  # run from its sources
        return "unknown"


def _gauge(name: str, sentence: str, labels: tuple[str, ...], samples: _Samples) -> Metric:
    metric = GaugeMetricFamily(name, sentence, labels=labels)
    for key, value in samples:
        metric.add_metric(key, value)
    return metric


def _counter(name: str, sentence: str, labels: tuple[str, ...], samples: _Samples) -> Metric:
    metric = CounterMetricFamily(name, sentence, labels=labels)
    for key, value in samples:
        metric.add_metric(key, value)
    return metric


def _buckets(bounds: tuple[float, ...], counts: list[int]) -> list[tuple[str, float]]:
    """Counts of each bucket as Prometheus has them: of all up to its bound."""
    ends = [*map(floatToGoString, bounds), "+Inf"]
    return list(zip(ends, itertools.accumulate(counts), strict=True))


class _Only:
    """One metric, as `generate_latest` wants it."""

    def __init__(self, metric: Metric) -> None:
        self._metric = metric

    def collect(self) -> Iterable[Metric]:
        """It alone."""
        return [self._metric]
