"""What a configuration may write down as a pipeline, and what that comes to with its models' signatures."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pool.config import Config, decode_config
from pool.errors import ConfigError
from pool.pipelines import PipelineConfig, Source, StepConfig, wire
from pool.signature import Signature, TensorSpec


def decode(**pipelines: Any) -> Config:
    return decode_config({"models": {"m": {"path": "p"}, "n.1": {"path": "p"}}, "pipelines": pipelines}, "f")


def mistakes(**pipelines: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        decode(**pipelines)
    lines = caught.value.message.split("\n")
    assert all(line.startswith("f: pipelines") for line in lines)
    return [line.removeprefix("f: ") for line in lines]


STEP = {"model": "m", "inputs": {"x": "request.x"}}


def test_a_pipeline_has_steps_and_defaults():
    config = decode(p={"steps": [STEP, {"name": "b", "model": "n.1", "inputs": {"x": "m.y"}}]})
    first, second = config.pipelines["p"].steps
    assert (first.label, second.label) == ("m", "b")
    assert config.pipelines["p"] == PipelineConfig(
        steps=(
            StepConfig(model="m", inputs={"x": "request.x"}),
            StepConfig(name="b", model="n.1", inputs={"x": "m.y"}),
        )
    )


@pytest.mark.parametrize(
    ("pipeline", "want"),
    [
        (5, "pipelines.p: must be a table, got 5"),
        ({}, "pipelines.p.steps: must be given, got nothing"),
        ({"steps": []}, "pipelines.p.steps: must hold at least one step, got []"),
        ({"steps": 5}, "pipelines.p.steps: must be a list of tables, each a step, got 5"),
        ({"steps": [5]}, "pipelines.p.steps: must be a list of tables, each a step, got [5]"),
        ({"steps": [{}]}, "pipelines.p.steps[0].inputs: must be given, got nothing"),
        ({"step": []}, "pipelines.p.step: unknown key; the nearest valid key is steps, got []"),
        ({"workers": 1, "steps": [STEP]}, "workers: unknown key here; workers belongs in [models.NAME]"),
        (
            {"steps": [STEP | {"imputs": {}}]},
            "pipelines.p.steps[0].imputs: unknown key; the nearest valid key is inputs, got {}",
        ),
        ({"steps": [STEP | {"inputs": {"x": 5}}]}, "steps[0].inputs: must be a table of strings, got "),
        (
            {"steps": [STEP | {"model": "k"}]},
            'pipelines.p.steps[0].model: must be a model of this file (m, n.1), got "k"',
        ),
        (
            {"steps": [STEP | {"model": "n.1"}]},
            "pipelines.p.steps[0].name: must be of letters, digits, '_' and '-', got nothing",
        ),
        ({"steps": [STEP | {"name": "a b"}]}, "'_' and '-', got \"a b\""),
        ({"steps": [STEP | {"name": "request"}]}, "must not be 'request', which stands for the inputs"),
        ({"steps": [STEP, STEP]}, 'pipelines.p.steps[1].name: must be another one for each step, got "m"'),
        (
            {"steps": [{"model": "m", "inputs": {"x": "x"}}]},
            'pipelines.p.steps[0].inputs.x: must read "request.INPUT" or "STEP.OUTPUT", got "x"',
        ),
        ({"steps": [{"model": "m", "inputs": {"x": ".x"}}]}, 'or "STEP.OUTPUT", got ".x"'),
        (
            {"steps": [{"model": "m", "inputs": {"x": "m.y"}}]},
            'steps[0].inputs.x: must come from the request or an earlier step (request), got "m.y"',
        ),
        (
            {"steps": [STEP], "outputs": {"y": "k.y"}},
            'outputs.y: must come from the request or an earlier step (request, m), got "k.y"',
        ),
        ({"steps": [STEP], "outputs": {}}, "pipelines.p.outputs: must name at least one, or be left out"),
        (
            {"steps": [STEP, STEP | {"name": "b"}]},
            'pipelines.p.steps[0]: must be used by a later step or by `outputs`, got "m"',
        ),
        (
            {"steps": [{"model": "m", "inputs": {}}]},
            'pipelines.p.steps: must use an input, "request.NAME", somewhere, got nothing',
        ),
        ({"steps": [STEP], "max_requests": 0}, "max_requests: must be an integer from 1 to 1000000, got 0"),
    ],
)
def test_mistakes_of_the_file(pipeline, want):
    assert any(want in line for line in mistakes(p=pipeline)), mistakes(p=pipeline)


def test_mistakes_of_its_name_and_of_all_at_once():
    assert mistakes(m={"steps": [STEP]})[0].startswith(
        "pipelines.m: must not have the name of a model: clients ask for both"
    )
    assert mistakes(**{"a b": {}}) == [
        "pipelines.\"a b\": must be a name of letters, digits, '_', '.' and '-', got \"a b\""
    ]
    assert len(mistakes(p={"steps": [STEP | {"model": "k"}, STEP | {"model": "k"}]})) == 3


# -- with signatures -------------------------------------------------------------------------------


def spec(name, *shape, dtype="float32"):
    return TensorSpec(name, dtype, shape)


def signature(inputs, outputs, batched=True, name="serving_default"):
    return Signature(name, tuple(inputs), tuple(outputs), batched, "" if batched else "so")


DOUBLE = signature([spec("x", None, 4)], [spec("y", None, 4), spec("z", None, dtype="int64")])
CROPS = signature([spec("p", None, None, 3)], [spec("c", None, 4)], batched=False)
ANY = signature([TensorSpec("a", "float32", None), spec("b", None, None)], [spec("y", None, 2)])
MODELS = {"double": (DOUBLE,), "crops": (CROPS,), "any": (ANY,), "two": (DOUBLE, signature([], [], name="o"))}


def wired(*steps, outputs=None, found=None):
    config = PipelineConfig(steps=tuple(StepConfig(**step) for step in steps), outputs=outputs)
    mistakes = [] if found is None else found
    wiring = wire("pipelines.p", config, MODELS, mistakes)
    assert (wiring is None) == bool(mistakes)
    return wiring


def step(model, name=None, **inputs):
    return {"model": model, "name": name, "inputs": inputs}


def test_its_signature_is_that_of_what_it_takes_and_gives():
    wiring = wired(
        step("double", x="request.x"),
        step("any", a="double.y", b="request.side"),
        outputs={"out": "any.y", "early": "double.z", "same": "request.x"},
    )
    assert [(s.name, s.describe()) for s in wiring.signature.inputs] == [
        ("x", "float32 [any, 4]"),
        ("side", "float32 [any, any]"),
    ]
    assert [(s.name, s.describe()) for s in wiring.signature.outputs] == [
        ("out", "float32 [any, 2]"),
        ("early", "int64 [any]"),
        ("same", "float32 [any, 4]"),
    ]
    assert wiring.signature.batched
    assert [s.sources for s in wiring.steps] == [
        (Source(-1, "x"),),
        (Source(0, "y"), Source(-1, "side")),
    ]
    assert [s.outputs for s in wiring.steps] == [("y", "z"), ("y",)]
    assert wiring.last_use == {
        Source(-1, "x"): 2,
        Source(-1, "side"): 1,
        Source(0, "y"): 1,
        Source(0, "z"): 2,
        Source(1, "y"): 2,
    }


def test_an_input_of_several_steps_is_what_all_of_them_take():
    wiring = wired(step("any", a="request.v", b="request.v"), step("double", x="request.v"), outputs={
        "o": "double.y", "y": "any.y"})  # fmt: skip
    assert [s.describe() for s in wiring.signature.inputs] == ["float32 [any, 4]"]


def test_one_step_for_one_request_makes_it_a_pipeline_for_one():
    wiring = wired(step("crops", p="request.picture"), step("double", x="crops.c"))
    assert wiring.signature.unbatched_reason == "its step 'crops' runs one request at a time: so"
    assert [s.name for s in wiring.signature.outputs] == ["y", "z"]


@pytest.mark.parametrize(
    ("steps", "outputs", "want"),
    [
        (
            [step("double", x="request.x"), step("crops", p="double.y")],
            None,
            'steps[1].inputs.p: must be float32 [any, any, 3], got "double.y: float32 [any, 4]"',
        ),
        (
            [step("double", x="request.x"), step("double", "b", x="double.z")],
            None,
            'steps[1].inputs.x: must be float32 [any, 4], got "double.z: int64 [any]"',
        ),
        (
            [step("double", x="request.x"), step("any", a="double.z", b="request.b")],
            None,
            'steps[1].inputs.a: must be float32 of any rank, got "double.z: int64 [any]"',
        ),
        (
            [step("double", x="request.x"), step("double", "b", x="double.w")],
            None,
            'steps[1].inputs.x: must be an output of that step (y, z), got "double.w"',
        ),
        (
            [step("any", a="request.x")],
            None,
            "steps[0].inputs.b: must say where the input (float32 [any, any]) comes from, got nothing",
        ),
        (
            [step("double", x="request.x", w="request.x")],
            None,
            "steps[0].inputs.w: must be an input of model 'double' (x), got \"request.x\"",
        ),
        (
            [step("crops", p="request.x"), step("double", x="request.x")],
            {"y": "double.y", "c": "crops.c"},
            'steps[1].inputs.x: must be float32 [any, 4], got "request.x: float32 [any, any, 3]"',
        ),
        (
            [step("double", x="request.x")],
            {"y": "double.w"},
            'outputs.y: must be an output of that step (y, z), got "double.w"',
        ),
        (
            [step("double", x="request.x")],
            {"y": "request.w"},
            'outputs.y: must be an input that a step uses, got "request.w"',
        ),
        (
            [step("two", x="request.x") | {"signature": "q"}],
            None,
            "steps[0].signature: must be a signature of the model (no signature 'q'; wanted one of ",
        ),
    ],
)
def test_mistakes_with_models(steps, outputs, want):
    found = []
    wired(*steps, outputs=outputs, found=found)
    assert any(f"pipelines.p.{want}" in str(each) for each in found), list(map(str, found))


@given(data=st.data(), count=st.integers(1, 6))
def test_every_tensor_is_there_as_long_as_it_is_needed(data, count):
    """Steps run one after the other, keeping what `last_use` says: each finds all it takes."""
    steps, sources = [], ["request.x"]
    for i in range(count):
        chosen = [data.draw(st.sampled_from(sources)) for _ in range(2)]
        steps.append(step("sum", f"s{i}", a=chosen[0], b=chosen[1]))
        sources += [f"s{i}.y", f"s{i}.z", "request.x", "request.w"]
    outputs = {f"o{i}": reference for i, reference in enumerate(sources[1:]) if reference[0] == "s"}
    asked = {name: outputs[name] for name in data.draw(st.sets(st.sampled_from(sorted(outputs)), min_size=1))}
    config = PipelineConfig(steps=tuple(StepConfig(**each) for each in steps), outputs=asked)
    both = [spec("a", None), spec("b", None)]
    found = []
    wiring = wire("p", config, {"sum": (signature(both, [spec("y", None), spec("z", None)]),)}, found)
    assert not found
    request = {s.name: i + 1 for i, s in enumerate(wiring.signature.inputs)}

    def whole():
        values = {f"request.{name}": value for name, value in request.items()}
        for each in steps:
            a, b = (values[each["inputs"][name]] for name in "ab")
            values |= {f"{each['name']}.y": 3 * a + b, f"{each['name']}.z": a - b}
        return {name: values[reference] for name, reference in asked.items()}

    kept = {Source(-1, name): value for name, value in request.items()}
    for at, each in enumerate(wiring.steps):
        a, b = (kept[source] for source in each.sources)
        given = {"y": 3 * a + b, "z": a - b}
        kept |= {Source(at, name): given[name] for name in each.outputs}
        kept = {source: value for source, value in kept.items() if wiring.last_use[source] > at}
    assert set(kept) == set(wiring.outputs), "and nothing is kept for longer"
    names = [s.name for s in wiring.signature.outputs]
    assert {name: kept[source] for name, source in zip(names, wiring.outputs, strict=True)} == whole()
