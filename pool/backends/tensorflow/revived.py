"""A SavedModel as TensorFlow loads it: by its objects, or by its MetaGraph. Runs in loaders and workers."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import tensorflow as tf

from pool.backends import BoundCall
from pool.backends.tensorflow import call, metagraph
from pool.backends.tensorflow.loaded import Loaded, Node, Tensor, Variable, in_order, signature_of
from pool.errors import ModelLoadError
from pool.signature import Signature


class Concrete:
    """A `loaded.Function` over a tf.types.experimental.ConcreteFunction.

    Args:
        name: Of the signature, as each has a function of its own.
        function: Takes its inputs in the order of `keywords`, gives a dict of the signature's outputs.
        keywords: The name each of the function's flat inputs goes by.
    """

    def __init__(self, name: str, function: Any, keywords: list[str]) -> None:
        self.name = name
        self._function = function
        self._keywords = keywords

    def bind(self, signature: Signature, tensors: Mapping[str, Tensor], owner: object) -> BoundCall:
        """See `loaded.Function`."""
        inputs = [tensors[keyword] for keyword in self._keywords]
        try:
            return call.bind(call.entry(self._function), signature.outputs, inputs, owner)
        except AttributeError:
            return call.bind_by_keyword(self._function, signature.outputs, tensors, owner)

    def bodies(self) -> Iterator[Sequence[Node]]:
        """See `loaded.Function`."""
        graph = self._function.graph.as_graph_def()
        yield graph.node
        yield from (function.node_def for function in graph.library.function)


def load(path: str, state: str, *, has_objects: bool, skip_checkpoint: bool) -> Loaded:
    """Load a SavedModel directory.

    Args:
        path: The directory.
        state: An operation of the graph that keeps state outside of variables, or ''.
        has_objects: Whether there are objects to revive.
        skip_checkpoint: Leave variables without values.

    Raises:
        ModelLoadError: it cannot be loaded.
    """
    root: Any = None
    skipped: dict[str, str] = {}
    not_revived = ""
    by_metagraph = False
    if has_objects:
        options = tf.saved_model.LoadOptions(experimental_skip_checkpoint=skip_checkpoint)
        try:
            root = tf.saved_model.load(path, options=options)
        except Exception as error:
            not_revived = call.describe(error)
            gc.collect()  # what was restored until then, possibly all the weights
    if root is None:
        try:
            root, skipped = metagraph.load(path, skip_checkpoint=skip_checkpoint)
            by_metagraph = True
        except Exception as error:
            reason = call.describe(error)
            if not_revived and not_revived != reason:
                reason += f"; and its objects cannot be revived: {not_revived}"
            raise ModelLoadError(f"{path}: {reason}") from None
    return _loaded(root, skipped, state, by_metagraph=by_metagraph)


def _loaded(root: Any, skipped: dict[str, str], state: str, *, by_metagraph: bool) -> Loaded:
    served: dict[str, Any] = {}
    functions: dict[str, Concrete] = {}
    signatures: dict[str, Signature] = {}
    unlifted: dict[str, Variable] = {}
    references: list[str] = []
    for name in in_order(root.signatures):
        if name.startswith("__saved_model_"):
            continue  # initialisation, not an entry point
        function = root.signatures[name]
        keywords = _keywords(function)
        signature = _signature(name, function, keywords)
        if isinstance(signature, str):
            skipped[name] = signature
            continue
        served[name] = function
        functions[name] = Concrete(name, function, keywords)
        signatures[name] = signature
        if by_metagraph:
            references += _find_unlifted(function, unlifted)
    unshareable = ""
    if state:
        unshareable = f"the model keeps state outside of variables ({state})"
    elif references:
        unshareable = f"{references[0]!r} is a reference variable, which cannot be shared"
    variables = [*_captured(served), *unlifted.values()]
    release = partial(metagraph.destroy, [variable.handle for variable in unlifted.values()])
    # The root owns tables and initialisers that functions refer to by handle only.
    return Loaded(signatures, functions, skipped, variables, unshareable, root, release)


def _captured(served: Mapping[str, Any]) -> Iterator[Variable]:
    found = set()
    for name in sorted(served):
        function = served[name]
        by_handle = {id(variable.handle): variable for variable in function.variables}
        for captured in function.captured_inputs:
            variable = by_handle.get(id(captured))
            if variable is not None and id(captured) not in found:
                found.add(id(captured))
                yield Variable(variable.name.removesuffix(":0"), variable.dtype, variable.shape, captured)


def _find_unlifted(function: Any, unlifted: dict[str, Variable]) -> list[str]:
    nodes, references = metagraph.unlifted_variables(function)
    for node in nodes:
        if node.name not in unlifted:
            dtype, shape = node.get_attr("dtype"), tf.TensorShape(node.get_attr("shape"))
            unlifted[node.name] = Variable(node.name, dtype, shape, metagraph.handle(node))
    return references


def _keywords(function: Any) -> list[str]:
    """The name of each of the function's flat inputs, captures aside."""
    keywords = getattr(function, "_arg_keywords", None)
    if keywords is None:
        keywords = sorted(function.structured_input_signature[1])
    return [str(keyword) for keyword in keywords]


def _signature(name: str, function: Any, keywords: list[str]) -> Signature | str:
    """The signature of a function; or why it cannot be served."""
    placeholders = function.inputs[: len(function.inputs) - len(function.captured_inputs)]
    if not placeholders:
        return "takes no inputs"
    if len(placeholders) != len(keywords):
        return f"takes {len(placeholders)} tensors for its {len(keywords)} inputs"
    outputs = function.structured_outputs
    if not isinstance(outputs, dict) or not outputs:
        return "has no named outputs"
    return signature_of(name, dict(zip(keywords, placeholders, strict=True)), outputs)
