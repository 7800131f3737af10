"""Putting converted nodes into order, and taking out what nobody reads any more."""

from __future__ import annotations

from collections.abc import Iterator

import onnx

from sfa_onnx.errors import ModelError
from sfa_onnx.kv_convert.emit import Emitter

__all__ = ["Arrangement", "declare_domain"]


class Arrangement:
    """Remembers what was alive before a rewrite; `settle` keeps the order of all that stays."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.graph = graph
        self._live_before = _live(graph)
        self._used_before = {name for node in graph.node for name in _reads(node)}

    def settle(self, emit: Emitter) -> None:
        """Drop nodes that died, put each new node as early as its inputs allow."""
        graph = self.graph
        graph.node.extend(emit.nodes)
        graph.initializer.extend(emit.initializers)
        fresh = {name for node in emit.nodes for name in node.output}
        live = _live(graph)
        kept = [n for n in graph.node if self._stays(n, live, fresh)]
        ordered = _ordered(graph, kept, fresh)
        del graph.node[:]
        graph.node.extend(ordered)
        self._drop_leftovers()

    def _stays(self, node: onnx.NodeProto, live: set[str], fresh: set[str]) -> bool:
        names = [name for name in node.output if name]
        if any(name in live for name in names):
            return True
        was_live = any(name in self._live_before or name in fresh for name in names)
        return not was_live  # what was dead before is none of our business

    def _drop_leftovers(self) -> None:
        graph = self.graph
        used = {name for node in graph.node for name in _reads(node)}
        used |= {value.name for value in graph.output}
        produced = {name for node in graph.node for name in node.output}
        _keep(graph.initializer, lambda t: t.name in used or t.name not in self._used_before)
        known = produced | used | {value.name for value in graph.input}
        _keep(graph.value_info, lambda v: v.name in known)


def _keep(items: object, wanted: object) -> None:
    kept = [item for item in items if wanted(item)]  # type: ignore[attr-defined, operator]
    if len(kept) != len(items):  # type: ignore[arg-type]
        del items[:]  # type: ignore[attr-defined]
        items.extend(kept)  # type: ignore[attr-defined]


def _reads(node: onnx.NodeProto) -> Iterator[str]:
    yield from (name for name in node.input if name)
    for attribute in node.attribute:
        graphs = [attribute.g] if attribute.type == onnx.AttributeProto.GRAPH else attribute.graphs
        for graph in graphs:
            for inner in graph.node:
                yield from _reads(inner)
            yield from (value.name for value in graph.output)


def _live(graph: onnx.GraphProto) -> set[str]:
    """Names that reach a graph output."""
    producer = {name: node for node in graph.node for name in node.output if name}
    live: set[str] = set()
    stack = [value.name for value in graph.output]
    while stack:
        name = stack.pop()
        if name in live:
            continue
        live.add(name)
        node = producer.get(name)
        if node is not None:
            live.update(out for out in node.output if out)
            stack.extend(_reads(node))
    return live


def _ordered(
    graph: onnx.GraphProto, nodes: list[onnx.NodeProto], fresh: set[str]
) -> list[onnx.NodeProto]:
    """Old nodes in their order; a new one right before its first reader."""
    makers = {name: node for node in nodes for name in node.output if name in fresh}
    ready = {value.name for value in graph.input} | {t.name for t in graph.initializer}
    ready |= {tensor.values.name for tensor in graph.sparse_initializer}
    done: set[int] = set()
    ordered: list[onnx.NodeProto] = []

    def place(node: onnx.NodeProto) -> None:
        stack = [node]
        while stack:
            top = stack[-1]
            waiting = [makers[n] for n in _reads(top) if n in makers and id(makers[n]) not in done]
            if waiting:
                stack.extend(waiting)
                continue
            stack.pop()
            if id(top) not in done:
                done.add(id(top))
                ordered.append(top)

    for node in nodes:
        if not any(name in makers for name in node.output):
            place(node)
    for node in nodes:
        place(node)
    _check_order(ordered, ready)
    return ordered


def _check_order(nodes: list[onnx.NodeProto], ready: set[str]) -> None:
    made = {name for node in nodes for name in node.output}
    seen = set(ready)
    for node in nodes:
        late = [name for name in node.input if name in made and name not in seen]
        if late:
            raise ModelError(
                f"{node.name or node.op_type}: reads {late[0]} before it is made; please report"
                " this model"
            )
        seen.update(node.output)


def declare_domain(model: onnx.ModelProto, domain: str, version: int) -> None:
    """Import `domain` unless the model does so already."""
    if all(entry.domain != domain for entry in model.opset_import):
        model.opset_import.add(domain=domain, version=version)
