"""Orders in memfds, requests and reports over a real control socket."""

from __future__ import annotations

import contextlib
import os
import socket

import pytest

from pool.config import Placement
from pool.sample import Recipe
from pool.shm import control
from pool.shm.weights import Weight
from pool.signature import Signature, TensorSpec

SIGNATURE = Signature(
    "serving_default",
    (TensorSpec("x", "float32", (None, 3)), TensorSpec("any", "string", None)),
    (TensorSpec("y", "bfloat16", (None,)),),
    batched=False,
    unbatched_reason="it is not",
)
WEIGHTS = (Weight("w", "float32", (2, 3), 0), Weight("b", "int8", (), 64))
REPORT = control.LoadReport(
    version=3,
    path="/models/m/3",
    signatures=(SIGNATURE,),
    skipped={"train": "has an input 'q' of dtype qint8"},
    unobserved={},
    recipes={"serving_default": Recipe(axis=32, text=b"\x00\xff")},
    output_row_bytes={"serving_default": 2, "other": None},
    weights=WEIGHTS,
    weights_bytes=65,
    weights_shared=True,
    unshared_reason="",
    is_lean=False,
)
ORDERS = (
    control.LoaderOrder("m", "tensorflow", "/models/m", True, Placement((0, 1), 2)),
    control.WorkerOrder(
        model="m",
        index=1,
        backend="tensorflow",
        path="/models/m/3",
        weights=WEIGHTS,
        placement=Placement((), 1, gpu=0, gpu_memory_mb=512),
        slots=4,
        slot_bytes=1 << 20,
        allowed_batch_sizes=(1, 8),
        warm_up=(control.WarmUp(SIGNATURE, Recipe(), (1, 8)),),
    ),
)


@contextlib.contextmanager
def control_pair():
    front, zygote = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with front, zygote:
        yield front, zygote


@pytest.mark.parametrize("order", ORDERS, ids=["loader", "worker"])
def test_an_order_travels_in_a_memfd(order):
    fd = control.write_order(order)
    assert os.readlink(f"/proc/self/fd/{fd}").startswith("/memfd:pool-order")
    assert not os.get_inheritable(fd)
    assert control.read_order(fd, type(order)) == order
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_an_order_may_be_longer_than_any_packet():
    many = tuple(Weight(f"layer/{i}/" + "x" * 200, "float32", (1, 2, 3), 64 * i) for i in range(10_000))
    order = control.WorkerOrder(
        "m", 0, "tensorflow", "/models/m/1", many, Placement(), 1, 4096, (), ()
    )  # fmt: skip
    assert control.read_order(control.write_order(order), control.WorkerOrder) == order


def test_a_request_brings_its_descriptors_along():
    read_fd, write_fd = os.pipe()
    with control_pair() as (front, zygote):
        control.send_fork(front, control.Fork(7, "worker"), [read_fd, write_fd])
        os.close(read_fd)
        os.close(write_fd)
        fork, fds = control.receive_fork(zygote)
        assert fork == control.Fork(7, "worker")
        assert len(fds) == 2
        os.write(fds[1], b"through the copies")
        assert os.read(fds[0], 100) == b"through the copies"
        for fd in fds:
            os.close(fd)


def test_a_gone_front_reads_as_none():
    with control_pair() as (front, zygote):
        front.close()
        assert control.receive_fork(zygote) is None


REPORTS = (
    control.Preloaded(),
    control.Forked(1, 1234),
    control.ForkFailed(2, "Resource temporarily unavailable"),
    control.Exited(1, 1234, -9),
)


def test_reports_arrive_in_order_and_then_the_end():
    with control_pair() as (front, zygote):
        front.setblocking(False)
        with pytest.raises(BlockingIOError):
            control.receive_report(front)
        for report in REPORTS:
            control.send_report(zygote, report)
        zygote.close()
        assert [control.receive_report(front) for _ in REPORTS] == list(REPORTS)
        assert control.receive_report(front) is None


def test_a_zygote_that_died_with_requests_unread_reads_as_none():
    with control_pair() as (front, zygote):
        control.send_fork(front, control.Fork(1, "loader"), [])
        zygote.close()
        assert control.receive_report(front) is None  # the kernel says ECONNRESET first


@pytest.mark.parametrize("outcome", [REPORT, control.LoadFailure("/x: no model")], ids=["report", "failure"])
def test_an_outcome_survives_its_pipe(outcome):
    assert control.decode_outcome(control.encode_outcome(outcome)) == outcome
