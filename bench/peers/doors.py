"""The ways into servers: how a row is put into a request, and the answer taken out. Pure but for `ask`."""

from __future__ import annotations

import base64
import http.client
import json
import struct
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, Any]

GRPC_PATH = "/inference.GRPCInferenceService/ModelInfer"
_ASK_TIMEOUT_S = 15.0


class Door(NamedTuple):
    """A way in.

    Attributes:
        protocol: `http`, `grpc`, `shm` (Triton's shared memory) or `pool`.
        path: Of the URL.
        encode: From a row to headers and body; None where the load generator makes its own.
        decode: From a body to the output's bytes; None likewise.
    """

    protocol: str
    path: str = ""
    encode: Callable[[Array], tuple[dict[str, str], bytes]] | None = None
    decode: Callable[[bytes], bytes] | None = None


# -- HTTP --------------------------------------------------------------------------------------------


def _raw(row: Array) -> tuple[dict[str, str], bytes]:
    return {"Content-Type": "application/octet-stream"}, row.tobytes()


def _litserve(row: Array) -> tuple[dict[str, str], bytes]:
    return _json({"x": base64.b64encode(row.tobytes()).decode()})


def _bentoml(row: Array) -> tuple[dict[str, str], bytes]:
    return _json({"rows": [base64.b64encode(row.tobytes()).decode()]})


def _json(document: dict[str, Any]) -> tuple[dict[str, str], bytes]:
    return {"Content-Type": "application/json"}, json.dumps(document).encode()


def _v2(row: Array) -> tuple[dict[str, str], bytes]:
    """Triton's HTTP with its binary extension: a JSON header, then the tensor as it is."""
    document = {
        "inputs": [
            {
                "name": "x",
                "datatype": "FP32",
                "shape": [1, *row.shape],
                "parameters": {"binary_data_size": row.nbytes},
            }
        ],
        "outputs": [{"name": "y", "parameters": {"binary_data": True}}],
    }
    header = json.dumps(document).encode()
    headers = {
        "Content-Type": "application/octet-stream",
        "Inference-Header-Content-Length": str(len(header)),
    }
    return headers, header + row.tobytes()


def _v2_answer(body: bytes) -> bytes:
    # The header's length is in a header of the reply; a JSON document ends where its braces do.
    document, end = json.JSONDecoder().raw_decode(body.decode("latin-1"))
    (output,) = document["outputs"]
    assert len(body) - end == output["parameters"]["binary_data_size"]
    return body[end:]


# -- gRPC, by hand: three messages do not need a compiler ------------------------------------------------


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _field(number: int, payload: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(payload)) + payload


def grpc_request(row: Array) -> bytes:
    """A `ModelInferRequest` for one row."""
    shape = b"".join(_varint(size) for size in (1, *row.shape))
    tensor = _field(1, b"x") + _field(2, b"FP32") + _field(3, shape)
    return _field(1, b"model") + _field(5, tensor) + _field(7, row.tobytes())


def grpc_answer(message: bytes) -> bytes:
    """The output of a `ModelInferResponse`, as raw bytes or as a list of floats."""
    for number, payload in _fields(message):
        if number == 6 and isinstance(payload, bytes):
            return payload
    for number, output in _fields(message):
        if number == 5 and isinstance(output, bytes):
            for inner, contents in _fields(output):
                if inner == 5 and isinstance(contents, bytes):
                    return b"".join(p for n, p in _fields(contents) if n == 6 and isinstance(p, bytes))
    raise ValueError("no output in the gRPC answer")


def _fields(message: bytes) -> Iterator[tuple[int, bytes | int]]:
    at = 0
    while at < len(message):
        key, at = _read_varint(message, at)
        if key & 7 == 0:
            value, at = _read_varint(message, at)
            yield key >> 3, value
            continue
        if key & 7 == 2:
            size, at = _read_varint(message, at)
        else:
            size = {1: 8, 5: 4}[key & 7]
        yield key >> 3, message[at : at + size]
        at += size


def _read_varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at


def _grpc(row: Array) -> tuple[dict[str, str], bytes]:
    """The body of an HTTP/2 request: what gRPC puts in front, and the message."""
    message = grpc_request(row)
    return {"content-type": "application/grpc", "te": "trailers"}, struct.pack(
        ">BI", 0, len(message)
    ) + message


RAW = Door("http", "/", _raw, bytes)
MOSEC = Door("http", "/inference", _raw, bytes)
LITSERVE = Door("http", "/predict", _litserve, lambda body: base64.b64decode(json.loads(body)["y"]))
BENTOML = Door("http", "/predict", _bentoml, lambda body: base64.b64decode(json.loads(body)[0]))
V2_HTTP = Door("http", "/v2/models/model/infer", _v2, _v2_answer)
V2_GRPC = Door("grpc", GRPC_PATH, _grpc, grpc_answer)
V2_SHM = Door("shm")
POOL = Door("pool")


def ask(door: Door, port: int, row: Array) -> Array:
    """Ask once, over HTTP or gRPC; gives the output's floats.

    Raises:
        OSError · ValueError · RuntimeError · http.client.HTTPException: no answer, or none that is one.
    """
    assert door.encode is not None
    assert door.decode is not None
    if door.protocol == "grpc":
        import grpc

        with grpc.insecure_channel(f"127.0.0.1:{port}", _UNLIMITED) as channel:
            try:
                answer = channel.unary_unary(door.path)(grpc_request(row), timeout=_ASK_TIMEOUT_S)
            except grpc.RpcError as e:
                raise RuntimeError(f"gRPC: {e.code()} {e.details()}"[:300]) from None
        return np.frombuffer(door.decode(answer), np.float32)
    headers, body = door.encode(row)
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_ASK_TIMEOUT_S)
    try:
        connection.request("POST", door.path, body, headers)
        response = connection.getresponse()
        data = response.read()
        if response.status != 200:
            raise RuntimeError(f"HTTP {response.status}: {data[:200]!r}")
        return np.frombuffer(door.decode(data), np.float32)
    finally:
        connection.close()


_UNLIMITED = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
