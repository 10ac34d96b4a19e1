"""Replies of a server, from frames to arrays and documents. Client process; pure.

A `Plan` for each msgpack part of a reply and row count holds the arrays to make, so that a reply like an
earlier one costs a look-up and one copy for each output.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
import numpy as np

from pool import wire
from pool.client.conversion import Array
from pool.client.route import COPY_BYTES, Frame, remember
from pool.errors import PoolError, WireError
from pool.signature import numpy_dtype
from pool.wire import Flag, Kind, ResultMeta, TimedResultMeta, TimelineMeta

_RESULT_HEAD = wire.head(Kind.RESULT)
_RESULT_BUNDLE_HEAD = wire.head(Kind.RESULT, Flag.BUNDLE)
_ERROR_BUNDLE_HEAD = wire.head(Kind.ERROR, Flag.BUNDLE)
_ID = struct.Struct("<8xQ")
_ROWS_OFFSET = 20  # from here a header is the same for every reply with this meta and row count

# Outputs of a bundle of replies up to here are handed out as slices of one array. A caller that keeps a
# single one of them keeps that array; beyond this size each gets a copy of its own.
SLICED_BYTES = 65_536

_unpack_id = _ID.unpack_from


class Reply(msgspec.Struct):
    """One decoded reply; exactly one of outputs, document and error is set.

    Attributes:
        id: Of the request it answers.
        outputs: RESULT: name to array. The arrays are the caller's own and writable.
        document: INFO: the document.
        error: ERROR, or what is wrong with a reply that cannot be decoded.
        timeline: The server's part of the time line, where a RESULT has it.
    """

    id: int
    outputs: dict[str, Array] | None = None
    document: dict[str, Any] | None = None
    error: PoolError | None = None
    timeline: TimelineMeta | None = None

    def take_outputs(self) -> dict[str, Array]:
        """The arrays of a prediction.

        Raises:
            PoolError: the reply's error; WireError if it is no answer to a prediction.
        """
        if self.outputs is None:
            raise self.error or WireError("the server answered PREDICT with INFO; wanted RESULT")
        return self.outputs

    def take_document(self) -> dict[str, Any]:
        """The document asked for.

        Raises:
            PoolError: the reply's error; WireError if it is no answer to a question.
        """
        if self.document is None:
            raise self.error or WireError("the server answered a question with RESULT; wanted INFO")
        return self.document


# One output array of a plan: name, numpy dtype (None for string), whole shape, payload bytes.
_Output = tuple[str, "np.dtype[Any] | None", tuple[int, ...], int]
Plan = tuple[_Output, ...]


class ReplyDecoder:
    """Decodes messages of the server; remembers how for those that repeat."""

    def __init__(self) -> None:
        self._plans: dict[bytes, Plan] = {}

    def receive(self, frames: Sequence[Frame]) -> Reply:
        """Decode one message from the server.

        Args:
            frames: The header as `bytes`, then the tensors. Payloads over `COPY_BYTES` that are
                writable are aliased, not copied.

        Returns:
            The reply. What is wrong with its body is its `error`, a `WireError`.

        Raises:
            WireError: the header itself cannot be read, so nobody can be told; `ProtocolVersionError`
                if it is of another protocol version. The connection is of no more use.
        """
        header: bytes = frames[0]
        if header[:8] == _RESULT_HEAD:
            plan = self._plans.get(header[_ROWS_OFFSET:])
            if plan is not None:
                try:
                    return Reply(_unpack_id(header)[0], decode_outputs(plan, frames))
                except WireError as e:
                    return Reply(_unpack_id(header)[0], error=e)
        decoded = wire.decode_header(header)
        if decoded.kind < Kind.RESULT:
            raise WireError(f"the server sent a {decoded.kind.name}, which is a request; wanted a reply")
        try:
            if decoded.kind is Kind.RESULT:
                plan = make_plan(decoded)
                if decoded.flags == 0:
                    remember(self._plans, header[_ROWS_OFFSET:], plan)
                timeline = None
                if decoded.flags & Flag.TIMELINE:
                    timeline = wire.decode_meta(TimedResultMeta, decoded.meta).timeline
                return Reply(decoded.id, decode_outputs(plan, frames), timeline=timeline)
            if len(frames) != 1:
                raise WireError(f"{decoded.kind.name} has {len(frames) - 1} tensor frames; wanted none")
            if decoded.kind is Kind.INFO:
                return Reply(decoded.id, document=wire.decode_info(decoded.meta))
            return Reply(decoded.id, error=wire.decode_error(decoded))
        except WireError as e:
            return Reply(decoded.id, error=e)

    def receive_all(self, frames: Sequence[Frame]) -> Sequence[Reply]:
        """Decode one message that may hold several replies (`docs/wire.md` 3.9).

        Args:
            frames: As for `receive`.

        Returns:
            The replies. Arrays of those that came together may lie side by side in memory.

        Raises:
            WireError: as for `receive`, or the table that says whose the replies are cannot be read.
        """
        header: bytes = frames[0]
        head = header[: wire.HEAD_BYTES]
        if head == _ERROR_BUNDLE_HEAD and len(frames) > 1:
            # An exception each: whoever raises one writes its traceback into it.
            ids, _, _ = wire.split_parts(frames[1], 0)
            return [Reply(id_, error=self.receive(frames[:1]).error) for id_ in ids]
        if head != _RESULT_BUNDLE_HEAD or len(header) < wire.FIXED_BYTES:
            return (self.receive(frames),)
        decoded_rows = wire.HEAD.unpack_from(header)[3]
        ids, _, rows = wire.split_parts(frames[1] if len(frames) > 1 else b"", decoded_rows)
        try:
            plan = self._plans.get(header[_ROWS_OFFSET:])
            if plan is None:
                plan = make_plan(wire.decode_header(header))
                remember(self._plans, header[_ROWS_OFFSET:], plan)
            outputs = decode_outputs(plan, [header, *frames[2:]])
        except WireError as e:
            return [Reply(id_, error=e) for id_ in ids]
        is_sliced = sum(array.nbytes for array in outputs.values()) <= SLICED_BYTES
        shares: list[dict[str, Array]] = [{} for _ in ids]
        for name, array in outputs.items():
            for share, piece in zip(shares, cut(array, rows), strict=True):
                share[name] = piece if is_sliced else piece.copy()
        return list(map(Reply, ids, shares))


def read_flag(document: dict[str, Any], flag: str) -> bool:
    """One yes or no of a LIVE or READY reply (sections 3.4, 3.5).

    Raises:
        WireError: it is not there.
    """
    value = document.get(flag)
    if not isinstance(value, bool):
        raise WireError(f"the server's {flag!r} is {value!r}; wanted true or false")
    return value


def read_models(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The models of a MODELS reply (section 3.3).

    Raises:
        WireError: they are not there.
    """
    models = document.get("models")
    if not isinstance(models, dict):
        raise WireError(f"the server's 'models' is {models!r}; wanted a map")
    return models


# -- replies: plans and arrays ---------------------------------------------------------------------


def make_plan(header: wire.Header) -> Plan:
    """The arrays to make of every reply with this meta, flags and row count.

    Raises:
        WireError: the meta is not that of a RESULT.
    """
    tensors = wire.decode_meta(ResultMeta, header.meta).outputs
    whole = bool(header.flags & Flag.WHOLE)
    plan: list[_Output] = []
    for tensor in tensors:
        shape = tensor.shape if whole else (header.rows, *tensor.shape)
        if tensor.dtype == "string":
            plan.append((tensor.name, None, shape, 0))
        else:
            size = wire.tensor_bytes(tensor.dtype, shape)
            plan.append((tensor.name, numpy_dtype(tensor.dtype), shape, size))
    return tuple(plan)


def cut(array: Array, rows: Sequence[int]) -> Iterable[Array]:
    """Views of so many rows each, one behind the other, which are all rows of the array."""
    if rows.count(rows[0]) == len(rows):  # to step through an axis costs half of what slices do
        return array.reshape(len(rows), rows[0], *array.shape[1:])
    ends = list(itertools.accumulate(rows))
    return [array[end - count : end] for end, count in zip(ends, rows, strict=True)]


def decode_outputs(plan: Plan, frames: Sequence[Frame]) -> dict[str, Array]:
    """The arrays of a reply; `frames` as for `ReplyDecoder.receive`, its first is passed over.

    Raises:
        WireError: the frames are not what the plan says.
    """
    if len(frames) != len(plan) + 1:
        raise WireError(f"RESULT has {len(frames) - 1} tensor frames; wanted {len(plan)}")
    outputs: dict[str, Array] = {}
    for position, (name, dtype, shape, size) in enumerate(plan, 1):
        payload = frames[position]
        if dtype is None:
            outputs[name] = wire.decode_tensor(payload, "string", shape)
            continue
        got = len(payload)
        if got != size:
            raise WireError(f"output {name!r}, {dtype} {list(shape)}, has {got} bytes; wanted {size}")
        # A bytearray is the array's own, writable and aligned. A small message as received is none of
        # these: it lies anywhere in a receive buffer, which the array would keep alive.
        if size <= COPY_BYTES or type(payload) is bytes:
            payload = bytearray(payload)
        try:
            outputs[name] = np.ndarray(shape, dtype, payload)
        except ValueError as e:  # empty, but with other axes so long that numpy has no such shape
            raise WireError(f"output {name!r}, {dtype} {list(shape)}: {e}") from None
    return outputs
