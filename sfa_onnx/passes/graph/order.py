"""What a node reads, which values a graph needs, and nodes in an order that runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import onnx

from sfa_onnx.errors import ModelError
from sfa_onnx.passes.graph.sub_graphs import captured

__all__ = ["in_order", "live_values", "put_in_order", "reads"]


def reads(node: onnx.NodeProto) -> Iterator[str]:
    """The inputs of a node and the outer values that its sub-graphs read."""
    yield from (name for name in node.input if name)
    if node.attribute:
        yield from captured(node)


def live_values(graph: onnx.GraphProto) -> set[str]:
    """Values that reach an output of the graph."""
    producer = {name: node for node in graph.node for name in node.output if name}
    live: set[str] = set()
    stack = [value.name for value in graph.output]
    while stack:
        name = stack.pop()
        if name not in live:
            live.add(name)
            if (node := producer.get(name)) is not None:
                live.update(out for out in node.output if out)
                stack.extend(reads(node))
    return live


def in_order(nodes: Sequence[onnx.NodeProto]) -> list[onnx.NodeProto]:
    """The nodes, each after what it reads; otherwise in the order given.

    A node that is listed late and read early moves to just before its first reader.

    Raises:
        ModelError: a node needs its own result.
    """
    maker = {name: i for i, node in enumerate(nodes) for name in node.output if name}
    done: dict[int, None] = {}
    begun: set[int] = set()
    for start in range(len(nodes)):
        stack = [start]
        while stack:
            if stack[-1] in done:
                stack.pop()
                continue
            begun.add(stack[-1])
            needed = {maker[name] for name in reads(nodes[stack[-1]]) if name in maker}
            waiting = sorted(needed - done.keys(), reverse=True)
            if loop := begun.intersection(waiting):
                node = nodes[min(loop)]
                raise ModelError(f"{node.name or node.output[0]!r} depends on its own result")
            stack += waiting
            if not waiting:
                done[stack.pop()] = None
    return [nodes[i] for i in done]


def put_in_order(graph: onnx.GraphProto) -> None:
    """Sort the nodes of a graph, in place, so that each comes after what it reads.

    Raises:
        ModelError: a node needs its own result.
    """
    nodes = in_order(list(graph.node))
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)
