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
from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.utils import floatToGoString

from pool.errors import CODES
from pool.front.http import Answer
from pool.front.metrics import BOUNDS_S
from pool.front.processes import GpuMemory, Member, Usage, measure_gpus, measure_processes
from pool.front.states import SlotState, WorkerState
from pool.front.tallies import Tally

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

# What is counted of each model that is loaded, by its name in a tally; and what is the case now.
_MODEL_COUNTERS = (
    ("pool_retried_runs", "Runs of parts of batches that failed.", "retried_runs"),
    ("pool_blamed_requests", "Requests found guilty of a failure.", "blamed_requests"),
    (
        "pool_poison_refusals",
        "Requests refused because the same killed a worker before.",
        "poison_refusals",
    ),
)
_MODEL_GAUGES = (
    ("pool_arena_bytes", "Size of the arenas, of all fronts.", "arena_bytes"),
    ("pool_queue_rows", "Rows that no worker has begun.", "queue_rows"),
    ("pool_poison_remembered", "Requests barred now.", "poison_remembered"),
)
# The same of the front that leads.
_SERVING_GAUGES: tuple[tuple[str, str, Callable[[Serving], float]], ...] = (
    ("pool_weights_bytes", "Size of the weights.", lambda s: s.generation.report.weights_bytes),
    (
        "pool_expected_wait_seconds",
        "How long a row placed now will wait for its answer.",
        lambda s: s.generation.batcher.expected_s,
    ),
)


class Exposition:
    """The pages.

    Args:
        engine: Has the models.
        describe_front: Gives the endpoint's part of the status document.
        total: Gives what all fronts have counted (`pool.front.tallies`).
        fronts: Gives of each front its number, requests, restarts, and whether it serves.
    """

    def __init__(
        self,
        engine: Engine,
        describe_front: Callable[[], dict[str, Any]],
        total: Callable[[], Awaitable[Tally]],
        fronts: Callable[[], list[tuple[int, int, int, bool]]],
    ) -> None:
        self._engine = engine
        self._describe_front = describe_front
        self._ask_total = total
        self._fronts = fronts
        self._total: Tally = {}
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
                self._total = await self._ask_total()
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
        yield from self._of_fronts()
        yield from self._of_requests()
        yield from self._of_batches()
        yield from self._of_models()
        yield from self._of_pipelines()
        yield from self._of_workers()
        yield from self._of_processes(members)

    def _of_front(self) -> Iterator[Metric]:
        front, total = self._describe_front(), self._total
        yield _gauge("pool_build_info", "1; the version is the label.", ("version",), [((_version(),), 1)])
        yield _gauge("pool_uptime_seconds", "Time since the front started.", (), [((), front["uptime_s"])])
        yield _gauge("pool_clients", "Clients connected.", (), [((), total["now"]["clients"])])
        yield _counter("pool_admitted_requests", "Predictions admitted.", (), [((), total["requests"])])
        yield _counter("pool_replies", "Replies sent, of all kinds.", (), [((), total["replies"])])
        yield _counter(
            "pool_dropped_replies",
            "Replies whose client was gone or did not read.",
            (),
            [((), total["dropped_replies"])],
        )
        yield _counter(
            "pool_refused_connections",
            "Connections of those who may not use the server.",
            (),
            [((), total["refused_connections"])],
        )

    def _of_fronts(self) -> Iterator[Metric]:
        fronts = self._fronts()
        label = ("front",)
        yield _gauge(
            "pool_front_up",
            "1 if the front serves; 0 leads.",
            label,
            [((str(number),), float(serves)) for number, _, _, serves in fronts],
        )
        yield _counter(
            "pool_front_requests",
            "Predictions admitted by a front.",
            label,
            [((str(number),), requests) for number, requests, _, _ in fronts],
        )
        yield _counter(
            "pool_front_restarts",
            "Processes started to replace one of a front that ended.",
            label,
            [((str(number),), restarts) for number, _, restarts, _ in fronts],
        )

    def _of_requests(self) -> Iterator[Metric]:
        models, pipelines = self._total["models"], self._total["pipelines"]
        counted = [(name, of["answers"]) for name, of in (*models.items(), *pipelines.items())]
        yield _counter(
            "pool_requests",
            "Answers to predictions by code, of models and pipelines; without a name where it is not known.",
            ("model", "code"),
            [
                ((name, code), answers.get(code, 0))
                for name, answers in (*counted, ("", self._total["unknown"]))
                for code in (_CODES if name else answers)
            ],
        )
        stages = HistogramMetricFamily(
            "pool_stage_seconds", "Time of requests in each stage.", labels=("model", "stage")
        )
        for name, of in (*models.items(), *pipelines.items()):
            for stage, times in of["stages"].items():
                stages.add_metric((name, stage), _buckets(BOUNDS_S, times["counts"]), times["sum_s"])
        yield stages

    def _of_batches(self) -> Iterator[Metric]:
        models = self._total["models"]
        rows = HistogramMetricFamily("pool_batch_rows", "Rows of the batches that ran.", labels=("model",))
        for name, of in models.items():
            counts = [0] * (len(_ROW_BOUNDS) + 1)
            for size, count in of["batch_sizes"].items():
                counts[bisect_left(_ROW_BOUNDS, size)] += count
            rows.add_metric((name,), _buckets(_ROW_BOUNDS, counts), of["rows"])
        yield rows
        yield _counter(
            "pool_batches_closed",
            "Batches by why they took no more rows.",
            ("model", "reason"),
            [
                ((name, reason), of["closed"].get(reason, 0))
                for name, of in models.items()
                for reason in _CLOSED
            ],
        )
        for metric, sentence, key in _MODEL_COUNTERS:
            yield _counter(
                metric, sentence, ("model",), [((name,), of[key]) for name, of in models.items() if key in of]
            )

    def _of_models(self) -> Iterator[Metric]:
        ready = self._engine.readiness()
        yield _gauge(
            "pool_model_ready",
            "1 if a worker that answered its canary is there; of a pipeline, one of each of its models.",
            ("model",),
            [((name,), float(is_ready)) for name, is_ready in ready.items()],
        )
        yield _gauge(
            "pool_model_info",
            "1; what is served is told by the labels.",
            ("model", "version", "backend"),
            [
                ((name, str(s.generation.version), s.generation.config.backend), 1)
                for name, s in self._servings()
            ],
        )
        now = self._total["now"]["models"]
        slots = [((name, state), n) for name, of in now.items() for state, n in of["slots"].items()]
        rows = [
            ((name, state), n)
            for name, of in now.items()
            for state, n in of["slot_rows"].items()
            if state != SlotState.FREE.value
        ]
        yield _gauge("pool_arena_slots", "Slots of the arenas by state.", ("model", "state"), slots)
        yield _gauge("pool_arena_rows", "Rows in slots by state of the slot.", ("model", "state"), rows)
        for metric, sentence, key in _MODEL_GAUGES:
            yield _gauge(metric, sentence, ("model",), [((name,), of[key]) for name, of in now.items()])
        for metric, sentence, value in _SERVING_GAUGES:
            yield _gauge(metric, sentence, ("model",), self._of_each(value))

    def _of_pipelines(self) -> Iterator[Metric]:
        now = self._total["now"]["pipelines"]
        under_way: list[tuple[tuple[str, ...], float]] = []
        waiting: list[tuple[tuple[str, ...], float]] = []
        requests: list[tuple[tuple[str, ...], float]] = []
        errors: list[tuple[tuple[str, ...], float]] = []
        labels = ("pipeline", "step")
        seconds = HistogramMetricFamily("pool_step_seconds", "Time of requests in each step.", labels=labels)
        for name, of in self._total["pipelines"].items():
            current = now.get(name, {"under_way": 0, "waiting": {}})
            under_way.append(((name,), current["under_way"]))
            for step, counted in of["steps"].items():
                key = (name, step)
                waiting.append((key, current["waiting"].get(step, 0)))
                requests.append((key, counted["requests"]))
                errors.append((key, counted["errors"]))
                times = counted["seconds"]
                seconds.add_metric(key, _buckets(BOUNDS_S, times["counts"]), times["sum_s"])
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
        for name, serving in served:
            workers = serving.replicas.workers
            wanted.append(((name,), len(workers)))
            for state in WorkerState:
                states.append(((name, state.value), sum(worker.state is state for worker in workers)))
            work = self._total["models"].get(name, {}).get("workers", {})
            busy += [((name, str(i)), of["busy_s"]) for i, of in work.items() if i < len(workers)]
        yield _gauge("pool_workers", "Workers by state.", ("model", "state"), states)
        yield _gauge("pool_workers_wanted", "Workers that the configuration asks for.", ("model",), wanted)
        yield _counter("pool_worker_busy_seconds", "Time a worker had a batch.", ("model", "worker"), busy)
        yield _counter(
            "pool_worker_restarts",
            "Workers started again, by what became of the one before.",
            ("model", "cause"),
            [
                ((name, cause), model.metrics.restarts.get(cause, 0))
                for name, model in self._engine.models.items()
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
