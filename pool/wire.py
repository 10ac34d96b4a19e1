"""The messages between client and front: bytes to values and back. Pure; used by both processes.

`docs/wire.md` is the specification; section numbers below refer to it. A message is a header frame
followed by one frame per tensor. The header is a fixed part, which differs from request to request,
and a msgpack part (*meta*), which is byte-identical for all requests of a kind, so that either end
may look it up instead of decoding it:

     0       2         3      4          5          6       8        16         20      24
     +-------+---------+------+----------+----------+-------+--------+----------+-------+------
     | magic | version | kind | priority | reserved | flags |   id   |  millis  | rows  | meta…
     | "pl"  |   u8    |  u8  |    u8    |   0, u8  |  u16  |  u64   |   u32    |  u32  | msgpack
     +-------+---------+------+----------+----------+-------+--------+----------+-------+------
                              (integers little-endian)

Nothing here opens a socket, reads a clock or imports zmq.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Sequence
from typing import Any, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from pool.errors import PoolError, ProtocolVersionError, WireError, error_from_code
from pool.signature import DTYPES, ITEM_BYTES, numpy_dtype, row_items

MAGIC = b"pl"
VERSION = 1

FIXED = struct.Struct("<2sBBBBHQII")
FIXED_BYTES = FIXED.size  # 24

# The same 24 bytes for hot paths: what does not differ between requests of a kind is one prebuilt `head()`.
HEAD = struct.Struct("<8sQII")
HEAD_BYTES = 8

# What differs from request to request: id, millis, rows. Bytes 8 to 24 of a header, and an entry of a
# bundle's table (section 3.9).
PART = struct.Struct("<QII")
PART_BYTES = PART.size  # 16
MAX_PARTS = 4096  # 2.4: requests in a bundle

# A tensor frame of a request with `Flag.REGION` (section 7.3): token, offset and size of the tensor.
REFERENCE = struct.Struct("<16sQQ")

# What the two say on the socket beside an ipc endpoint (section 7.2). The client: magic, version, size of the
# region whose descriptor comes along. The server: magic, version, token, most bytes of a region; or an ERROR.
# The magic says who writes: the client its tensors, or the server its answers (a *room*, section 7.4).
REGION_OFFER = struct.Struct("<4sIQ")
REGION_GRANT = struct.Struct("<4sI16sQ")
REGION_MAGIC = b"plrg"
ROOM_MAGIC = b"plro"
REGION_VERSION = 1
TOKEN_BYTES = 16

MAX_HEADER_BYTES = 65_536  # 2.4: a header is names and shapes; anything longer is not one
MAX_RESULT_META_BYTES = MAX_HEADER_BYTES - FIXED_BYTES - 73  # of a reply: it has room for a time line
MAX_INFO_BYTES = 16_777_216  # 2.4: but an INFO header is a whole document
MAX_TENSORS = 256  # 2.4: per message
MAX_RANK = 63  # 2.4: of a row; numpy arrays have 64 axes at most, one of which is the row axis
MAX_PRIORITY = 3
MAX_MESSAGE_CHARS = 8_192  # 3.7: an error's sentence; at most 32 KiB of UTF-8, so it always fits a header


class Kind(enum.IntEnum):
    """What a message is (section 3). Requests are below 0x80, replies above."""

    PREDICT = 0x01
    SIGNATURE = 0x02
    MODELS = 0x03
    STATUS = 0x04
    LIVE = 0x05
    READY = 0x06
    CANCEL = 0x07
    RESULT = 0x81
    ERROR = 0x82
    INFO = 0x83


class Flag(enum.IntFlag):
    """Bits of the header's `flags` (section 2.3)."""

    WHOLE = 0x0001  # RESULT: the shapes are whole tensors, not rows of a batch
    BUNDLE = 0x0002  # PREDICT, RESULT, ERROR: the message stands for several (section 3.9)
    PRIORITY = 0x0004  # PREDICT: the priority byte is meant; without it the model's default holds
    REGION = 0x0008  # PREDICT, RESULT: the tensor frames say where in a region the tensors lie (section 7)
    TIMELINE = 0x0010  # PREDICT, RESULT: the reply's meta has the time line (section 3.11)
    ROOM = 0x0020  # PREDICT: one more frame says where in a room the answer may be put (section 7.4)


def head(kind: Kind, flags: int = 0, priority: int = 0) -> bytes:
    """The first eight header bytes, for `HEAD.pack` and for comparing."""
    return FIXED.pack(MAGIC, VERSION, kind, priority, 0, flags, 0, 0, 0)[:HEAD_BYTES]


class Header(msgspec.Struct, frozen=True):
    """A decoded header frame, meta still in bytes.

    Attributes:
        kind: What the message is.
        id: Chosen by the client; its reply carries the same.
        millis: PREDICT: remaining timeout in ms, 0 for none. ERROR: `retry_after_ms`, 0 for none.
        rows: Length of axis 0 of every tensor that follows.
        priority: 0 (first) to 3; meant only with `Flag.PRIORITY`.
        flags: Bits of `Flag`.
        meta: The msgpack part.
    """

    kind: Kind
    id: int
    meta: bytes
    millis: int = 0
    rows: int = 0
    priority: int = 0
    flags: int = 0


class TensorMeta(msgspec.Struct, frozen=True, array_like=True):
    """Name, dtype and shape of the tensor frame at the same position (section 3.1).

    `shape` is that of one row, without the row axis; of the whole tensor where the signature is not
    batched.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]


class PredictMeta(msgspec.Struct, frozen=True, array_like=True):
    """Meta of PREDICT (section 3.1)."""

    model: str
    version: int | None
    signature: str | None
    inputs: tuple[TensorMeta, ...]
    outputs: tuple[str, ...] | None = None


class SignatureMeta(msgspec.Struct, frozen=True, array_like=True):
    """Meta of SIGNATURE (section 3.2) and READY (section 3.5; empty model = all)."""

    model: str
    version: int | None = None


class TimelineMeta(msgspec.Struct, frozen=True, array_like=True):
    """The server's part of a time line (section 3.11).

    Attributes:
        received_ns: The server's monotonic clock when `receive` began.
        receive_ns: Until its rows lay in their slots.
        queue_ns: Until its batch was given to a worker.
        run_ns: Until the worker's answer was heard.
        reply_ns: Until its answer was about to be sent.
        model_ns: The part of `run_ns` in which the worker ran the batch.
        batch_rows: Rows of its batch, without padding; 0 if it was split over several.
        worker: Which ran it; -1 if several did.
    """

    received_ns: int
    receive_ns: int
    queue_ns: int
    run_ns: int
    reply_ns: int
    model_ns: int
    batch_rows: int
    worker: int


class ResultMeta(msgspec.Struct, frozen=True, array_like=True):
    """Meta of RESULT (section 3.6)."""

    version: int
    outputs: tuple[TensorMeta, ...]


class TimedResultMeta(msgspec.Struct, frozen=True, array_like=True):
    """Meta of RESULT with the flag TIMELINE (section 3.11)."""

    version: int
    outputs: tuple[TensorMeta, ...]
    timeline: TimelineMeta


class ErrorMeta(msgspec.Struct, frozen=True, array_like=True):
    """Meta of ERROR (section 3.7)."""

    code: str
    message: str


Meta = TypeVar("Meta", PredictMeta, SignatureMeta, ResultMeta, TimedResultMeta, ErrorMeta)

_encode = msgspec.msgpack.Encoder().encode
_decoders: dict[type, Any] = {
    kind: msgspec.msgpack.Decoder(kind)
    for kind in (PredictMeta, SignatureMeta, ResultMeta, TimedResultMeta, ErrorMeta)
}
_decode_any = msgspec.msgpack.Decoder().decode


# -- headers ---------------------------------------------------------------------------------------


def encode_header(header: Header) -> bytes:
    """The header frame's bytes."""
    return (
        FIXED.pack(
            MAGIC,
            VERSION,
            header.kind,
            header.priority,
            0,
            header.flags,
            header.id,
            header.millis,
            header.rows,
        )
        + header.meta
    )


def decode_header(frame: bytes) -> Header:
    """Decode any header frame, checking section 2.

    Raises:
        ProtocolVersionError: it is pool's, but of a version this end does not speak.
        WireError: it is not a header.
    """
    size = len(frame)
    if size < FIXED_BYTES:
        raise WireError(f"header frame has {size} bytes; wanted at least {FIXED_BYTES}")
    magic, version, kind, priority, reserved, flags, id_, millis, rows = FIXED.unpack_from(frame)
    if magic != MAGIC:
        raise WireError(f"header starts with {magic!r}; wanted {MAGIC!r}")
    if version != VERSION:
        raise ProtocolVersionError(f"protocol version {version}; wanted {VERSION}")
    try:
        known = Kind(kind)
    except ValueError:
        raise WireError(f"message kind 0x{kind:02x} is not known") from None
    limit = MAX_INFO_BYTES if known is Kind.INFO else MAX_HEADER_BYTES
    if size > limit:
        raise WireError(f"{known.name} header frame has {size} bytes; wanted at most {limit}")
    if priority > MAX_PRIORITY:
        raise WireError(f"priority {priority}; wanted 0 to {MAX_PRIORITY}")
    if priority and not flags & Flag.PRIORITY:
        raise WireError(f"priority {priority} without the flag PRIORITY; wanted 0")
    if reserved:
        raise WireError(f"reserved header byte is {reserved}; wanted 0")
    return Header(known, id_, frame[FIXED_BYTES:], millis, rows, priority, flags)


def peek_id(frame: bytes) -> int | None:
    """The request id of a header that failed to decode, if enough of it is there to answer."""
    if len(frame) < FIXED_BYTES or frame[:2] != MAGIC:
        return None
    id_: int = FIXED.unpack_from(frame)[6]
    return id_


# -- bundles ---------------------------------------------------------------------------------------


def split_parts(table: memoryview | bytes, rows: int) -> tuple[list[int], list[int], list[int]]:
    """Ids, millis and rows of a bundle's parts: by column, which costs a third of an object for each.

    Args:
        table: The frame after the header.
        rows: Of the whole bundle, as its header says.

    Raises:
        WireError: no table, too many parts, or their rows do not add up.
    """
    size = len(table)
    if size == 0 or size % PART_BYTES or size > MAX_PARTS * PART_BYTES:
        raise WireError(
            f"table of a bundle has {size} bytes; wanted 1 to {MAX_PARTS} entries of {PART_BYTES} bytes"
        )
    cells = memoryview(table)
    words = cells.cast("I")  # little-endian, as every machine that TensorFlow runs on
    counts = words[3::4].tolist()
    total = sum(counts)
    if total != rows:
        raise WireError(f"the parts of a bundle have {total} rows; its header says {rows}")
    return cells.cast("Q")[::2].tolist(), words[2::4].tolist(), counts


def without_millis(table: memoryview | bytes) -> bytes:
    """A table that was split, as replies have it."""
    copy = bytearray(table)
    memoryview(copy).cast("I")[2::4] = memoryview(bytes(len(copy) // 4)).cast("I")
    return bytes(copy)


def encode_ids(ids: Sequence[int]) -> bytes:
    """The table of a bundle of ERRORs."""
    pack = PART.pack
    return b"".join([pack(id_, 0, 0) for id_ in ids])


# -- meta ------------------------------------------------------------------------------------------


def encode_meta(meta: PredictMeta | SignatureMeta | ResultMeta | TimedResultMeta | ErrorMeta) -> bytes:
    """The msgpack part of a header."""
    return _encode(meta)


def decode_meta(kind: type[Meta], data: bytes) -> Meta:
    """Decode a msgpack part and check what msgpack alone cannot.

    Raises:
        WireError: not msgpack, not of that form, an unknown dtype, too many tensors, or an axis
            that is negative or makes the tensor larger than any memory.
    """
    try:
        meta: Meta = _decoders[kind].decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as e:
        raise WireError(f"{kind.__name__} is not valid: {e}") from None
    if isinstance(meta, PredictMeta):
        _check_tensors(meta.inputs)
    elif isinstance(meta, (ResultMeta, TimedResultMeta)):
        _check_tensors(meta.outputs)
    return meta


def _check_tensors(tensors: tuple[TensorMeta, ...]) -> None:
    if len(tensors) > MAX_TENSORS:
        raise WireError(f"{len(tensors)} tensors; wanted at most {MAX_TENSORS}")
    seen = set()
    for t in tensors:
        if t.name in seen:
            raise WireError(f"tensor {t.name!r} appears twice")
        seen.add(t.name)
        if t.dtype not in DTYPES:
            raise WireError(f"tensor {t.name!r} has dtype {t.dtype!r}; wanted one of {', '.join(DTYPES)}")
        if len(t.shape) > MAX_RANK:
            raise WireError(f"tensor {t.name!r} has rank {len(t.shape)}; wanted at most {MAX_RANK}")
        if any(axis < 0 for axis in t.shape):
            raise WireError(f"tensor {t.name!r} has shape {list(t.shape)}; wanted axes of 0 or more")
        # An axis of 0 empties the tensor, but does not excuse its other axes: numpy refuses those too.
        if row_items(tuple(axis or 1 for axis in t.shape)) >= 1 << 47:  # no address space holds it
            raise WireError(f"tensor {t.name!r} of shape {list(t.shape)} is larger than any memory")


_TWO_ELEMENTS, _THREE_ELEMENTS = b"\x92", b"\x93"  # how msgpack begins an array of so many


def add_timeline(meta: bytes, timeline: TimelineMeta) -> bytes:
    """The meta of a RESULT with a time line behind it (section 3.11).

    Args:
        meta: As `encode_meta` gave it for a `ResultMeta`.
        timeline: To add.
    """
    assert meta[:1] == _TWO_ELEMENTS, "version and outputs"
    return _THREE_ELEMENTS + meta[1:] + _encode(timeline)


def encode_info(document: dict[str, Any]) -> bytes:
    """The meta of an INFO reply: any msgpack map (section 3.8)."""
    return _encode(document)


def decode_info(data: bytes) -> dict[str, Any]:
    """The document of an INFO reply.

    Raises:
        WireError: it is not a msgpack map.
    """
    try:
        document = _decode_any(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as e:
        raise WireError(f"INFO is not valid: {e}") from None
    if not isinstance(document, dict):
        raise WireError(f"INFO holds a {type(document).__name__}; wanted a map")
    if not all(isinstance(key, str) for key in document):
        raise WireError("INFO has a key that is not a string")
    return document


def encode_error(id_: int, error: PoolError) -> bytes:
    """The one frame of an ERROR reply (section 3.7).

    A sentence that is too long (a model's own can be) is cut; what is not Unicode in it is replaced.
    """
    meta = encode_error_meta(error)
    return encode_header(Header(Kind.ERROR, id_, meta, millis=error.retry_after_ms or 0))


def encode_error_meta(error: PoolError) -> bytes:
    """The msgpack part of an ERROR."""
    message = error.message
    if len(message) > MAX_MESSAGE_CHARS:
        message = message[: MAX_MESSAGE_CHARS - 1] + "…"
    return _encode(ErrorMeta(error.code, message.encode("utf-8", "replace").decode()))


def decode_error(header: Header) -> PoolError:
    """The exception an ERROR reply stands for."""
    meta = decode_meta(ErrorMeta, header.meta)
    return error_from_code(meta.code, meta.message, retry_after_ms=header.millis or None)


# -- tensors ---------------------------------------------------------------------------------------


def encode_tensor(array: npt.NDArray[Any], dtype: str) -> memoryview | bytes:
    """The payload frame of one tensor (section 4); no copy where the array is already contiguous.

    Args:
        array: Any shape; items already of `dtype` (for `string`: an object array of `bytes`).
        dtype: One of `DTYPES`.
    """
    if dtype == "string":
        return encode_strings(array.reshape(-1).tolist())
    contiguous = np.ascontiguousarray(array)
    if contiguous.dtype.byteorder == ">":
        contiguous = contiguous.astype(contiguous.dtype.newbyteorder("<"))
    if contiguous.size == 0:
        return b""
    return contiguous.reshape(-1).view(np.uint8).data


def encode_strings(items: Sequence[bytes]) -> bytes:
    """Payload of a string tensor (section 4.2): `n + 1` uint64 offsets, then the heap."""
    offsets = np.zeros(len(items) + 1, "<u8")
    np.cumsum([len(item) for item in items], out=offsets[1:])
    return offsets.tobytes() + b"".join(items)


def split_strings(payload: memoryview | bytes, items: int) -> tuple[npt.NDArray[np.uint64], memoryview]:
    """Check a string payload and give its offsets (length `items + 1`) and heap, both without a copy.

    Raises:
        WireError: too short, or the offsets do not start at 0, decrease, or miss the heap's end.
    """
    view = memoryview(payload)
    head = 8 * (items + 1)
    if len(view) < head:
        raise WireError(f"string tensor has {len(view)} bytes; wanted at least {head} for {items} items")
    offsets = np.frombuffer(view[:head], "<u8")
    heap = view[head:]
    if offsets[0] != 0 or offsets[-1] != len(heap) or bool(np.any(offsets[1:] < offsets[:-1])):
        raise WireError(
            f"string tensor's offsets must rise from 0 to its heap's {len(heap)} bytes; "
            f"got {int(offsets[0])} to {int(offsets[-1])}"
        )
    return offsets, heap


def tensor_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a numeric tensor's payload."""
    return ITEM_BYTES[dtype] * row_items(shape)


def decode_tensor(payload: memoryview | bytes, dtype: str, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """The array of a payload frame; numeric arrays alias `payload`, string arrays are new objects.

    Args:
        payload: One frame.
        dtype: One of `DTYPES`.
        shape: The whole shape, row axis included.

    Raises:
        WireError: the frame's size does not fit dtype and shape.
    """
    array: npt.NDArray[Any]
    if dtype == "string":
        items = row_items(shape)
        offsets, heap = split_strings(payload, items)
        ends = offsets.tolist()
        array = np.empty(items, object)
        for i in range(items):
            array[i] = bytes(heap[ends[i] : ends[i + 1]])
    else:
        want = tensor_bytes(dtype, shape)
        got = len(payload)
        if got != want:
            raise WireError(f"{dtype} tensor of shape {list(shape)} has {got} bytes; wanted {want}")
        array = np.frombuffer(payload, numpy_dtype(dtype))
    try:
        return array.reshape(shape)
    except ValueError as e:  # empty, but with other axes so long that numpy has no such shape
        raise WireError(f"{dtype} tensor of shape {list(shape)}: {e}") from None
