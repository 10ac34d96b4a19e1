"""Serialized `tf.train.Example`s that a graph's own parsing operations would take. Runs in the loader.

A model that parses its input refuses generated words. What it wants is in its graph: the parsing
operation names each feature, its dtype and its shape.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import tensorflow as tf

Node = Any  # tensorflow.core.framework.node_def_pb2.NodeDef


def texts(bodies: Iterable[Sequence[Node]]) -> tuple[bytes, ...]:
    """One serialized Example, holding every feature, per parsing operation among the nodes of functions."""
    found = []
    for nodes in bodies:
        by_name = {node.name: node for node in nodes}
        for node in nodes:
            features = dict(_features(node, by_name))
            if features:
                example = tf.train.Example(features=tf.train.Features(feature=features))
                found.append(example.SerializeToString(deterministic=True))
    return tuple(dict.fromkeys(found))


def _features(node: Node, by_name: dict[str, Node]) -> Iterator[tuple[str, Any]]:
    attributes = node.attr
    sparse: list[bytes]
    dense: list[bytes]
    ragged: list[bytes] = []
    if node.op == "ParseExampleV2":  # serialized, names, sparse_keys, dense_keys, ragged_keys, defaults
        sparse, dense, ragged = (_strings(name, by_name) for name in node.input[2:5])
    elif node.op == "ParseExample":  # serialized, names, sparse_keys * N, dense_keys * M, defaults * M
        n, m = attributes["Nsparse"].i, attributes["Ndense"].i
        sparse = [key for name in node.input[2 : 2 + n] for key in _strings(name, by_name)]
        dense = [key for name in node.input[2 + n : 2 + n + m] for key in _strings(name, by_name)]
    elif node.op == "ParseSingleExample":  # serialized, defaults; the keys are attributes
        sparse, dense = list(attributes["sparse_keys"].list.s), list(attributes["dense_keys"].list.s)
    else:
        return
    for key, kind in zip(sparse, attributes["sparse_types"].list.type, strict=False):
        yield key.decode(), _feature(kind, 1)
    for key, kind in zip(ragged, attributes["ragged_value_types"].list.type, strict=False):
        yield key.decode(), _feature(kind, 1)
    shapes = attributes["dense_shapes"].list.shape
    for key, kind, shape in zip(dense, attributes["Tdense"].list.type, shapes, strict=False):
        # An axis of any length is given the length 1.
        yield key.decode(), _feature(kind, math.prod(max(axis.size, 1) for axis in shape.dim))


def _strings(name: str, by_name: dict[str, Node]) -> list[bytes]:
    node = by_name.get(name.removeprefix("^").partition(":")[0])
    if node is None or node.op != "Const":
        return []
    return [bytes(key) for key in tf.make_ndarray(node.attr["value"].tensor).reshape(-1)]


def _feature(kind: int, items: int) -> Any:
    dtype = tf.as_dtype(kind)
    if dtype == tf.string:
        return tf.train.Feature(bytes_list=tf.train.BytesList(value=[b""] * items))
    if dtype.is_integer:
        return tf.train.Feature(int64_list=tf.train.Int64List(value=[0] * items))
    return tf.train.Feature(float_list=tf.train.FloatList(value=[0.0] * items))
