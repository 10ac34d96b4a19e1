"""What the service manager hears, and when it hears nothing."""

from __future__ import annotations

import asyncio
import socket
from math import inf

import pytest

from pool.front.heartbeat import GRACE_S, Batch, Heartbeat, StatusLine, Vitals, Watchdog
from pool.front.notify import Notifier

WELL = Vitals(models=2, models_ready=2, workers=4, workers_ready=3, queue_rows=7)


# -- the sentence -----------------------------------------------------------------------------------


def test_the_first_sentence_comes_at_once_and_has_no_rate_yet():
    line = StatusLine()
    assert line.update(100.0, "serving", WELL, 5000) == (
        "2/2 models ready, 3/4 workers, 0 requests/s, 7 rows queued"
    )


def test_a_rate_is_of_the_time_since_the_last_sentence():
    line = StatusLine()
    line.update(100.0, "serving", WELL, 1000)
    assert line.update(100.5, "serving", WELL, 1800) is None
    sentence = line.update(102.0, "serving", WELL, 3000)
    assert sentence is not None
    assert "1000 requests/s" in sentence


def test_another_phase_is_told_at_once():
    line = StatusLine()
    line.update(1.0, "starting", WELL, 0)
    assert line.update(1.1, "starting", WELL._replace(workers_ready=4), 0) is None
    assert (
        line.update(1.2, "serving", WELL, 9) == "2/2 models ready, 3/4 workers, 0 requests/s, 7 rows queued"
    )
    assert line.update(1.3, "serving", WELL, 0) is None


def test_what_did_not_change_is_not_said_again():
    line = StatusLine()
    assert line.update(1.0, "serving", WELL, 0)
    assert line.update(2.0, "serving", WELL, 0) is None
    assert line.update(3.0, "serving", WELL._replace(workers_ready=4), 0)
    assert line.update(4.0, "stopping", WELL, 0) == (
        "stopping: 2/2 models ready, 3/4 workers, 0 requests/s, 7 rows queued"
    )
    trouble = line.update(5.0, "serving", WELL, 0, "all is lost")
    assert trouble is not None
    assert trouble.startswith("all is lost; ")


# -- the watchdog -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "is_well"),
    [
        (Batch("m", 0.0, 100.0), True),
        (Batch("m", 0.0, 100.0 - GRACE_S), True),
        (Batch("m", 0.0, 99.9 - GRACE_S), False),
        (Batch("m", -1e9, inf), True),  # timeout_ms = 0: it may run for ever
    ],
)
def test_a_batch_that_outlives_its_end_is_trouble(batch, is_well):
    trouble = Watchdog().trouble(100.0, [Batch("other", 99.0, 1.0), batch])
    assert (trouble == "") is is_well
    assert is_well or "'m' has run for 100 s" in trouble


def test_nothing_running_is_no_trouble():
    assert Watchdog().trouble(100.0, []) == ""


# -- the beat ---------------------------------------------------------------------------------------


class Patient:
    """A front as the heartbeat sees it."""

    def __init__(self) -> None:
        self.batches: list[Batch] = []

    def vitals(self) -> Vitals:
        return WELL

    def running(self) -> list[Batch]:
        return self.batches


@pytest.fixture
def manager(tmp_path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "notify"))
        sock.setblocking(False)
        yield sock


def beats(manager, tmp_path, script, watchdog_s=None):
    """Run `script(heartbeat, patient, hear)`; `hear` awaits the next datagram and gives its lines."""

    async def run():
        notifier = Notifier(str(tmp_path / "notify"), watchdog_s)
        patient = Patient()
        heartbeat = Heartbeat(notifier, patient, lambda: 0)

        async def hear():
            loop = asyncio.get_running_loop()
            return (await asyncio.wait_for(loop.sock_recv(manager, 4096), 10)).decode().split("\n")

        try:
            await script(heartbeat, patient, hear)
        finally:
            heartbeat.close()
            notifier.close()

    asyncio.run(run())


def test_a_life(manager, tmp_path):
    async def script(heartbeat, _patient, hear):
        heartbeat.start()
        first = await hear()
        assert "EXTEND_TIMEOUT_USEC=30000000" in first
        assert any(line.startswith("STATUS=starting: ") for line in first)
        assert not any("WATCHDOG" in line for line in first), "nobody asked for it"
        serving = "STATUS=2/2 models ready, 3/4 workers, 0 requests/s, 7 rows queued"
        heartbeat.ready()
        assert await hear() == ["READY=1", serving], "with what is true from now on"
        heartbeat.reloading()
        began = await hear()
        assert began[0] == "RELOADING=1"
        assert began[1].startswith("MONOTONIC_USEC=")
        heartbeat.ready()
        assert await hear() == ["READY=1", serving]
        heartbeat.stopping()
        heartbeat.ready()  # of a reload that was under way
        assert (await hear())[:2] == ["STOPPING=1", "EXTEND_TIMEOUT_USEC=30000000"]
        late = await hear()
        assert "STOPPING=1" not in late, "told once"
        assert late[0] == "EXTEND_TIMEOUT_USEC=30000000"

    beats(manager, tmp_path, script)


def test_the_watchdog_is_fed_while_all_is_well_and_again_when_it_is(manager, tmp_path, caplog):
    async def script(heartbeat, patient, hear):
        heartbeat.start()
        heartbeat.ready()
        await hear()
        assert "WATCHDOG=1" in await hear()
        assert "WATCHDOG=1" in await hear()
        patient.batches = [Batch("m", -1e6, 1.0)]
        heard = await hear()
        while heard == ["WATCHDOG=1"]:
            heard = await hear()
        assert "WATCHDOG=1" not in heard
        assert heard[0].startswith("STATUS=a batch of model 'm' has run")
        patient.batches = []
        assert "WATCHDOG=1" in await hear()

    beats(manager, tmp_path, script, watchdog_s=0.15)
    assert [record.levelname for record in caplog.records] == ["ERROR"]


def test_what_the_manager_did_not_hear_is_said_again(manager, tmp_path):
    async def script(heartbeat, _patient, hear):
        while heartbeat._notifier.send("X=1"):
            pass
        heartbeat.start()
        heartbeat.ready()
        heard = await hear()
        while heard == ["X=1"]:
            heard = await hear()
        assert heard[0] == "READY=1"
        assert any(line.startswith("STATUS=") for line in heard)

    beats(manager, tmp_path, script, watchdog_s=0.3)


def test_without_a_manager_there_is_no_heartbeat():
    async def run():
        heartbeat = Heartbeat(Notifier(), Patient(), lambda: 0)
        heartbeat.start()
        heartbeat.ready()
        assert heartbeat._timer is None

    asyncio.run(run())
