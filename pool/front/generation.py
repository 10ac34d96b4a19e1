"""From a request's header to its rows in a slot. Runs in the front; does no I/O.

One `Generation` is a model as it is served now: a version, its arena, its batcher. It resolves request
headers to `Route`s (once for each distinct header; `pool.front.endpoint` keeps them) and copies rows
into slots; `pool.front.replies` is the way back.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, inf
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import msgspec

from pool.config import ModelConfig
from pool.errors import InternalError, InvalidInput, Overloaded, TooLarge, WorkerLost
from pool.front.batcher import Batcher
from pool.front.columns import Column, StringColumn, read_columns, read_rows, write_rows
from pool.front.metrics import ModelMetrics
from pool.front.parts import Parts
from pool.front.placing import Refused, place_parts
from pool.front.poison import PoisonMemory
from pool.front.replies import Join, Reply
from pool.front.route import Route, check_input, choose_outputs
from pool.front.sizing import plan_arena, row_bytes
from pool.front.slots import Slot, Ticket
from pool.shm.arena import Arena, InputRegion, Layout, decode_outputs, plan_layout
from pool.shm.control import LoadReport
from pool.shm.loans import is_aligned
from pool.signature import Signature, choose_signature
from pool.wire import PredictMeta, TensorMeta

if TYPE_CHECKING:
    from pool.front.regions import Loan

# Distinct shapes (and output tables) remembered. Each is about a kB; a client that makes up shapes
# without end must not grow the front.
_REMEMBERED_MAX = 4096

# Advice to a client that found no room, before any batch has told how long one takes; and at most.
_RETRY_AFTER_MS = 10
_RETRY_AFTER_MOST_MS = 10_000


def retry_after_ms(expected_s: float) -> int:
    """When to come again where a row would now wait so long for its answer."""
    return min(ceil(expected_s * 1e3) or _RETRY_AFTER_MS, _RETRY_AFTER_MOST_MS)


class Generation:
    """A model as it is served: version, arena, batcher, routes.

    Args:
        model: Its name.
        config: Its settings.
        report: What the loader found.
        metrics: What is counted of the model; its own unless given.
        arena: Made by another front, which has planned it; owned from now on. Its own unless given.

    Raises:
        ConfigError: the arena cannot be allocated.
    """

    def __init__(
        self,
        model: str,
        config: ModelConfig,
        report: LoadReport,
        metrics: ModelMetrics | None = None,
        arena: Arena | None = None,
    ) -> None:
        self.model = model
        self.config = config
        self.report = report
        self.metrics = metrics or ModelMetrics(model)
        self.version = report.version
        self.signatures = {signature.name: signature for signature in report.signatures}
        self.arena = arena or Arena.create(*plan_arena(config, report))
        self.views = [slot.data for slot in self.arena.slots]
        self.batcher = Batcher(
            len(self.arena.slots),
            config.max_queue_delay_ms / 1e3,
            config.priority_ageing_ms / 1e3,
            config.timeout_ms / 1e3 or inf,
        )
        self.poison = PoisonMemory(config.poison_memory_s)
        self._layouts: dict[tuple[str, tuple[tuple[int, ...], ...]], Layout] = {}
        self._layouts_made = 0
        self._replies: dict[tuple[int, bytes, tuple[int, ...]], Reply] = {}

    def apply(self, config: ModelConfig) -> None:
        """Take over settings that leave the arena as it is; routes made before are to be made anew."""
        self.config = config
        self.batcher.max_queue_delay_s = config.max_queue_delay_ms / 1e3
        self.batcher.ageing_s = config.priority_ageing_ms / 1e3
        self.batcher.timeout_s = config.timeout_ms / 1e3 or inf
        self.poison.memory_s = config.poison_memory_s

    def close(self) -> None:
        """Give the arena's memory back; no worker may be running."""
        self.views = []
        self.arena.close()

    def describe(self) -> dict[str, Any]:
        """What a client must know to build requests (`docs/wire.md` 3.2)."""
        return {
            "model": self.model,
            "version": self.version,
            "signatures": [msgspec.to_builtins(signature) for signature in self.signatures.values()],
            "max_rows": self.inflight_rows(self.config.max_batch_size),
        }

    def inflight_rows(self, capacity: int) -> int:
        """Most rows that one client may have in the arena, where a slot holds `capacity`.

        Unless the config says, all but one slot: so one client alone never shuts the others out.
        """
        slots = len(self.batcher.slots)
        if self.config.max_inflight_rows is not None:
            return min(self.config.max_inflight_rows, slots * capacity)
        return (slots - 1 if slots > 2 else slots) * capacity

    # -- resolving ----------------------------------------------------------------------------------

    def resolve(self, meta: PredictMeta) -> Route:
        """What requests with this header run and how their rows lie in a slot.

        Raises:
            SignatureNotFound · InvalidInput · TooLarge: the sentence names what was got and wanted.
        """
        signature = self.find_signature(meta.signature)
        position = {spec.name: i for i, spec in enumerate(signature.inputs)}
        ordered: list[TensorMeta | None] = [None] * len(signature.inputs)
        order = []
        for tensor in meta.inputs:
            check_input(signature, signature.input(tensor.name), tensor)
            order.append(position[tensor.name])
            ordered[position[tensor.name]] = tensor
        given = [tensor for tensor in ordered if tensor is not None]
        if len(given) < len(ordered):
            missing = [s.name for s, t in zip(signature.inputs, ordered, strict=True) if t is None]
            raise InvalidInput(f"inputs {missing} are missing; signature {signature.name!r} wants them all")
        return Route(
            self, signature, self._layout(signature, given), order, choose_outputs(signature, meta.outputs)
        )

    def find_signature(self, name: str | None) -> Signature:
        """The signature of that name; for None the only one, or `serving_default`.

        Raises:
            SignatureNotFound: there is none; the sentence lists those there are.
        """
        return choose_signature(tuple(self.signatures.values()), name)

    def _layout(self, signature: Signature, inputs: list[TensorMeta]) -> Layout:
        key = (signature.name, tuple(tensor.shape for tensor in inputs))
        layout = self._layouts.get(key)
        if layout is None:
            if len(self._layouts) >= _REMEMBERED_MAX:
                self._layouts.clear()
            self._layouts_made += 1
            layout = self._layouts[key] = plan_layout(
                self._layouts_made,
                signature,
                inputs,
                row_bytes(signature.outputs, signature.batched),
                self.arena.slot_bytes,
                self.config.max_batch_size,
                self.config.allowed_batch_sizes,
                self.report.output_row_bytes.get(signature.name) or 0,
            )
        return layout

    # -- placing ------------------------------------------------------------------------------------

    def check_rows(self, route: Route, rows: int) -> None:
        """Refuse a number of rows that can never be placed.

        Raises:
            InvalidInput · TooLarge
        """
        if not route.signature.batched and rows != 1:
            raise InvalidInput(
                f"{rows} rows for signature {route.signature.name!r}, which is not batched "
                f"({route.signature.unbatched_reason}); wanted 1, with whole tensors"
            )
        if rows > route.inflight_rows:
            raise TooLarge(
                f"request of {rows} rows; model {self.model!r} takes at most {route.inflight_rows} "
                f"of one client"
            )

    def check_room(self, ticket: Ticket, now: float) -> None:
        """Refuse a request that there is no room for, or whose answer would come too late.

        Raises:
            Overloaded: the sentence says which of the two.
        """
        patience = ticket.deadline - now
        self.batcher.expect(now)
        if patience < self.batcher.expected_s:
            raise self._overloaded(
                f"model {self.model!r} would answer in about {self.batcher.expected_s * 1e3:.0f} ms; "
                f"the request waits for {patience * 1e3:.0f} ms"
            )
        route: Route = ticket.route
        free = self.batcher.free_rows(ticket.key, route.capacity)
        if free < ticket.rows or not free:
            raise self.full(ticket)
        if ticket.account.rows + ticket.rows > route.inflight_rows:
            raise self._overloaded(
                f"no room for {ticket.rows} rows of this client: it has {ticket.account.rows} of at most "
                f"{route.inflight_rows} in model {self.model!r}"
            )

    def find_poison(
        self, route: Route, frames: Sequence[memoryview | bytes], now: float
    ) -> WorkerLost | None:
        """The refusal of a request that killed a worker before; None if it did not.

        Args:
            route: Of the request.
            frames: Its tensor payloads, in its own order.
            now: Monotonic seconds.
        """
        ordered = [frame for _, frame in sorted(zip(route.order, frames, strict=True), key=itemgetter(0))]
        known = self.poison.find(route.layout.number, ordered, now)
        if known is None:
            return None
        how, remaining_s = known
        return WorkerLost(
            f"the same request came before, and {how}; it is refused for another {remaining_s:.0f} s"
        )

    def given_up(self, ticket: Ticket, now: float) -> Overloaded:
        """The refusal of a request that was admitted, and waited longer than was to be expected."""
        return self._overloaded(
            f"model {self.model!r} would answer too late: the request waits for another "
            f"{(ticket.deadline - now) * 1e3:.0f} ms, and its batch would take longer"
        )

    def full(self, ticket: Ticket) -> Overloaded:
        """The refusal of a request that finds no room in the arena."""
        route: Route = ticket.route
        return self._overloaded(
            f"no room for {ticket.rows} rows: model {self.model!r} has "
            f"{self.batcher.free_rows(ticket.key, route.capacity)} of "
            f"{route.capacity * len(self.batcher.slots)} rows free"
        )

    def _overloaded(self, sentence: str) -> Overloaded:
        """With the time in which the batches that wait now will be through as advice."""
        return Overloaded(sentence, retry_after_ms=retry_after_ms(self.batcher.expected_s))

    def place(
        self, ticket: Ticket, frames: Sequence[memoryview | bytes], now: float, loans: Sequence[Loan] = ()
    ) -> None:
        """Copy a request's rows into slots and commit them, split over batches where one has no room.

        Rows that lie one after the other in memory of their client, and may be run on there, are not copied
        as long as nothing else comes to their batch.

        Args:
            ticket: In no slot yet; its `route` and `rows` are set.
            frames: Tensor payloads in the request's order (`docs/wire.md` 4).
            now: Monotonic seconds.
            loans: Where the payloads lie, if a worker can map that.

        Raises:
            WireError: a frame's size is not what the header says.
            InvalidInput · TooLarge · Overloaded: nothing of the request will run.
        """
        route: Route = ticket.route
        self.check_rows(route, ticket.rows)
        columns = read_columns(route, ticket.rows, frames)
        if self.poison:
            refusal = self.find_poison(route, frames, now)
            if refusal is not None:
                raise refusal
        self.check_room(ticket, now)
        if loans and self._borrow(ticket, loans, now):
            return
        join: Join | None = None
        done = 0
        while join is None or done < ticket.rows:
            try:
                slot, rows = self.fill(route, ticket.key, columns, done, ticket.rows - done)
            except BaseException:
                self._unplace(join)
                raise
            if slot is None:
                self._unplace(join)
                raise self.full(ticket)
            if rows == ticket.rows:
                self.batcher.commit(slot, ticket, now)
                return
            if join is None:
                join = Join(ticket)
            part = Ticket(
                join,
                None,
                len(join.parts),
                route,
                rows,
                ticket.deadline,
                ticket.turn,
                ticket.key,
                ticket.account,
            )
            join.parts.append((slot, part))
            self.batcher.commit(slot, part, now)
            done += rows

    def _borrow(self, ticket: Ticket, loans: Sequence[Loan], now: float) -> bool:
        """Commit a request whose rows stay where they lie: the first of a batch, or right behind the others.

        Args:
            ticket: In no slot yet; there is room for it.
            loans: Where its payloads lie, in its own order.
            now: Monotonic seconds.

        Returns:
            Whether it was; else its rows are to be copied.
        """
        route: Route = ticket.route
        if not 0 < ticket.rows <= route.capacity or not _can_lend(route, loans):
            return False
        slot = self.batcher.open_slot(ticket.key, route.capacity)
        if slot is None or ticket.rows > slot.capacity - slot.rows:
            return False
        ordered = [loan for _, loan in sorted(zip(route.order, loans, strict=True))]
        if slot.rows == 0:
            slot.loans = ordered
        elif not slot.loans or not _follow(ordered, slot, route.layout):
            return False
        self.batcher.commit(slot, ticket, now)
        return True

    def open_slot(self, key: int, capacity: int) -> Slot | None:
        """`Batcher.open_slot` for rows that are copied: those in the slot lie there, too, from now on."""
        slot = self.batcher.open_slot(key, capacity)
        if slot is not None and slot.loans:
            self.settle_loans(slot)
        return slot

    def fill(
        self, route: Route, key: int, columns: Sequence[Column | StringColumn], done: int, rows: int
    ) -> tuple[Slot | None, int]:
        """Copy as many rows of a request as fit into one slot, which are then to be committed.

        Args:
            route: Of the request.
            key: Of its route, by priority.
            columns: Of all its rows.
            done: The first row to copy.
            rows: How many there are from there on.

        Returns:
            The slot and how many fitted; None and 0 if the arena is full.

        Raises:
            TooLarge: the first of them does not even fit an empty slot.
        """
        while True:
            slot = self.open_slot(key, route.capacity)
            if slot is None:
                return None, 0
            memory = self.arena.slots[slot.index]
            fit = min(rows, slot.capacity - slot.rows)
            try:
                for column in columns:
                    fit = min(fit, column.fit(memory, slot.rows, done, fit))
                if fit > 0 or rows == 0:
                    for column in columns:
                        column.write(memory, slot.rows, done, fit)
                    return slot, fit
            except BaseException:  # a slot left open with no rows would never be given back
                self.batcher.abandon(slot)
                raise
            if not slot.tickets:
                self.batcher.abandon(slot)
                raise TooLarge(
                    f"row {done} of the request has more string bytes than a slot holds: raise max_rows_bytes"
                )
            self.batcher.close(slot)  # its string heap is full: go on in the next slot

    def place_all(self, parts: Parts, frames: Sequence[memoryview | bytes], now: float) -> Refused:
        """Place the requests of a bundle; see `pool.front.placing`."""
        return place_parts(self, parts, frames, now)

    def read_rows(self, slot: Slot, ticket: Ticket) -> list[bytes]:
        """A copy of a ticket's rows, as payloads in the order of the layout."""
        regions = ticket.route.layout.descriptor.inputs
        if slot.loans:
            return [
                bytes(_rows_of(loan, region, ticket.start, ticket.rows))
                for loan, region in zip(slot.loans, regions, strict=True)
            ]
        return read_rows(regions, self.arena.slots[slot.index], ticket.start, ticket.rows)

    def refill(
        self, slot: Slot, tickets: Sequence[tuple[Ticket, list[bytes]]], aside: Sequence[Ticket]
    ) -> None:
        """Have a slot hold the rows of some of its tickets and no others (`Batcher.refill`).

        Args:
            slot: The front's.
            tickets: Who runs now, with their rows as `read_rows` gave them.
            aside: Who runs later.
        """
        slot.loans = ()
        self.batcher.refill(slot, [ticket for ticket, _ in tickets], aside)
        memory = self.arena.slots[slot.index]
        for ticket, payloads in tickets:
            regions = ticket.route.layout.descriptor.inputs
            write_rows(regions, memory, ticket.start, ticket.rows, payloads)

    def settle_loans(self, slot: Slot) -> None:
        """Copy a batch that lies in memory of its client into its slot."""
        view = self.views[slot.index]
        layout: Layout = slot.tickets[0].route.layout
        for loan, region in zip(slot.loans, layout.descriptor.inputs, strict=True):
            rows = _rows_of(loan, region, 0, slot.rows)
            view[region.offset : region.offset + len(rows)] = rows
        slot.loans = ()

    def can_lend(self, slot: Slot) -> bool:
        """Whether a worker can run a batch where it lies: it needs no rows beside those of the requests."""
        allowed = self.config.allowed_batch_sizes
        return not allowed or slot.rows in allowed

    def _unplace(self, join: Join | None) -> None:
        if join is not None:
            join.withdraw()

    # -- replying -----------------------------------------------------------------------------------

    def reply_for(self, route: Route, places: bytes) -> Reply:
        """How to cut the replies of `route` out of a slot whose run record holds `places`.

        Raises:
            InternalError: the record does not describe outputs within the slot.
            TooLarge: no message can hold what it describes.
        """
        key = (route.layout.number, places, route.outputs)
        reply = self._replies.get(key)
        if reply is None:
            try:
                decoded = decode_outputs(places)
            except ValueError as e:
                raise InternalError(f"run record of model {self.model!r} is not valid: {e}") from None
            ends = [place.offset + place.size_bytes for place in decoded]
            if len(decoded) != len(route.signature.outputs) or max(ends, default=0) > self.arena.slot_bytes:
                raise InternalError(f"run record of model {self.model!r} points outside its slot")
            if len(self._replies) >= _REMEMBERED_MAX:
                self._replies.clear()
            reply = Reply(self.version, route.signature, decoded, route.outputs)
            self._replies[key] = reply
        return reply


def _can_lend(route: Route, loans: Sequence[Loan]) -> bool:
    return route.is_lendable and all(is_aligned(loan.offset) for loan in loans)


def _follow(loans: Sequence[Loan], slot: Slot, layout: Layout) -> bool:
    """Whether rows begin where those of the slot end, of each input."""
    return all(
        loan.region is base.region and loan.offset == base.offset + slot.rows * region.row_bytes
        for loan, base, region in zip(loans, slot.loans, layout.descriptor.inputs, strict=True)
    )


def _rows_of(loan: Loan, region: InputRegion, start: int, rows: int) -> memoryview:
    """Some rows of a batch that lies in memory of its client."""
    at = loan.offset + start * region.row_bytes
    return loan.region.memory[at : at + rows * region.row_bytes]
