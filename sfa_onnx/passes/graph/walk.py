"""Walks over a graph: up to what values are made of, down to who reads them."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator
from typing import Final

import onnx

from sfa_onnx.passes.graph.index import GraphIndex

__all__ = ["above", "back", "below"]

_FAR: Final = 64

Passes = Callable[[onnx.NodeProto], bool]


def above(
    index: GraphIndex, values: Iterable[str], passes: Passes, most: int = _FAR
) -> Iterator[int]:
    """Nodes that `values` are made by, those nearest first taken; each once.

    Args:
        index: the graph.
        values: where to begin.
        passes: whether what a node reads is looked at as well.
        most: nodes that are looked at.
    """
    stack, seen = list(values), set[int]()
    while stack and len(seen) < most:
        i = index.producer.get(stack.pop())
        if i is None or i in seen:
            continue
        seen.add(i)
        yield i
        if passes(index.nodes[i]):
            stack += index.nodes[i].input


def below(
    index: GraphIndex, values: Iterable[str], passes: Passes, most: int = _FAR
) -> Iterator[tuple[int, int]]:
    """(node, input position) of those that read `values`, as `above`; a capture is at -1."""
    stack, seen = list(values), set[int]()
    while stack and len(seen) < most:
        for i, position in index.uses(stack.pop()):
            if i in seen:
                continue
            seen.add(i)
            yield i, position
            if position >= 0 and passes(index.nodes[i]):
                stack += filter(None, index.nodes[i].output)


def back(
    index: GraphIndex, value: str, through: Container[str] | None, most: int = _FAR
) -> Iterator[str]:
    """`value`, and what it is made of by operators of these kinds (None: any), by first inputs."""
    for _ in range(most):
        yield value
        node = index.maker(value)
        if node is None or not node.input or not (through is None or node.op_type in through):
            return
        value = node.input[0]
