"""Pipelines on real workers: in an engine of this process, and as clients of a server see them."""

from __future__ import annotations

import asyncio
import io
import itertools
import json
import os
import subprocess
import sys
import time
from math import inf

import numpy as np
import psutil
import pytest
from PIL import Image

from pool import (
    AsyncClient,
    Client,
    DeadlineExceeded,
    InvalidInput,
    ModelError,
    ModelNotFound,
    Overloaded,
    PoolError,
    SignatureNotFound,
    Unavailable,
    VersionNotFound,
)
from pool.backends import drill
from pool.backends.drill import Fault
from pool.config import load_config
from pool.embedded.calls import Calls
from pool.front.engine import Engine
from pool.front.reloading import reload
from tests import models

PATIENCE_S = 40.0

GLUE = """
import io, os, time
import numpy as np
from PIL import Image
from pool.python import model

@model(inputs={"x": "float32 [any, 4]"}, outputs={"y": "float32 [any, 4]"})
def inc(x):
    return x + np.float32(1)

@model(inputs={"jpeg": "string [1]"}, outputs={"crops": "float32 [any, 4]"}, batched=False)
def crops(jpeg):
    # As many rows as the picture is wide.
    picture = np.asarray(Image.open(io.BytesIO(jpeg[0])).convert("L"), np.float32)
    return np.repeat(picture[0][:, None], 4, axis=1)

@model(
    inputs={"y": "float32 [any, 4]"},
    outputs={"name": "string [any]", "count": "int64 []"},
    batched=False,
)
def names(y):
    return {"name": ["light" if v > 128 else "dark" for v in y[:, 0]], "count": np.int64(len(y))}
"""


@pytest.fixture(autouse=True)
def _nothing_is_left_behind():
    """Here workers are replaced within a test: stopping looks for what is left instead."""
    return


def drills(*names, **keys):
    settings = "".join(f"{key} = {value}\n" for key, value in keys.items())
    return "".join(f'[models.{name}]\nbackend = "drill"\npath = "d.toml"\n{settings}' for name in names)


def glue(*names, **keys):
    settings = "".join(f"{key} = {value}\n" for key, value in keys.items())
    return "".join(
        f'[models.{name}]\nbackend = "python"\npath = "glue.py:{name}"\n{settings}' for name in names
    )


def drilled(name, x, number):
    """A step whose faults are the request's own."""
    faults = f'fault = "request.f{number}", argument = "request.a{number}"'
    return f'{{ name = "s{number}", model = "{name}", inputs = {{ x = "{x}", {faults} }} }}'


def chain(name, *names):
    sources = ["request.x", *(f"s{i}.y" for i in range(len(names)))]
    steps = [drilled(model, sources[i], i) for i, model in enumerate(names)]
    return f"[pipelines.{name}]\nsteps = [\n{','.join(steps)}\n]\n"


def inputs(x, faults=None, steps=3):
    """Of a chain: {step: (fault, argument)} holds for all rows of the request."""
    given = {"x": np.asarray(x, np.float32)}
    for i in range(steps):
        fault, argument = (faults or {}).get(i, (0, 0))
        given[f"f{i}"] = np.full(len(x), fault, np.int32)
        given[f"a{i}"] = np.full(len(x), argument, np.float32)
    return given


def rows(n, value):
    return np.full((n, 4), value, np.float32)


def answer(x, steps=3, version=1):
    for _ in range(steps):
        x = drill.answer(x, version)
    return x


def write(folder, text, drill_text=""):
    (folder / "glue.py").write_text(GLUE)
    (folder / "d.toml").write_text(drill_text)
    file = folder / "pool.toml"
    file.write_text(text)
    return file


async def until(condition):
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        await asyncio.sleep(0.002)


class Site:
    """An engine in this process, asked as an application asks its own."""

    def __init__(self, engine):
        self.engine = engine
        self.calls = Calls(engine, "safe")

    async def predict(self, name, given, timeout=inf, priority=None):
        future = self.calls.begin(name, given, None, None, None, None, priority, timeout, False)
        try:
            got = await future
        except asyncio.CancelledError:
            self.calls.give_up(future)
            raise
        if isinstance(got, PoolError):
            raise got
        return got

    def came_to(self, pipeline, step):
        return self.engine.pipelines.metrics[pipeline].steps[step].requests

    @property
    def is_empty(self):
        """Whether no row is left in any arena, and nobody waits."""
        return not self.engine.pipelines.executions and all(
            model.serving.generation.batcher.is_idle for model in self.engine.models.values()
        )

    def worker(self, model):
        return self.engine.models[model].serving.replicas.workers[0]


def scene(file, act):
    async def main():
        engine = Engine(load_config(file))
        try:
            await asyncio.wait_for(engine.start(), PATIENCE_S)
            site = Site(engine)
            await act(site)
            await until(lambda: site.is_empty)
        finally:
            await engine.stop()

    asyncio.run(main())


# -- in an engine ----------------------------------------------------------------------------------


def test_cancel_and_deadline_at_every_step_leave_no_row(tmp_path):
    """Where the step runs, and where it waits for room, because somebody else has the only slot."""
    file = write(tmp_path, drills("a", "b", "c", slots=1, max_batch_size=4) + chain("p", "a", "b", "c"))

    async def act(site):
        for step, waits, by in itertools.product(range(3), (False, True), ("cancel", "deadline")):
            if waits and step == 0:
                continue  # there it would be refused
            before = site.came_to("p", f"s{step}")
            sleeps = {step - 1: (Fault.SLEEP, 0.1)} if waits else {step: (Fault.SLEEP, 0.4)}
            timeout = 0.25 if by == "deadline" else inf
            task = asyncio.ensure_future(site.predict("p", inputs(rows(2, 2), sleeps), timeout))
            await asyncio.sleep(0)
            sleeper = None
            if waits:
                sleep = chained(rows(4, 1)) | {"fault": np.full(4, Fault.SLEEP, np.int32)}
                sleep["argument"][...] = 0.5
                sleeper = asyncio.ensure_future(site.predict("abc"[step], sleep))
            await until(lambda b=before, s=step: site.came_to("p", f"s{s}") > b)
            assert site.engine.pipelines.waiting.of("p") == ({f"s{step}": 1} if waits else {})
            if by == "cancel":
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            else:
                with pytest.raises(DeadlineExceeded, match=f"step 's{step}' of pipeline 'p': no answer with"):
                    await task
            assert site.engine.pipelines.waiting.of("p") == {}
            if sleeper is not None:
                assert np.array_equal((await sleeper)["y"], answer(rows(4, 1), 1))
            await until(lambda: site.is_empty)
        got = await site.predict("p", inputs(rows(3, 5)))
        assert np.array_equal(got["y"], answer(rows(3, 5)))

    scene(file, act)


def test_pipelines_that_want_each_others_slots_do_not_wait_for_ever(tmp_path):
    """Each model has one slot; each pipeline ends where the other one begins; far more than fits is asked."""
    text = drills("a", "b", slots=1, max_batch_size=2) + chain("there", "a", "b") + chain("back", "b", "a")
    file = write(tmp_path, text)

    async def act(site):
        done = {"OK": 0, "OVERLOADED": 0}

        async def user(number):
            name = "there" if number % 2 else "back"
            for i in range(12):
                x = rows(1 + i % 2, number * 100 + i)
                while True:
                    try:
                        got = await site.predict(name, inputs(x, steps=2))
                    except Overloaded:
                        done["OVERLOADED"] += 1
                        await asyncio.sleep(0.001)
                        continue
                    break
                assert np.array_equal(got["y"], answer(x, steps=2))
                done["OK"] += 1

        await asyncio.wait_for(asyncio.gather(*map(user, range(16))), PATIENCE_S)
        assert done["OK"] == 16 * 12
        steps = [s for p in site.engine.pipelines.metrics.values() for s in p.steps.values()]
        assert sum(step.waited for step in steps) > 0, "there was nothing to wait for"

    scene(file, act)


def test_a_worker_killed_in_the_middle_costs_nobody_the_answer(tmp_path):
    file = write(tmp_path, drills("a", "b", "c", max_batch_size=8) + chain("p", "a", "b", "c"))

    async def act(site):
        asked = [
            asyncio.ensure_future(site.predict("p", inputs(rows(1, i), {1: (Fault.SLEEP, 0.3)})))
            for i in range(6)
        ]
        await until(lambda: site.worker("b").slot is not None)
        psutil.Process(site.worker("b").pid).kill()
        for i, got in enumerate(await asyncio.gather(*asked)):
            assert np.array_equal(got["y"], answer(rows(1, i)))
        assert site.worker("b").restarts + site.worker("b").failures > 0

    scene(file, act)


def test_a_faulty_row_fails_its_own_request_at_its_step(tmp_path):
    file = write(tmp_path, drills("a", "b", "c", max_batch_size=16) + chain("p", "a", "b", "c"))

    async def act(site):
        # Something to keep the first model busy: all others then share batches.
        first = asyncio.ensure_future(site.predict("p", inputs(rows(1, 0), {0: (Fault.SLEEP, 0.2)})))
        await until(lambda: site.worker("a").slot is not None)
        faults = {3: {1: (Fault.RAISE, 0)}, 5: {2: (Fault.EXIT, 7)}, 6: {0: (Fault.RAISE, 0)}}
        asked = [site.predict("p", inputs(rows(1, i), faults.get(i))) for i in range(10)]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        for i, got in enumerate(answers):
            if i not in faults:
                assert np.array_equal(got["y"], answer(rows(1, i)))
        for i, step in ((3, "s1"), (6, "s0")):
            assert isinstance(answers[i], ModelError)
            assert str(answers[i]).startswith(f"step '{step}' of pipeline 'p': row ")
        assert answers[5].code == "WORKER_LOST"
        assert str(answers[5]).startswith("step 's2' of pipeline 'p': the worker running the batch")
        with pytest.raises(PoolError, match="step 's2' of pipeline 'p': the same request came before"):
            await site.predict("p", inputs(rows(1, 5), faults[5]))
        await first

    scene(file, act)


def test_a_model_given_up_makes_its_pipelines_unavailable(tmp_path):
    file = write(tmp_path, drills("a", "b", "c", slots=1) + chain("p", "a", "b", "c") + chain("q", "a"))

    async def act(site):
        given = inputs(rows(1, 0), {1: (Fault.SLEEP, 0.3)})
        asked = [asyncio.ensure_future(site.predict("p", given))]
        await until(lambda: site.worker("b").slot is not None)
        asked.append(asyncio.ensure_future(site.predict("p", given)))
        await until(lambda: site.engine.pipelines.waiting.of("p") == {"s1": 1})
        serving = site.engine.models["b"].serving
        site.engine.failed(serving, "told so")
        for error in await asyncio.gather(*asked, return_exceptions=True):
            if isinstance(error, dict):
                continue  # the batch that ran may end
            assert isinstance(error, Unavailable)
            assert "step 's1' of pipeline 'p': model 'b' is failed" in str(error)
        with pytest.raises(Unavailable, match="model 'b' is failed: its workers keep ending: told so"):
            await site.predict("p", given)
        assert site.engine.readiness() == {"a": True, "b": False, "c": True, "p": False, "q": True}
        assert np.array_equal(
            (await site.predict("q", inputs(rows(1, 1), steps=1)))["y"], answer(rows(1, 1), 1)
        )
        site.engine.models["b"].state = "ready"

    scene(file, act)


def test_a_reload_is_all_or_nothing_and_what_was_admitted_ends_as_it_began(tmp_path):
    base = drills("a", "b") + chain("p", "a", "b")
    file = write(tmp_path, base)

    async def act(site):
        engine = site.engine
        worker = psutil.Process(site.worker("a").pid)
        worker.suspend()
        slow = asyncio.ensure_future(site.predict("p", inputs(rows(1, 1), steps=2)))
        await until(lambda: site.worker("a").slot is not None)
        # Other models under it, another one beside it, and one step more.
        (tmp_path / "d.toml").write_text("version = 2")
        more = drills("a", "b", "c", max_batch_size=32) + chain("p", "a", "b", "c") + chain("q", "c")
        file.write_text(more)
        changes = [str(change) for change in await reload(engine, load_config(file))]
        assert (
            "pipelines.p.steps: s0 > s1 -> s0 > s1 > s2: wired anew; what was admitted goes on as it began"
            in (changes)
        )
        assert "pipelines.q: added: its models are wired" in changes
        assert not slow.done()
        worker.resume()
        got = await site.predict("p", inputs(rows(2, 3)))
        assert np.array_equal(got["y"], answer(rows(2, 3), 3, version=2))
        assert np.array_equal((await slow)["y"], answer(rows(1, 1), 2, version=1)), "the models it began with"
        # What does not fit changes nothing.
        file.write_text(more.replace('x = "s0.y"', 'x = "s0.pid"') + chain("r", "c"))
        with pytest.raises(
            PoolError, match=r"pipelines\.p\.steps\[1\]\.inputs\.x: must be float32 \[any, 4\]"
        ):
            await reload(engine, load_config(file))
        assert list(engine.pipelines.served) == ["p", "q"]
        got = await site.predict("p", inputs(rows(1, 3)))
        assert np.array_equal(got["y"], answer(rows(1, 3), 3, version=2))
        # And they go.
        file.write_text(drills("a", "b", "c", max_batch_size=32) + chain("q", "c"))
        changes = await reload(engine, load_config(file))
        assert [str(change) for change in changes] == [
            "pipelines.p: removed: a pipeline answers what it admitted, and ends"
        ]
        with pytest.raises(ModelNotFound, match="no model 'p'; wanted one of 'a', 'b', 'c', 'q'"):
            await site.predict("p", inputs(rows(1, 3)))

    scene(file, act)


def test_those_under_way_are_finished_before_the_end(tmp_path):
    file = write(tmp_path, drills("a", "b", slots=1) + chain("p", "a", "b"))

    async def act(site):
        sleep = {0: (Fault.SLEEP, 0.15), 1: (Fault.SLEEP, 0.15)}
        asked = [asyncio.ensure_future(site.predict("p", inputs(rows(1, 0), sleep, 2)))]
        await until(lambda: site.worker("b").slot is not None)
        asked.append(asyncio.ensure_future(site.predict("p", inputs(rows(1, 1), sleep, 2))))
        await asyncio.sleep(0)
        assert await site.engine.drain(PATIENCE_S)
        for i, got in enumerate(await asyncio.gather(*asked)):
            assert np.array_equal(got["y"], answer(rows(1, i), 2))
        with pytest.raises(Unavailable, match="stopping"):
            await site.predict("p", inputs(rows(1, 0), None, 2))

    scene(file, act)


def test_those_that_cannot_be_finished_are_told(tmp_path):
    file = write(tmp_path, drills("a", "b", slots=1) + chain("p", "a", "b"))

    async def main():
        engine = Engine(load_config(file))
        await engine.start()
        site = Site(engine)
        sleep = {1: (Fault.SLEEP, 0.3)}
        asked = []
        for i in range(3):
            asked.append(asyncio.ensure_future(site.predict("p", inputs(rows(1, i), sleep, 2))))
            await until(lambda n=i: site.came_to("p", "s1") == n + 1)
        await engine.stop()
        answers = await asyncio.gather(*asked, return_exceptions=True)
        assert [type(each) for each in answers[1:]] == [Unavailable] * 2
        assert "step 's1' of pipeline 'p': the server is stopping" in str(answers[2])

    asyncio.run(main())


# -- a server --------------------------------------------------------------------------------------

PIPELINES = """
[pipelines.chain]
steps = [
    { model = "inc", inputs = { x = "request.x" } },
    { model = "d", inputs = { x = "inc.y", fault = "request.fault", argument = "request.argument" } },
    { name = "again", model = "inc", inputs = { x = "d.y" } },
]
outputs = { y = "again.y", first = "inc.y", pid = "d.pid" }
request_timeout_ms = 30_000.0

[pipelines.label]
steps = [
    { model = "crops", inputs = { jpeg = "request.jpeg" } },
    { model = "inc", inputs = { x = "crops.crops" } },
    { model = "names", inputs = { y = "inc.y" } },
]
"""


@pytest.fixture(scope="module")
def server(start_server, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipelines")
    text = (
        drills("d", max_batch_size=64)
        + glue("inc", max_batch_size=64)
        + glue("crops", "names", max_rows_bytes=65536, slots=64)
        + PIPELINES
    )
    write(folder, "", "batch_s = 0.002")
    with start_server(folder, text) as server:
        yield server


def chained(x):
    return {"x": x, "fault": np.zeros(len(x), np.int32), "argument": np.zeros(len(x), np.float32)}


def right(got, x):
    return np.array_equal(got["first"], x + 1) and np.array_equal(got["y"], drill.answer(x + 1, 1) + 1)


def jpeg(width, level):
    out = io.BytesIO()
    Image.fromarray(np.full((8, width, 3), level, np.uint8)).save(out, "JPEG")
    return out.getvalue()


def test_to_a_client_it_is_a_model(server):
    with Client(server.endpoint) as client:
        info = client.signature("chain")
        (signature,) = info.signatures
        assert signature.batched
        assert [(s.name, s.describe()) for s in signature.inputs] == [
            ("x", "float32 [any, 4]"),
            ("fault", "int32 [any]"),
            ("argument", "float32 [any]"),
        ]
        assert [s.name for s in signature.outputs] == ["y", "first", "pid"]
        assert client.models()["chain"] == {"version": 1, "ready": True, "signatures": ["serving_default"]}
        assert client.ready("chain")
        assert client.ready()
        for n in (1, 3, 0, 150):
            x = rows(n, n)
            assert right(client.predict("chain", chained(x), version=1), x)
        x = rows(2, 7)
        assert list(client.predict("chain", chained(x), outputs=["first"])) == ["first"]
        got = client.predict("chain", chained(x), timeline=True, priority=0)
        assert right(got, x)
        assert got.timeline.total_ns > 0
        with pytest.raises(VersionNotFound, match="pipeline 'chain' has no version 2; wanted 1"):
            client.predict("chain", chained(x), version=2)
        with pytest.raises(SignatureNotFound):
            client.predict("chain", chained(x), signature="other")
        with pytest.raises(InvalidInput, match="no output 'z'"):
            client.predict("chain", chained(x), outputs=["z"])
        with pytest.raises(InvalidInput):
            client.predict("chain", {"x": x})
        with pytest.raises(DeadlineExceeded):
            client.predict("chain", {**chained(x), "fault": [Fault.SLEEP] * 2, "argument": [0.5] * 2},
                           timeout=0.1, cast="same_kind")  # fmt: skip


def test_users_are_batched_together_at_every_step(server):
    async def ask():
        async with AsyncClient(server.endpoint) as one, AsyncClient(server.endpoint) as other:
            before = await one.status()

            async def user(number):
                client = one if number % 2 else other
                for i in range(5):
                    x = rows(1 + i % 3, number * 10 + i)
                    assert right(await client.predict("chain", chained(x)), x)

            await asyncio.gather(*map(user, range(60)))
            return before, await one.status()

    before, after = asyncio.run(ask())
    for name in ("inc", "d"):
        was, now = before["models"][name], after["models"][name]
        assert (now["rows"] - was["rows"]) / (now["batches"] - was["batches"]) > 3, name
    was, now = before["pipelines"]["chain"], after["pipelines"]["chain"]
    assert now["answers"]["OK"] - was["answers"].get("OK", 0) == 300
    assert [step["name"] for step in now["steps"]] == ["inc", "d", "again"]
    for a, b in zip(was["steps"], now["steps"], strict=True):
        assert b["requests"] - a["requests"] == 300
        assert b["waiting"] == 0
    assert now["under_way"] == 0
    assert sum(now["stages"]["total"]["counts"]) - sum(was["stages"]["total"]["counts"]) == 300
    assert after["front"]["requests"] - before["front"]["requests"] == 300


def test_a_picture_becomes_many_rows_and_names_come_out(server):
    async def ask():
        async with AsyncClient(server.endpoint) as client:
            before = (await client.status())["models"]["inc"]

            async def user(number):
                width, level = 1 + number * 3, 40 if number % 2 else 220
                got = await client.predict("label", {"jpeg": [jpeg(width, level)]})
                assert got["count"] == width
                assert got["name"].tolist() == [b"dark" if number % 2 else b"light"] * width
                return width

            widths = await asyncio.gather(*map(user, range(30)))
            with pytest.raises(ModelError, match="step 'crops' of pipeline 'label': UnidentifiedImageError"):
                await client.predict("label", {"jpeg": [b"no picture"]})
            after = (await client.status())["models"]["inc"]
            assert after["rows"] - before["rows"] == sum(widths)
            return (after["rows"] - before["rows"]) / (after["batches"] - before["batches"])

    assert asyncio.run(ask()) > 16, "pictures of one user each would be batches of their own"


def test_large_inputs_by_memory_of_the_client(server):
    x = np.random.default_rng(1).random((900, 4), np.float32).repeat(12, axis=0)[:960]
    with Client(server.endpoint) as client:
        for _ in range(3):
            assert right(client.predict("chain", chained(x)), x)


def test_requests_of_a_client_that_is_gone_are_let_go(server):
    script = f"""
import numpy as np, sys
from pool import Client
x = np.zeros((4, 4), np.float32)
print("asking", flush=True)
Client({server.endpoint!r}).predict("chain", {{
    "x": x, "fault": np.full(4, {int(Fault.SLEEP)}, np.int32), "argument": np.full(4, 1, np.float32)}})
"""
    with Client(server.endpoint) as client:
        before = client.status()["pipelines"]["chain"]["steps"][1]["requests"]
        process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
        deadline = time.monotonic() + PATIENCE_S
        while client.status()["pipelines"]["chain"]["steps"][1]["requests"] == before:
            assert time.monotonic() < deadline
        process.kill()
        process.communicate()
        while client.status()["pipelines"]["chain"]["under_way"]:
            assert time.monotonic() < deadline
        assert client.status()["models"]["d"]["queue_rows"] == 0
        x = rows(1, 1)
        assert right(client.predict("chain", chained(x)), x)


def test_the_commands_show_it(server):
    def run(*arguments):
        command = [sys.executable, "-m", "pool", *arguments]
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, env=os.environ | {"COLUMNS": "200"}
        )
        return done.stdout

    status = run("status", "--endpoint", server.endpoint)
    assert "chain" in status
    assert "inc > d > again" in status
    checked = json.loads(run("check", "--json", str(server.config)))["pipelines"]["label"]
    assert [step["model"] for step in checked["steps"]] == ["crops", "inc", "names"]
    (signature,) = checked["signatures"]
    assert not signature["batched"]
    text = run("check", str(server.config))
    assert "label, pipeline" in text
    assert "crops > inc > names" in text


def test_check_tells_what_does_not_fit(tmp_path):
    two = "\n".join(line for line in PIPELINES.split("[pipelines.label]")[0].split("\n") if '"d"' not in line)
    text = glue("inc", "names") + two.replace('"d.y"', '"inc.z"').replace(', pid = "d.pid"', "")
    file = write(tmp_path, text)
    done = subprocess.run(
        [sys.executable, "-m", "pool", "check", str(file)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr == (
        f'{file}: pipelines.chain.steps[1].inputs.x: must be an output of that step (y), got "inc.z"\n'
    )


def test_metrics_count_it(start_server, tmp_path):
    import urllib.request

    write(tmp_path, "")
    with (
        start_server(
            tmp_path, drills("a", "b") + chain("p", "a", "b"), server='metrics = "127.0.0.1:*"'
        ) as server,
        Client(server.endpoint) as client,
    ):
        client.predict("p", inputs(rows(2, 1), steps=2))
        with pytest.raises(ModelError):
            client.predict("p", inputs(rows(2, 1), {1: (Fault.RAISE, 0)}, steps=2))
        address = client.status()["front"]["metrics"]
        with urllib.request.urlopen(f"http://{address}/metrics") as page:
            text = page.read().decode()
        with urllib.request.urlopen(f"http://{address}/ready/p") as page:
            assert page.read() == b"p ready\n"
    assert 'pool_requests_total{code="OK",model="p"} 1.0' in text
    assert 'pool_requests_total{code="MODEL_ERROR",model="p"} 1.0' in text
    assert 'pool_requests_total{code="OK",model="a"} 0.0' in text
    assert 'pool_model_ready{model="p"} 1.0' in text
    assert 'pool_step_requests_total{pipeline="p",step="s1"} 2.0' in text
    assert 'pool_step_errors_total{pipeline="p",step="s1"} 1.0' in text
    assert 'pool_step_seconds_count{pipeline="p",step="s0"} 2.0' in text
    assert 'pool_pipeline_requests{pipeline="p"} 0.0' in text
    assert 'pool_stage_seconds_count{model="p",stage="total"} 1.0' in text


DESCRIBE = """
import io
import numpy as np
from PIL import Image
from pool.python import model

@model(inputs={"jpeg": "string [any]"}, outputs={"level": "float32 [any]", "name": "string [any]"})
def describe(jpeg):
    level = np.array([np.asarray(Image.open(io.BytesIO(j)).convert("L")).mean() for j in jpeg], np.float32)
    return {"level": level, "name": ["light" if v > 128 else "dark" for v in level]}
"""

CLASSIFY = """
[pipelines.classify]
steps = [
    { model = "describe", inputs = { jpeg = "request.jpeg" } },
    { model = "root", inputs = { x = "describe.level" } },
    { model = "upper", inputs = { text = "describe.name" } },
]
outputs = { root = "root.y", name = "upper.upper", length = "upper.length" }
"""


def test_tensorflow_models_behind_a_function(start_server, tmp_path):
    """Bytes of a JPEG in, names out, between slots of three models in two backends."""
    (tmp_path / "glue.py").write_text(DESCRIBE)
    text = glue("describe") + CLASSIFY
    for name, model in (("root", "raising"), ("upper", "strings")):
        text += f'[models.{name}]\npath = "{models.path(model)}"\nmax_batch_size = 8\n'
    levels = [10, 60, 130, 250]
    with start_server(tmp_path, text) as server, Client(server.endpoint) as client:
        pictures = [jpeg(16, level) for level in levels]
        got = client.predict("classify", {"jpeg": pictures * 3})
        assert got["root"] ** 2 == pytest.approx(np.array(levels * 3, np.float32), abs=1)
        assert got["name"].tolist() == [b"DARK", b"DARK", b"LIGHT", b"LIGHT"] * 3
        assert got["length"].tolist() == [4, 4, 5, 5] * 3
