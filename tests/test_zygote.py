"""A real zygote, spoken to as the front does: it forks a loader and workers that run TensorFlow."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest

from pool.config import Placement
from pool.front.zygotes import zygote_environment
from pool.shm import control, doorbell, loans, weights
from pool.shm.arena import Arena, plan_layout, slot_bytes_for
from pool.shm.doorbell import Message, Ring
from pool.wire import TensorMeta
from tests import models

PATIENCE_S = 60.0
HERE = Placement(threads=1)


class Zygote:
    """The zygote's process and what the front holds of it."""

    def __init__(self):
        self.sock, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.sock.settimeout(PATIENCE_S)
        self.lifeline, self.hold = os.pipe()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pool.worker.zygote", str(its.fileno()), str(self.lifeline), "tensorflow"],
            pass_fds=(its.fileno(), self.lifeline),
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=zygote_environment(),
        )
        its.close()
        self.token = 0

    def fork(self, role, fds):
        """Have a child forked; gives its pid."""
        self.token += 1
        control.send_fork(self.sock, control.Fork(self.token, role), fds)
        report = control.receive_report(self.sock)
        assert isinstance(report, control.Forked)
        assert report.token == self.token
        return report.pid

    def await_exit(self, pid):
        report = control.receive_report(self.sock)
        assert isinstance(report, control.Exited)
        assert report.pid == pid
        return report.code

    def load(self, name, share=True):
        """Run a loader; gives its outcome and the weights memfd."""
        order = control.write_order(
            control.LoaderOrder(
                "m", "tensorflow", str(models.path(name)) if name else "/no/model", share, HERE
            )
        )
        weights_fd = weights.create()
        read_fd, write_fd = os.pipe()
        pid = self.fork("loader", [order, self.lifeline, write_fd, weights_fd])
        os.close(order)
        os.close(write_fd)
        with os.fdopen(read_fd, "rb") as pipe:
            outcome = control.decode_outcome(pipe.read())
        assert self.await_exit(pid) == 0
        return outcome, weights_fd

    def work(self, report, arena, weights_fd=None, path=None):
        """Start a worker; gives its pid and its doorbell."""
        bell, its_bell = doorbell.make_pair()
        bell.settimeout(PATIENCE_S)
        lender, borrower = loans.make_pair()
        order = control.write_order(
            control.WorkerOrder(
                model="m",
                index=3,
                backend="tensorflow",
                path=path or report.path,
                weights=report.weights,
                placement=HERE,
                slots=len(arena.slots),
                slot_bytes=arena.slot_bytes,
                allowed_batch_sizes=(),
                warm_up=(control.WarmUp(report.signatures[0], report.recipes["serving_default"], (1,)),),
            )
        )
        shared = [] if weights_fd is None else [weights_fd]
        fds = [order, self.lifeline, 2, its_bell.fileno(), borrower.fileno(), arena.fd, *shared]
        pid = self.fork("worker", fds)
        for sock in (its_bell, lender, borrower):
            sock.close()
        os.close(order)
        return pid, bell

    def close(self):
        self.sock.close()
        code = self.process.wait(PATIENCE_S)
        for fd in (self.lifeline, self.hold):
            os.close(fd)
        self.process.stderr.close()
        return code


@pytest.fixture(scope="module")
def zygote():
    made = Zygote()
    assert control.receive_report(made.sock) == control.Preloaded()
    yield made
    if made.process.returncode is None:
        assert made.close() == 0


@pytest.fixture(scope="module")
def loaded(zygote):
    report, weights_fd = zygote.load("cnn")
    yield report, weights_fd
    os.close(weights_fd)


@pytest.fixture
def arena():
    made = Arena.create(2, slot_bytes_for(1 << 16))
    yield made
    made.close()


def test_it_has_imported_the_framework_and_run_nothing(zygote):
    process = psutil.Process(zygote.process.pid)
    assert process.name() == "pool-zygote"
    # One thread, or a fork would leave the others' locks held for ever.
    assert process.num_threads() == 1
    assert "tensorflow" in Path(f"/proc/{process.pid}/maps").read_text()


def test_a_loader_reports_and_fills_the_weights(loaded):
    report, weights_fd = loaded
    assert isinstance(report, control.LoadReport)
    assert report.weights_shared
    assert all(signature.batched for signature in report.signatures)
    assert os.fstat(weights_fd).st_size >= report.weights_bytes > 0
    with pytest.raises(PermissionError):
        os.ftruncate(weights_fd, 0)
    arrays = weights.map_private(weights_fd, report.weights)
    assert any(np.any(array) for array in arrays)


def test_a_loader_that_fails_says_why_and_costs_nothing_else(zygote):
    outcome, weights_fd = zygote.load(None)
    assert isinstance(outcome, control.LoadFailure)
    assert "/no/model" in outcome.message
    assert os.fstat(weights_fd).st_size == 0
    os.close(weights_fd)


def test_a_worker_runs_slots_until_it_is_asked_to_leave(zygote, loaded, arena):
    report, weights_fd = loaded
    pid, bell = zygote.work(report, arena, weights_fd)
    assert doorbell.answer(bell) == Message(Ring.READY)
    assert psutil.Process(pid).name() == "pool-3-m"
    signature = report.signatures[0]
    meta = (TensorMeta(signature.inputs[0].name, "float32", (8, 8, 1)),)
    layout = plan_layout(1, signature, meta, 40, arena.slot_bytes, 8)
    images = np.random.default_rng(0).random((2, 8, 8, 1), np.float32)
    answers = []
    for turn in range(4):
        slot = turn % 2
        arena.describe(slot, layout)
        (region,) = layout.descriptor.inputs
        arena.slots[slot][region.offset : region.offset + images.nbytes] = images.reshape(-1).view(np.uint8)
        doorbell.ring(bell, Message(Ring.RUN, slot, 2, turn, 1))
        assert doorbell.answer(bell) == Message(Ring.DONE, slot, 2, turn, 1)
        started_ns, ended_ns, _, encoded = arena.read_run_record(slot)
        assert started_ns < ended_ns
        (place,) = control.msgspec.msgpack.decode(encoded)
        dtype, shape, offset, size = place
        assert (dtype, shape, size) == ("float32", [2, 10], 80)
        answers.append(bytes(arena.slots[slot][offset : offset + size]))
    assert len(set(answers)) == 1
    assert np.any(np.frombuffer(answers[0], np.float32))
    doorbell.ring(bell, Message(Ring.DRAIN))
    assert zygote.await_exit(pid) == 0
    assert doorbell.answer(bell) is None
    bell.close()


def test_a_worker_that_cannot_load_says_why_and_leaves(zygote, loaded, arena):
    report, _ = loaded
    pid, bell = zygote.work(report, arena, path="/no/model")
    message = doorbell.answer(bell)
    assert message.kind == Ring.LOAD_ERROR
    assert "/no/model" in message.text
    assert zygote.await_exit(pid) == 1
    bell.close()


def test_a_worker_whose_doorbell_closes_leaves(zygote, loaded, arena):
    pid, bell = zygote.work(*loaded[:1], arena, loaded[1])
    assert doorbell.answer(bell) == Message(Ring.READY)
    bell.close()
    assert zygote.await_exit(pid) == 0


def test_how_a_worker_was_killed_is_told(zygote, loaded, arena):
    pid, bell = zygote.work(loaded[0], arena, loaded[1])
    assert doorbell.answer(bell) == Message(Ring.READY)
    os.kill(pid, signal.SIGTERM)  # ignored, as Ctrl-C is: the front asks workers to leave
    os.kill(pid, signal.SIGINT)
    os.kill(pid, signal.SIGSEGV)
    assert zygote.await_exit(pid) == -signal.SIGSEGV
    bell.close()


def test_a_child_has_no_descriptors_but_its_own(zygote, loaded, arena):
    """Of two workers, neither holds the other's doorbell: its end of file would never be seen."""
    pids, bells = zip(*(zygote.work(loaded[0], arena, loaded[1]) for _ in range(2)), strict=True)
    for bell in bells:
        assert doorbell.answer(bell) == Message(Ring.READY)
    for pid in pids:
        kinds = [os.readlink(f"/proc/{pid}/fd/{fd}").split(":")[0] for fd in os.listdir(f"/proc/{pid}/fd")]
        assert kinds.count("socket") == 2  # its doorbell, and what it is lent comes by
    for pid, bell in zip(pids, bells, strict=True):
        bell.close()
        assert zygote.await_exit(pid) == 0


def oom_score(pid):
    return int(Path(f"/proc/{pid}/oom_score_adj").read_text())


def test_short_of_memory_a_worker_goes_before_the_zygote_and_that_before_the_front(zygote, loaded, arena):
    pid, bell = zygote.work(loaded[0], arena, loaded[1])
    assert doorbell.answer(bell) == Message(Ring.READY)
    scores = [oom_score(process) for process in (os.getpid(), zygote.process.pid, pid)]
    assert scores[0] + 250 < scores[1] < scores[2] - 250
    bell.close()
    assert zygote.await_exit(pid) == 0


def test_an_order_that_is_none_ends_the_child_alone(zygote):
    with open("/dev/null", "rb") as nothing:
        pid = zygote.fork("loader", [nothing.fileno(), zygote.lifeline])
    assert zygote.await_exit(pid) == 1
    assert select.select([zygote.process.stderr], [], [], PATIENCE_S)[0]
    assert b"Traceback" in os.read(zygote.process.stderr.fileno(), 65_536)


def test_signals_to_the_group_are_for_the_front(zygote):
    os.kill(zygote.process.pid, signal.SIGTERM)
    os.kill(zygote.process.pid, signal.SIGINT)
    with open("/dev/null", "rb") as nothing:
        pid = zygote.fork("loader", [nothing.fileno(), zygote.lifeline])
    assert zygote.await_exit(pid) == 1


def test_with_the_front_gone_all_leave(zygote, loaded, arena):
    """The last of these tests: it takes the zygote along."""
    pids, bells = zip(*(zygote.work(loaded[0], arena, loaded[1]) for _ in range(2)), strict=True)
    for bell in bells:
        assert doorbell.answer(bell) == Message(Ring.READY)
    os.kill(pids[1], signal.SIGSTOP)  # reads no pipe any more; the zygote sees to it
    workers = [psutil.Process(pid) for pid in pids]
    assert zygote.close() == 0
    assert psutil.wait_procs(workers, PATIENCE_S)[1] == []
    for bell in bells:
        bell.close()
