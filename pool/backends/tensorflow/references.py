"""Turning the reference variables of a MetaGraph into resource variables. Runs in loaders and workers.

TensorFlow 1's variables were, unless one asked otherwise, *reference* variables: an operation that hands
out its buffer. Only the graph itself can reach them, and assigning always copies, so that they cannot take
over shared memory. A resource variable behaves the same for everything a serving graph does with it:

    VariableV2 v                         VarHandleOp v
    Identity v/read (v)                  ReadVariableOp r (v);  Identity v/read (r)
    Assign v/Assign (v, x)               AssignVariableOp w (v, x);  ReadVariableOp v/Assign (v, ^w)
    IsVariableInitialized i (v)          VarIsInitializedOp i (v)

A graph that does anything else with a reference is left as it was.
"""

from __future__ import annotations

from typing import Any

from tensorflow.core.framework import variable_pb2
from tensorflow.python.framework import op_def_registry

MetaGraph = Any  # tensorflow.core.protobuf.meta_graph_pb2.MetaGraphDef
Node = Any  # tensorflow.core.framework.node_def_pb2.NodeDef

_ASSIGNMENTS = {
    "Assign": "AssignVariableOp",
    "AssignAdd": "AssignAddVariableOp",
    "AssignSub": "AssignSubVariableOp",
}


def convert(meta_graph: MetaGraph) -> bool:
    """Convert all reference variables of the graph, in place; or, if any resists, none.

    Returns:
        Whether the graph has no reference variables any more.
    """
    nodes = meta_graph.graph_def.node
    variables = {node.name: node for node in nodes if node.op == "VariableV2"}
    if any(node.op == "Variable" for node in nodes):
        return False
    if not variables:
        return True
    # Assignments hand their reference on.
    references = {node.name for node in nodes if node.op in ("VariableV2", *_ASSIGNMENTS)}
    if not all(_is_convertible(node, variables, references) for node in nodes):
        return False
    added: list[Node] = []
    for node in list(nodes):
        if node.name not in variables:
            _convert_consumer(node, variables, added)
    for variable in variables.values():
        _convert_variable(variable)
    nodes.extend(added)
    for collection in meta_graph.collection_def.values():
        _convert_collection(collection, variables)
    return True


def _source(name: str) -> str:
    """The node an input comes from; '' for a control input."""
    return "" if name.startswith("^") else name.removesuffix(":0")


def _takes_reference(node: Node, index: int) -> bool:
    """Whether the node's input of that index is declared a reference; unknown operations count as such."""
    definition = op_def_registry.get(node.op)
    if definition is None or any(
        a.number_attr or a.type_list_attr for a in definition.input_arg[: index + 1]
    ):
        # Inputs of varying number: positions say nothing, but no such operation but these takes one.
        return definition is None or any(a.is_ref for a in definition.input_arg)
    return bool(definition.input_arg[index].is_ref)


def _is_convertible(node: Node, variables: dict[str, Node], references: set[str]) -> bool:
    for index, name in enumerate(node.input):
        source = _source(name)
        if source not in references or not _takes_reference(node, index):
            continue
        # Nobody but an assignment may write, and not through what another assignment hands on.
        if source not in variables or node.op not in (*_ASSIGNMENTS, "IsVariableInitialized"):
            return False
    return node.op not in _ASSIGNMENTS or _source(node.input[0]) in variables


def _convert_consumer(node: Node, variables: dict[str, Node], added: list[Node]) -> None:
    read = [i for i, name in enumerate(node.input) if _source(name) in variables]
    if not read:
        return
    if node.op == "IsVariableInitialized":
        _become(node, "VarIsInitializedOp", {})
        return
    if node.op in _ASSIGNMENTS:
        variable = variables[_source(node.input[0])]
        write = type(node)(name=f"{node.name}/resource_write", op=_ASSIGNMENTS[node.op], device=node.device)
        write.input.extend(node.input)
        write.attr["dtype"].CopyFrom(variable.attr["dtype"])
        added.append(write)
        read_back = [node.input[0], f"^{write.name}"]
        _become(node, "ReadVariableOp", {"dtype": variable.attr["dtype"]})
        del node.input[:]
        node.input.extend(read_back)
        node, read = write, [i for i in read if i > 0]
    control = [name for name in node.input if name.startswith("^")]
    for index in read:
        variable = variables[_source(node.input[index])]
        # One read for each consumer, after what the consumer waits for: as a reference would be read.
        value = type(node)(name=f"{node.name}/resource_value{index}", op="ReadVariableOp", device=node.device)
        value.input.extend([variable.name, *control])
        value.attr["dtype"].CopyFrom(variable.attr["dtype"])
        added.append(value)
        node.input[index] = value.name


def _become(node: Node, operation: str, attributes: dict[str, Any]) -> None:
    colocation = [bytes(place) for place in node.attr["_class"].list.s]
    node.op = operation
    node.attr.clear()
    if colocation:
        node.attr["_class"].list.s.extend(colocation)
    for name, value in attributes.items():
        node.attr[name].CopyFrom(value)


def _convert_variable(node: Node) -> None:
    kept = {name: type(node.attr[name])() for name in ("dtype", "shape", "container", "shared_name")}
    for name, value in kept.items():
        value.CopyFrom(node.attr[name])
    # A reference variable without a shared name goes by its node's.
    kept["shared_name"].s = kept["shared_name"].s or node.name.encode()
    _become(node, "VarHandleOp", kept)


def _convert_collection(collection: Any, variables: dict[str, Node]) -> None:
    """Mark the variables of a collection (messages of type VariableDef) as resources."""
    if collection.WhichOneof("kind") != "bytes_list":
        return
    values = collection.bytes_list.value
    for i, encoded in enumerate(values):
        definition = variable_pb2.VariableDef()
        try:
            definition.ParseFromString(encoded)
        except Exception:  # another kind of message (protobuf's exception class differs by implementation)
            return
        if _source(definition.variable_name) in variables:
            definition.is_resource = True
            values[i] = definition.SerializeToString()
