"""The client without its sockets: calls to frames, frames to replies. Client process; pure.

Both shells and `pool bench` drive it the same way:

    while (request := core.request(model, inputs)) is None:     # the signature is not known yet
        send core.signature_request(model); core.learn(model, None, reply.document)
    send request.message()                                      # one multipart message
    reply = core.receive(received_frames)                       # reply.id tells whose: request.id

Many requests that are to be sent at once cost a fraction each when they travel together:

    for frames, count in core.bundle(requests):                 # messages for all of them, in order
    for reply in core.receive_all(received_frames):             # a message may hold many replies

What is alike between requests is worked out once: a `Route` per (model, version, signature, outputs)
holds the checked signature and, per row shape, a `Pattern` with the finished msgpack part of the header
(`reply` does the like for replies). A request that repeats an earlier one's shape costs two look-ups and
one copy; its header is made when it is known whether it travels alone. Every cache is bounded and safe to
share between threads (each step is a single dict operation; a lost update is only worked out again).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from types import EllipsisType
from typing import Any

import msgspec
import numpy as np

from pool import wire
from pool.client.conversion import Cast, check_cast
from pool.client.reply import Reply as Reply
from pool.client.reply import ReplyDecoder
from pool.client.route import COPY_BYTES, Frame, Pattern, Route, remember
from pool.errors import (
    DeadlineExceeded,
    InvalidInput,
    ModelNotFound,
    PoolError,
    SignatureNotFound,
    VersionNotFound,
    WireError,
)
from pool.signature import DTYPES, Signature, choose_signature
from pool.wire import Flag, Kind, SignatureMeta

_PREDICT_HEAD = wire.head(Kind.PREDICT)
_PRIORITY_HEADS = tuple(
    wire.head(Kind.PREDICT, Flag.PRIORITY, priority) for priority in range(wire.MAX_PRIORITY + 1)
)
# Of a request that travels alone to that of a bundle of such.
_BUNDLE_HEADS = {
    _PREDICT_HEAD: wire.head(Kind.PREDICT, Flag.BUNDLE),
    **{
        head: wire.head(Kind.PREDICT, Flag.BUNDLE | Flag.PRIORITY, priority)
        for priority, head in enumerate(_PRIORITY_HEADS)
    },
}
_TIMELINE_HEADS = {
    _PREDICT_HEAD: wire.head(Kind.PREDICT, Flag.TIMELINE),
    **{
        head: wire.head(Kind.PREDICT, Flag.TIMELINE | Flag.PRIORITY, priority)
        for priority, head in enumerate(_PRIORITY_HEADS)
    },
}
_CANCEL_HEAD = wire.head(Kind.CANCEL)
_NO_LIMIT = 0xFFFF_FFFF  # of the wire's 32-bit milliseconds

_ALONE = Pattern(b"", None, 0)  # no request's

_pack, _pack_part = wire.HEAD.pack, wire.PART.pack
_ndarray = np.ndarray  # one look-up instead of two, for each request


class Request(msgspec.Struct, gc=False):
    """One request, checked and encoded.

    Attributes:
        id: By which its reply is known.
        head: The first eight bytes of its header; the same object for all requests with the same.
        millis: Its header's timeout.
        rows: Its header's rows.
        pattern: What it shares with others, the rest of its header among it.
        tensors: Its payloads.
    """

    id: int
    head: bytes
    millis: int
    rows: int
    pattern: Pattern
    tensors: list[Frame]

    def message(self) -> list[Frame]:
        """The frames of its message, if it travels alone."""
        return [_pack(self.head, self.id, self.millis, self.rows) + self.pattern.meta, *self.tensors]


class ModelInfo(msgspec.Struct, frozen=True):
    """What a server tells about one model (`docs/wire.md` 3.2).

    Attributes:
        model: Its name.
        version: The version served; a number of the model's directory.
        signatures: Every named signature.
        max_rows: Most rows one request may have, or None for no limit of its own.
        max_frame_bytes: Most bytes of one input tensor, or None for no limit.
    """

    model: str
    version: int
    signatures: tuple[Signature, ...]
    max_rows: int | None = None
    max_frame_bytes: int | None = None

    def signature(self, name: str | None = None) -> Signature:
        """The signature of that name; None for the default.

        Raises:
            SignatureNotFound: there is none.
        """
        return choose_signature(self.signatures, name)


class ClientCore(ReplyDecoder):
    """Encodes requests, remembers signatures, and decodes replies (its base class).

    Args:
        cast: Which casts of input arrays are made unasked; see `conversion.to_array`.

    Raises:
        InvalidInput: `cast` is not known.
    """

    def __init__(self, *, cast: str = "safe") -> None:
        super().__init__()
        self._cast: Cast = check_cast(cast)
        self._ids = itertools.count(1)
        self._infos: dict[tuple[str, int | None], ModelInfo] = {}
        self._routes: dict[tuple[str, int | None, str | None, tuple[str, ...] | None], Route] = {}

    # -- requests ----------------------------------------------------------------------------------

    def request(
        self,
        model: str,
        inputs: Any,
        *,
        version: int | None = None,
        signature: str | None = None,
        outputs: Sequence[str] | None = None,
        timeout_ms: int = 0,
        cast: str | None = None,
        priority: int | None = None,
        timeline: bool = False,
    ) -> Request | None:
        """Check a prediction and encode it.

        Args:
            model: Name of the model.
            inputs: Name -> array of shape [rows, ...], or the bare array if the model has one input.
            version: None for the one the server prefers.
            signature: None for the default one.
            outputs: Names of the outputs wanted, in the order wanted; None for all.
            timeout_ms: What remains of the caller's patience, for the server; 0 for no limit.
            cast: Overrides the core's own for this request.
            priority: 0 (first) to 3; None for what the server gives the model.
            timeline: Whether the reply is to tell its time line.

        Returns:
            The request; None if the signature has to be learnt first. Tensors over `COPY_BYTES` alias
            the caller's arrays.

        Raises:
            InvalidInput: a name, dtype, rank, shape, row count or the priority is wrong; TooLarge if too
                many rows.
            SignatureNotFound: the model has no such signature.
            After either, the model's signature is forgotten, in case it was replaced on the server.
        """
        if outputs is not None and type(outputs) is not tuple:
            outputs = output_names(outputs)
        route = self._routes.get((model, version, signature, outputs))
        if route is None:
            route = self.route(model, version, signature, outputs)
            if route is None:
                return None
        array = inputs
        if type(array) is dict and len(array) == 1:
            array = array.get(route.sole_name)
        if type(array) is _ndarray and array.dtype is route.sole_dtype:
            shape = array.shape
            pattern = route.patterns.get(shape[1:])
            if pattern is not None and shape and shape[0] <= route.max_rows and array.nbytes <= COPY_BYTES:
                head = _PREDICT_HEAD if priority is None else _PRIORITY_HEADS[check_priority(priority)]
                if timeline:
                    head = _TIMELINE_HEADS[head]
                return Request(next(self._ids), head, timeout_ms, shape[0], pattern, [array.tobytes()])
        allowed = self._cast if cast is None else check_cast(cast)
        try:
            rows, pattern, tensors = route.encode(inputs, allowed)
        except InvalidInput:
            self.forget(model)
            raise
        head = _PREDICT_HEAD if priority is None else _PRIORITY_HEADS[check_priority(priority)]
        if timeline:
            head = _TIMELINE_HEADS[head]
        return Request(next(self._ids), head, timeout_ms, rows, pattern, tensors)

    def bundle(self, requests: Sequence[Request]) -> Iterator[tuple[list[Frame], int]]:
        """Messages that carry these requests, in order: neighbours that are alike travel together.

        Args:
            requests: As the core made them.

        Yields:
            The frames of one message (`docs/wire.md` 3.9 if it carries several), and how many of the
            requests it carries.
        """
        run: list[Request] = []  # alike so far, and few enough
        rows = 0
        head, pattern = b"", _ALONE
        for request in requests:
            added = request.rows
            rows += added
            if (
                request.pattern is not pattern
                or request.head is not head
                or rows > pattern.bundle_rows
                or added > pattern.most_rows
                or len(run) == wire.MAX_PARTS
            ):
                if run:
                    yield _message(run), len(run)
                run = []
                rows = added
                head = request.head
                can_be_joined = added <= request.pattern.most_rows and head in _BUNDLE_HEADS
                pattern = request.pattern if can_be_joined else _ALONE
            run.append(request)
        if run:
            yield _message(run), len(run)

    def signature_request(self, model: str, version: int | None = None) -> Request:
        """Ask what a model takes and gives; its INFO reply is for `learn`.

        Raises:
            InvalidInput: `model` is not a string or `version` not a number from 0.
        """
        return self._plain_request(Kind.SIGNATURE, _model_meta(model, version))

    def models_request(self) -> Request:
        """Ask which models are served."""
        return self._plain_request(Kind.MODELS)

    def status_request(self) -> Request:
        """Ask for the server's status document."""
        return self._plain_request(Kind.STATUS)

    def live_request(self) -> Request:
        """Ask whether the server answers."""
        return self._plain_request(Kind.LIVE)

    def ready_request(self, model: str | None = None) -> Request:
        """Ask whether a model, or with None every model, can answer predictions."""
        return self._plain_request(Kind.READY, _model_meta(model or "", None))

    def cancel(self, id_: int) -> list[Frame]:
        """The message that withdraws a request that was sent (`docs/wire.md` 3.10); it has no reply."""
        return [_pack(_CANCEL_HEAD, id_, 0, 0)]

    def _plain_request(self, kind: Kind, meta: bytes = b"") -> Request:
        return Request(next(self._ids), wire.head(kind), 0, 0, Pattern(meta, None, 0), [])

    # -- signatures --------------------------------------------------------------------------------

    def learn(self, model: str, version: int | None, document: dict[str, Any]) -> ModelInfo:
        """Remember the answer to a `signature_request` and give it in readable form.

        Args:
            model: As asked for.
            version: As asked for.
            document: Of the reply.

        Raises:
            WireError: the document is not one of section 3.2.
        """
        try:
            info = msgspec.convert(document, ModelInfo)
        except msgspec.ValidationError as e:
            raise WireError(f"the signatures of model {model!r} are not valid: {e}") from None
        for signature in info.signatures:
            for spec in (*signature.inputs, *signature.outputs):
                if spec.dtype not in DTYPES:
                    raise WireError(f"model {model!r}: tensor {spec.name!r} has unknown dtype {spec.dtype!r}")
        self.forget(model, version)
        remember(self._infos, (model, version), info)
        return info

    def forget(self, model: str, version: int | EllipsisType | None = ...) -> None:
        """Drop what is known about a model, in that version as asked for, or in all."""
        for asked in [key for key in list(self._infos) if key[0] == model and version in (..., key[1])]:
            self._infos.pop(asked, None)
        for key in [key for key in list(self._routes) if key[0] == model and version in (..., key[1])]:
            self._routes.pop(key, None)

    def note_refusal(self, model: str, error: PoolError) -> None:
        """Take in the error a prediction was answered with: some say that the signature known is old."""
        if isinstance(error, (InvalidInput, ModelNotFound, VersionNotFound, SignatureNotFound)):
            self.forget(model)

    def route(
        self, model: str, version: int | None, signature: str | None, outputs: tuple[str, ...] | None
    ) -> Route | None:
        """How such calls are checked and encoded; None if the model's signature has to be learnt first.

        Raises:
            InvalidInput: the outputs are not the signature's; SignatureNotFound: there is no such signature.
        """
        info = self._infos.get((model, version))
        if info is None:
            return None
        try:
            route = Route(
                model, version, info.signature(signature), outputs, info.max_rows, info.max_frame_bytes
            )
        except (InvalidInput, SignatureNotFound):
            self.forget(model)
            raise
        remember(self._routes, (model, version, signature, outputs), route)
        return route


def output_names(outputs: Sequence[str]) -> tuple[str, ...]:
    """Names of outputs, in a form that caches can be looked up by.

    Raises:
        InvalidInput: it is one name, not several.
    """
    if isinstance(outputs, str):
        raise InvalidInput(f"outputs is the str {outputs!r}; wanted a list of names")
    return tuple(outputs)


def check_priority(priority: int) -> int:
    """The priority, if it is one.

    Raises:
        InvalidInput: it is not.
    """
    if not isinstance(priority, int) or not 0 <= priority <= wire.MAX_PRIORITY:
        raise InvalidInput(
            f"priority is {priority!r}; wanted a number from 0 (first) to {wire.MAX_PRIORITY}, or None"
        )
    return priority


def _message(requests: list[Request]) -> list[Frame]:
    """One message for requests that share head and pattern."""
    first = requests[0]
    if len(requests) == 1:
        return first.message()
    table = b"".join([_pack_part(request.id, request.millis, request.rows) for request in requests])
    rows = sum([request.rows for request in requests])
    tensors = [
        b"".join([request.tensors[column] for request in requests]) for column in range(len(first.tensors))
    ]
    return [_pack(_BUNDLE_HEADS[first.head], 0, 0, rows) + first.pattern.meta, table, *tensors]


def check_timeout(timeout: float) -> float:
    """The timeout, if any of it is left.

    Raises:
        DeadlineExceeded: it is not above 0 seconds, as when what remains of a longer one is passed on.
    """
    if not timeout > 0:
        raise DeadlineExceeded(f"timeout is {timeout:g} s; wanted more than 0 s")
    return timeout


def timeout_to_ms(timeout: float) -> int:
    """Seconds as the wire carries them: whole milliseconds, at least 1; 0 for infinity."""
    return 0 if timeout == math.inf else max(1, min(int(timeout * 1000), _NO_LIMIT))


def check_model(model: str, version: int | None) -> None:
    """Refuse what cannot name a model.

    Raises:
        InvalidInput: the name is no string, or the version no number from 0.
    """
    if not isinstance(model, str):
        raise InvalidInput(f"model is {model!r}; wanted its name, a str")
    if version is not None and (not isinstance(version, int) or not 0 <= version < 1 << 63):
        raise InvalidInput(f"version is {version!r}; wanted a number from 0, or None")


def _model_meta(model: str, version: int | None) -> bytes:
    check_model(model, version)
    return wire.encode_meta(SignatureMeta(model, version))
