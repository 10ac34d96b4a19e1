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


def test_loaders_and_a_zygote_that_dies(tmp_path):
    quick, slow = tmp_path / "quick", tmp_path / "slow.toml"
    (quick / "1").mkdir(parents=True)
    (quick / "1" / "drill.toml").write_text("weights_bytes = 1000")
    slow.write_text("batch_s = 0.2")  # a loader runs it some times

    async def scenario(supervisor):
        # What many ask for at once is started once.
        one, two = await asyncio.gather(supervisor.zygote("drill"), supervisor.zygote("drill"))
        assert one is two

        shared = ModelConfig(path=str(quick), backend="drill")
        report, weights_fd = await supervisor.load("quick", shared, PATIENCE_S)
        assert report.version == 1
        assert os.fstat(weights_fd).st_size >= report.weights_bytes > 1000
        os.close(weights_fd)
        config = ModelConfig(path=str(quick), backend="drill", version=1, share_weights=False)
        report, nothing = await supervisor.load("quick", config, PATIENCE_S)
        assert (report.version, nothing) == (1, None)

        with pytest.raises(ModelLoadError, match=r"model 'gone': .*/no/model"):
            await supervisor.load("gone", ModelConfig(path="/no/model", backend="drill"), PATIENCE_S)

        waiting = ModelConfig(path=str(slow), backend="drill")
        with pytest.raises(ModelLoadError, match=r"model 'slow': not loaded within 0\.001 s"):
            await supervisor.load("slow", waiting, 0.001)

        # A loader that is killed is told from one that fails.
        zygote = psutil.Process(one.pid)
        while one._children:  # the one that took too long is killed, even if it was not forked yet
            await asyncio.sleep(0)
        loading = asyncio.ensure_future(supervisor.load("slow", waiting, PATIENCE_S))
        while not (children := zygote.children()):
            await asyncio.sleep(0)
        os.kill(children[0].pid, signal.SIGKILL)
        with pytest.raises(
            ModelLoadError, match=r"its loader ended before it reported \(killed by SIGKILL\)"
        ):
            await loading

        # A dead zygote forks nothing; a new one is being started.
        os.kill(one.pid, signal.SIGKILL)
        while "drill" in supervisor.zygotes:
            await asyncio.sleep(0)
        with pytest.raises(Unavailable, match="the drill zygote is gone; a new one is being started"):
            one.fork("loader", [])
        three = await supervisor.zygote("drill")
        assert three.pid != one.pid
        report, nothing = await supervisor.load("quick", config, PATIENCE_S)
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
