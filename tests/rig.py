"""A generation and its worker's Runner in one process: the way of a request without sockets and forks.

The model is numpy: it gives its inputs back. Everything else is what front and worker run.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable, Sequence
from math import inf
from typing import Any

import numpy as np

from pool import wire
from pool.config import ModelConfig, Placement
from pool.errors import PoolError
from pool.front.generation import Generation
from pool.front.parts import Parts
from pool.front.regions import Loan, Region
from pool.front.replies import Reply
from pool.front.route import Route
from pool.front.slots import Account, Slot, Ticket, Turn
from pool.front.workers import Worker
from pool.shm import loans
from pool.shm.arena import Arena
from pool.shm.control import LoadReport
from pool.shm.doorbell import Message, Ring
from pool.signature import Signature, TensorSpec
from pool.wire import PredictMeta, TensorMeta
from pool.worker.runner import Runner

Array = np.ndarray[Any, Any]


def report(*signatures: Signature, version: int = 7) -> LoadReport:
    """What a loader would say of a model with these signatures."""
    return LoadReport(
        version=version,
        path="/models/m/7",
        signatures=signatures,
        skipped={},
        unobserved={},
        recipes={},
        output_row_bytes={},
        weights=(),
        weights_bytes=0,
        weights_shared=False,
        unshared_reason="",
        is_lean=False,
    )


def generation(*signatures: Signature, **config: Any) -> Generation:
    """A generation of the model `m`; keywords are those of its `[models.m]` table."""
    # The arena is the limit unless a test says otherwise, and not half a gigabyte, as strings get by default.
    config = {"max_inflight_rows": 1 << 20, "slots": 4} | config
    return Generation("m", ModelConfig(path="/models/m", **config), report(*signatures))


def identity(
    *specs: tuple[str, str, tuple[int | None, ...] | None], name: str = "serving_default"
) -> Signature:
    """A batched signature whose outputs `NAME_out` are its inputs."""
    inputs = tuple(TensorSpec(*spec) for spec in specs)
    outputs = tuple(TensorSpec(f"{spec.name}_out", spec.dtype, spec.shape) for spec in inputs)
    return Signature(name, inputs, outputs)


def floats(rows: int, start: float = 0) -> Array:
    """Rows of three that tell each other apart."""
    return np.arange(3 * rows, dtype=np.float32).reshape(rows, 3) + np.float32(start)


class NumpyModel:
    """A `pool.backends.Model` of numpy functions.

    Args:
        function: From signature name and inputs to outputs; gives the inputs back unless given.

    Attributes:
        bound: (signature, shapes) of every `bind`.
        seen: Copies of the inputs of every call.
    """

    def __init__(self, function: Callable[[str, list[Array]], list[Array]] | None = None) -> None:
        self._function = function or (lambda _, inputs: inputs)
        self.signatures: tuple[Signature, ...] = ()
        self.skipped: dict[str, str] = {}
        self.bound: list[tuple[str, list[tuple[int, ...]]]] = []
        self.seen: list[list[Array]] = []

    def texts(self, _signature: str) -> tuple[bytes, ...]:
        return ()

    def runs(self, signature: str) -> str:
        return signature

    def weights(self) -> list[tuple[str, Array]]:
        return []

    def bind(self, signature: str, inputs: Sequence[Array]) -> Callable[[], list[Array]]:
        held = list(inputs)
        for array in held:
            assert array.dtype == object or (array.flags.c_contiguous and array.ctypes.data % 64 == 0)
        self.bound.append((signature, [array.shape for array in held]))

        def call() -> list[Array]:
            self.seen.append([array.copy() for array in held])
            return self._function(signature, held)

        return call


class ClientMemory:
    """A region of a client, as the front has it.

    Args:
        size: Bytes.
    """

    def __init__(self, size: int) -> None:
        fd = os.memfd_create("pool-region")
        os.pwrite(fd, bytes(size), 0)
        self._mine = mmap.mmap(fd, size)
        self.region = Region(fd, size)

    def lay(self, offset: int, array: Array) -> Loan:
        """Write an array there; gives where it lies."""
        self._mine[offset : offset + array.nbytes] = array.tobytes()
        return Loan(self.region, offset)


class Collector:
    """A sink that keeps what it is sent, decoded as a client would.

    Attributes:
        answers: By the ticket's id: a dict of arrays, or the error.
    """

    def __init__(self) -> None:
        self.answers: dict[Any, dict[str, Array] | PoolError] = {}

    def _keep(self, ticket: Ticket, answer: dict[str, Array] | PoolError) -> None:
        assert ticket.id not in self.answers, "answered twice"
        self.answers[ticket.id] = answer

    def send_results(self, tickets: Sequence[Ticket], reply: Reply, slot: Slot) -> None:
        for ticket in [alone for each in tickets for alone in each.split()]:
            memory = ticket.route.generation.views[slot.index]
            self.send_frames(ticket, reply, list(reply.payloads(memory, ticket.start, ticket.rows)))

    def send_frames(self, ticket: Ticket, reply: Reply, frames: Sequence[memoryview | bytes]) -> None:
        meta = wire.decode_meta(wire.ResultMeta, reply.meta)
        assert len(frames) == len(meta.outputs)
        whole = bool(reply.flags & wire.Flag.WHOLE)
        answer = {}
        for tensor, frame in zip(meta.outputs, frames, strict=True):
            shape = tensor.shape if whole else (ticket.rows, *tensor.shape)
            answer[tensor.name] = wire.decode_tensor(bytes(frame), tensor.dtype, shape)
        self._keep(ticket, answer)

    def send_error(self, ticket: Ticket, error: PoolError) -> None:
        for alone in ticket.split():
            self._keep(alone, error)


class Rig:
    """A generation, one worker's Runner on its arena, and a sink.

    Args:
        served: The generation; closed by `close`.
        model: What the Runner runs.
    """

    def __init__(self, served: Generation, model: NumpyModel | None = None) -> None:
        self.generation = served
        self.batcher = served.batcher
        self.model = model or NumpyModel()
        self.sink = Collector()
        self.account = Account()
        # A worker maps the arena by itself; here both ends may share one map.
        arena = Arena.__new__(Arena)
        arena.__dict__ |= served.arena.__dict__
        self.lender, self.borrower = loans.make_pair()
        self.runner = Runner(
            self.model,
            arena,
            served.signatures,
            served.config.allowed_batch_sizes,
            loans.Borrowed(self.borrower),
        )
        # Knows what regions the Runner has; it has no process.
        self.worker = Worker(0, 0, "serving", "", Placement())
        self.worker.loans = self.lender
        self.now = time.monotonic()
        self.batches: list[int] = []
        self.lent: list[bool] = []

    def __enter__(self) -> Rig:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.runner = None  # type: ignore[assignment]
        self.lender.close()
        self.borrower.close()
        self.generation.close()

    # -- a client's part ----------------------------------------------------------------------------

    def route(
        self, inputs: dict[str, Array], outputs: Sequence[str] | None = None, name: str | None = None
    ) -> Route:
        """The route of a request with these inputs."""
        signature = self.generation.find_signature(name)
        metas = []
        for key, array in inputs.items():
            dtype = signature.input(key).dtype
            metas.append(TensorMeta(key, dtype, array.shape[1:] if signature.batched else array.shape))
        chosen = None if outputs is None else tuple(outputs)
        return self.generation.resolve(PredictMeta("m", None, name, tuple(metas), chosen))

    def ticket(self, id_: Any, route: Route, rows: int, deadline: float = inf) -> Ticket:
        return Ticket(
            self.sink, b"client", id_, route, rows, deadline, Turn(self.now), route.key, self.account
        )

    def parts(self, route: Route, requests: Sequence[tuple[int, int, int]]) -> Parts:
        """Of a bundle: its requests as (id, millis, rows)."""
        table = b"".join([wire.PART.pack(*request) for request in requests])
        columns, turn = wire.split_parts(table, sum(rows for _, _, rows in requests)), Turn(self.now)
        return Parts(self.sink, b"client", route, turn, route.key, self.account, table, columns, self.now)

    def place(
        self, id_: Any, inputs: dict[str, Array], loans: Sequence[Loan] = (), **keywords: Any
    ) -> Ticket:
        """Admit a request; raises what `Generation.place` raises."""
        route = self.route(inputs, **keywords)
        rows = len(next(iter(inputs.values()))) if route.is_batched else 1
        ticket = self.ticket(id_, route, rows)
        frames = [
            bytes(wire.encode_tensor(array, region.dtype))
            for array, region in zip(inputs.values(), route.regions, strict=True)
        ]
        self.generation.place(ticket, frames, self.now, loans)
        return ticket

    # -- an engine's and a worker's part -------------------------------------------------------------

    def start(self) -> list[Slot]:
        """Dispatch one batch."""
        self.batcher.worker_ready(0)
        started = [slot for slot, _ in self.batcher.dispatch(self.now)]
        for slot in started[1:]:
            self.batcher.recall(slot, self.now)
        self.batcher.worker_lost(0)
        return started[:1]

    def finish(self, slot: Slot) -> Message:
        """Run a dispatched batch, send its answers and give the slot back."""
        message = self.answer(slot)
        self.batcher.release(slot)
        return message

    def answer(self, slot: Slot) -> Message:
        """Run a dispatched batch and send its answers."""
        self.generation.arena.describe(slot.index, slot.tickets[0].route.layout)
        kind = Ring.RUN
        if slot.loans:
            if self.generation.can_lend(slot):
                self.worker.lend(slot, self.generation.arena)
                kind = Ring.RUN_LENT
            else:
                self.generation.settle_loans(slot)
        message = self.runner.run(Message(kind, slot.index, slot.rows, slot.generation, slot.layout))
        self.batches.append(slot.rows)
        self.lent.append(kind == Ring.RUN_LENT)
        for ticket in self.batcher.finish(slot, self.now):
            ticket.is_settled = True
            if message.kind == Ring.DONE:
                places = self.generation.arena.read_run_record(slot.index)[-1]
                reply = self.generation.reply_for(ticket.route, places)
                ticket.sink.send_results([ticket], reply, slot)
            else:
                ticket.sink.send_error(ticket, PoolError(message.text))
        return message

    def run_all(self) -> None:
        """Run batches until none waits; afterwards every slot is FREE."""
        while started := self.start():
            for slot in started:
                self.finish(slot)
        assert self.batcher.is_idle
