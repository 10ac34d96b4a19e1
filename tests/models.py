"""Models that tests serve: built by real TensorFlow in a process of their own, kept between runs.

`path(name)` gives the directory (or `.keras` file) of a model, building it first if need be. All small
ones are built together, because importing TensorFlow takes longer than all of them; large ones only when
asked for. What was built lies in `build/test-models/`, under a hash of this file, or in
`$POOL_TEST_MODELS`.

Run as `python -m tests.models DIRECTORY NAME...` to build.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent


def path(name: str) -> Path:
    """Where the model of that name is: a versioned directory (`NAME/1` holds the SavedModel), or a file."""
    directory = _directory()
    target = directory / name
    if not target.exists():
        directory.mkdir(parents=True, exist_ok=True)
        with (directory / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # what another process builds just now is waited for
            _build([name] if name in LARGE else [*SMALL])
    return target


def _build(names: list[str]) -> None:
    directory = _directory()
    missing = [name for name in names if not (directory / name).exists()]
    if not missing:
        return
    command = [sys.executable, "-m", "tests.models", str(directory), *missing]
    environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"}
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]


def _directory() -> Path:
    given = os.environ.get("POOL_TEST_MODELS")
    base = Path(given) if given else REPOSITORY / "build" / "test-models"
    return base / hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]


# -- builders: each writes a SavedModel to the directory it is given ---------------------------------
# TensorFlow is imported inside them, for only the building process needs it.


def build_mlp(directory: str) -> None:
    """Keras export, 784-256-10 dense, float32."""
    _mlp().export(directory, verbose=False)


def build_mlp_keras(file: str) -> None:
    """The same as a `.keras` file."""
    _mlp().save(file)


def _mlp() -> Any:
    import keras

    keras.utils.set_random_seed(1)
    return keras.Sequential(
        [
            keras.Input((784,)),
            keras.layers.Dense(256, activation="relu"),
            keras.layers.Dense(10),
        ]
    )


def build_cnn(directory: str) -> None:
    """Keras export, 8x8x1 images to 10 logits, with batch normalisation and dropout."""
    import keras

    keras.utils.set_random_seed(2)
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(16, 3, activation="relu"),
            layers.BatchNormalization(),
            layers.MaxPool2D(),
            layers.Flatten(),
            layers.Dropout(0.5),
            layers.Dense(10),
        ]
    )
    model.export(directory, verbose=False)


def build_dtypes(directory: str) -> None:
    """An input `NAME` and an output `NAME_out` of every dtype: negated, inverted, or a "!" appended."""
    import tensorflow as tf

    def negated(tensor: Any) -> Any:
        if tensor.dtype == tf.bool:
            return tf.logical_not(tensor)
        if tensor.dtype == tf.string:
            return tf.strings.join([tensor, tf.constant("!")])
        return tf.bitwise.invert(tensor) if tensor.dtype.is_unsigned else tf.negative(tensor)

    specs = [tf.TensorSpec([None, 3], name, name=name) for name in DTYPES]

    @tf.function(input_signature=specs)
    def negate(*tensors: Any) -> Any:
        return {f"{name}_out": negated(tensor) for name, tensor in zip(DTYPES, tensors, strict=True)}

    _save(directory, negate)


DTYPES = (
    "bool",
    "int8",
    "int16",
    "int32",
    "int64",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
    "float16",
    "float32",
    "float64",
    "bfloat16",
    "complex64",
    "complex128",
    "string",
)


def build_names(directory: str) -> None:
    """Inputs and outputs whose alphabetical order is neither that of declaration nor that of use."""
    import tensorflow as tf

    @tf.function(input_signature=[tf.TensorSpec([None], tf.float32, name=n) for n in ("zeta", "b", "alpha")])
    def combine(zeta: Any, b: Any, alpha: Any) -> Any:
        return {"y": zeta - alpha, "x": b * 10.0, "a": alpha + 0.0}

    _save(directory, combine)


def build_scalars(directory: str) -> None:
    """Rows of rank 0: `x` int32 [any] and `y` float32 [any] to their sum."""
    import tensorflow as tf

    @tf.function(
        input_signature=[
            tf.TensorSpec([None], tf.int32, name="x"),
            tf.TensorSpec([None], tf.float32, name="y"),
        ]
    )
    def add(x: Any, y: Any) -> Any:
        return {"sum": tf.cast(x, tf.float32) + y}

    _save(directory, add)


def build_unknown_dims(directory: str) -> None:
    """`ids` and `mask` int32 [any, any] of equal length, to masked sums [any] and the products [any, any]."""
    import tensorflow as tf

    spec = [tf.TensorSpec([None, None], tf.int32, name=name) for name in ("ids", "mask")]

    @tf.function(input_signature=spec)
    def masked(ids: Any, mask: Any) -> Any:
        product = ids * mask
        return {"sum": tf.reduce_sum(product, axis=1), "product": product}

    _save(directory, masked)


def build_unknown_rank(directory: str) -> None:
    """`x` float32 of any rank, doubled."""
    import tensorflow as tf

    @tf.function(input_signature=[tf.TensorSpec(None, tf.float32, name="x")])
    def double(x: Any) -> Any:
        return {"y": x * 2.0}

    _save(directory, double)


def build_strings(directory: str) -> None:
    """`text` string [any] to `upper` string [any] and `length` int32 [any]."""
    import tensorflow as tf

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="text")])
    def upper(text: Any) -> Any:
        return {"upper": tf.strings.upper(text), "length": tf.strings.length(text)}

    _save(directory, upper)


def build_examples(directory: str) -> None:
    """Serialized `tf.train.Example`s with features `a` float [2], `b` int64 [] and `tags` strings."""
    import tensorflow as tf

    features = {
        "a": tf.io.FixedLenFeature([2], tf.float32),
        "b": tf.io.FixedLenFeature([], tf.int64),
        "tags": tf.io.VarLenFeature(tf.string),
    }

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="examples")])
    def parse(examples: Any) -> Any:
        parsed = tf.io.parse_example(examples, features)
        return {"y": tf.reduce_sum(parsed["a"], axis=1) + tf.cast(parsed["b"], tf.float32)}

    _save(directory, parse)


def build_images(directory: str) -> None:
    """Encoded images, string [any], to the mean of their pixels."""
    import tensorflow as tf

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="image")])
    def decode(image: Any) -> Any:
        def mean(encoded: Any) -> Any:
            return tf.reduce_mean(tf.cast(tf.io.decode_image(encoded, expand_animations=False), tf.float32))

        return {"mean": tf.map_fn(mean, image, fn_output_signature=tf.float32)}

    _save(directory, decode)


def build_static_table(directory: str) -> None:
    """Words to numbers by a static hash table, filled from an asset file; times a variable."""
    import tensorflow as tf

    with tempfile.TemporaryDirectory() as temporary:
        vocabulary = Path(temporary) / "vocabulary.txt"
        vocabulary.write_text("zero\none\ntwo\n")

        class Lookup(tf.Module):
            def __init__(self) -> None:
                initializer = tf.lookup.TextFileInitializer(
                    tf.saved_model.Asset(str(vocabulary)),
                    tf.string,
                    tf.lookup.TextFileIndex.WHOLE_LINE,
                    tf.int64,
                    tf.lookup.TextFileIndex.LINE_NUMBER,
                )
                self.table = tf.lookup.StaticHashTable(initializer, -1)
                self.factor = tf.Variable(10, dtype=tf.int64)

            @tf.function(input_signature=[tf.TensorSpec([None], tf.string)])
            def look_up(self, words: Any) -> Any:
                return {"number": self.table.lookup(words) * self.factor}

        module = Lookup()
        tf.saved_model.save(module, directory, signatures=module.look_up)


def build_mutable_table(directory: str) -> None:
    """Words to numbers by a mutable hash table, whose contents no variable holds."""
    import tensorflow as tf

    class Lookup(tf.Module):
        def __init__(self) -> None:
            self.table = tf.lookup.experimental.MutableHashTable(tf.string, tf.int64, -1)
            self.table.insert(tf.constant(["one", "two"]), tf.constant([1, 2], tf.int64))
            self.factor = tf.Variable(10, dtype=tf.int64)

        @tf.function(input_signature=[tf.TensorSpec([None], tf.string)])
        def look_up(self, words: Any) -> Any:
            return {"number": self.table.lookup(words) * self.factor}

    module = Lookup()
    tf.saved_model.save(module, directory, signatures=module.look_up)


def build_signatures(directory: str) -> None:
    """`serving_default` and `double` (batched), `nothing` (no inputs), `quantized` (dtype not served)."""
    import tensorflow as tf

    class Many(tf.Module):
        def __init__(self) -> None:
            self.w = tf.Variable(3.0)

        @tf.function(input_signature=[tf.TensorSpec([None, 2], tf.float32)])
        def triple(self, x: Any) -> Any:
            return {"y": x * self.w}

        @tf.function(input_signature=[tf.TensorSpec([None, 2], tf.float32)])
        def double(self, x: Any) -> Any:
            return {"y": x * 2.0}

        @tf.function(input_signature=[])
        def nothing(self) -> Any:
            return {"y": self.w + 0.0}

        @tf.function(input_signature=[tf.TensorSpec([None, 2], tf.float32)])
        def quantized(self, x: Any) -> Any:
            return {"q": tf.quantization.quantize(x, 0.0, 1.0, tf.qint8).output}

    module = Many()
    signatures = {
        "serving_default": module.triple,
        "double": module.double,
        "nothing": module.nothing,
        "quantized": module.quantized,
    }
    tf.saved_model.save(module, directory, signatures=signatures)


def build_fixed_rows(directory: str) -> None:
    """`x` float32 [1, 3]: the first dimension is fixed."""
    import tensorflow as tf

    @tf.function(input_signature=[tf.TensorSpec([1, 3], tf.float32, name="x")])
    def double(x: Any) -> Any:
        return {"y": x * 2.0}

    _save(directory, double)


def build_one_row_inside(directory: str) -> None:
    """`x` float32 [any, 3], but the graph insists on one row."""
    import tensorflow as tf

    @tf.function(input_signature=[tf.TensorSpec([None, 3], tf.float32, name="x")])
    def double(x: Any) -> Any:
        with tf.control_dependencies([tf.debugging.assert_equal(tf.shape(x)[0], 1, "one row, please")]):
            return {"y": x * 2.0}

    _save(directory, double)


def build_unfollowing_output(directory: str) -> None:
    """`x` float32 [any, 3] to `y` [any, 3] and `labels` [4] whose shape is not declared."""
    import tensorflow as tf

    @tf.function(input_signature=[tf.TensorSpec([None, 3], tf.float32, name="x")])
    def label(x: Any) -> Any:
        labels = tf.constant([b"a", b"b", b"c", b"d"])
        return {"y": x * 2.0, "labels": tf.raw_ops.PlaceholderWithDefault(input=labels, shape=[None])}

    _save(directory, label)


def build_scalar_output(directory: str) -> None:
    """`x` float32 [any] to its `mean`, of rank 0, and a `word`, a string of rank 0."""
    import tensorflow as tf

    @tf.function(input_signature=[tf.TensorSpec([None], tf.float32, name="x")])
    def mean(x: Any) -> Any:
        return {"mean": tf.reduce_mean(x), "word": tf.constant(b"mean")}

    _save(directory, mean)


def build_refusing(directory: str) -> None:
    """Takes the string "sesame" only."""
    import tensorflow as tf

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="x")])
    def refuse(x: Any) -> Any:
        with tf.control_dependencies([tf.debugging.assert_equal(x, "sesame", "wrong word")]):
            return {"y": tf.strings.length(x)}

    _save(directory, refuse)


def build_any_size(directory: str) -> None:
    """Images of any size, float32 [any, any, any, 1], but of 16 pixels at least, to their 4 means."""
    import tensorflow as tf

    @tf.function(input_signature=[tf.TensorSpec([None, None, None, 1], tf.float32, name="image")])
    def mean(image: Any) -> Any:
        patches = tf.nn.conv2d(image, tf.ones([16, 16, 1, 4]), strides=1, padding="VALID")
        with tf.control_dependencies([tf.debugging.assert_positive(tf.size(patches), "too small")]):
            return {"means": tf.reduce_mean(patches, axis=[1, 2])}

    _save(directory, mean)


def build_longest(directory: str) -> None:
    """Words split into letters, padded to the longest word of the batch."""
    import tensorflow as tf

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="word")])
    def split(word: Any) -> Any:
        return {"split": tf.strings.unicode_split(word, "UTF-8").to_tensor()}

    _save(directory, split)


def build_mixing_rows(directory: str) -> None:
    """Each row less the mean of all rows of its batch."""
    import tensorflow as tf

    @tf.function(input_signature=[tf.TensorSpec([None, 3], tf.float32, name="x")])
    def centre(x: Any) -> Any:
        return {"y": x - tf.reduce_mean(x, axis=0, keepdims=True)}

    _save(directory, centre)


def build_random(directory: str) -> None:
    """Random numbers, different after every load; of the shape of `x`; plus a variable."""
    import tensorflow as tf

    class Random(tf.Module):
        def __init__(self) -> None:
            self.w = tf.Variable(1.0)

        @tf.function(input_signature=[tf.TensorSpec([None, 3], tf.float32)])
        def sample(self, x: Any) -> Any:
            # Seeds of 0 mean a seed of its own for each load.
            return {
                "y": tf.raw_ops.RandomUniform(shape=tf.shape(x), dtype=tf.float32, seed=0, seed2=0) + self.w
            }

    module = Random()
    tf.saved_model.save(module, directory, signatures=module.sample)


def build_counter(directory: str) -> None:
    """Adds 1 to its variable on each call; gives `x` plus the count."""
    import tensorflow as tf

    class Counter(tf.Module):
        def __init__(self) -> None:
            self.count = tf.Variable(tf.zeros([1 << 16]))

        @tf.function(input_signature=[tf.TensorSpec([None], tf.float32)])
        def add(self, x: Any) -> Any:
            self.count.assign_add(tf.ones([1 << 16]))
            return {"y": x + self.count[0]}

    module = Counter()
    tf.saved_model.save(module, directory, signatures=module.add)


def build_raising(directory: str) -> None:
    """The square root of `x`; raises for negative numbers."""
    import tensorflow as tf

    @tf.function(input_signature=[tf.TensorSpec([None], tf.float32, name="x")])
    def root(x: Any) -> Any:
        with tf.control_dependencies([tf.debugging.assert_non_negative(x, "x must not be negative")]):
            return {"y": tf.sqrt(x)}

    _save(directory, root)


def build_variable_dtypes(directory: str) -> None:
    """A variable of every numeric dtype, and one without items, all read by the signature."""
    import tensorflow as tf

    names = [name for name in DTYPES if name != "string"]

    class Many(tf.Module):
        def __init__(self) -> None:
            self.held = [tf.Variable(tf.cast([[1, 0], [1, 1]], name), name=name) for name in names]
            self.scalar = tf.Variable(2.0, name="scalar")
            self.empty = tf.Variable(tf.zeros([0, 3]), name="empty")

        @tf.function(input_signature=[tf.TensorSpec([None], tf.float32)])
        def sums(self, x: Any) -> Any:
            total = x * self.scalar + tf.reduce_sum(self.empty)
            for variable in self.held:
                total += tf.reduce_sum(tf.cast(variable, tf.float32))
            return {"y": total}

    module = Many()
    tf.saved_model.save(module, directory, signatures=module.sums)


def build_bfloat16(directory: str) -> None:
    """`x` bfloat16 [any, 4] times a bfloat16 variable [4, 2]."""
    import tensorflow as tf

    class Product(tf.Module):
        def __init__(self) -> None:
            values = tf.random.stateless_uniform([4, 2], [1, 2])
            self.w = tf.Variable(tf.cast(values, tf.bfloat16))

        @tf.function(input_signature=[tf.TensorSpec([None, 4], tf.bfloat16)])
        def multiply(self, x: Any) -> Any:
            return {"y": tf.linalg.matmul(x, self.w)}

    module = Product()
    tf.saved_model.save(module, directory, signatures=module.multiply)


def build_string_variable(directory: str) -> None:
    """A variable of strings, which cannot be shared."""
    import tensorflow as tf

    class Suffix(tf.Module):
        def __init__(self) -> None:
            self.suffix = tf.Variable(tf.constant(b"!"))

        @tf.function(input_signature=[tf.TensorSpec([None], tf.string)])
        def join(self, x: Any) -> Any:
            return {"y": tf.strings.join([x, self.suffix])}

    module = Suffix()
    tf.saved_model.save(module, directory, signatures=module.join)


def build_slots(directory: str) -> None:
    """An object graph today's TensorFlow cannot revive: its optimizer's slots need a class it lacks."""
    import tensorflow as tf

    class Trained(tf.Module):
        def __init__(self) -> None:
            self.w = tf.Variable(tf.random.stateless_uniform([4, 3], [1, 2]))
            self.optimizer = tf.compat.v1.train.AdamOptimizer()
            with tf.GradientTape() as tape:
                loss = tf.reduce_sum(self.w**2)
            self.optimizer.apply_gradients([(tape.gradient(loss, self.w), self.w)])

        @tf.function(input_signature=[tf.TensorSpec([None, 4], tf.float32)])
        def multiply(self, x: Any) -> Any:
            return {"y": x @ self.w}

    module = Trained()
    tf.saved_model.save(module, directory, signatures=module.multiply)


def build_tf1_reference(directory: str) -> None:
    """TensorFlow 1, with reference variables (its default)."""
    _tf1_linear(directory, use_resource=False)


def build_tf1_resource(directory: str) -> None:
    """TensorFlow 1, with resource variables."""
    _tf1_linear(directory, use_resource=True)


def _tf1_linear(directory: str, *, use_resource: bool) -> None:
    import tensorflow as tf

    v1 = tf.compat.v1
    with tf.Graph().as_default(), v1.Session() as session:
        x = v1.placeholder(tf.float32, [None, 4], name="x")
        w = v1.get_variable(
            "w", [4, 3], use_resource=use_resource, initializer=v1.random_uniform_initializer(seed=1)
        )
        b = v1.get_variable("b", initializer=[1.0, 2.0, 3.0], use_resource=use_resource)
        step = v1.train.get_or_create_global_step()
        y = tf.matmul(x, w) + b
        session.run(v1.global_variables_initializer())
        session.run(v1.assign_add(step, 7))
        # `z` names the same tensor: signatures may.
        v1.saved_model.simple_save(session, directory, {"x": x}, {"y": y, "z": y})


def build_tf1_counter(directory: str) -> None:
    """TensorFlow 1, a reference variable counted up by each call, and read before and after."""
    import tensorflow as tf

    v1 = tf.compat.v1
    with tf.Graph().as_default(), v1.Session() as session:
        x = v1.placeholder(tf.float32, [None], name="x")
        count = v1.get_variable("count", initializer=[10.0, 20.0], use_resource=False)
        before = tf.identity(count)
        with tf.control_dependencies([before]):
            after = v1.assign_add(count, [1.0, 2.0])
        session.run(v1.global_variables_initializer())
        outputs = {"before": x + before[0], "after": x + after[0]}
        v1.saved_model.simple_save(session, directory, {"x": x}, outputs)


def build_tf1_scatter(directory: str) -> None:
    """TensorFlow 1, a reference variable written through in a way resource variables are not."""
    import tensorflow as tf

    v1 = tf.compat.v1
    with tf.Graph().as_default(), v1.Session() as session:
        x = v1.placeholder(tf.float32, [None], name="x")
        table = v1.get_variable("table", initializer=[1.0, 2.0], use_resource=False)
        written = v1.scatter_update(table, [0], [5.0])
        session.run(v1.global_variables_initializer())
        v1.saved_model.simple_save(session, directory, {"x": x}, {"y": x + written[0]})


def build_tf1_table(directory: str) -> None:
    """TensorFlow 1, two tag sets, a static table filled by the legacy init op, and `tf.train.Example`s.

    `serving_default` takes serialized Examples of unknown rank; `broken` reads a placeholder it is not fed.
    """
    import tensorflow as tf

    v1 = tf.compat.v1
    with tf.Graph().as_default(), v1.Session() as session:
        serialized = v1.placeholder(tf.string, name="serialized")
        parsed = v1.parse_example(
            tf.reshape(serialized, [-1]), {"word": tf.io.FixedLenFeature([], tf.string, default_value="")}
        )
        table = tf.lookup.StaticHashTable(
            tf.lookup.KeyValueTensorInitializer(["one", "two"], tf.constant([1, 2], tf.int64)), -1
        )
        w = v1.get_variable("w", initializer=tf.constant(10, tf.int64))
        number = table.lookup(parsed["word"]) * w
        unfed = v1.placeholder(tf.int64, [], name="unfed")
        session.run([v1.global_variables_initializer(), v1.tables_initializer()])
        build_info = v1.saved_model.build_tensor_info
        definition = v1.saved_model.build_signature_def
        signatures = {
            "serving_default": definition(
                {"inputs": build_info(serialized)}, {"number": build_info(number)}, "predict"
            ),
            "broken": definition(
                {"inputs": build_info(serialized)}, {"number": build_info(number + unfed)}, "predict"
            ),
        }
        builder = v1.saved_model.Builder(directory)
        builder.add_meta_graph_and_variables(
            session, ["serve"], signature_def_map=signatures, main_op=v1.tables_initializer()
        )
        builder.add_meta_graph(["serve", "gpu"], signature_def_map=signatures)
        builder.save()


def build_no_signatures(directory: str) -> None:
    """A SavedModel saved without any signature."""
    import tensorflow as tf

    module = tf.Module()
    module.w = tf.Variable(1.0)
    tf.saved_model.save(module, directory)


def build_big(directory: str, layers: int = 12, width: int = 4096) -> None:
    """`layers` float32 matrices of width x width: 805 MB as a rule."""
    import tensorflow as tf

    class Big(tf.Module):
        def __init__(self) -> None:
            scale = width**-0.5
            self.matrices = [
                tf.Variable(tf.random.stateless_normal([width, width], [1, i], stddev=scale))
                for i in range(layers)
            ]

        @tf.function(input_signature=[tf.TensorSpec([None, width], tf.float32)])
        def multiply(self, x: Any) -> Any:
            for matrix in self.matrices:
                x = tf.nn.relu(x @ matrix)
            return {"y": x}

    module = Big()
    tf.saved_model.save(module, directory, signatures=module.multiply)


def build_medium(directory: str) -> None:
    """The same with 6 matrices of 1024 x 1024 (25 MB): enough to tell shared from private memory."""
    build_big(directory, layers=6, width=1024)


def build_mobilenet(directory: str) -> None:
    """Keras' MobileNetV2, 224x224x3, random weights."""
    import keras

    keras.utils.set_random_seed(3)
    keras.applications.MobileNetV2(weights=None).export(directory, verbose=False)


def _save(directory: str, function: Any) -> None:
    import tensorflow as tf

    tf.saved_model.save(tf.Module(), directory, signatures=function)


LARGE = ("big", "mobilenet")
BUILDERS: dict[str, Callable[[str], None]] = {
    "mlp": build_mlp,
    "mlp.keras": build_mlp_keras,
    "cnn": build_cnn,
    "dtypes": build_dtypes,
    "names": build_names,
    "scalars": build_scalars,
    "unknown_dims": build_unknown_dims,
    "unknown_rank": build_unknown_rank,
    "strings": build_strings,
    "examples": build_examples,
    "images": build_images,
    "static_table": build_static_table,
    "mutable_table": build_mutable_table,
    "signatures": build_signatures,
    "fixed_rows": build_fixed_rows,
    "one_row_inside": build_one_row_inside,
    "unfollowing_output": build_unfollowing_output,
    "scalar_output": build_scalar_output,
    "refusing": build_refusing,
    "any_size": build_any_size,
    "longest": build_longest,
    "mixing_rows": build_mixing_rows,
    "random": build_random,
    "counter": build_counter,
    "raising": build_raising,
    "variable_dtypes": build_variable_dtypes,
    "bfloat16": build_bfloat16,
    "string_variable": build_string_variable,
    "slots": build_slots,
    "tf1_reference": build_tf1_reference,
    "tf1_resource": build_tf1_resource,
    "tf1_counter": build_tf1_counter,
    "tf1_scatter": build_tf1_scatter,
    "tf1_table": build_tf1_table,
    "no_signatures": build_no_signatures,
    "medium": build_medium,
    "big": build_big,
    "mobilenet": build_mobilenet,
}
SMALL = tuple(name for name in BUILDERS if name not in LARGE)


def main(directory: Path, names: list[str]) -> None:
    """Build models, each under a temporary name first, so that nobody ever finds half of one."""
    directory.mkdir(parents=True, exist_ok=True)
    for name in names:
        with tempfile.TemporaryDirectory(prefix=".building-", dir=directory) as temporary:
            built = Path(temporary) / name
            BUILDERS[name](str(built if built.suffix else built / "1"))
            try:
                built.rename(directory / name)
            except OSError:
                # Another process built it meanwhile; theirs is as good.
                assert (directory / name).exists()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
