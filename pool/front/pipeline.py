"""A pipeline as it is served. Runs in the front; does no I/O.

To whoever asks, it is a model: it resolves headers to routes, admits requests, and counts. What it admits is
an `Execution` from then on.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import TYPE_CHECKING, Any, cast

import msgspec

from pool.errors import InternalError, InvalidInput, Overloaded, PoolError
from pool.front.columns import read_columns, read_numeric
from pool.front.execution import Execution, Value
from pool.front.generation import Generation, retry_after_ms
from pool.front.logs import Log
from pool.front.metrics import Histogram, ModelMetrics
from pool.front.parts import Parts
from pool.front.placing import Refused
from pool.front.replies import Reply
from pool.front.route import Route, check_input, choose_outputs
from pool.front.slots import LANES, Ticket
from pool.pipelines import VERSION, PipelineConfig, Source, Wiring
from pool.shm.arena import InputRegion, OutputPlace
from pool.signature import ITEM_BYTES, choose_signature, row_items
from pool.wire import PredictMeta, TensorMeta

if TYPE_CHECKING:
    from pool.front.pipelines import Pipelines
    from pool.front.regions import Loan

log = Log("pool.pipeline")

# Distinct shapes remembered, as in a generation.
_REMEMBERED_MAX = 4096

# One client may have all but an eighth of a pipeline's requests: so it alone never shuts the others out.
_OTHERS_SHARE = 8


class StepMetrics:
    """What is counted of one step.

    Attributes:
        requests: That came to it.
        rows: Of those.
        waited: Of those, how many found no room at once.
        errors: Requests that ended here with one.
        seconds: From the end of the step before to the end of this one.
    """

    __slots__ = ("errors", "requests", "rows", "seconds", "waited")

    def __init__(self) -> None:
        self.requests = self.rows = self.waited = self.errors = 0
        self.seconds = Histogram()


class PipelineMetrics(ModelMetrics):
    """What is counted of a pipeline; answers, and times of its stages `receive` and `total`.

    Attributes:
        steps: By name.
        under_way: Requests admitted and not answered.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.steps: dict[str, StepMetrics] = {}
        self.under_way = 0


class PipelineRoute(Route):
    """What the header of a request to a pipeline resolves to."""

    __slots__ = ("tensors",)

    def __init__(self, pipeline: Pipeline, meta: PredictMeta) -> None:
        signature = choose_signature((pipeline.wiring.signature,), meta.signature)
        position = {spec.name: i for i, spec in enumerate(signature.inputs)}
        for tensor in meta.inputs:
            check_input(signature, signature.input(tensor.name), tensor)
        missing = sorted(position.keys() - {tensor.name for tensor in meta.inputs}, key=position.__getitem__)
        if missing:
            raise InvalidInput(f"inputs {missing} are missing; signature {signature.name!r} wants them all")
        # Whoever wants of it what a pipeline has not (slots) looks at `is_direct` first.
        self.generation = cast(Generation, pipeline)
        self.signature = signature
        self.keys = tuple(range(LANES))
        self.key = pipeline.config.priority
        self.is_batched = signature.batched
        self.order = tuple(position[tensor.name] for tensor in meta.inputs)
        self.regions = [_region(tensor) for tensor in meta.inputs]
        self.is_numeric = all(tensor.dtype != "string" for tensor in meta.inputs)
        self.is_direct = False
        self.outputs = choose_outputs(signature, meta.outputs)
        timeout_ms = pipeline.config.request_timeout_ms
        self.timeout_s = inf if timeout_ms is None else timeout_ms * 1e-3
        self.tensors = meta.inputs

    def values(self, rows: int, frames: Sequence[memoryview | bytes]) -> dict[Source, Value]:
        """The tensors of a request, by where steps look for them."""
        leading = (rows,) if self.is_batched else ()
        return {
            Source(-1, tensor.name): Value(tensor.dtype, (*leading, *tensor.shape), frame)
            for tensor, frame in zip(self.tensors, frames, strict=True)
        }


def _region(tensor: TensorMeta) -> InputRegion:
    """As if it lay at the start of a slot: what checks frames wants of a region is its size."""
    item_bytes = ITEM_BYTES.get(tensor.dtype, 8)  # an offset, of a string
    return InputRegion(tensor.dtype, tensor.shape, 0, item_bytes * row_items(tensor.shape))


class Pipeline:
    """A pipeline wired to the generations that its models had when it was made.

    Args:
        name: In the config.
        config: Its table.
        wiring: Of that to the generations' signatures.
        generations: Of each step.
        metrics: What is counted of all that have had this name.
        pipelines: Which it is one of.

    Attributes:
        model: Its name.
        config: As above.
        wiring: As above.
        generations: As above.
        metrics: As above.
        kept: By step: what came before it and is needed after it.
    """

    def __init__(
        self,
        name: str,
        config: PipelineConfig,
        wiring: Wiring,
        generations: Sequence[Generation],
        metrics: PipelineMetrics,
        pipelines: Pipelines,
    ) -> None:
        self.model = name
        self.config = config
        self.wiring = wiring
        self.generations = tuple(generations)
        self.kept = [
            tuple(source for source, last in wiring.last_use.items() if source.step < at < last)
            for at in range(len(wiring.steps))
        ]
        self.metrics = metrics
        self._pipelines = pipelines
        self._routes: dict[tuple[int, tuple[tuple[str, tuple[int, ...]], ...]], Route] = {}
        self._replies: dict[tuple[tuple[int, ...], tuple[tuple[str, tuple[int, ...]], ...]], Reply] = {}

    @property
    def entry(self) -> Generation:
        """Where its first step runs."""
        return self.generations[0]

    def forget(self) -> None:
        """Settings of models have changed: make routes anew."""
        self._routes.clear()

    # -- as a model ---------------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        """What a client must know to build requests (`docs/wire.md` 3.2)."""
        return {
            "model": self.model,
            "version": VERSION,
            "signatures": [msgspec.to_builtins(self.wiring.signature)],
            "max_rows": self.entry.inflight_rows(self.entry.config.max_batch_size),
        }

    def resolve(self, meta: PredictMeta) -> Route:
        """What requests with this header run.

        Raises:
            SignatureNotFound · InvalidInput: the sentence names what was got and wanted.
        """
        return PipelineRoute(self, meta)

    def place(
        self,
        ticket: Ticket,
        frames: Sequence[memoryview | bytes],
        now: float,
        _loans: Sequence[Loan] = (),
    ) -> None:
        """Admit a request: it is in the first step's slots, or on its way there.

        Args:
            ticket: Its `route` and `rows` are set; its account is with this pipeline.
            frames: Tensor payloads in the request's order.
            now: Monotonic seconds.
            _loans: Where they lie, if in memory of the client; they are copied all the same.

        Raises:
            WireError: a frame's size is not what the header says.
            PoolError: nothing of the request will run.
        """
        route = cast(PipelineRoute, ticket.route)
        if not route.is_batched and ticket.rows != 1:
            raise InvalidInput(
                f"{ticket.rows} rows for pipeline {self.model!r}, which is not batched "
                f"({route.signature.unbatched_reason}); wanted 1, with whole tensors"
            )
        read_columns(route, ticket.rows, frames)  # those that the first step does not look at, too
        self._check_room(ticket, now)
        Execution(self, ticket, self._pipelines).begin(route.values(ticket.rows, frames), now)

    def place_all(self, parts: Parts, frames: Sequence[memoryview | bytes], now: float) -> Refused:
        """Admit the requests of a bundle, each by itself; see `Generation.place_all`."""
        columns = read_numeric(parts.route, parts.rows, frames)
        refused: Refused = []
        for i in range(len(parts)):
            ticket, start = parts.ticket(i, i + 1), parts.start(i)
            try:
                self.place(ticket, [column.span(start, ticket.rows) for column in columns], now)
            except PoolError as e:
                # Its traceback holds this frame, and with it the payloads.
                refused.append((e.with_traceback(None), [ticket.id]))
            except Exception as e:  # the others are admitted, or were
                log.defect("cannot go on in a pipeline")
                refused.append((InternalError(f"{type(e).__name__} while handling the request"), [ticket.id]))
        return refused

    def _check_room(self, ticket: Ticket, now: float) -> None:
        for generation in self.generations:
            generation.batcher.expect(now)
        expected_s = sum(generation.batcher.expected_s for generation in self.generations)
        patience = ticket.deadline - now
        most = self.config.max_requests
        most_of_one = max(1, most - max(1, most // _OTHERS_SHARE))
        if patience < expected_s:
            sentence = (
                f"pipeline {self.model!r} would answer in about {expected_s * 1e3:.0f} ms; "
                f"the request waits for {patience * 1e3:.0f} ms"
            )
        elif self.metrics.under_way >= most:
            sentence = f"pipeline {self.model!r} has {most} requests under way, as many as it may"
        elif ticket.account.rows >= most_of_one:
            sentence = (
                f"this client has {ticket.account.rows} requests of at most {most_of_one} "
                f"in pipeline {self.model!r}"
            )
        else:
            return
        raise Overloaded(sentence, retry_after_ms=retry_after_ms(expected_s))

    # -- what executions ask ------------------------------------------------------------------------

    def find_route(self, at: int, values: Sequence[Value]) -> Route:
        """What the rows of a step run.

        Raises:
            InvalidInput · TooLarge: the model does not take tensors of these shapes.
        """
        step = self.wiring.steps[at]
        first = 1 if step.signature.batched else 0
        shapes = tuple((value.dtype, value.shape[first:]) for value in values)
        route = self._routes.get((at, shapes))
        if route is None:
            inputs = tuple(
                TensorMeta(spec.name, dtype, shape)
                for spec, (dtype, shape) in zip(step.signature.inputs, shapes, strict=True)
            )
            meta = PredictMeta(step.model, None, step.signature.name, inputs, step.outputs)
            route = self.generations[at].resolve(meta)
            if len(self._routes) >= _REMEMBERED_MAX:
                self._routes.clear()
            self._routes[at, shapes] = route
        return route

    def reply_for(self, route: Route, values: Sequence[Value]) -> Reply:
        """What is sent before these outputs, which are those that a request wanted.

        Raises:
            TooLarge: no message can hold them.
        """
        key = (route.outputs, tuple((value.dtype, value.shape[1:]) for value in values))
        if not route.is_batched:
            key = (route.outputs, tuple((value.dtype, value.shape) for value in values))
        reply = self._replies.get(key)
        if reply is None:
            places = [OutputPlace(spec.dtype, (), 0, 0) for spec in self.wiring.signature.outputs]
            for i, value in zip(route.outputs, values, strict=True):
                places[i] = OutputPlace(value.dtype, value.shape, 0, len(value.payload))
            if len(self._replies) >= _REMEMBERED_MAX:
                self._replies.clear()
            reply = self._replies[key] = Reply(VERSION, self.wiring.signature, places, route.outputs)
        return reply
