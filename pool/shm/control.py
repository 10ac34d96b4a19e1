"""What the front tells a zygote and its forks, and what the zygote reports. Used at both ends.

The control socket is `SOCK_SEQPACKET`; a message is one packet of msgpack, descriptors ride along as
SCM_RIGHTS. Orders can be long (every weight has a name), so they travel in a memfd.

    front  --Fork(token, role) + fds-->  zygote  --fork-->  child: reads its order, plays its role
    front  <--Preloaded---------------   zygote             once, when the framework is imported
    front  <--Forked(token, pid)------   zygote
    front  <--Exited(token, pid, …)---   zygote             after it was waited for

Descriptors of a Fork, in order:

    loader   order, lifeline, report (write end of a pipe), weights (empty memfd)
    worker   order, lifeline, stderr (write end of a pipe), doorbell, regions' socket, arena,
             joins (only when other fronts may join), weights (only when shared)

The *lifeline* is the read end of a pipe whose only write end the front holds: it reads end of file
when the front is gone, however it went.
"""

from __future__ import annotations

import os
import signal
import socket
from typing import TypeVar

import msgspec

from pool.config import Placement
from pool.sample import Recipe
from pool.shm.weights import Weight
from pool.signature import Signature


class Fork(msgspec.Struct, frozen=True, tag=True):
    """Ask for a child. `token` names it in every report."""

    token: int
    role: str  # "loader" or "worker"


class Preloaded(msgspec.Struct, frozen=True, tag=True):
    """The zygote has imported its framework and can fork."""


class Forked(msgspec.Struct, frozen=True, tag=True):
    """The child runs."""

    token: int
    pid: int


class ForkFailed(msgspec.Struct, frozen=True, tag=True):
    """There is no child: the system refused (processes or memory)."""

    token: int
    reason: str


class Exited(msgspec.Struct, frozen=True, tag=True):
    """The child ended and was waited for. `code` is its exit code, or minus the signal that ended it."""

    token: int
    pid: int
    code: int


Report = Preloaded | Forked | ForkFailed | Exited


class LoaderOrder(msgspec.Struct, frozen=True):
    """What a loader does: load the model at `path` once, report on it, fill the weights memfd."""

    model: str
    backend: str
    path: str
    share_weights: bool
    placement: Placement


class LoadReport(msgspec.Struct, frozen=True, tag=True):
    """What a loader found out about a model.

    Attributes:
        version: The model's version number.
        path: The concrete model that workers load.
        signatures: All servable ones, `batched` as observed.
        skipped: Signatures that cannot be served, with the reason.
        unobserved: Signatures that raised on every generated input, with the message; what is said of
            them rests on the shapes they declare.
        recipes: How to generate inputs a signature takes (`pool.sample`); none for those in `unobserved`.
        output_row_bytes: Most bytes of all outputs together per row (per call where not batched), as
            observed; None for those in `unobserved`.
        weights: The place of each weight in the memfd; empty when not shared.
        weights_bytes: Size of all weights, 0 when they could not be read.
        weights_shared: Whether workers are to map the memfd.
        unshared_reason: Why not, in a sentence; '' when shared.
        is_lean: Whether workers are to load no more than it takes to run signatures.
    """

    version: int
    path: str
    signatures: tuple[Signature, ...]
    skipped: dict[str, str]
    unobserved: dict[str, str]
    recipes: dict[str, Recipe]
    output_row_bytes: dict[str, int | None]
    weights: tuple[Weight, ...]
    weights_bytes: int
    weights_shared: bool
    unshared_reason: str
    is_lean: bool


class LoadFailure(msgspec.Struct, frozen=True, tag=True):
    """The model cannot be loaded; `message` says why."""

    message: str


LoadOutcome = LoadReport | LoadFailure


class WarmUp(msgspec.Struct, frozen=True):
    """Sample batches a worker runs before it says READY: one signature at some sizes."""

    signature: Signature
    recipe: Recipe
    rows: tuple[int, ...]


class WorkerOrder(msgspec.Struct, frozen=True):
    """What a worker does: attach, load, warm up, then run slots until the doorbell closes."""

    model: str
    index: int
    backend: str
    path: str
    weights: tuple[Weight, ...]  # empty: the worker loads a copy of its own
    placement: Placement
    slots: int
    slot_bytes: int
    allowed_batch_sizes: tuple[int, ...]
    warm_up: tuple[WarmUp, ...]
    is_lean: bool = False  # `Backend.load`
    awake_s: float = 0.0  # how long it stays awake for the next batch before it sleeps
    split_s: float = 0.0  # longest run of a batch that is tried in pieces; 0 for never
    is_shared: bool = False  # other fronts than the one that started it may join


PACKET_MAX_BYTES = 65_536

# Has a worker write where it is to its standard error.
TRACEBACK_SIGNAL = signal.SIGUSR1
_FORK_FDS_MAX = 8

_encode = msgspec.msgpack.Encoder().encode
_decode_fork = msgspec.msgpack.Decoder(Fork).decode
_decode_report = msgspec.msgpack.Decoder(Report).decode

decode_outcome = msgspec.msgpack.Decoder(LoadOutcome).decode
encode_outcome = _encode

Order = TypeVar("Order", LoaderOrder, WorkerOrder)


def send_fork(sock: socket.socket, fork: Fork, fds: list[int]) -> None:
    """Front: ask for a child and pass its descriptors (the front keeps its own copies)."""
    socket.send_fds(sock, [_encode(fork)], fds)


def receive_fork(sock: socket.socket) -> tuple[Fork, list[int]] | None:
    """Zygote: the next request, or None when the front is gone."""
    data, fds, _, _ = socket.recv_fds(sock, PACKET_MAX_BYTES, _FORK_FDS_MAX)
    return (_decode_fork(data), fds) if data else None


def send_report(sock: socket.socket, report: Report) -> None:
    """Zygote: tell the front."""
    sock.send(_encode(report))


def receive_report(sock: socket.socket) -> Report | None:
    """Front: the next report, or None when the zygote is gone.

    Raises:
        BlockingIOError: none there yet.
    """
    try:
        data = sock.recv(PACKET_MAX_BYTES)
    except ConnectionResetError:
        return None
    return _decode_report(data) if data else None


def write_order(order: LoaderOrder | WorkerOrder) -> int:
    """A memfd holding the order; the caller closes it."""
    fd = os.memfd_create("pool-order", os.MFD_CLOEXEC)
    with os.fdopen(os.dup(fd), "wb") as f:
        f.write(_encode(order))
    return fd


def read_order(fd: int, kind: type[Order]) -> Order:
    """The order in a memfd; closes it."""
    with os.fdopen(fd, "rb") as f:
        f.seek(0)
        return msgspec.msgpack.decode(f.read(), type=kind)
