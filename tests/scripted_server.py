"""A ROUTER that answers as a test scripts it: what a pool server says on the wire, and what none should.

For faults that a real server does not commit. The answers to well-formed questions follow docs/wire.md.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec
import numpy as np
import zmq

from pool import wire
from pool.errors import ModelNotFound, PoolError
from pool.signature import Signature, TensorSpec
from pool.wire import Flag, Header, Kind, PredictMeta, ResultMeta, SignatureMeta, TensorMeta

SIGNATURES = (
    Signature(
        "serving_default",
        (TensorSpec("x", "float32", (None, 3)),),
        (TensorSpec("y", "float32", (None, 3)),),
    ),
    Signature(
        "pair",
        (TensorSpec("a", "int64", (None,)), TensorSpec("b", "string", (None, 2))),
        (TensorSpec("a", "int64", (None,)), TensorSpec("b", "string", (None, 2))),
    ),
    Signature(
        "whole",
        (TensorSpec("x", "float32", (2, 3)),),
        (TensorSpec("x", "float32", (2, 3)),),
        batched=False,
        unbatched_reason="the first dimension is fixed",
    ),
    Signature("large", (TensorSpec("x", "uint8", (None, None)),), (TensorSpec("x", "uint8", (None, None)),)),
)


def signature_document(model: str = "m", signatures: Sequence[Signature] = SIGNATURES) -> dict[str, Any]:
    """The INFO document of section 3.2."""
    listed = [msgspec.to_builtins(each) for each in signatures]
    return {"model": model, "version": 7, "signatures": listed, "max_rows": 64}


def info(id_: int, document: dict[str, Any]) -> list[bytes]:
    """An INFO reply."""
    return [wire.encode_header(Header(Kind.INFO, id_, wire.encode_info(document)))]


def result(header: Header, tensors: Sequence[bytes]) -> list[bytes]:
    """A RESULT that gives a PREDICT's inputs back under the names of the signature's outputs."""
    meta = wire.decode_meta(PredictMeta, header.meta)
    signature = next(each for each in SIGNATURES if each.name == meta.signature)
    outputs = tuple(
        TensorMeta(spec.name, tensor.dtype, tensor.shape)
        for spec, tensor in zip(signature.outputs, meta.inputs, strict=True)
    )
    reply = Header(
        Kind.RESULT,
        header.id,
        wire.encode_meta(ResultMeta(7, outputs)),
        rows=header.rows,
        flags=0 if signature.batched else Flag.WHOLE,
    )
    return [wire.encode_header(reply), *tensors]


def unbundle(header: Header, tensors: list[bytes]) -> Iterator[tuple[Header, list[bytes]]]:
    """The requests a message stands for, each as if it had come alone (section 3.9)."""
    if not header.flags & Flag.BUNDLE:
        yield header, tensors
        return
    table, *columns = tensors
    start = 0
    for id_, millis, count in zip(*wire.split_parts(table, header.rows), strict=True):
        sizes = [len(column) // max(header.rows, 1) for column in columns]
        spans = [
            column[start * size : (start + count) * size] for column, size in zip(columns, sizes, strict=True)
        ]
        alone = header.flags & ~Flag.BUNDLE
        yield Header(header.kind, id_, header.meta, millis, count, header.priority, alone), spans
        start += count


Answer = Callable[[Header, list[bytes]], "list[list[bytes]] | None"]


def answer_properly(header: Header, tensors: list[bytes]) -> list[list[bytes]]:
    """What a server with the models `m` says; predictions give their inputs back."""
    id_ = header.id
    if header.kind is Kind.CANCEL:
        return []  # what it withdraws is answered already, or never will be
    if header.kind is Kind.PREDICT:
        return [result(header, tensors)]
    if header.kind in (Kind.SIGNATURE, Kind.READY):
        model = wire.decode_meta(SignatureMeta, header.meta).model
        if model not in ("m", "") or (model == "" and header.kind is Kind.SIGNATURE):
            return [[wire.encode_error(id_, ModelNotFound(f"no model {model!r}; wanted 'm'"))]]
        if header.kind is Kind.SIGNATURE:
            return [info(id_, signature_document())]
        return [info(id_, {"ready": True, "models": {"m": True}})]
    documents: dict[Kind, dict[str, Any]] = {
        Kind.MODELS: {"models": {"m": {"version": 7, "ready": True, "signatures": ["serving_default"]}}},
        Kind.STATUS: {"models": {}, "front": {"pid": 1}},
        Kind.LIVE: {"live": True},
    }
    return [info(id_, documents[header.kind])]


def on_predict(answer: Answer) -> Answer:
    """A script for PREDICT only; questions are answered properly."""

    def script(header: Header, tensors: list[bytes]) -> list[list[bytes]] | None:
        return answer(header, tensors) if header.kind is Kind.PREDICT else answer_properly(header, tensors)

    return script


def refuse(error: PoolError) -> Answer:
    """A script that answers every prediction with an error."""
    return on_predict(lambda header, _: [[wire.encode_error(header.id, error)]])


def in_turn(*answers: Answer) -> Answer:
    """A script whose first prediction gets the first answer, and so on; all after that get the last."""
    left = list(answers)
    return on_predict(lambda header, tensors: (left.pop(0) if len(left) > 1 else left[0])(header, tensors))


def never(_header: Header, _tensors: list[bytes]) -> None:
    """No answer."""


class ScriptedServer:
    """A ROUTER in a thread of this process.

    Attributes:
        endpoint: Where it listens.
        requests: Every header received.
        predicted: Released once per PREDICT received.
        cancelled: Released once per CANCEL received.
    """

    def __init__(self, endpoint: str, answer: Answer = answer_properly, *, linger_ms: int = 0) -> None:
        self.endpoint = endpoint
        self.answer = answer
        self.requests: list[Header] = []
        self.predicted = threading.Semaphore(0)
        self.cancelled = threading.Semaphore(0)
        self._context = zmq.Context()
        self._router = self._context.socket(zmq.ROUTER)
        self._router.linger = linger_ms
        self._router.sndhwm = 0  # a ROUTER drops what a slow client has no room for
        self._router.ipv6 = endpoint.startswith("tcp://[")
        self._router.bind(endpoint)
        if endpoint.endswith(":*"):
            self.endpoint = self._router.last_endpoint.decode()
        self._stop_in, self._stop_out = self._context.socket(zmq.PAIR), self._context.socket(zmq.PAIR)
        self._stop_in.bind("inproc://stop")
        self._stop_out.connect("inproc://stop")
        self._thread = threading.Thread(target=self._run, name="scripted-server")
        self._thread.start()

    def _run(self) -> None:
        peer = b""
        while True:
            ready = dict(zmq.zmq_poll([(self._router, zmq.POLLIN), (self._stop_in, zmq.POLLIN)], -1))
            if self._stop_in in ready:
                command = self._stop_in.recv_multipart()
                if command[0] == b"stop":
                    break
                self._router.send_multipart([peer, *command[1:]])
                continue
            peer, first, *tensors = self._router.recv_multipart()
            for header, payloads in unbundle(wire.decode_header(first), tensors):
                self.requests.append(header)
                for message in self.answer(header, payloads) or ():
                    self._router.send_multipart([peer, *message])
                if header.kind is Kind.PREDICT:
                    self.predicted.release()
                elif header.kind is Kind.CANCEL:
                    self.cancelled.release()
        self._router.close()

    def say(self, message: list[bytes]) -> None:
        """Send a message to the last peer heard, asked or not."""
        self._stop_out.send_multipart([b"say", *message])

    def kinds(self) -> list[Kind]:
        """The kinds of the requests received."""
        return [header.kind for header in self.requests]

    def ids(self, kind: Kind) -> list[int]:
        """The ids of the requests of that kind received."""
        return [header.id for header in self.requests if header.kind is kind]

    def stop(self) -> None:
        """Close the socket: to the clients, the server is gone."""
        if self._thread.is_alive():
            self._stop_out.send(b"stop")
            self._thread.join()
            self._stop_out.close()
            self._stop_in.close()
            self._context.term()


@contextlib.contextmanager
def scripted_server(
    endpoint: str, answer: Answer = answer_properly, *, linger_ms: int = 0
) -> Iterator[ScriptedServer]:
    """A scripted server for the length of a block."""
    server = ScriptedServer(endpoint, answer, linger_ms=linger_ms)
    try:
        yield server
    finally:
        server.stop()


def rows(n: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """A legal input of the default signature: float32 [n, 3]."""
    return np.arange(3 * n, dtype=np.float32).reshape(n, 3)
