"""Local functions: they end, and unfold into a number of nodes that a machine can hold."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from onnx import ModelProto, NodeProto

from sfa_onnx.files.sound_nodes import holds_graphs
from sfa_onnx.guard.budgets import NODES

__all__ = ["function_problems"]

_Key = tuple[str, str, str]  # domain, name, overload


def function_problems(model: ModelProto) -> list[str]:
    """Functions that call themselves, or differ under one name; empty when all are sound.

    Raises:
        BudgetError: unfolding the calls of the main graph takes more nodes than the budget.
    """
    if not model.functions:
        NODES.check(len(model.graph.node), "reading this model")
        return []
    functions = {(f.domain, f.name, f.overload): f for f in model.functions}
    calls = {key: _count(f.node, functions.keys()) for key, f in functions.items()}
    sizes: dict[_Key, int] = {}
    for key in functions:
        if loop := _measure(key, calls, sizes):
            return [f"function {loop[0]}::{loop[1]} calls itself; functions must end"]
    own, called = _count(model.graph.node, functions.keys())
    total = own + sum(sizes[key] * times for key, times in called.items())
    NODES.check(total, "unfolding the functions of this model")
    return []


def _count(nodes: Iterable[NodeProto], known: Iterable[_Key]) -> tuple[int, dict[_Key, int]]:
    """How many nodes there are, sub-graphs included, and how often each function is called."""
    known = set(known)
    own, called = 0, dict[_Key, int]()
    for node in _all(nodes):
        key = (node.domain, node.op_type, node.overload)
        own += 1
        if key in known:
            called[key] = called.get(key, 0) + 1
    return own, called


def _all(nodes: Iterable[NodeProto]) -> Iterator[NodeProto]:
    for node in nodes:
        yield node
        if node.attribute:
            for graph in holds_graphs(node).values():
                yield from _all(graph.node)


def _measure(
    start: _Key, calls: dict[_Key, tuple[int, dict[_Key, int]]], sizes: dict[_Key, int]
) -> _Key | None:
    """Enter the unfolded size of a function and of those it calls; returns one that recurses."""
    path: dict[_Key, None] = {}
    stack = [start]
    while stack:
        key = stack[-1]
        own, called = calls[key]
        if key in sizes:
            stack.pop()
            continue
        path[key] = None
        waiting = [k for k in called if k not in sizes]
        if not waiting:
            sizes[key] = own + sum(sizes[k] * times for k, times in called.items())
            path.pop(key)
            stack.pop()
            continue
        if loop := next((k for k in waiting if k in path), None):
            return loop
        stack += waiting
    return None
