"""Is this model sound? The one place that decides it, before any other code looks at a model.

A sound model keeps the format's rules as far as code here, onnxruntime and ATC lean on them: every
value is made once and nobody needs its own result, standard operators have the inputs, outputs and
attributes of their schema, tensors have the bytes of their type and shape, functions end.
Declared shapes may still contradict each other; who reads them deals with that.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Final

import onnx
from onnx import FunctionProto, GraphProto, ModelProto, NodeProto

from sfa_onnx.errors import ModelError
from sfa_onnx.files.fields import Fields
from sfa_onnx.files.parts import Parts, parts_of_graph, parts_of_model
from sfa_onnx.files.sound_functions import function_problems
from sfa_onnx.files.sound_glance import Reader, free_values, unseen_tensors
from sfa_onnx.files.sound_nodes import NodeRules, holds_graphs
from sfa_onnx.files.sound_tensors import RANK, sparse_problem, tensor_problem
from sfa_onnx.guard.text import printable

__all__ = ["assert_sound", "problems"]

_SHOWN: Final = 3  # problems named in one message
_SMALL: Final = 1 << 25  # bytes of a model that may be copied as a whole, which is faster
_OPSETS: Final = 1 << 31  # onnx and onnxruntime keep the version in 32 bits
_ENOUGH: Final = 50  # problems after which nobody looks further


def assert_sound(model: ModelProto, what: str, data: bytes | None = None) -> None:
    """Refuse a broken model, by its first few problems.

    Args:
        model: not changed.
        what: the file's name, for the message.
        data: the serialised model, where that is at hand.

    Raises:
        ModelError: the model breaks the format's rules.
        BudgetError: its functions would unfold into too many nodes.
    """
    found = problems(model, data)
    if not found:
        return
    more = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    raise ModelError(
        printable(
            f"{what}: not a sound ONNX model: {'; '.join(found[:_SHOWN])}{more}. Export it again,"
            " or repair it; nothing was done with it"
        )
    )


def problems(model: ModelProto, data: bytes | None = None) -> list[str]:
    """What breaks the rules, in the order of the file; empty for a sound model.

    Args:
        model: not changed.
        data: as in `assert_sound`.

    Raises:
        BudgetError: its functions would unfold into too many nodes.
    """
    size = len(data) if data else model.ByteSize()
    reader = _Reader(model, small=size <= _SMALL)
    reader.walk(parts_of_model(data) if data else None)
    return reader.found[:_ENOUGH] or function_problems(model)


class _Reader:
    """Walks a model once and collects what is wrong with it."""

    def __init__(self, model: ModelProto, *, small: bool) -> None:
        self.model, self.small = model, small
        self.found: list[str] = []

    def walk(self, parts: Parts | None) -> None:
        """Look at the main graph, which may be at hand as its parts, and at every function."""
        model = self.model
        opsets = {o.domain: o.version for o in model.opset_import}
        self._opsets(opsets, "the model")
        rules = NodeRules(opsets)
        free = self._graph(model.graph, rules, "", parts)
        self._unmade(free, "")
        for function in model.functions:
            self._function(function, opsets)

    def _opsets(self, opsets: dict[str, int], what: str) -> None:
        for domain, version in opsets.items():
            if not 1 <= version < _OPSETS:
                name = domain or "ai.onnx"
                self.found.append(
                    f"{what} imports opset {version} of {name}, expected 1 to {_OPSETS - 1}"
                )

    def _function(self, function: FunctionProto, outer: dict[str, int]) -> None:
        where = f" of function {function.domain}::{function.name}"
        opsets = {**outer, **{o.domain: o.version for o in function.opset_import}}
        self._opsets(opsets, where.removeprefix(" of "))
        rules = NodeRules(opsets)
        values = dict.fromkeys(function.input, "an input")
        if "" in (*function.input, *function.output):
            self.found.append(f"an input or output{where} has no name")
        if through := [name for name in function.output if name in values]:
            self.found.append(
                f"output {through[0]!r}{where} is its input, expected a node between (Identity)"
            )
        fields = Fields.of(NodeProto, (node.SerializeToString() for node in function.node))
        free = self._nodes(function.node, fields, values, function.output, rules, where)
        self._unmade(free, where)

    def _unmade(self, free: dict[str, Reader], where: str) -> None:
        for value, reader in free.items():
            who = reader if isinstance(reader, str) else _label(reader)
            self.found.append(f"{who} reads {value!r}{where}, which nothing makes")

    def _graph(
        self, graph: GraphProto, rules: NodeRules, where: str, parts: Parts | None = None
    ) -> dict[str, Reader]:
        """Look at a graph; returns the values it takes from around it, with who reads them."""
        made: dict[str, str] = {}
        for info in graph.input:
            if not info.name:
                self.found.append(f"an input{where} has no name")
            elif info.name in made:
                self._twice(info.name, "an input", where)
            made[info.name] = "an input"
        nodes, tensors = parts or parts_of_graph(graph, small=self.small)
        made.update(dict.fromkeys(self._stored(graph, tensors, where), "an initializer"))
        self._types(graph, where)
        results = [v.name for v in graph.output]
        return self._nodes(graph.node, nodes, made, results, rules, where)

    def _stored(self, graph: GraphProto, fields: Fields | None, where: str) -> list[str]:
        """Look at the initializers of a graph; their names."""
        sparse = [s.values for s in graph.sparse_initializer]
        names = [t.name for t in (*graph.initializer, *sparse)]
        if len(set(names)) < len(names):
            for name, times in Counter(names).items():
                for _ in range(times - 1):
                    self._twice(name, "an initializer", where)
        for tensor in unseen_tensors(graph.initializer, fields):
            if problem := tensor_problem(tensor):
                self.found.append(f"initializer {tensor.name!r}{where} {problem}")
        for tensor in graph.sparse_initializer:
            if problem := sparse_problem(tensor):
                name = tensor.values.name
                self.found.append(f"sparse initializer {name!r}{where} {problem}")
        return names

    def _types(self, graph: GraphProto, where: str) -> None:
        for kind, infos in (("input", graph.input), ("output", graph.output)):
            for info in infos:
                elem = info.type.tensor_type.elem_type
                if elem not in _KNOWN_TYPES:
                    self.found.append(
                        f"{kind} {info.name!r}{where} has the element type {elem}, which onnx"
                        f" {onnx.__version__} does not know"
                    )
                if (rank := len(info.type.tensor_type.shape.dim)) > RANK:
                    self.found.append(
                        f"{kind} {info.name!r}{where} has {rank} axes, expected {RANK} at most"
                    )
        given = {v.name: v.type.tensor_type.elem_type for v in graph.input}
        for info in graph.output:  # runtimes hand such a value on as it is, whatever they said
            kinds = {info.type.tensor_type.elem_type, given.get(info.name, 0)} - {0}
            if len(kinds) > 1:
                self.found.append(f"{info.name!r}{where} is an input and an output of two types")

    def _twice(self, value: str, maker: str, where: str) -> None:
        self.found.append(f"{value!r}{where} is made twice, again by {maker}")

    def _nodes(
        self,
        nodes: Sequence[NodeProto],
        fields: Fields | None,
        made: dict[str, str],
        results: Iterable[str],
        rules: NodeRules,
        where: str,
    ) -> dict[str, Reader]:
        """Look at the nodes of one graph: at all together, and at each where that is not enough."""
        bodies = _Bodies(self, nodes, rules, where)
        results = list(results)
        seen = free_values(nodes, fields, made, results, rules, bodies.sound)
        if seen is not None:
            return seen
        free = self._each(nodes, made, bodies)
        return free | {n: f"output {n!r}" for n in results if n not in made and n not in free}

    def _each(
        self, nodes: Sequence[NodeProto], made: dict[str, str], bodies: _Bodies
    ) -> dict[str, Reader]:
        """Look at every node of one graph; `made` grows by what they make."""
        where = bodies.where
        early: dict[str, NodeProto] = {}  # read before it is made here, or made elsewhere
        inner: dict[str, Reader] = {}
        for i, node in enumerate(nodes):
            for name in node.input:
                if name not in made and name and name not in early:
                    early[name] = node
            for problem in bodies.rules.problems(node):
                self.found.append(f"{_label(node)}{where} {problem}")
            if holds_graphs(node):
                inner |= bodies.free(i)
                early |= {n: node for n in bodies.free(i) if n not in made and n not in early}
            for name in node.output:
                if name in made:
                    self._twice(name, _label(node), where)
                elif name:
                    made[name] = ""
            if len(self.found) >= _ENOUGH:
                return {}
        if any(n in made for n in early) and (loop := _cycle(nodes, bodies.looked_at)) is not None:
            self.found.append(
                f"the graph depends on itself: {_label(loop)}{where} needs its own result"
            )
        return {n: inner.get(n, node) for n, node in early.items() if n not in made}


class _Bodies:
    """The graphs that the nodes of one graph hold: each is looked at once, on demand."""

    def __init__(
        self, reader: _Reader, nodes: Sequence[NodeProto], rules: NodeRules, where: str
    ) -> None:
        self.rules, self.where = rules, where
        self.looked_at: dict[int, dict[str, Reader]] = {}
        self._reader, self._nodes = reader, nodes
        self._problems: dict[int, list[str]] = {}

    def sound(self, at: int) -> dict[str, Reader] | None:
        """The free values of the graphs that a node holds; None where something is wrong there."""
        found = self._reader.found
        before = len(found)
        free = self.free(at)
        self._problems[at] = found[before:]  # said when its turn comes
        del found[before:]
        return None if self._problems[at] else free

    def free(self, at: int) -> dict[str, Reader]:
        """As `sound`; what is wrong goes to the reader's list."""
        self._reader.found += self._problems.pop(at, [])
        if at not in self.looked_at:
            node, free = self._nodes[at], dict[str, Reader]()
            for name, graph in holds_graphs(node).items():
                inner = f" in {name} of {_label(node)}{self.where}"
                free |= self._reader._graph(graph, self.rules, inner)
            self.looked_at[at] = free
        return self.looked_at[at]


_KNOWN_TYPES: Final = frozenset(onnx.TensorProto.DataType.values())


def _label(node: NodeProto) -> str:
    """A node as messages name it."""
    name = node.name or next((o for o in node.output if o), "")
    return f"{node.op_type or 'a node without operator'} {name!r}"


def _cycle(nodes: Sequence[NodeProto], bodies: dict[int, dict[str, Reader]]) -> NodeProto | None:
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
