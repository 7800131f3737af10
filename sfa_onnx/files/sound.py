"""Is this model sound? The one place that decides it, before any other code looks at a model.

A sound model keeps the format's rules as far as code here, onnxruntime and ATC lean on them: every
value is made once and nobody needs its own result, standard operators have the inputs, outputs and
attributes of their schema, tensors have the bytes of their type and shape, functions end.
Declared shapes may still contradict each other; who reads them deals with that.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

import onnx
from onnx import FunctionProto, GraphProto, ModelProto, NodeProto

from sfa_onnx.errors import ModelError
from sfa_onnx.files.sound_functions import function_problems
from sfa_onnx.files.sound_nodes import NodeRules, holds_graphs
from sfa_onnx.files.sound_tensors import tensor_problem
from sfa_onnx.guard.text import printable

__all__ = ["assert_sound", "problems"]

_SHOWN: Final = 3  # problems told in one message
_ENOUGH: Final = 50  # problems after which nobody looks further


def assert_sound(model: ModelProto, what: str) -> None:
    """Refuse a broken model, by its first few problems.

    Args:
        model: not changed.
        what: the file's name, for the message.

    Raises:
        ModelError: the model breaks the format's rules.
        BudgetError: its functions would unfold into too many nodes.
    """
    found = problems(model)
    if not found:
        return
    more = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    raise ModelError(
        printable(
            f"{what}: not a sound ONNX model: {'; '.join(found[:_SHOWN])}{more}. Export it again,"
            " or repair it; nothing was done with it"
        )
    )


def problems(model: ModelProto) -> list[str]:
    """What breaks the rules, in the order of the file; empty for a sound model.

    Raises:
        BudgetError: its functions would unfold into too many nodes.
    """
    reader = _Reader(model)
    reader.walk()
    return reader.found[:_ENOUGH] or function_problems(model)


class _Reader:
    """Walks a model once and collects what is wrong with it."""

    def __init__(self, model: ModelProto) -> None:
        self.model = model
        self.found: list[str] = []

    def walk(self) -> None:
        """Look at the main graph and at every function."""
        model = self.model
        opsets = {o.domain: o.version for o in model.opset_import}
        self._opsets(opsets, "the model")
        rules = NodeRules(opsets)
        free = self._graph(model.graph, rules, "")
        self._unmade(free, "")
        for function in model.functions:
            self._function(function, opsets)

    def _opsets(self, opsets: dict[str, int], what: str) -> None:
        for domain, version in opsets.items():
            if version < 1:
                name = domain or "ai.onnx"
                self.found.append(f"{what} imports opset {version} of {name}, expected 1 or more")

    def _function(self, function: FunctionProto, outer: dict[str, int]) -> None:
        where = f" of function {function.domain}::{function.name}"
        opsets = {**outer, **{o.domain: o.version for o in function.opset_import}}
        self._opsets(opsets, where.removeprefix(" of "))
        rules = NodeRules(opsets)
        values = dict.fromkeys(function.input, "an input")
        self._unmade(self._nodes(function.node, values, function.output, rules, where), where)

    def _unmade(self, free: dict[str, str], where: str) -> None:
        for value, reader in free.items():
            self.found.append(f"{reader} reads {value!r}{where}, which nothing makes")

    def _graph(self, graph: GraphProto, rules: NodeRules, where: str) -> dict[str, str]:
        """Look at a graph; returns the values it takes from around it, with who reads them."""
        made: dict[str, str] = {}
        for info in graph.input:
            if not info.name:
                self.found.append(f"an input{where} has no name")
            elif info.name in made:
                self._twice(info.name, "an input", where)
            made[info.name] = "an input"
        stored: set[str] = set()
        sparse = [s.values for s in graph.sparse_initializer]
        for tensor in (*graph.initializer, *sparse):
            if tensor.name in stored:
                self._twice(tensor.name, "an initializer", where)
            stored.add(tensor.name)
            if problem := tensor_problem(tensor):
                self.found.append(f"initializer {tensor.name!r}{where} {problem}")
        made.update(dict.fromkeys(stored, "an initializer"))
        self._types(graph, where)
        return self._nodes(graph.node, made, [v.name for v in graph.output], rules, where)

    def _types(self, graph: GraphProto, where: str) -> None:
        for kind, infos in (("input", graph.input), ("output", graph.output)):
            for info in infos:
                elem = info.type.tensor_type.elem_type
                if elem not in _KNOWN_TYPES:
                    self.found.append(
                        f"{kind} {info.name!r}{where} has the element type {elem}, which onnx"
                        f" {onnx.__version__} does not know"
                    )

    def _twice(self, value: str, maker: str, where: str) -> None:
        self.found.append(f"{value!r}{where} is made twice, again by {maker}")

    def _nodes(
        self,
        nodes: Sequence[NodeProto],
        made: dict[str, str],
        results: Iterable[str],
        rules: NodeRules,
        where: str,
    ) -> dict[str, str]:
        """Look at the nodes of one graph; `made` grows by what they make."""
        early: dict[str, NodeProto] = {}  # read before it is made here, or made elsewhere
        bodies: dict[int, dict[str, str]] = {}
        inner: dict[str, str] = {}
        for i, node in enumerate(nodes):  # 130,000 of them are common: as few look-ups as can be
            inputs, outputs, attributes = node.input[:], node.output[:], node.attribute
            for name in inputs:
                if name not in made and name and name not in early:
                    early[name] = node
            if not rules.plain(node, inputs, outputs, attributes):
                for problem in rules.problems(node):
                    self.found.append(f"{_label(node)}{where} {problem}")
            if attributes and (graphs := holds_graphs(node)):
                bodies[i] = self._bodies(node, graphs, rules, where)
                inner |= bodies[i]
                early |= {n: node for n in bodies[i] if n not in made and n not in early}
            for name in outputs:
                if name in made:
                    self._twice(name, _label(node), where)
                elif name:
                    made[name] = ""
            if len(self.found) >= _ENOUGH:
                return {}
        if any(name in made for name in early) and (loop := _cycle(nodes, bodies)) is not None:
            self.found.append(
                f"the graph depends on itself: {_label(loop)}{where} needs its own result"
            )
        free = {n: inner.get(n) or _label(node) for n, node in early.items() if n not in made}
        return free | {n: f"output {n!r}" for n in results if n not in made and n not in free}

    def _bodies(
        self, node: NodeProto, graphs: dict[str, GraphProto], rules: NodeRules, where: str
    ) -> dict[str, str]:
        free: dict[str, str] = {}
        for name, graph in graphs.items():
            inner = f" in {name} of {_label(node)}{where}"
            free |= self._graph(graph, rules, inner)
        return free


_KNOWN_TYPES: Final = frozenset(onnx.TensorProto.DataType.values())


def _label(node: NodeProto) -> str:
    """A node as messages name it."""
    name = node.name or next((o for o in node.output if o), "")
    return f"{node.op_type or 'a node without operator'} {name!r}"


def _cycle(nodes: Sequence[NodeProto], bodies: dict[int, dict[str, str]]) -> NodeProto | None:
    """A node that needs its own result; None when an order exists that runs."""
    maker = {name: i for i, node in enumerate(nodes) for name in node.output if name}
    needs = [
        {maker[n] for n in (*node.input, *bodies.get(i, ())) if n in maker}
        for i, node in enumerate(nodes)
    ]
    readers: dict[int, list[int]] = {}
    for i, sources in enumerate(needs):
        for source in sources:
            readers.setdefault(source, []).append(i)
    waiting = [len(sources) for sources in needs]
    ready = [i for i, count in enumerate(waiting) if not count]
    while ready:
        for reader in readers.get(ready.pop(), ()):
            waiting[reader] -= 1
            if not waiting[reader]:
                ready.append(reader)
    left = [i for i, count in enumerate(waiting) if count]
    if not left:
        return None
    seen: set[int] = set()  # walk upwards among those that wait: the first one met again loops
    at = left[0]
    while at not in seen:
        seen.add(at)
        at = next(source for source in needs[at] if waiting[source])
    return nodes[at]
