"""A loaded SavedModel: its signatures, its variables, its calls. Runs in loader and worker processes.

Sharing weights rests on two things TensorFlow does: `from_dlpack` makes a tensor over foreign memory, and
assigning a tensor to a resource variable makes the variable hold that tensor's buffer, without a copy.
So a SavedModel is loaded without its checkpoint, and each variable is assigned a view of the weights memfd.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from typing import Any

import msgspec
import tensorflow as tf

from pool.backends import Array, BoundCall
from pool.backends.tensorflow import call, examples, metagraph
from pool.errors import ModelLoadError, SignatureNotFound
from pool.signature import DTYPES, Shape, Signature, TensorSpec, numpy_dtype

Function = Any  # a tf.types.experimental.ConcreteFunction
Handle = Any  # an eager tensor of dtype resource


def load(path: str, weights: Sequence[Array] | None) -> SavedModel:
    """Load a SavedModel directory; see `pool.backends.Backend.load`.

    Raises:
        ModelLoadError: it cannot be loaded, has no servable signature, or does not fit `weights`.
    """
    shared = weights is not None
    try:
        proto = metagraph.parse(path)
    except Exception as error:
        raise ModelLoadError(f"{path}: {call.describe(error)}") from None
    graphs = proto.meta_graphs
    state = next((found for graph in graphs if (found := metagraph.stateful_operation(graph))), "")
    has_objects = len(graphs) == 1 and graphs[0].HasField("object_graph_def")
    del proto, graphs

    root: Any = None
    skipped: dict[str, str] = {}
    not_revived = ""
    by_metagraph = False
    if has_objects:
        options = tf.saved_model.LoadOptions(experimental_skip_checkpoint=shared)
        try:
            root = tf.saved_model.load(path, options=options)
        except Exception as error:
            not_revived = call.describe(error)
            gc.collect()  # what was restored until then, possibly all the weights
    if root is None:
        try:
            root, skipped = metagraph.load(path, skip_checkpoint=shared)
            by_metagraph = True
        except Exception as error:
            reason = call.describe(error)
            if not_revived and not_revived != reason:
                reason += f"; and its objects cannot be revived: {not_revived}"
            raise ModelLoadError(f"{path}: {reason}") from None

    model = SavedModel(path, root, skipped, state, by_metagraph=by_metagraph)
    if weights is not None:
        model.adopt(weights)
    return model


class _Variable(msgspec.Struct):
    """A variable some signature reads: a resource handle and what it holds."""

    name: str
    dtype: Any  # tf.DType
    shape: Any  # tf.TensorShape, possibly not fully known
    handle: Handle

    def read(self) -> Any:
        return tf.raw_ops.ReadVariableOp(resource=self.handle, dtype=self.dtype)

    def assign(self, tensor: Any) -> None:
        tf.raw_ops.AssignVariableOp(resource=self.handle, value=tensor, validate_shape=False)


class SavedModel:
    """A `pool.backends.Model` over a loaded SavedModel.

    Args:
        path: Its directory, for messages.
        root: The loaded object; its `signatures` attribute maps names to concrete functions.
        skipped: Signatures that could not be loaded, with the reason.
        state: An operation of the graph that keeps state outside of variables, or ''.
        by_metagraph: Whether `root` was loaded by its MetaGraph.

    Raises:
        ModelLoadError: no signature is servable.
    """

    def __init__(
        self, path: str, root: Any, skipped: dict[str, str], state: str, *, by_metagraph: bool
    ) -> None:
        self._path = path
        self._root = root  # owns tables and initialisers that functions refer to by handle only
        self._state = state
        self._functions: dict[str, Function] = {}
        self._keywords: dict[str, list[str]] = {}
        self._signatures: dict[str, Signature] = {}
        self._unlifted: dict[str, _Variable] = {}
        self._references: list[str] = []
        self.skipped = dict(skipped)
        # "serving_default" first, because the first is what a request without a signature's name means.
        for name in sorted(root.signatures, key=lambda name: (name != "serving_default", name)):
            if name.startswith("__saved_model_"):
                continue  # initialisation, not an entry point
            function = root.signatures[name]
            keywords = _keywords(function)
            signature = _signature(name, function, keywords)
            if isinstance(signature, str):
                self.skipped[name] = signature
                continue
            self._functions[name] = function
            self._keywords[name] = keywords
            self._signatures[name] = signature
            if by_metagraph:
                self._find_unlifted(function)
        if self._unlifted:
            handles = [variable.handle for variable in self._unlifted.values()]
            weakref.finalize(self, metagraph.destroy, handles).atexit = False
        if not self._signatures:
            reasons = "; ".join(f"{name!r} {reason}" for name, reason in sorted(self.skipped.items()))
            raise ModelLoadError(f"{path} has no servable signature: {reasons or 'it was saved without any'}")

    @property
    def signatures(self) -> tuple[Signature, ...]:
        """All servable signatures, "serving_default" first; `batched` as far as static shapes tell."""
        return tuple(self._signatures.values())

    def bind(self, signature: str, inputs: Sequence[Array]) -> BoundCall:
        """Prepare a call; see `pool.backends.Model.bind`.

        Raises:
            SignatureNotFound: there is no servable signature of that name.
        """
        found = self._signatures.get(signature)
        if found is None:
            raise SignatureNotFound(f"no signature {signature!r}; wanted one of {sorted(self._signatures)}")
        return call.bind(self._functions[signature], found, self._keywords[signature], inputs, owner=self)

    def texts(self, signature: str) -> tuple[bytes, ...]:
        """Serialized `tf.train.Example`s the signature's parsing operations would take."""
        if not any(spec.dtype == "string" for spec in self._signatures[signature].inputs):
            return ()
        return examples.texts(self._functions[signature])

    def weights(self) -> list[tuple[str, Array]]:
        """Name and value of each variable that a signature reads, aliasing TensorFlow's memory.

        Raises:
            ModelLoadError: the model holds state that these do not carry.
        """
        named = []
        for variable in self._variables():
            dtype = variable.dtype.base_dtype.name
            if dtype not in DTYPES or dtype == "string":
                raise ModelLoadError(f"variable {variable.name!r} holds {dtype}, which cannot be shared")
            try:
                named.append((variable.name, call.as_array(variable.read(), dtype)))
            except Exception as error:
                raise ModelLoadError(f"variable {variable.name!r}: {call.describe(error)}") from None
        return named

    def adopt(self, weights: Sequence[Array]) -> None:
        """Make the variables hold these arrays' memory instead of memory of their own.

        Args:
            weights: One per variable, in the order of `weights()`; 64-byte aligned and writable.

        Raises:
            ModelLoadError: they are not this model's weights.
        """
        variables = self._variables()
        if len(variables) != len(weights):
            raise ModelLoadError(f"{self._path} has {len(variables)} variables; got {len(weights)} weights")
        for variable, array in zip(variables, weights, strict=True):
            dtype = variable.dtype.base_dtype.name
            if array.dtype != numpy_dtype(dtype) or not variable.shape.is_compatible_with(array.shape):
                raise ModelLoadError(
                    f"variable {variable.name!r} is {dtype} {variable.shape}; "
                    f"got a weight of {array.dtype} {list(array.shape)}"
                )
            variable.assign(call.as_tensor(array, dtype))

    def _variables(self) -> list[_Variable]:
        """Each variable that a signature reads, once; the same order for every load.

        What no signature reads (an optimizer's slots) is left out: a worker never needs it.

        Raises:
            ModelLoadError: the signatures reach state that is not in variables.
        """
        if self._state:
            raise ModelLoadError(f"the model keeps state outside of variables ({self._state})")
        if self._references:
            raise ModelLoadError(f"{self._references[0]!r} is a reference variable, which cannot be shared")
        found: dict[Any, _Variable] = {}
        for name in sorted(self._functions):
            function = self._functions[name]
            by_handle = {id(variable.handle): variable for variable in function.variables}
            for captured in function.captured_inputs:
                variable = by_handle.get(id(captured))
                if variable is not None:
                    found[id(captured)] = _Variable(
                        variable.name.removesuffix(":0"), variable.dtype, variable.shape, captured
                    )
        return [*found.values(), *self._unlifted.values()]

    def _find_unlifted(self, function: Function) -> None:
        nodes, references = metagraph.unlifted_variables(function)
        self._references.extend(references)
        for node in nodes:
            if node.name not in self._unlifted:
                dtype, shape = node.get_attr("dtype"), tf.TensorShape(node.get_attr("shape"))
                self._unlifted[node.name] = _Variable(node.name, dtype, shape, metagraph.handle(node))


def _keywords(function: Function) -> list[str]:
    """The name of each of the function's flat inputs, captures aside."""
    keywords = getattr(function, "_arg_keywords", None)
    if keywords is None:
        keywords = sorted(function.structured_input_signature[1])
    return [str(keyword) for keyword in keywords]


def _signature(name: str, function: Function, keywords: list[str]) -> Signature | str:
    """The signature of a function; or why it cannot be served."""
    placeholders = function.inputs[: len(function.inputs) - len(function.captured_inputs)]
    if not placeholders:
        return "takes no inputs"
    if len(placeholders) != len(keywords):
        return f"takes {len(placeholders)} tensors for its {len(keywords)} inputs"
    outputs = function.structured_outputs
    if not isinstance(outputs, dict) or not outputs:
        return "has no named outputs"
    inputs = dict(zip(keywords, placeholders, strict=True))
    specs: dict[str, list[TensorSpec]] = {"input": [], "output": []}
    for role, named in (("input", inputs), ("output", outputs)):
        for key in sorted(named):
            tensor = named[key]
            if not isinstance(tensor, (tf.Tensor, tf.TensorSpec)):
                return f"has an {role} {key!r} that is a {type(tensor).__name__}, not a tensor"
            dtype = tensor.dtype.base_dtype.name
            if dtype not in DTYPES:
                return f"has an {role} {key!r} of dtype {dtype}, which is not supported"
            specs[role].append(TensorSpec(key, dtype, _shape(tensor.shape)))
    reason = _unbatched_reason(specs)
    return Signature(
        name, tuple(specs["input"]), tuple(specs["output"]), batched=not reason, unbatched_reason=reason
    )


def _shape(shape: Any) -> Shape | None:
    return None if shape.rank is None else tuple(shape.as_list())


def _unbatched_reason(specs: dict[str, list[TensorSpec]]) -> str:
    for role, named in specs.items():
        for spec in named:
            if spec.shape is not None and (not spec.shape or spec.shape[0] is not None):
                return f"the first dimension of {role} {spec.name!r} ({spec.describe()}) is not a row axis"
    return ""
