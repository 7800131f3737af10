"""Attributes of ONNX nodes as Python values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from onnx import AttributeProto, GraphProto, NodeProto, TensorProto, helper

__all__ = [
    "CONTROL_FLOW",
    "attribute",
    "attributes",
    "constants",
    "control_flow",
    "find_attribute",
    "graphs",
    "subgraphs",
    "value_of",
]

CONTROL_FLOW: Final = frozenset(("If", "Loop", "Scan", "SequenceMap"))  # ONNX's own with graphs


def control_flow(node: NodeProto) -> str:
    """The operator of a node that is one of CONTROL_FLOW and ONNX's own; "" of any other."""
    own = node.op_type in CONTROL_FLOW and node.domain in ("", "ai.onnx")
    return node.op_type if own else ""


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


def constants(graph: GraphProto, outer: Mapping[str, TensorProto]) -> dict[str, TensorProto]:
    """Initializers and Constant nodes that a graph can read; `outer`: of the graphs around it.

    What the graph names again is not the outer value.
    """
    own = {v.name for v in graph.input} | {n for node in graph.node for n in node.output}
    known = {name: tensor for name, tensor in outer.items() if name not in own}
    known |= {t.name: t for t in graph.initializer}
    for node in graph.node:
        value = find_attribute(node, "value") if node.op_type == "Constant" else None
        if value is not None and value.HasField("t") and node.output:
            known[node.output[0]] = value.t
    return known
