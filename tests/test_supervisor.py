"""Zygotes and loaders as the front keeps them, for real."""

from __future__ import annotations

import asyncio
import os
import signal

import psutil
import pytest

from pool.config import ModelConfig
from pool.errors import ModelLoadError, Unavailable
from pool.front.supervisor import Supervisor
from pool.front.zygotes import UNKNOWN_EXIT, describe_exit, zygote_environment
from tests import models

PATIENCE_S = 60.0


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (0, "exit code 0"),
        (3, "exit code 3"),
        (-9, "killed by SIGKILL"),
        (-11, "killed by SIGSEGV"),
        (-99, "killed by signal 99"),
        (UNKNOWN_EXIT, "ended, nobody saw how"),
    ],
)
def test_how_a_process_ended_in_words(code, words):
    assert describe_exit(code) == words


def test_the_zygotes_environment_keeps_imports_from_starting_threads(monkeypatch):
    monkeypatch.setenv("POOL_TEST", "kept")
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    environment = zygote_environment()
    assert environment["OPENBLAS_NUM_THREADS"] == "1"
    assert environment["POOL_TEST"] == "kept"


def run(scenario):
    """Run a scenario on a Supervisor; afterwards nothing of it is left."""

    async def main():
        supervisor = Supervisor()
        try:
            await asyncio.wait_for(scenario(supervisor), PATIENCE_S)
        finally:
            await supervisor.stop()

    before = set(os.listdir("/proc/self/fd"))
    asyncio.run(main())
    assert set(os.listdir("/proc/self/fd")) == before


def test_a_zygote_that_cannot_start_is_an_error_each_time():
    async def scenario(supervisor):
        for _ in range(2):
            with pytest.raises(ModelLoadError, match=r"the nope zygote could not start \(exit code 1\)"):
                await supervisor.zygote("nope")

    run(scenario)


def test_loaders_and_a_zygote_that_dies():
    async def scenario(supervisor):
        # What many ask for at once is started once.
        one, two = await asyncio.gather(supervisor.zygote("tensorflow"), supervisor.zygote("tensorflow"))
        assert one is two

        shared = ModelConfig(path=str(models.path("mlp")))
        report, weights_fd = await supervisor.load("mlp", shared, PATIENCE_S)
        assert report.version == 1
        assert os.fstat(weights_fd).st_size >= report.weights_bytes
        os.close(weights_fd)
        config = ModelConfig(path=str(models.path("mlp")), version=1, share_weights=False)
        report, nothing = await supervisor.load("mlp", config, PATIENCE_S)
        assert (report.version, nothing) == (1, None)

        with pytest.raises(ModelLoadError, match=r"model 'gone': .*/no/model"):
            await supervisor.load("gone", ModelConfig(path="/no/model"), PATIENCE_S)

        with pytest.raises(ModelLoadError, match=r"model 'mlp': not loaded within 0\.001 s"):
            await supervisor.load("mlp", config, 0.001)

        # A loader that is killed is told from one that fails.
        zygote = psutil.Process(one.pid)
        while one._children:  # the one that took too long is killed, even if it was not forked yet
            await asyncio.sleep(0)
        loading = asyncio.ensure_future(supervisor.load("mlp", shared, PATIENCE_S))
        while not (children := zygote.children()):
            await asyncio.sleep(0)
        os.kill(children[0].pid, signal.SIGKILL)
        with pytest.raises(
            ModelLoadError, match=r"its loader ended before it reported \(killed by SIGKILL\)"
        ):
            await loading

        # A dead zygote forks nothing; a new one is being started.
        os.kill(one.pid, signal.SIGKILL)
        while "tensorflow" in supervisor.zygotes:
            await asyncio.sleep(0)
        with pytest.raises(Unavailable, match="the tensorflow zygote is gone; a new one is being started"):
            one.fork("loader", [])
        three = await supervisor.zygote("tensorflow")
        assert three.pid != one.pid
        report, nothing = await supervisor.load("mlp", config, PATIENCE_S)
        assert report.version == 1

    run(scenario)


def test_a_supervisor_that_stops_while_its_zygote_starts_does_not_wait_for_it():
    async def scenario(supervisor):
        starting = asyncio.ensure_future(supervisor.zygote("tensorflow"))
        while not supervisor._known:
            await asyncio.sleep(0)
        await supervisor.stop()
        with pytest.raises(asyncio.CancelledError):
            await starting
        supervisor.stop = lambda: asyncio.sleep(0)

    run(scenario)
