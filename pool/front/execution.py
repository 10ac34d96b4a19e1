"""One request on its way through a pipeline, from slot to slot. Runs in the front; does no I/O.

A step's rows lie in slots of its model's arena as tickets, each a *part* of the request, beside the rows of
whoever else asked for that model. When the last part of a step is done, its outputs are copied from the slot
into one of the next model. If that has no room, they are copied into memory of the front's own, the slot is
given back all the same, and the request waits (`pool.front.waiting`). It never keeps a slot to wait for
another one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from pool.errors import (
    DeadlineExceeded,
    InternalError,
    InvalidInput,
    ModelError,
    PoolError,
    Unavailable,
    error_from_code,
)
from pool.front.columns import Column, StringColumn, read_columns
from pool.front.logs import Log
from pool.front.replies import Compound, Reply
from pool.front.route import Route
from pool.front.slots import LANES, Slot, Ticket, Turn
from pool.pipelines import Source, WiredStep

if TYPE_CHECKING:
    from pool.front.pipeline import Pipeline
    from pool.front.pipelines import Pipelines

log = Log("pool.execution")


class Value(NamedTuple):
    """A tensor: its dtype, its whole shape, its bytes as on the wire (which may lie in a slot)."""

    dtype: str
    shape: tuple[int, ...]
    payload: memoryview | bytes

    def copied(self) -> Value:
        """With bytes of its own."""
        return self._replace(payload=bytes(self.payload))


class Execution(Compound):
    """A request admitted to a pipeline.

    Args:
        pipeline: Which; kept to the end, whatever is served by its name then.
        whole: The request's ticket.
        pipelines: Hears that it waits, and that it is over.

    Attributes:
        pipeline: As above.
        whole: As above.
        step: The place of the step it is at.
        route: Of that step's rows.
        waits_at: Its place among those that wait for room; None while it does not.
    """

    def __init__(self, pipeline: Pipeline, whole: Ticket, pipelines: Pipelines) -> None:
        self.pipeline = pipeline
        self.whole = whole
        self.step = 0
        self.route: Route
        self.waits_at: tuple[float, int] | None = None
        self._pipelines = pipelines
        self._kept: dict[Source, Value] = {}  # what a step to come needs
        self._entered_at = 0.0
        self._rows = 0
        self._done = 0  # rows placed
        self._columns: Sequence[Column | StringColumn] = ()
        self._parts: list[tuple[Slot, Ticket]] = []
        self._results: dict[int, tuple[int, list[bytes]]] = {}
        self._shapes: list[tuple[int, ...]] | None = None

    def begin(self, given: Mapping[Source, Value], now: float) -> None:
        """Enter the first step.

        Args:
            given: The request's inputs.
            now: Monotonic seconds.

        Raises:
            PoolError: it is refused there; nothing of it will run, and nobody is told but the caller.
        """
        self._pipelines.began(self)
        self.whole.account.rows += 1
        try:
            self._enter(0, given, now)
        except PoolError as e:
            self.withdraw()
            raise self._named(e.with_traceback(None)) from None
        except BaseException:  # whoever answers for a defect is to be the only one
            self.withdraw()
            raise

    # -- from step to step --------------------------------------------------------------------------

    def _enter(self, at: int, fresh: Mapping[Source, Value], now: float) -> None:
        """Begin a step.

        Args:
            at: Its place.
            fresh: What the step before gave, or the request; the bytes may lie in a slot that is given back
                after this.
            now: Monotonic seconds.

        Raises:
            PoolError: it cannot be begun.
        """
        self.step = at
        self._entered_at = now
        step = self.pipeline.wiring.steps[at]
        values = [fresh[source] if source in fresh else self._kept[source] for source in step.sources]
        self._kept = {
            source: fresh[source].copied() if source in fresh else self._kept[source]
            for source in self.pipeline.kept[at]
        }
        rows = _rows(step, values)
        self.route = self.pipeline.find_route(at, values)
        generation = self.route.generation
        payloads = [value.payload for value in values]
        if at == 0:
            generation.check_rows(self.route, rows)
            generation.check_room(self._part(rows, self.whole.turn), now)
        self._columns = read_columns(self.route, rows, payloads)
        if generation.poison:
            refusal = generation.find_poison(self.route, payloads, now)
            if refusal is not None:
                raise refusal
        self._rows, self._done, self._shapes = rows, 0, None
        self._parts, self._results = [], {}
        metrics = self.pipeline.metrics.steps[step.name]
        metrics.requests += 1
        metrics.rows += rows
        if not self.place(now):
            self._columns = read_columns(self.route, rows, [bytes(payload) for payload in payloads])
            metrics.waited += 1
            self._pipelines.waiting.enter(self, now)

    def place(self, now: float) -> bool:
        """Put as many of the step's rows into slots as there is room for.

        Returns:
            Whether these were the last.

        Raises:
            TooLarge: a row does not even fit an empty slot.
            Unavailable: the model has no workers any more.
        """
        route = self.route
        generation = route.generation
        reason = self._pipelines.reason_lost(generation)
        if reason is not None:
            raise Unavailable(reason)
        account = self.whole.client.account(generation)
        while True:
            left = self._rows - self._done
            room = route.inflight_rows - account.rows
            if left > 0 and room <= 0:
                return False
            key = route.keys[self.whole.key & (LANES - 1)]
            slot, rows = generation.fill(route, key, self._columns, self._done, min(left, room))
            if slot is None:
                return False
            turn = self.whole.turn if self.step == 0 else self._pipelines.turn(now)
            part = self._part(rows, turn)
            self._parts.append((slot, part))
            generation.batcher.commit(slot, part, now)
            self._pipelines.touch(generation)
            self._done += rows
            if self._done == self._rows:
                self._columns = ()
                return True

    def _part(self, rows: int, turn: Turn) -> Ticket:
        whole, route = self.whole, self.route
        key = route.keys[whole.key & (LANES - 1)]
        account = whole.client.account(route.generation)
        return Ticket(self, None, len(self._parts), route, rows, whole.deadline, turn, key, account)

    # -- answers (Sink) -----------------------------------------------------------------------------

    def send_results(self, tickets: Sequence[Ticket], reply: Reply, slot: Slot) -> None:
        """Parts of the step are done."""
        try:
            for ticket in tickets:
                view = ticket.route.generation.views[slot.index]
                payloads = reply.payloads(view, ticket.start, ticket.rows)
                if not self.whole.is_settled:
                    self._take(ticket, reply, payloads)
        except PoolError as e:
            self.fail(e.with_traceback(None))  # its frames have views of the slot
        except Exception as e:  # whoever waits for it must hear of it, and the batch's others must not
            log.defect("cannot go on in a pipeline")
            self.fail(InternalError(f"{type(e).__name__} after the step"))

    def _take(self, ticket: Ticket, reply: Reply, payloads: Sequence[memoryview | bytes]) -> None:
        if ticket.rows == self._rows:  # it is the only one
            self._leave(reply, payloads)
            return
        if self._shapes not in (None, reply.row_shapes):
            raise ModelError(
                f"rows of one request ran in several batches and gave row shapes {self._shapes} and "
                f"{reply.row_shapes}, which do not join"
            )
        self._shapes = reply.row_shapes
        self._results[ticket.id] = (ticket.rows, [bytes(payload) for payload in payloads])
        if self._done == self._rows and len(self._results) == len(self._parts):
            self._leave(reply, reply.join([self._results[i] for i in range(len(self._parts))]))

    def _leave(self, reply: Reply, payloads: Sequence[memoryview | bytes]) -> None:
        """The step is done: go on to the next one, or answer."""
        steps = self.pipeline.wiring.steps
        step = steps[self.step]
        now = self._pipelines.clock()
        self._parts, self._results = [], {}
        self.pipeline.metrics.steps[step.name].seconds.add(now - self._entered_at, 1)
        leading = (self._rows,) if self.route.is_batched else ()
        fresh = {
            Source(self.step, name): Value(dtype, (*leading, *shape), payload)
            for name, dtype, shape, payload in zip(
                step.outputs, reply.dtypes, reply.row_shapes, payloads, strict=True
            )
        }
        if self.step + 1 < len(steps):
            self._pipelines.check_running()
            self._enter(self.step + 1, fresh, now)
            return
        values = [fresh[s] if s in fresh else self._kept[s] for s in self.pipeline.wiring.outputs]
        wanted = [values[i].copied() for i in self.whole.route.outputs]
        whole = self.whole
        answer = self.pipeline.reply_for(whole.route, wanted)
        # Settled only then: if it cannot be sent, the request fails.
        whole.sink.send_frames(whole, answer, [value.payload for value in wanted])
        self.pipeline.metrics.stages["total"].add(now - whole.turn.started, 1)
        self.withdraw()

    def send_error(self, ticket: Ticket, error: PoolError) -> None:
        """A part failed: so has the request."""
        assert ticket.is_settled, "whoever answers for a part settles it first"
        self.fail(error)

    # -- the end ------------------------------------------------------------------------------------

    def fail(self, error: PoolError) -> None:
        """End with an error that names the step; once it is answered, nothing happens."""
        if self.whole.is_settled:
            return
        self.pipeline.metrics.steps[self.pipeline.wiring.steps[self.step].name].errors += 1
        self.withdraw()
        self.whole.sink.send_error(self.whole, self._named(error))

    def withdraw(self) -> None:
        """No part is wanted any more, nor any answer."""
        if self.whole.is_settled:
            return
        self.whole.is_settled = True
        for slot, part in self._parts:
            if not part.is_settled:
                part.route.generation.batcher.withdraw(slot, part)
        # Parts and execution hold each other: only the garbage collector would free what they keep.
        self._parts, self._results, self._kept, self._columns = [], {}, {}, ()
        self.whole.account.rows -= 1
        self._pipelines.ended(self)

    def _named(self, error: PoolError) -> PoolError:
        name = self.pipeline.wiring.steps[self.step].name
        message = error.message
        if isinstance(error, DeadlineExceeded):  # it has waited for longer than this step knows
            waited_ms = (self._pipelines.clock() - self.whole.turn.started) * 1e3
            message = f"no answer within the request's timeout; waited {waited_ms:.0f} ms"
        sentence = f"step {name!r} of pipeline {self.pipeline.model!r}: {message}"
        return error_from_code(error.code, sentence, retry_after_ms=error.retry_after_ms)


def _rows(step: WiredStep, values: Sequence[Value]) -> int:
    """How many rows a step gets.

    Raises:
        InvalidInput: its inputs do not agree.
    """
    if not step.signature.batched:
        return 1
    counts = [value.shape[0] if value.shape else None for value in values]
    if None in counts or len(set(counts)) > 1:
        told = ", ".join(
            f"{spec.name!r} of shape {list(value.shape)}"
            for spec, value in zip(step.signature.inputs, values, strict=True)
        )
        raise InvalidInput(f"its inputs must have equally many rows; got {told}")
    rows = counts[0]
    assert rows is not None, "checked above"
    return rows
