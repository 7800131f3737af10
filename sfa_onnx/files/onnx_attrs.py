"""Attributes of ONNX nodes as Python values."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from onnx import AttributeProto, GraphProto, NodeProto, helper

__all__ = ["attribute", "attributes", "find_attribute", "graphs", "subgraphs", "value_of"]


def value_of(proto: AttributeProto) -> Any:
    """The value of an attribute; a string is decoded."""
    value = helper.get_attribute_value(proto)
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def attributes(node: NodeProto) -> dict[str, Any]:
    """Attribute name -> value, strings decoded."""
    return {proto.name: value_of(proto) for proto in node.attribute}


def find_attribute(node: NodeProto, name: str) -> AttributeProto | None:
    """The attribute itself, or None when the node does not carry it."""
    return next((proto for proto in node.attribute if proto.name == name), None)


def attribute(node: NodeProto, name: str, default: Any = None) -> Any:
    """The value of one attribute, or `default`."""
    proto = find_attribute(node, name)
    return default if proto is None else value_of(proto)


def subgraphs(node: NodeProto) -> Iterator[GraphProto]:
    """The graphs that a node's attributes hold (If, Loop, Scan)."""
    for proto in node.attribute:
        if proto.type == AttributeProto.GRAPH:
            yield proto.g
        elif proto.type == AttributeProto.GRAPHS:
            yield from proto.graphs


def graphs(graph: GraphProto) -> Iterator[GraphProto]:
    """The graph and every graph below it, each before its own."""
    yield graph
    for node in graph.node:
        for inner in subgraphs(node):
            yield from graphs(inner)
