from __future__ import annotations

import gc
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pool.config import Placement
from pool.errors import ModelError, ModelLoadError, SignatureNotFound
from pool.sample import Recipe, aligned_empty, sample_inputs
from pool.shm import weights
from pool.signature import numpy_dtype
from tests import models


@pytest.fixture(scope="module")
def backend(tensorflow_backend):
    return tensorflow_backend


@pytest.fixture
def load(backend):
    return lambda name, shared=None, is_lean=False: backend.load(
        str(models.path(name) / "1"), shared, is_lean
    )


def aligned(values, dtype="float32"):
    array = np.asarray(values, numpy_dtype(dtype))
    if dtype == "string":
        return array
    copy = aligned_empty(array.shape, array.dtype)
    copy[...] = array
    return copy


def predict(model, *inputs, signature="serving_default"):
    """The outputs, by name, of one call on these arrays (in the signature's order)."""
    spec = next(found for found in model.signatures if found.name == signature)
    outputs = model.bind(signature, list(inputs))()
    assert len(outputs) == len(spec.outputs)
    for output, wanted in zip(outputs, spec.outputs, strict=True):
        assert isinstance(output, np.ndarray)
        assert output.dtype == numpy_dtype(wanted.dtype)
        assert wanted.accepts_shape(output.shape)
    return {wanted.name: np.array(output) for output, wanted in zip(outputs, spec.outputs, strict=True)}


# -- before anything runs --------------------------------------------------------------------------

FRESH = """
import json, os, sys
from pool.backends import find_backend
from pool.config import Placement
from pool.errors import ModelLoadError

told = {}
backend = find_backend("tensorflow")
told["imported"] = "tensorflow" in sys.modules
backend.preload()
from tensorflow.python.eager import context
told["keras"] = "keras" in sys.modules
told["preloaded"] = "pool.backends.tensorflow.saved_model" in sys.modules
told["initialised"] = context.context()._context_handle is not None
try:
    backend.prepare(Placement(gpu=97))
except ModelLoadError as error:
    told["gpu"] = error.message
backend.prepare(Placement(cores=(min(os.sched_getaffinity(0)),), threads=3))
import tensorflow as tf
told["cores"] = sorted(os.sched_getaffinity(0))
told["visible"] = os.environ["CUDA_VISIBLE_DEVICES"]
told["intra"] = tf.config.threading.get_intra_op_parallelism_threads()
told["inter"] = tf.config.threading.get_inter_op_parallelism_threads()
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def fresh():
    """What a process that has run nothing sees while it preloads and prepares."""
    command = [sys.executable, "-c", FRESH]
    done = subprocess.run(command, cwd=models.REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def test_preload_imports_what_models_need_and_initialises_nothing(fresh):
    assert not fresh["imported"]
    assert fresh["preloaded"]
    assert not fresh["keras"]
    assert not fresh["initialised"]


def test_prepare_pins_and_limits(fresh):
    assert fresh["cores"] == [min(os.sched_getaffinity(0))]
    assert fresh["visible"] == "-1"
    assert (fresh["intra"], fresh["inter"]) == (3, 1)


def test_a_gpu_that_is_not_there_is_an_error(fresh):
    assert fresh["gpu"].startswith("gpu:97 was asked for, and ")


def test_a_core_that_is_not_there_is_named(backend):
    before = os.sched_getaffinity(0)
    with pytest.raises(ModelLoadError, match=r"cores \[1000\] are not all there; got \[\d"):
        backend.prepare(Placement(cores=(1000,)))
    assert os.sched_getaffinity(0) == before


# -- which model a path means ----------------------------------------------------------------------


def saved_model(directory: Path) -> Path:
    directory.mkdir(parents=True)
    (directory / "saved_model.pb").touch()
    return directory


@pytest.mark.parametrize(("name", "version"), [("model", 1), ("7", 7), ("0", 0), ("0012", 12), ("1e3", 1)])
def test_a_saved_model_has_the_version_its_directory_is_named(backend, tmp_path, name, version):
    directory = saved_model(tmp_path / name)
    assert backend.resolve(str(directory)) == (version, str(directory))


def test_the_highest_complete_version_is_served(backend, tmp_path):
    for name in ("2", "10", "9", "latest", "1.5", "9" * 30):
        saved_model(tmp_path / name)
    (tmp_path / "11").mkdir()  # still being written
    (tmp_path / "12").touch()
    assert backend.resolve(str(tmp_path)) == (10, str(tmp_path / "10"))


def test_links_are_followed(backend, tmp_path):
    saved_model(tmp_path / "versions" / "3")
    (tmp_path / "current").symlink_to(tmp_path / "versions" / "3")
    assert backend.resolve(str(tmp_path / "current")) == (3, str(tmp_path / "versions" / "3"))


def test_what_is_there_instead_of_a_model_is_told(backend, tmp_path):
    with pytest.raises(ModelLoadError, match="found nothing"):
        backend.resolve(str(tmp_path))
    (tmp_path / "1").mkdir()
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ModelLoadError, match=r"numbered version with one; found 1, notes\.txt"):
        backend.resolve(str(tmp_path))
    with pytest.raises(ModelLoadError, match=r"notes\.txt is a file; wanted a SavedModel directory"):
        backend.resolve(str(tmp_path / "notes.txt"))
    with pytest.raises(ModelLoadError, match="nowhere does not exist"):
        backend.resolve(str(tmp_path / "nowhere"))


def test_a_keras_file_is_exported_once(backend, tmp_path, monkeypatch):
    monkeypatch.delenv("CACHE_DIRECTORY", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "any name.keras"
    shutil.copy(models.path("mlp.keras"), file)
    version, exported = backend.resolve(str(file))
    assert version == 1
    assert Path(exported).parent == tmp_path / "cache" / "pool" / "keras"
    written = (Path(exported) / "saved_model.pb").stat()
    shutil.copy(file, tmp_path / "another.keras")
    assert backend.resolve(str(tmp_path / "another.keras")) == (1, exported)
    assert (Path(exported) / "saved_model.pb").stat() == written
    assert [entry.name for entry in Path(exported).parent.iterdir()] == [Path(exported).name]

    model = backend.load(exported, None)
    (x,) = sample_inputs(model.signatures[0], 3).values()
    ours = predict(model, x)["output_0"]
    theirs = predict(backend.load(str(models.path("mlp") / "1"), None), x)["output_0"]
    assert ours.tobytes() == theirs.tobytes()


def test_systemds_cache_directory_comes_first(backend, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    monkeypatch.setenv("CACHE_DIRECTORY", f"{tmp_path / 'system'}:{tmp_path / 'other'}")
    _, exported = backend.resolve(str(models.path("mlp.keras")))
    assert Path(exported).is_relative_to(tmp_path / "system")


def test_a_broken_keras_file_is_an_error_and_leaves_nothing(backend, tmp_path, monkeypatch):
    monkeypatch.setenv("CACHE_DIRECTORY", str(tmp_path / "cache"))
    file = tmp_path / "broken.keras"
    file.write_bytes(b"not a zip file")
    with pytest.raises(ModelLoadError, match=r"broken\.keras cannot be exported: \w+: "):
        backend.resolve(str(file))
    assert list((tmp_path / "cache" / "keras").iterdir()) == []


# -- loading ---------------------------------------------------------------------------------------


def test_what_cannot_be_loaded_says_why(backend, tmp_path):
    with pytest.raises(ModelLoadError, match="SavedModel file does not exist"):
        backend.load(str(tmp_path), None)
    (tmp_path / "saved_model.pb").write_bytes(b"\xff\xff")
    with pytest.raises(ModelLoadError, match=re.escape(str(tmp_path))):
        backend.load(str(tmp_path), None)


def test_a_checkpoint_that_is_missing_says_so(backend, tmp_path):
    shutil.copytree(models.path("mlp") / "1", tmp_path / "1")
    shutil.rmtree(tmp_path / "1" / "variables")
    with pytest.raises(ModelLoadError, match="variables"):
        backend.load(str(tmp_path / "1"), None)


def test_a_model_without_signatures_cannot_be_served(load):
    with pytest.raises(ModelLoadError, match="has no servable signature: it was saved without any"):
        load("no_signatures")


def test_signatures_that_cannot_be_served_are_skipped_with_the_reason(load):
    model = load("signatures")
    assert [signature.name for signature in model.signatures] == ["serving_default", "double"]
    assert model.skipped == {
        "nothing": "takes no inputs",
        "quantized": "has an output 'q' of dtype qint8, which is not supported",
    }
    with pytest.raises(SignatureNotFound, match="no signature 'nothing'; wanted one of"):
        model.bind("nothing", [])


def test_every_signature_runs(load):
    model = load("signatures")
    x = aligned([[1, 2]])
    assert predict(model, x)["y"].tolist() == [[3, 6]]
    assert predict(model, x, signature="double")["y"].tolist() == [[2, 4]]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("fixed_rows", "the first dimension of input 'x' (float32 [1, 3]) is not a row axis"),
        ("scalar_output", "the first dimension of output 'mean' (float32 []) is not a row axis"),
        ("mlp", ""),
        ("unknown_rank", ""),
    ],
)
def test_batched_is_what_static_shapes_tell(load, name, reason):
    signature = load(name).signatures[0]
    assert signature.batched == (not reason)
    assert signature.unbatched_reason == reason


def test_objects_that_cannot_be_revived_are_served_by_their_metagraph(load):
    x = aligned(np.eye(4))
    model = load("slots")
    named = dict(model.weights())
    assert list(named) == ["Variable"]  # the optimizer's slots are nobody's input
    assert predict(model, x)["y"].tolist() == named["Variable"].tolist()


@pytest.mark.parametrize("name", ["tf1_reference", "tf1_resource"])
def test_tensorflow_1_models_are_served(load, name):
    model = load(name)
    named = dict(model.weights())
    outputs = predict(model, aligned(np.eye(4)))
    assert np.allclose(outputs["y"], named["w"] + [1, 2, 3])
    assert outputs["y"].tolist() == outputs["z"].tolist()


def test_reference_variables_keep_their_order_of_reads_and_writes(load):
    model = load("tf1_counter")
    x = aligned([0.0])
    for count in (10, 11, 12):
        assert predict(model, x) == {"before": [count], "after": [count + 1]}


def test_references_that_cannot_be_converted_are_served_all_the_same(load):
    model = load("tf1_scatter")
    assert predict(model, aligned([1.0]))["y"].tolist() == [6.0]
    with pytest.raises(ModelLoadError, match="'table' is a reference variable, which cannot be shared"):
        model.weights()


def test_the_serve_tag_tables_and_unfed_signatures_of_tensorflow_1(load):
    import tensorflow as tf

    model = load("tf1_table")
    assert list(model.skipped) == ["broken"]
    assert "placeholder which is not an input" in model.skipped["broken"]
    examples = []
    for word in ("one", "two", "three"):
        feature = tf.train.Feature(bytes_list=tf.train.BytesList(value=[word.encode()]))
        example = tf.train.Example(features=tf.train.Features(feature={"word": feature}))
        examples.append(example.SerializeToString())
    assert predict(model, aligned(examples, "string"))["number"].tolist() == [10, 20, -10]


def test_static_tables_are_filled_from_their_assets(load):
    words = aligned([b"zero", b"two", b"else"], "string")
    assert predict(load("static_table"), words)["number"].tolist() == [0, 20, -10]


def test_the_graph_tells_what_examples_hold(load):
    import tensorflow as tf

    (text,) = load("examples").texts("serving_default")
    features = tf.train.Example.FromString(text).features.feature
    assert sorted(features) == ["a", "b", "tags"]
    assert list(features["a"].float_list.value) == [0, 0]
    assert list(features["b"].int64_list.value) == [0]
    assert load("mlp").texts("serving_default") == ()


# -- calling ---------------------------------------------------------------------------------------

RECIPES = {"examples": "texts", "any_size": Recipe(axis=16), "refusing": Recipe(text=b"sesame")}
PURE = sorted(
    set(models.SMALL)
    - {"mlp.keras", "no_signatures", "random", "counter", "tf1_counter", "images", "tf1_table"}
)


@pytest.mark.parametrize("name", PURE)
def test_answers_are_tensorflows_own(load, name):
    import tensorflow as tf

    model = load(name)
    for signature in model.signatures:
        recipe = RECIPES.get(name, Recipe())
        if recipe == "texts":
            recipe = Recipe(text=model.texts(signature.name)[0])
        rows = 1 if name == "one_row_inside" else 3
        sample = sample_inputs(signature, rows, seed=5, recipe=recipe)
        ours = predict(model, *sample.values(), signature=signature.name)
        function = model._loaded.functions[signature.name]._function
        tensors = {spec.name: tf.constant(sample[spec.name], spec.dtype) for spec in signature.inputs}
        theirs = function(**tensors)
        assert ours.keys() == theirs.keys()
        for key, tensor in theirs.items():
            value = np.asarray(tensor.numpy(), ours[key].dtype)
            same = value.tolist() == ours[key].tolist() if value.dtype == object else False
            assert same or value.tobytes() == ours[key].tobytes()


def test_every_dtype_goes_through_unchanged(load):
    model = load("dtypes")
    sample = sample_inputs(model.signatures[0], 3, seed=1)
    outputs = predict(model, *sample.values())
    for name, array in sample.items():
        got = outputs[f"{name}_out"]
        if name == "string":
            assert got.tolist() == [[item + b"!" for item in row] for row in array.tolist()]
        elif name == "bool":
            assert got.tolist() == (~array).tolist()
        else:
            assert got.tolist() == (~array if name.startswith("uint") else -array).tolist()


def test_names_go_with_their_tensors_whatever_their_order(load):
    model = load("names")
    assert [spec.name for spec in model.signatures[0].inputs] == ["alpha", "b", "zeta"]
    assert [spec.name for spec in model.signatures[0].outputs] == ["a", "x", "y"]
    outputs = predict(model, aligned([1]), aligned([2]), aligned([30]))
    assert outputs == {"a": [1], "x": [20], "y": [29]}


@pytest.mark.parametrize("dtype", [name for name in models.DTYPES if name != "string"])
def test_a_bound_call_reads_what_its_arrays_hold_when_it_runs(load, dtype):
    model = load("dtypes")
    signature = model.signatures[0]
    sample = sample_inputs(signature, 2)
    call = model.bind(signature.name, list(sample.values()))
    position = [spec.name for spec in signature.outputs].index(f"{dtype}_out")
    for value in (0, 1):
        sample[dtype][...] = value
        want = predict(model, *sample.values())[f"{dtype}_out"]
        assert call()[position].tolist() == want.tolist()


def test_strings_are_bytes_of_any_kind(load):
    texts = aligned([b"", b"a\0b", "ß".encode(), b"\xff\xfe", b"x" * 100_000], "string")
    outputs = predict(load("strings"), texts)
    assert outputs["upper"].tolist() == [text.upper() for text in texts]
    assert outputs["length"].tolist() == [len(text) for text in texts]


@pytest.mark.parametrize(
    "name", ["mlp", "cnn", "dtypes", "strings", "unknown_dims", "tf1_reference", "slots"]
)
def test_no_rows_give_no_rows(load, name):
    model = load(name)
    sample = sample_inputs(model.signatures[0], 0)
    for output in predict(model, *sample.values()).values():
        assert len(output) == 0


@pytest.mark.parametrize("shape", [(3,), (2, 3), (1, 2, 3, 4)])
def test_any_rank_where_the_signature_leaves_it_open(load, shape):
    x = aligned(np.ones(shape))
    assert predict(load("unknown_rank"), x)["y"].tolist() == np.full(shape, 2.0).tolist()


def test_outputs_of_rank_0_are_arrays(load):
    outputs = predict(load("scalar_output"), aligned([1, 2, 6]))
    assert outputs["mean"].shape == outputs["word"].shape == ()
    assert (outputs["mean"].item(), outputs["word"].item()) == (3.0, b"mean")


def test_a_model_that_raises_says_what_and_goes_on(load):
    model = load("raising")
    x = aligned([4.0])
    call = model.bind("serving_default", [x])
    assert call()[0].tolist() == [2.0]
    x[0] = -1
    with pytest.raises(
        ModelError, match=r"^InvalidArgumentError: assertion failed: \[x must not be neg"
    ) as caught:
        call()
    assert "{{" not in caught.value.message
    assert "[Op:" not in caught.value.message
    assert "\n" not in caught.value.message
    x[0] = 9
    assert call()[0].tolist() == [3.0]


def test_calls_outlive_their_model(load):
    for name, columns in (("mlp", 784), ("slots", 4)):
        call = load(name).bind("serving_default", [aligned(np.ones((1, columns)))])
        gc.collect()
        assert call()[0].any()


def test_calling_by_keyword_gives_the_same(load):
    # The way for a TensorFlow whose runtime entry point is not where it was.
    from pool.backends.tensorflow import call

    for name in ("mlp", "dtypes", "names", "scalar_output", "tf1_reference"):
        model = load(name)
        signature = model.signatures[0]
        sample = sample_inputs(signature, 2)
        tensors = {spec.name: call.as_tensor(sample[spec.name], spec.dtype) for spec in signature.inputs}
        function = model._loaded.functions[signature.name]._function
        by_keyword = call.bind_by_keyword(function, signature.outputs, tensors, owner=model)
        bound = model.bind(signature.name, list(sample.values()))
        for a, b in zip(by_keyword(), bound(), strict=True):
            assert a.dtype == b.dtype
            assert a.tolist() == b.tolist()


@pytest.mark.parametrize(
    ("message", "want"),
    [
        ("plain", "plain"),
        ("{{function_node __wrapped__f}} bad shape [Op:MatMul] name: ", "bad shape name:"),
        (
            "assertion failed: [x]\n\t [[{{node assert/Assert}}]] [Op:__inference_f_1]",
            "assertion failed: [x]",
        ),
        (
            "2 root error(s) found.\n  (0) INVALID_ARGUMENT:  no\n\t [[{{node a}}]]\n  (1) ABORTED: late",
            "no",
        ),
        (
            "Graph execution error:\n\nDetected at node f defined at (most recent call last):\n"
            '  File "m.py", line 1, in f\n    x()\n\nIndices out of range\n\t [[{{node f}}]]',
            "Indices out of range",
        ),
        ("", ""),
    ],
)
@pytest.mark.usefixtures("backend")
def test_errors_lose_what_tensorflow_adds(message, want):
    import tensorflow as tf

    from pool.backends.tensorflow.call import describe

    error = tf.errors.InvalidArgumentError(None, None, message)
    assert describe(error) == ("InvalidArgumentError: " + want if want else "InvalidArgumentError")


# -- sharing weights -------------------------------------------------------------------------------


@pytest.fixture(params=[False, True], ids=["in_full", "lean"])
def share(load, request):
    """Load a model twice, with weights of its own and on a memfd's; gives both and the views it maps."""
    opened = []

    def load_both(name):
        own = load(name)
        fd = weights.create()
        opened.append(fd)
        views = weights.map_private(fd, weights.write(fd, own.weights()))
        return own, load(name, views, request.param), views

    yield load_both
    for fd in opened:
        os.close(fd)
    gc.collect()  # a mapping holds a descriptor too, and a model holds its mapping


SHARED = [
    "mlp",
    "cnn",
    "bfloat16",
    "variable_dtypes",
    "static_table",
    "signatures",
    "medium",
    "slots",
    "tf1_reference",
    "tf1_resource",
    "tf1_counter",
]


@pytest.mark.parametrize("name", SHARED)
def test_answers_on_shared_weights_are_the_same_bits(share, name):
    own, shared, _ = share(name)
    for signature in own.signatures:
        sample = list(sample_inputs(signature, 3).values())
        a = predict(own, *sample, signature=signature.name)
        b = predict(shared, *sample, signature=signature.name)
        assert {key: value.tobytes() for key, value in a.items()} == {
            key: value.tobytes() for key, value in b.items()
        }


@pytest.mark.parametrize("name", ["mlp", "bfloat16", "medium", "slots", "tf1_reference", "tf1_resource"])
def test_variables_alias_the_weights_they_are_given(share, name):
    _, shared, views = share(name)
    signature = shared.signatures[0]
    sample = list(sample_inputs(signature, 2).values())
    assert predict(shared, *sample)[signature.outputs[0].name].any()
    for view in views:
        view[...] = 0
    assert not predict(shared, *sample)[signature.outputs[0].name].any()


def test_variables_of_every_dtype_alias(share):
    _, shared, views = share("variable_dtypes")
    one = aligned([1.0])
    total = predict(shared, one)["y"].item()
    for (name, value), view in zip(shared.weights(), views, strict=True):
        if view.ndim == 2 and view.size:
            assert view.astype(complex).sum() == 3, name
            view[...] = 0
            assert not value.any(), f"{name} is a copy"
            total -= 3
            assert predict(shared, one)["y"].item() == total, name


def test_a_variable_that_is_written_is_written_for_one_model_only(load):
    fd = weights.create()
    places = weights.write(fd, load("counter").weights())
    weights.seal(fd)
    replicas = [load("counter", weights.map_private(fd, places)) for _ in range(2)]
    x = aligned([0.0])
    for model in replicas:
        assert [predict(model, x)["y"].item() for _ in range(3)] == [1, 2, 3]
    assert not any(os.pread(fd, 1 << 18, 0))
    os.close(fd)
    del model, replicas
    gc.collect()


def test_weights_come_in_the_same_order_from_every_load(load):
    for name in ("mlp", "cnn", "slots", "tf1_reference"):
        first, second = ([weight for weight, _ in load(name).weights()] for _ in range(2))
        assert first == second


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("mutable_table", "the model keeps state outside of variables (MutableHashTableV2)"),
        ("string_variable", "variable 'Variable' holds string, which cannot be shared"),
    ],
)
def test_state_that_cannot_be_shared_is_named(load, name, reason):
    with pytest.raises(ModelLoadError, match=re.escape(reason)):
        load(name).weights()


def test_weights_of_another_model_are_refused(load):
    with pytest.raises(ModelLoadError, match="has 4 variables; got 1 weights"):
        load("mlp", [aligned(np.ones(3))])
    wrong = [aligned(np.ones(3))] * 4
    with pytest.raises(
        ModelLoadError, match=r"kernel' is float32 \(784, 256\); got a weight of float32 \[3\]"
    ):
        load("mlp", wrong)


# -- lean ------------------------------------------------------------------------------------------


@pytest.fixture
def load_lean(load):
    """Load a model in full, and lean on weights of any values."""

    def both(name):
        own = load(name)
        views = [aligned_empty(value.shape, value.dtype) for _, value in own.weights()]
        return own, load(name, views, True)

    return both


def is_lean(model):
    from pool.backends.tensorflow.lean import Registered

    return isinstance(model._loaded.functions[model.signatures[0].name], Registered)


@pytest.mark.parametrize(
    "name",
    ["mlp", "cnn", "bfloat16", "variable_dtypes", "signatures", "medium", "counter", "dtypes", "names",
     "unknown_dims", "unknown_rank", "scalar_output", "strings", "examples", "images", "raising",
     "slots"],  # which TensorFlow itself cannot revive
)  # fmt: skip
def test_a_lean_load_tells_the_same_of_a_model(load_lean, name):
    own, lean = load_lean(name)
    assert is_lean(lean)
    assert not is_lean(own)
    assert lean.signatures == own.signatures
    assert lean.skipped == own.skipped
    assert [key for key, _ in lean.weights()] == [key for key, _ in own.weights()]
    assert [lean.texts(one.name) for one in lean.signatures] == [
        own.texts(one.name) for one in own.signatures
    ]


@pytest.mark.parametrize("name", ["static_table", "tf1_resource", "tf1_reference", "tf1_counter"])
def test_what_takes_more_than_functions_and_variables_is_loaded_in_full(load_lean, name):
    _, shared = load_lean(name)
    assert not is_lean(shared)


def test_signatures_that_do_the_same_are_one_function_of_the_runtime(load_lean):
    own, lean = load_lean("mlp")
    assert [one.name for one in lean.signatures] == ["serving_default", "serve"]
    assert lean.runs("serve") == lean.runs("serving_default")
    assert "signature_wrapper" not in lean.runs("serve")
    assert own.runs("serve") != own.runs("serving_default")


def test_a_lean_model_that_is_gone_leaves_nothing_with_the_runtime(load_lean):
    from tensorflow.python.eager import context

    _, lean = load_lean("cnn")
    names = {name for function in lean._loaded.functions.values() for name in function.reached}
    assert names
    assert all(context.context().has_function(name) for name in names)
    _, another = load_lean("cnn")
    del lean
    gc.collect()
    assert not any(context.context().has_function(name) for name in names)
    assert another.bind("serving_default", list(sample_inputs(another.signatures[0], 1).values()))()


def test_outputs_go_by_name_through_a_wrapper_that_orders_them_anew(load_lean):
    own, lean = load_lean("names")
    inputs = [aligned([1]), aligned([2]), aligned([30])]
    assert predict(lean, *inputs) == predict(own, *inputs) == {"a": [1], "x": [20], "y": [29]}


def export(folder, function):
    import tensorflow as tf

    module = tf.Module()
    module.function = function
    tf.saved_model.save(module, str(folder), signatures={"serving_default": function})
    return str(folder)


def test_captured_constants_are_read_from_the_file(backend, tmp_path):
    import tensorflow as tf

    words = tf.constant([b"a", b"\xff"])
    numbers = tf.constant([[1.5, 2.5]])

    @tf.function(input_signature=[tf.TensorSpec([None, 2], tf.float32, "x")])
    def add(x):
        return {"sum": x + numbers, "words": words}

    path = export(tmp_path / "1", add)
    model = backend.load(path, [], True)
    assert is_lean(model)
    outputs = model.bind("serving_default", [aligned([[1, 2]])])()
    assert [output.tolist() for output in outputs] == [[[2.5, 4.5]], [b"a", b"\xff"]]


def test_a_compiled_function_is_called_through_its_wrapper(backend, tmp_path):
    import tensorflow as tf

    @tf.function(jit_compile=True, input_signature=[tf.TensorSpec([None], tf.float32, "x")])
    def double(x):
        return {"y": 2 * x}

    model = backend.load(export(tmp_path / "1", double), [], True)
    assert is_lean(model)
    assert "signature_wrapper" in model.runs("serving_default")
    assert model.bind("serving_default", [aligned([3.0])])()[0].tolist() == [6.0]


def test_functions_that_are_called_by_others_come_along(backend, tmp_path):
    import tensorflow as tf

    @tf.function(input_signature=[tf.TensorSpec([None], tf.float32, "x")])
    def collatz(x):
        def step(x, count):
            return tf.cond(x[0] % 2 == 0, lambda: x / 2, lambda: 3 * x + 1), count + 1

        _, count = tf.while_loop(lambda x, _: x[0] > 1, step, (x, tf.constant([0])))
        return {"steps": count}

    model = backend.load(export(tmp_path / "1", collatz), [], True)
    assert is_lean(model)
    assert len(model._loaded.functions["serving_default"].reached) > 3
    assert model.bind("serving_default", [aligned([27.0])])()[0].tolist() == [111]


def test_a_table_within_a_function_is_not_loaded_lean(backend, tmp_path):
    import tensorflow as tf

    @tf.function(input_signature=[tf.TensorSpec([None], tf.float32, "x")])
    def count(x):
        table = tf.raw_ops.HashTableV2(key_dtype=tf.int64, value_dtype=tf.int64, shared_name="t")
        keys = tf.constant([1], tf.int64)
        with tf.control_dependencies(
            [tf.raw_ops.LookupTableImportV2(table_handle=table, keys=keys, values=keys)]
        ):
            size = tf.raw_ops.LookupTableSizeV2(table_handle=table)
        return {"y": x + tf.cast(size, tf.float32)}

    model = backend.load(export(tmp_path / "1", count), [], True)
    assert not is_lean(model)
    assert model.bind("serving_default", [aligned([1.0])])()[0].tolist() == [2.0]
