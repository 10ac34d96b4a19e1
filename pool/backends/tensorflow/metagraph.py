"""Loading a SavedModel by its MetaGraph, the way TensorFlow Serving does. Runs in loaders and workers.

A SavedModel of TensorFlow 2 holds its functions twice: as a graph of Python objects, which
`tf.saved_model.load` revives, and as a MetaGraph with signature definitions, which is all that
TensorFlow 1 wrote and all that TensorFlow Serving reads. Objects that today's TensorFlow cannot revive
(Keras 2 optimizers, classes nobody registered) still have a working MetaGraph.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import tensorflow as tf
from tensorflow.core.protobuf import meta_graph_pb2
from tensorflow.python.framework import ops
from tensorflow.python.saved_model import load_v1_in_v2, loader_impl

from pool.backends.tensorflow import references

MetaGraph = Any  # tensorflow.core.protobuf.meta_graph_pb2.MetaGraphDef
Function = Any  # a tf.types.experimental.ConcreteFunction

# The MetaGraph that is for serving, where a SavedModel holds several.
SERVE = "serve"

# Operations that make an object with contents of its own, which no variable carries. Static hash tables
# are not among them: each load fills them from the graph or its assets. Neither are iterators made anew
# within a call.
_STATEFUL = re.compile(
    r"(Anonymous)?Mutable\w*HashTable\w*|\w*Queue(V2)?|Stack(V2)?|Barrier|\w*Accumulator"
    r"|(OneShot|MultiDevice)?Iterator(V\d)?|\w+ResourceHandleOp|TemporaryVariable"
)


def parse(path: str) -> Any:
    """The SavedModel message in directory `path`.

    Raises:
        OSError: there is none, or it is damaged.
    """
    return loader_impl.parse_saved_model(path)


def stateful_operation(meta_graph: MetaGraph) -> str:
    """An operation of the graph that keeps state outside of variables (`MutableHashTableV2`), or ''."""
    for node in _nodes(meta_graph):
        if _STATEFUL.fullmatch(node.op):
            return str(node.op)
    return ""


def _nodes(meta_graph: MetaGraph) -> Iterator[Any]:
    yield from meta_graph.graph_def.node
    for function in meta_graph.graph_def.library.function:
        yield from function.node_def


class _Loader(load_v1_in_v2._EagerSavedModelLoader):  # type: ignore[misc]
    """TensorFlow's own, but one signature that cannot be cut out of the graph does not cost the others."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.skipped: dict[str, str] = {}

    def get_meta_graph_def_from_tags(self, tags: Any) -> MetaGraph:
        meta_graph = super().get_meta_graph_def_from_tags(tags)
        references.convert(meta_graph)
        return meta_graph

    def _extract_signatures(self, wrapped: Any, meta_graph_def: MetaGraph) -> dict[str, Function]:
        functions: dict[str, Function] = {}
        for name in meta_graph_def.signature_def:
            one = meta_graph_pb2.MetaGraphDef()
            one.signature_def[name].CopyFrom(meta_graph_def.signature_def[name])
            try:
                functions.update(super()._extract_signatures(wrapped, one))
            except Exception as error:
                self.skipped[name] = str(error).strip().partition("\n")[0]
        return functions


def load(path: str, *, skip_checkpoint: bool) -> tuple[Any, dict[str, str]]:
    """The loaded graph, an object with `signatures` by name; and the signatures skipped, with the reason.

    Args:
        path: SavedModel directory with a MetaGraph tagged "serve" (or a single one, whatever its tags).
        skip_checkpoint: Leave variables without values.

    Raises:
        Exception: whatever TensorFlow raises; there is no closed list.
    """
    loader = _Loader(path)
    tags = [SERVE] if len(loader.saved_model.meta_graphs) > 1 else None
    with ops.init_scope():
        root = loader.load(tags=tags, skip_restoring_checkpoint=skip_checkpoint)
    return root, loader.skipped


def unlifted_variables(function: Function) -> tuple[list[Any], list[str]]:
    """Variables that live inside the function's graph instead of being captured by it.

    A MetaGraph written by TensorFlow 2 does not list its variables, so its loader leaves their handles
    where they are; they are reached by name through the runtime's resource manager.

    Returns:
        Nodes of type VarHandleOp, and names of reference variables (TensorFlow 1 before resource
        variables), which only the graph itself can reach.
    """
    handles, references = [], []
    for operation in function.graph.get_operations():
        if operation.type == "VarHandleOp":
            handles.append(operation)
        elif operation.type in ("Variable", "VariableV2"):
            references.append(operation.name)
    return handles, references


def destroy(handles: list[Any]) -> None:
    """Free unlifted variables, which the runtime would keep until the process ends."""
    for found in handles:
        tf.raw_ops.DestroyResourceOp(resource=found, ignore_lookup_error=True)


def handle(operation: Any) -> Any:
    """An eager handle of the variable that a VarHandleOp node stands for."""
    return tf.raw_ops.VarHandleOp(
        dtype=operation.get_attr("dtype"),
        shape=operation.get_attr("shape"),
        container=operation.get_attr("container"),
        shared_name=operation.get_attr("shared_name") or operation.name.encode(),
    )
