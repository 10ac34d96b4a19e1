"""What differs between two configurations, and what it costs."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest

from pool.config import Config, ModelConfig, ServerConfig
from pool.front import changes
from pool.front.changes import _MODEL_IN_PLACE, _SERVER_IN_PLACE, Cost, compare, of_model
from pool.pipelines import PipelineConfig, StepConfig

NOW = Config(models={"m": ModelConfig(path="/m", workers=2), "other": ModelConfig(path="/o")})


KEY = re.compile(r"`([a-z_]+)`")


def changed(**keys):
    models = NOW.models | {"m": msgspec.structs.replace(NOW.models["m"], **keys)}
    return Config(server=NOW.server, models=models)


def costs(then, slots=16, versions=None):
    return [(c.key, c.cost) for c in compare(NOW, then, {"m": slots, "other": 16}, versions or {})]


def test_nothing_differs():
    assert costs(NOW) == []


@pytest.mark.parametrize(
    ("keys", "cost"),
    [
        ({"timeout_ms": 5.0}, Cost.IN_PLACE),
        ({"max_queue_delay_ms": 5.0}, Cost.IN_PLACE),
        ({"workers": 3}, Cost.WORKERS),
        ({"workers": 1}, Cost.WORKERS),
        ({"workers": 8}, Cost.GENERATION),  # more than the arena has slots for
        ({"max_batch_size": 8}, Cost.GENERATION),
        ({"path": "/n"}, Cost.GENERATION),
        ({"version": 3}, Cost.GENERATION),
    ],
)
def test_a_key_costs_what_depends_on_it(keys, cost):
    assert costs(changed(**keys)) == [(f"models.m.{next(iter(keys))}", cost)]


def test_workers_that_move_are_new_ones():
    moved = changed(workers=3, devices=("cpu:0",))
    assert dict(costs(moved)) == {"models.m.workers": Cost.GENERATION, "models.m.devices": Cost.GENERATION}


def test_models_come_and_go():
    then = Config(models={"new": ModelConfig(path="/n"), "m": NOW.models["m"]})
    assert costs(then) == [("models.new", Cost.ADD), ("models.other", Cost.REMOVE)]


def test_a_name_that_begins_like_another_is_of_another_model():
    """Or what is added beside a model would have that loaded again."""
    now = Config(models={name: ModelConfig(path=f"/{name}") for name in ("m", "m.v2", "m.v4")})
    paths = {"m": "/m", "m.v2": "/new", "m.v3": "/v3", "m.workers": "/w"}
    then = Config(models={name: ModelConfig(path=path) for name, path in paths.items()})
    changes = compare(now, then, {}, {}, {"m.v2"})
    assert of_model(changes, "m") == []
    assert [change.cost for change in of_model(changes, "m.v2")] == [Cost.GENERATION]
    assert [change.cost for change in of_model(changes, "m.v3")] == [Cost.ADD]
    assert [change.cost for change in of_model(changes, "m.v4")] == [Cost.REMOVE]
    assert len(changes) == 4


def test_pipelines_come_change_and_go():
    step, more = (StepConfig(name=name, model="m", inputs={"x": "request.x"}) for name in ("a", "b"))
    now = msgspec.structs.replace(
        NOW, pipelines={"p": PipelineConfig(steps=(step,)), "old": PipelineConfig(steps=(step,))}
    )
    changed = PipelineConfig(steps=(step, more), outputs={"y": "a.y", "z": "b.y"}, max_requests=5)
    then = msgspec.structs.replace(NOW, pipelines={"p": changed, "new": PipelineConfig(steps=(step,))})
    rewired = Cost.REWIRE.value
    assert [str(change) for change in compare(now, then, {}, {})] == [
        f"pipelines.p.outputs: none -> y = a.y, z = b.y: {rewired}",
        f"pipelines.p.max_requests: 1024 -> 5: {rewired}",
        f"pipelines.p.steps: a -> a > b: {rewired}",
        "pipelines.new: added: its models are wired",
        "pipelines.old: removed: a pipeline answers what it admitted, and ends",
    ]
    assert compare(then, then, {}, {}) == []


def test_steps_that_do_something_else_are_told_apart():
    a = StepConfig(model="m", inputs={"x": "request.x"})
    b = StepConfig(model="other", name="b", inputs={"x": "m.y"})
    more = {"inputs": {"x": "m.y", "z": "request.z"}, "signature": "s"}
    now, then = (
        msgspec.structs.replace(NOW, pipelines={"p": PipelineConfig(steps=steps)})
        for steps in ((a, b), (a, msgspec.structs.replace(b, **more)))
    )
    (change,) = compare(now, then, {}, {})
    assert str(change) == (
        "pipelines.p.steps[1]: other(x = m.y) -> other(x = m.y, z = request.z), signature s: "
        + Cost.REWIRE.value
    )


def test_a_newer_version_is_a_change_of_a_file_that_has_none():
    assert costs(NOW, versions={"m": (1, 2)}) == [("models.m.version", Cost.GENERATION)]
    (change,) = compare(NOW, NOW, {}, {"m": (1, 2)})
    assert str(change) == "models.m.version: 1 -> 2: " + Cost.GENERATION.value
    assert costs(changed(path="/n"), versions={"m": (1, 2)}) == [("models.m.path", Cost.GENERATION)]


def test_what_failed_is_loaded_anew():
    (change,) = compare(NOW, NOW, {}, {}, {"m"})
    assert str(change) == "models.m: failed: it is loaded anew"
    (change,) = compare(NOW, changed(workers=3), {"m": 16}, {}, {"m"})
    assert change.key == "models.m.workers", "which says as much"


def test_what_the_socket_is_needs_a_restart():
    then = Config(server=ServerConfig(endpoints=("ipc:///x",), log_level="debug"), models=NOW.models)
    assert costs(then) == [("server.endpoints", Cost.RESTART), ("server.log_level", Cost.IN_PLACE)]
    (change, _) = compare(NOW, then, {}, {})
    assert str(change) == "server.endpoints: none -> [ipc:///x]: needs a restart"


def test_what_each_key_of_the_server_costs_is_documented():
    text = (Path(changes.__file__).parents[2] / "docs" / "operations.md").read_text()
    rows = [line for line in text.split("\n## 17 ")[1].split("\n## ")[0].splitlines() if line[:1] == "|"]
    told = {
        key: cost
        for row in rows
        for keys, cost, *_ in [row.strip("|").split("|")]
        for key in KEY.findall(keys)
    }
    for key in ServerConfig.__struct_fields__:
        wanted = "in place" if key in _SERVER_IN_PLACE else "needs a restart"
        assert told.get(key, "").strip() == wanted, key


def test_every_key_told_apart_is_one():
    assert set(ServerConfig.__struct_fields__) >= _SERVER_IN_PLACE
    assert set(ModelConfig.__struct_fields__) >= _MODEL_IN_PLACE
