from __future__ import annotations

import gc
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest

from pool.backends import find_backend
from pool.config import Placement
from pool.errors import ModelLoadError
from pool.sample import Recipe
from pool.shm import weights
from pool.shm.control import LoaderOrder, LoadFailure, LoadReport, decode_outcome
from pool.worker.loader import load_model, run_loader
from tests import models


@pytest.fixture(scope="module")
def backend(tensorflow_backend):
    return tensorflow_backend


@pytest.fixture
def weights_fd():
    fd = weights.create()
    yield fd
    os.close(fd)
    gc.collect()  # a mapping holds a descriptor too, and a model that was only dropped holds its mapping


@pytest.fixture
def load(backend, weights_fd):
    return lambda name, share=True: load_model(backend, str(models.path(name)), weights_fd, share)


@pytest.fixture
def recipe_of(backend):
    """The recipe a model took, as its loader reports it."""

    def recipe(name):
        fd = weights.create()
        try:
            report = load_model(backend, str(models.path(name)), fd, share=False)
        finally:
            os.close(fd)
        return report.recipes["serving_default"]

    return recipe


def test_a_report_names_the_concrete_model(load):
    report = load("mlp")
    assert report.version == 1
    assert report.path == str(models.path("mlp") / "1")


@pytest.mark.parametrize(
    "name",
    [
        "mlp",
        "cnn",
        "dtypes",
        "scalars",
        "unknown_dims",
        "unknown_rank",
        "strings",
        "examples",
        "images",
        "any_size",
        "static_table",
        "mutable_table",
        "counter",
        "random",
        "raising",
        "bfloat16",
        "slots",
        "tf1_reference",
        "tf1_counter",
        "tf1_table",
    ],
)
def test_rows_are_recognised(load, name):
    for signature in load(name).signatures:
        assert signature.batched, signature.unbatched_reason
        assert signature.unbatched_reason == ""


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("fixed_rows", "the first dimension of input 'x' (float32 [1, 3]) is not a row axis"),
        ("scalar_output", "the first dimension of output 'mean' (float32 []) is not a row axis"),
        ("one_row_inside", "it takes one row, but not 2: InvalidArgumentError: assertion failed: [one row"),
        ("unfollowing_output", "output 'labels' does not follow the rows: 2 rows gave shape [4]"),
        ("mixing_rows", "rows influence each other in output 'y'"),
        ("longest", "the shape of a row of output 'split' depends on the batch: "),
    ],
)
def test_signatures_without_rows_are_told_apart(load, name, reason):
    (signature,) = load(name).signatures
    assert not signature.batched
    assert signature.unbatched_reason.startswith(reason)


@pytest.mark.parametrize(
    ("name", "row_bytes"),
    [
        ("mlp", 10 * 4),
        ("scalars", 4),
        ("bfloat16", 2 * 2),
        ("unknown_dims", 4 + 4 * 4),  # at the recipe's length of unknown axes
        ("fixed_rows", 3 * 4),  # the whole answer, where there are no rows
        ("scalar_output", 4 + 2 * 8 + len("mean")),
        ("refusing", None),
    ],
)
def test_answers_are_measured(load, name, row_bytes):
    assert load(name).output_row_bytes["serving_default"] == row_bytes


def test_recipes_are_what_the_model_took(recipe_of):
    assert recipe_of("mlp") == Recipe()
    assert recipe_of("any_size").axis == 32
    assert recipe_of("tf1_table").rank == 1
    assert recipe_of("images").text.startswith(b"\x89PNG")
    assert b"tags" in recipe_of("examples").text


def test_a_signature_that_takes_no_generated_input_rests_on_its_shapes(load):
    report = load("refusing")
    assert report.signatures[0].batched
    assert report.recipes == {}
    assert report.unobserved["serving_default"].startswith("InvalidArgumentError: assertion failed: [wrong")


def test_skipped_signatures_are_reported(load):
    assert sorted(load("signatures").skipped) == ["nothing", "quantized"]


# -- sharing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["mlp", "cnn", "bfloat16", "static_table", "slots", "tf1_reference", "counter"]
)
def test_weights_are_shared_where_they_can_be(load, weights_fd, name):
    report = load(name)
    assert report.weights_shared, report.unshared_reason
    assert report.unshared_reason == ""
    views = weights.map_private(weights_fd, report.weights)
    assert sum(view.nbytes for view in views) == report.weights_bytes > 0
    with pytest.raises(PermissionError):
        os.pwrite(weights_fd, b"x", 0)


@pytest.mark.parametrize("name", ["mlp", "cnn", "bfloat16", "counter", "names"])
def test_workers_are_to_load_lean(load, name):
    assert load(name).is_lean


def test_what_could_not_be_compared_is_not_loaded_lean(load):
    report = load("refusing")
    assert report.unobserved
    assert report.weights_shared
    assert not report.is_lean


def test_a_tensorflow_whose_insides_are_others_is_loaded_in_full(load, monkeypatch):
    from pool.backends.tensorflow import call

    def moved(*_):
        raise AttributeError("no such entry point")

    monkeypatch.setattr(call, "bind", moved)
    report = load("mlp")
    assert report.weights_shared, report.unshared_reason
    assert not report.is_lean


@pytest.mark.parametrize(("lean", "is_lean"), [("right", True), ("wrong", False), ("fails", False)])
def test_a_lean_load_that_is_not_as_good_is_not_used(weights_fd, tmp_path, lean, is_lean):
    (tmp_path / "drill.toml").write_text(f'lean = "{lean}"')
    report = load_model(find_backend("drill"), str(tmp_path), weights_fd, share=True)
    assert report.weights_shared, report.unshared_reason
    assert report.is_lean == is_lean


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("mutable_table", "the model keeps state outside of variables (MutableHashTableV2)"),
        ("string_variable", "variable 'Variable' holds string, which cannot be shared"),
        ("random", "signature 'serving_default' answers differently after each load, so that sharing"),
        ("tf1_scatter", "'table' is a reference variable, which cannot be shared"),
    ],
)
def test_why_weights_are_not_shared_is_told(load, weights_fd, name, reason):
    report = load(name)
    assert not report.weights_shared
    assert report.unshared_reason.startswith(reason)
    assert report.weights == ()
    assert os.fstat(weights_fd).st_size == 0


def test_weights_are_not_shared_when_not_asked_to(load, weights_fd):
    report = load("mlp", share=False)
    assert not report.weights_shared
    assert "share_weights = false" in report.unshared_reason
    assert report.weights_bytes == 814_120
    assert os.fstat(weights_fd).st_size == 0


def test_the_weights_are_those_of_the_files_though_the_probes_write_variables(load, weights_fd):
    report = load("counter")
    (count,) = weights.map_private(weights_fd, report.weights)
    assert not np.any(count)


# -- as the zygote's fork plays it -----------------------------------------------------------------


def outcome_of(path, weights_fd):
    read_fd, write_fd = os.pipe()
    run_loader(LoaderOrder("m", "tensorflow", path, True, Placement()), write_fd, weights_fd)
    with os.fdopen(read_fd, "rb") as pipe:
        return decode_outcome(pipe.read())


@pytest.mark.usefixtures("backend")
def test_an_outcome_travels_through_the_pipe(weights_fd):
    outcome = outcome_of(str(models.path("names")), weights_fd)
    assert isinstance(outcome, LoadReport)
    assert [spec.name for spec in outcome.signatures[0].inputs] == ["alpha", "b", "zeta"]


@pytest.mark.usefixtures("backend")
def test_a_failure_travels_through_the_pipe(weights_fd):
    outcome = outcome_of("/nowhere", weights_fd)
    assert outcome == LoadFailure("/nowhere does not exist")


def test_a_model_that_cannot_be_loaded_is_a_load_error(load):
    with pytest.raises(ModelLoadError, match=re.escape("has no servable signature")):
        load("no_signatures")


# The zygote's part, in a process that has run nothing: a loader, then two workers at a time, each of which
# tells the memory that is its own once it has answered, while the other still lives.
FORKS = """
import json, os, sys
from pool.backends import find_backend
from pool.config import Placement
from pool.sample import sample_inputs
from pool.shm import weights
from pool.shm.control import LoaderOrder, decode_outcome
from pool.worker.loader import run_loader

backend = find_backend("tensorflow")
backend.preload()
fd = weights.create()
read_fd, write_fd = os.pipe()
loader = os.fork()
if not loader:
    run_loader(LoaderOrder("m", "tensorflow", sys.argv[1], True, Placement()), write_fd, fd)
    os._exit(0)
os.close(write_fd)
report = decode_outcome(os.fdopen(read_fd, "rb").read())
os.waitpid(loader, 0)

def own_memory():
    with open("/proc/self/smaps_rollup") as rollup:
        (kib,) = (line.split()[1] for line in rollup if line.startswith("Anonymous:"))
    return int(kib) * 1024

def weights_memory():
    sizes = {"Rss:": 0, "Pss:": 0, "Anonymous:": 0}
    is_weights = False
    with open("/proc/self/smaps") as maps:
        for line in maps:
            words = line.split()
            if "-" in words[0]:
                is_weights = "pool-weights" in line
            elif is_weights and words[0] in sizes:
                sizes[words[0]] += int(words[1]) * 1024
    return list(sizes.values())

def work(shared, answered_fd, go_fd):
    backend.prepare(Placement())
    before = own_memory()
    views = weights.map_private(fd, report.weights) if shared else None
    model = backend.load(report.path, views, shared and report.is_lean)
    signature = report.signatures[0]
    call = model.bind(signature.name, list(sample_inputs(signature, 2).values()))
    answer = call()[0].tobytes().hex()
    os.write(answered_fd, b"!")
    os.read(go_fd, 1)
    rss, pss, copied = weights_memory()
    told = {"shared": shared, "answer": answer, "own": own_memory() - before}
    print(json.dumps(told | {"rss": rss, "pss": pss, "copied": copied}), flush=True)

for shared in (True, False):
    answered = os.pipe()
    workers = []
    for _ in range(2):
        go = os.pipe()
        pid = os.fork()
        if not pid:
            work(shared, answered[1], go[0])
            os._exit(0)
        workers.append((pid, go[1]))
    for _ in workers:
        os.read(answered[0], 1)
    for pid, go_fd in workers:
        os.write(go_fd, b"!")  # one at a time, so that the other still maps what it maps
        os.waitpid(pid, 0)
"""


def test_forked_workers_share_one_copy_of_the_weights():
    command = [sys.executable, "-c", FORKS, str(models.path("medium"))]
    done = subprocess.run(command, cwd=models.REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert [worker["shared"] for worker in told] == [True, True, False, False]
    assert len({worker["answer"] for worker in told}) == 1
    size = 6 * 1024 * 1024 * 4
    own = min(worker["own"] for worker in told[2:])
    assert own > size
    for worker in told[:2]:
        # All but the weights grows alike; a tenth of them is left for what differs from run to run.
        assert worker["own"] < own - 0.9 * size
        # Every page of the weights was read, and none was copied to be written.
        assert worker["rss"] == size
        assert worker["copied"] == 0
    # While both live, each is charged for half of the copy they share.
    assert told[0]["pss"] == size / 2
