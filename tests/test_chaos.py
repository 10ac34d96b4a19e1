"""`pool chaos`: how its clients account for servers that misbehave, and a short drill of a real one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from itertools import islice

import numpy as np
import psutil
import pytest

from pool import Client, wire
from pool.backends import drill
from pool.cli import chaos
from pool.cli.chaos_client import PLAYERS, Questions, Task
from pool.cli.chaos_crew import Member
from pool.cli.chaos_faults import KINDS, POISONS, Target, is_whole, plans
from pool.cli.chaos_tally import Tally
from pool.errors import ConfigError, ModelError, ModelNotFound, Overloaded, WorkerLost
from pool.wire import Header, Kind, ResultMeta, TensorMeta
from tests.scripted_server import answer_properly, info, scripted_server, signature_document

PATIENCE_S = 40.0
ROW_ITEMS = 3
VERSION = 7  # of the scripted server


@pytest.fixture(autouse=True)
def _nothing_is_left_behind():
    """Here workers are replaced within a test; `start_server` sees to it that the server ends in order."""
    return


@pytest.fixture
def endpoint():
    # Not tmp_path: its name may be longer than the path of a Unix socket.
    with tempfile.TemporaryDirectory(prefix="pool-") as directory:
        yield f"ipc://{directory}/s"


# -- counting --------------------------------------------------------------------------------------


def test_every_request_is_counted_once():
    tally = Tally()
    tally.answer()
    tally.answer("wrong: it is")
    tally.fail(ModelError("m"), is_innocent=True)
    tally.fail(ModelError("m"), is_innocent=False)
    tally.fail(Overloaded("o"), is_innocent=True)
    tally.lose("lost: it is")
    tally.repeat("duplicated: it is")
    both = Tally()
    both.add(tally)
    both.add(tally)
    assert (tally.requests, tally.answered, tally.wrong, tally.lost, tally.duplicated) == (6, 1, 1, 1, 1)
    assert (tally.errors, tally.harmed) == ({"MODEL_ERROR": 2, "OVERLOADED": 1}, {"MODEL_ERROR": 1})
    assert (both.requests, both.errors["MODEL_ERROR"], both.harmed) == (12, 4, {"MODEL_ERROR": 2})
    # What must never happen is told before what may.
    assert [each.split(":")[0] for each in both.examples] == ["wrong", "lost", "duplicated", "wrong", "lost"]


def test_a_report_adds_up():
    rss = [100] * 60 + [200] * 60 + [300] * 30 + [400] * 30
    recoveries = {"kill": [0.5, None, 0.1], "hang": [None]}
    report = chaos.summarize(5, Tally(requests=2, answered=2), recoveries, rss, [])
    assert report["front_rss"] == {"second_minute_bytes": 200, "last_minute_bytes": 350}
    assert report["faults"] == {
        "hang": {"count": 1, "unrecovered": 1, "median_s": None, "worst_s": None},
        "kill": {"count": 3, "unrecovered": 1, "median_s": 0.3, "worst_s": 0.5},
    }
    short = chaos.summarize(5, Tally(), {}, rss[:90], [])
    assert short["front_rss"] == {"second_minute_bytes": None, "last_minute_bytes": 150}


def test_plans_are_those_of_the_seed_and_leave_no_kind_out():
    first = list(islice(plans(tuple(KINDS), 1.0, 3), 3 * len(KINDS)))
    assert first == list(islice(plans(tuple(KINDS), 1.0, 3), 3 * len(KINDS)))
    assert first != list(islice(plans(tuple(KINDS), 1.0, 4), 3 * len(KINDS)))
    for start in range(0, len(first), len(KINDS)):
        assert {plan.kind for plan in first[start : start + len(KINDS)]} == set(KINDS)
    assert all(0 <= plan.row < plan.rows and 0 <= plan.victim < 1 for plan in first)


def test_questions_differ_and_know_their_answers():
    questions = Questions(task("raw", "ipc:///nowhere"))
    asked = [questions.next() for _ in range(50)]
    assert len({inputs["x"].tobytes() for inputs in asked}) == 50
    assert {len(inputs["x"]) for inputs in asked} >= {1, 2, 8}
    one = next(inputs for inputs in asked if len(inputs["x"]) > 1)
    y = drill.answer(one["x"], VERSION)
    assert questions.mistake(one, {"y": y}) == ""
    assert "row 0 of" in questions.mistake(one, {"y": y[::-1]})
    assert "shape" in questions.mistake(one, {"y": y[1:]})
    assert "without" in questions.mistake(one, {})


def test_a_server_is_whole_when_all_are_at_work_and_the_victims_gone():
    def status(*workers, zygote=9, backend="drill"):
        listed = [{"pid": pid, "state": state} for pid, state in workers]
        return {"models": {"m": {"workers": listed}}, "zygotes": [{"backend": backend, "pid": zygote}]}

    target = Target("m", 1, 3, 2)
    assert is_whole(status((1, "ready"), (2, "busy")), target, [3])
    assert not is_whole(status((1, "ready"), (2, "busy")), target, [2])
    assert not is_whole(status((1, "ready"), (2, "busy")), target, [9])
    assert not is_whole(status((1, "ready"), (None, "backoff")), target)
    assert not is_whole(status((1, "ready"), (2, "busy"), backend="tensorflow"), target)


# -- clients of servers that misbehave -------------------------------------------------------------


def task(kind, endpoint, **fields):
    defaults = {
        "model": "m",
        "version": VERSION,
        "row_items": ROW_ITEMS,
        "max_rows": 8,
        "rate": 300.0,
        "window": 8,
        "patience_s": PATIENCE_S,
        "seed": 1,
    }
    return Task(kind=kind, is_local=True, endpoint=endpoint, **(defaults | fields))


def right(header, tensors):
    """The answer of a drill model."""
    x = np.frombuffer(tensors[0], np.float32).reshape(-1, ROW_ITEMS)
    meta = ResultMeta(VERSION, (TensorMeta("y", "float32", (ROW_ITEMS,)), TensorMeta("pid", "int64", ())))
    reply = Header(Kind.RESULT, header.id, wire.encode_meta(meta), rows=header.rows)
    y = drill.answer(x, VERSION)
    return [wire.encode_header(reply), y.tobytes(), np.ones(header.rows, np.int64).tobytes()]


def sometimes(answer, *, every=10):
    """A script: every tenth prediction is answered like that, the others rightly."""
    seen = [0]

    def script(header, tensors):
        if header.kind is Kind.SIGNATURE:
            return [info(header.id, signature_document(signatures=[drill.signature(ROW_ITEMS)]))]
        if header.kind is not Kind.PREDICT:
            return answer_properly(header, tensors)
        seen[0] += 1
        return answer(header, tensors) if seen[0] % every == 0 else [right(header, tensors)]

    return script


def play(kind, endpoint, script, is_enough, **fields):
    """The tally of a client that was told to stop when it had seen enough."""
    with scripted_server(endpoint, script):
        member = Member(task(kind, endpoint, **fields))
        try:
            member.await_ready()
            assert member.await_news(lambda each: is_enough(each.tally), PATIENCE_S), member.tally
            member.finish()
            member.join(PATIENCE_S)
            assert member.failure is None
        finally:
            member.kill()
    tally = member.tally
    assert tally.requests == tally.answered + tally.wrong + tally.lost + sum(tally.errors.values())
    assert tally.answered
    return tally


@pytest.mark.parametrize("kind", PLAYERS)
def test_right_answers_are_just_that(kind, endpoint):
    tally = play(kind, endpoint, sometimes(lambda *_: [], every=10**9), lambda tally: tally.answered >= 100)
    assert tally.requests == tally.answered
    assert not tally.duplicated
    assert tally.examples == []


@pytest.mark.parametrize("kind", PLAYERS)
def test_wrong_answers_are_noticed(kind, endpoint):
    def wrong(header, tensors):
        frames = right(header, tensors)
        return [[frames[0], frames[1][:-4] + b"\0\0\x80?", frames[2]]]  # the last number is 1

    tally = play(kind, endpoint, sometimes(wrong), lambda tally: tally.wrong >= 3)
    assert tally.examples[0].startswith("wrong: row ")


@pytest.mark.parametrize("kind", PLAYERS)
def test_missing_answers_are_lost(kind, endpoint):
    tally = play(kind, endpoint, sometimes(lambda *_: []), lambda tally: tally.lost >= 3, patience_s=0.3)
    assert tally.examples[0].startswith("lost: no reply within 0.3 s")


@pytest.mark.parametrize("kind", PLAYERS)
def test_errors_are_counted_by_code_and_harm_the_innocent(kind, endpoint):
    errors = [WorkerLost("w"), Overloaded("o")]

    def refuse(header, _):
        errors.reverse()
        return [[wire.encode_error(header.id, errors[0])]]

    tally = play(kind, endpoint, sometimes(refuse), lambda tally: sum(tally.errors.values()) >= 4)
    assert tally.errors.keys() == {"WORKER_LOST", "OVERLOADED"}
    assert tally.harmed == {"WORKER_LOST": tally.errors["WORKER_LOST"]}


def test_a_second_answer_is_noticed(endpoint):
    twice = sometimes(lambda header, tensors: [right(header, tensors)] * 2)
    tally = play("raw", endpoint, twice, lambda tally: tally.duplicated >= 3)
    assert tally.requests == tally.answered
    assert tally.examples[0].startswith("duplicated: another reply to request ")


@pytest.mark.parametrize("kind", PLAYERS)
def test_a_client_that_cannot_start_says_why(kind, endpoint):
    with scripted_server(endpoint):
        member = Member(task(kind, endpoint, model="absent"))
        with pytest.raises(ModelNotFound, match="no model 'absent'"):
            member.await_ready()
        member.kill()


# -- whom not to drill -----------------------------------------------------------------------------


def test_a_server_without_a_drill_model_is_refused(endpoint):
    with scripted_server(endpoint), Client(endpoint) as client:
        with pytest.raises(ModelNotFound, match=r"no model of the drill backend .* configs/drill\.toml"):
            chaos.find_target(client, None)
        with pytest.raises(ModelNotFound, match="model 'm' is none of the drill backend"):
            chaos.find_target(client, "m")


def test_a_server_elsewhere_is_refused():
    done = pool_chaos("--endpoint", "tcp://192.0.2.1:5600")
    assert done.wait(PATIENCE_S) == 2
    out, err = done.communicate()
    assert out == ""
    assert "tcp://192.0.2.1:5600 may be another machine" in err


def test_processes_that_are_not_the_servers_own_are_refused():
    def status(front, zygote, worker):
        return {
            "front": {"pid": front},
            "zygotes": [{"backend": "drill", "pid": zygote}],
            "models": {"m": {"workers": [{"pid": worker}, {"pid": None}]}, "loading": {}},
        }

    me, parent = os.getpid(), os.getppid()
    assert chaos.own_front(status(parent, me, me)).pid == parent
    with pytest.raises(ConfigError, match="4194305 is not on this machine"):
        chaos.own_front(status(parent, me, 4_194_305))  # Linux has no pid beyond 2^22
    with pytest.raises(ConfigError, match="are not a server of this machine"):
        chaos.own_front(status(me, parent, me))


# -- a real server ---------------------------------------------------------------------------------

MODEL = """
[models.drill]
backend = "drill"
path = "{path}"
workers = 2
timeout_ms = 300
max_worker_memory_mb = 256
"""


@pytest.fixture(scope="module")
def server(start_server, tmp_path_factory):
    folder = tmp_path_factory.mktemp("chaos")
    (folder / "drill.toml").write_text("batch_s = 0.002")
    with start_server(folder, MODEL.format(path=folder)) as running:
        yield running


def pool_chaos(*arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "pool", "chaos", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def report_of(process, code=0):
    out, err = process.communicate(timeout=100)
    assert (process.returncode, err) == (code, ""), out
    report = json.loads(out)
    counted = report["answered"] + report["wrong"] + report["lost"] + sum(report["errors"].values())
    assert report["requests"] == counted
    return report


def test_a_short_drill_costs_nobody_an_answer(server):
    arguments = ("--endpoint", server.endpoint, "--minutes", "0.1", "--seed", "5", "--json")
    report = report_of(pool_chaos(*arguments, "--interval", "0.1", "--rate", "300"))
    assert (report["wrong"], report["lost"], report["duplicated"], report["harmed"]) == (0, 0, 0, {})
    assert report["answered"] > 100
    assert report["front_rss"]["last_minute_bytes"] > 1 << 20
    assert report["seed"] == 5
    faults = report["faults"]
    assert faults.keys() <= KINDS.keys()
    assert len(faults) > 3
    for fault in faults.values():
        assert 0 <= fault["median_s"] <= fault["worst_s"]
    # Requests at fault got the errors they ask for, and they alone.
    poisoned = sum(faults[kind]["count"] for kind in faults.keys() & POISONS.keys())
    assert report["errors"].get("MODEL_ERROR", 0) + report["errors"].get("WORKER_LOST", 0) <= poisoned


def test_interrupted_it_tells_what_it_saw(server):
    arguments = ("--endpoint", server.endpoint, "--minutes", "60", "--faults", "kill,client-kill", "--json")
    process = pool_chaos(*arguments, "--interval", "0.05", "--rate", "300")
    with Client(server.endpoint) as client:
        before = client.status()["front"]["requests"]
        while client.status()["front"]["requests"] < before + 300:
            assert process.poll() is None
    children = psutil.Process(process.pid).children()
    process.send_signal(signal.SIGINT)
    report = report_of(process)
    assert report["requests"] > 0
    assert not any(child.is_running() for child in children)


def test_a_front_that_dies_is_told(tmp_path, endpoint):
    (tmp_path / "drill.toml").write_text("")
    config = tmp_path / "pool.toml"
    config.write_text(f'[server]\nendpoints = ["{endpoint}"]\n{MODEL.format(path=tmp_path)}')
    with subprocess.Popen(
        [sys.executable, "-m", "pool", "serve", str(config)], stderr=subprocess.DEVNULL
    ) as front:
        try:
            with Client(endpoint) as client:
                while not client.ready():
                    assert front.poll() is None
                arguments = ("--endpoint", endpoint, "--minutes", "60", "--timeout", "1", "--json")
                process = pool_chaos(*arguments, "--interval", "0.05", "--faults", "kill")
                while client.status()["front"]["requests"] < 300:
                    assert process.poll() is None
        finally:
            front.kill()
        report = report_of(process, code=1)
    assert report["answered"] > 0
    assert f"the front, process {front.pid}, is gone" in report["failures"]


def test_what_it_shows_is_a_table(server):
    arguments = ("--endpoint", server.endpoint, "--minutes", "0.02", "--faults", "leak", "--interval", "0.1")
    out, err = (process := pool_chaos(*arguments)).communicate(timeout=100)
    assert (process.returncode, err) == (0, "")
    assert "duplicated" in out
    assert "leak" in out
