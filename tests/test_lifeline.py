"""A process that holds a lifeline dies with whoever holds the other end, whatever it is doing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

SCRIPT = """
import ctypes, os, signal, sys, time
from pool.shm.lifeline import die_with_front
die_with_front(int(sys.argv[1]))
print("ready", flush=True)
{state}
"""
STATES = {
    "asleep": "time.sleep(600)",
    "stopped": "os.kill(os.getpid(), signal.SIGSTOP)",
    "holding the interpreter's lock": "ctypes.PyDLL(None).sleep(600)",
    "ignoring what can be ignored": "signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)",
}


@pytest.fixture
def ends():
    """A lifeline; its write end is given once."""
    read_fd, write_fd = os.pipe()
    yield read_fd, write_fd
    os.close(read_fd)


def launch(read_fd, state):
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT.format(state=state), str(read_fd)],
        pass_fds=(read_fd,),
        stdout=subprocess.PIPE,
    )


@pytest.mark.parametrize("state", STATES)
def test_it_dies_when_the_other_end_is_closed(ends, state):
    read_fd, write_fd = ends
    with launch(read_fd, STATES[state]) as process:
        assert process.stdout.readline() == b"ready\n"
        assert process.poll() is None
        os.close(write_fd)
        assert process.wait(30) == -signal.SIGKILL


def test_each_of_several_dies(ends):
    read_fd, write_fd = ends
    processes = [launch(read_fd, STATES["asleep"]) for _ in range(3)]
    for process in processes:
        assert process.stdout.readline() == b"ready\n"
    os.close(write_fd)
    for process in processes:
        assert process.wait(30) == -signal.SIGKILL
        process.stdout.close()


def test_it_leaves_when_the_other_end_was_closed_before(ends):
    read_fd, write_fd = ends
    os.close(write_fd)
    with launch(read_fd, STATES["asleep"]) as process:
        assert process.stdout.read() == b""
        assert process.wait(30) == 0
