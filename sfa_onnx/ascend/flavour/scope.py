"""Where a rewrite happens: one graph of the model, the names around it, what is known of values.

All passes that make the ATC flavour are rules `(Scope, node) -> nodes or None`; `apply` runs them
over every graph of a model, sub-graphs included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto

from sfa_onnx.files.onnx_attrs import CONTROL_FLOW, subgraphs
from sfa_onnx.guard.guarded import infer_shapes

__all__ = ["Facts", "Names", "Rule", "Scope", "apply", "inner_graphs", "scopes"]

_NUMBERS = frozenset({"value_int", "value_ints", "value_float", "value_floats"})
_SMALL = 4096  # elements: constants up to this size may be looked at
_LONGEST = 2**40  # elements of one axis


class Names:
    """Every name in use in a model (values, nodes), and fresh ones."""

    def __init__(self, model: ModelProto) -> None:
        self._used: set[str] = set()
        self._last: dict[str, int] = {}  # the number that a base was given last
        self._collect(model.graph)

    def _collect(self, graph: GraphProto) -> None:
        for values in (graph.input, graph.output, graph.initializer):
            self._used.update(v.name for v in values)
        self._used.update(s.values.name for s in graph.sparse_initializer)
        for node in graph.node:
            self._used.update((node.name, *node.input, *node.output))
            for inner in inner_graphs(node):
                self._collect(inner)

    def fresh(self, base: str) -> str:
        """`base`, or `base_1`, `base_2` ... : the first that nothing in the model carries."""
        name, n = base, self._last.get(base, 0)
        while not name or name in self._used:
            n += 1
            name = f"{base}_{n}"
        self._used.add(name)
        self._last[base] = n
        return name


def _size(dim: onnx.TensorShapeProto.Dimension) -> int | None:
    """A declared size; None where it is open, or is one that no tensor has."""
    known = dim.HasField("dim_value") and 0 <= dim.dim_value < _LONGEST
    return dim.dim_value if known else None


@dataclass
class Facts:
    """Element types and dims of values, by name; a name two graphs disagree on is unknown."""

    types: dict[str, int] = field(default_factory=dict)
    dims: dict[str, tuple[int | None, ...]] = field(default_factory=dict)

    def learn(self, name: str, type_proto: onnx.TypeProto) -> None:
        """Take one value's declared type; a later conflicting one erases it."""
        tensor = type_proto.tensor_type
        if not tensor.elem_type:
            return
        if self.types.setdefault(name, tensor.elem_type) != tensor.elem_type:
            self.types[name] = TensorProto.UNDEFINED
        if not tensor.HasField("shape"):
            return
        dims = tuple(map(_size, tensor.shape.dim))
        old = self.dims.setdefault(name, dims)
        if len(old) != len(dims):
            self.dims.pop(name)
        elif old != dims:
            self.dims[name] = tuple(a if b is None else b for a, b in zip(old, dims, strict=True))

    @classmethod
    def of(cls, model: ModelProto) -> Facts:
        """What the model says about its values, completed by onnx's own shape inference."""
        facts = cls()
        facts._read(model.graph)
        inferred, _ = infer_shapes(model, data_prop=True)
        if inferred is not None:
            facts._read(inferred.graph)
        return facts

    def _read(self, graph: GraphProto) -> None:
        for value in (*graph.input, *graph.output, *graph.value_info):
            self.learn(value.name, value.type)
        for tensor in graph.initializer:
            self.types[tensor.name] = tensor.data_type
            self.dims[tensor.name] = tuple(tensor.dims)
        for node in graph.node:
            for inner in inner_graphs(node):
                self._read(inner)


@dataclass
class Scope:
    """One graph being rewritten."""

    graph: GraphProto
    names: Names
    facts: Facts
    opset: int
    parent: Scope | None = None

    def __post_init__(self) -> None:
        self._producers: dict[str, NodeProto] | None = None
        self._readers: dict[str, list[NodeProto]] | None = None
        self._tensors: dict[str, TensorProto] | None = None

    def changed(self) -> None:
        """Forget what was looked up: the graph's nodes are new."""
        self._producers = self._tensors = None
        self._readers = None

    def readers(self, name: str) -> list[NodeProto]:
        """The nodes of this graph that read `name`, once per input."""
        if self._readers is None:
            self._readers = {}
            for node in self.graph.node:
                for value in node.input:
                    self._readers.setdefault(value, []).append(node)
        return self._readers.get(name, [])

    def made_here(self, name: str) -> NodeProto | None:
        """The node of this graph itself that makes `name`."""
        found = self.producer(name)
        return found if found is not None and name in (self._producers or ()) else None

    def producer(self, name: str) -> NodeProto | None:
        """The node that makes `name`, here or in an enclosing graph, unless it is a foreign one."""
        if self._producers is None:
            own = (node for node in self.graph.node if not _is_foreign(node))
            self._producers = {out: node for node in own for out in node.output if out}
        found = self._producers.get(name)
        return found if found is not None or self.parent is None else self.parent.producer(name)

    def initializer(self, name: str) -> TensorProto | None:
        """The initializer called `name`, here or in an enclosing graph."""
        if self._tensors is None:
            self._tensors = {t.name: t for t in self.graph.initializer}
        found = self._tensors.get(name)
        return found if found is not None or self.parent is None else self.parent.initializer(name)

    def array(self, name: str) -> npt.NDArray[np.generic] | None:
        """The value of a small embedded constant, else None."""
        tensor = self.initializer(name)
        if tensor is None:
            node = self.producer(name)
            if node is None or node.op_type != "Constant":
                return None
            value = node.attribute[0] if len(node.attribute) == 1 else None
            if value is not None and value.name in _NUMBERS:
                return np.asarray(onnx.helper.get_attribute_value(value))
            tensor = value.t if value is not None and value.name == "value" else None
        if tensor is None or tensor.data_location == TensorProto.EXTERNAL:
            return None
        if int(np.prod(tensor.dims, dtype=np.int64)) > _SMALL:
            return None
        try:
            return np.asarray(onnx.numpy_helper.to_array(tensor))
        except (ValueError, TypeError, KeyError):  # fewer bytes than its dims ask for, a new type
            return None

    def dtype(self, name: str) -> int:
        """The onnx element type of a value, 0 when unknown."""
        return self.facts.types.get(name, 0)

    def dims(self, name: str) -> tuple[int | None, ...] | None:
        """The dims of a value (None where symbolic), or None when the rank is unknown."""
        return self.facts.dims.get(name)

    def rank(self, name: str) -> int | None:
        """The rank of a value, or None."""
        dims = self.dims(name)
        return None if dims is None else len(dims)

    def constant(self, value: npt.ArrayLike, base: str, dtype: type = np.int64) -> str:
        """Add a small initializer to this graph and return its name."""
        name = self.names.fresh(base)
        tensor = onnx.numpy_helper.from_array(np.asarray(value, dtype=dtype), name)
        self.graph.initializer.append(tensor)
        self.facts.types[name], self.facts.dims[name] = tensor.data_type, tuple(tensor.dims)
        self._tensors = None
        return name

    def value(self, base: str, dtype: int = 0, dims: tuple[int | None, ...] | None = None) -> str:
        """A fresh value name, with what is known of it."""
        name = self.names.fresh(base)
        if dtype:
            self.facts.types[name] = dtype
        if dims is not None:
            self.facts.dims[name] = dims
        return name

    def node(
        self,
        op_type: str,
        inputs: Sequence[str],
        base: str,
        *,
        outputs: Sequence[str] = (),
        dtype: int = 0,
        dims: tuple[int | None, ...] | None = None,
        **attributes: Any,
    ) -> NodeProto:
        """A new standard node called (about) `base`; its one output is fresh unless given."""
        name = self.names.fresh(base)
        outs = list(outputs) or [self.value(f"{name}_out", dtype, dims)]
        return onnx.helper.make_node(op_type, list(inputs), outs, name=name, **attributes)

    def replace(
        self, old: NodeProto, op_type: str, inputs: Sequence[str], **attributes: Any
    ) -> NodeProto:
        """A standard node in the place of `old`: its name and its outputs."""
        outputs = list(old.output)
        return onnx.helper.make_node(op_type, list(inputs), outputs, name=old.name, **attributes)


Rule = Callable[[Scope, NodeProto], "Sequence[NodeProto] | None"]


def inner_graphs(node: NodeProto) -> Iterator[GraphProto]:
    """The graphs held by a node's attributes."""
    if not node.domain and node.op_type not in CONTROL_FLOW:
        return  # looking at every attribute costs seconds on 100,000 nodes
    yield from subgraphs(node)


def scopes(
    graph: GraphProto, names: Names, facts: Facts, opset: int, parent: Scope | None = None
) -> Iterator[Scope]:
    """The graph and every graph below it, outermost first."""
    scope = Scope(graph, names, facts, opset, parent)
    yield scope
    for node in graph.node:
        for inner in inner_graphs(node):
            yield from scopes(inner, names, facts, opset, scope)


def apply(model: ModelProto, rules: Sequence[Rule], facts: Facts, names: Names, opset: int) -> int:
    """Run the rules over every node, in order; returns the number of nodes replaced.

    What a rule makes is seen by the rules after it, not by itself.
    """
    return sum(_apply_one(scope, rules) for scope in scopes(model.graph, names, facts, opset))


def _apply_one(scope: Scope, rules: Sequence[Rule]) -> int:
    nodes: list[NodeProto] = []
    count = 0
    for node in scope.graph.node:
        made = _rewritten(scope, node, rules)
        count += made is not None
        nodes.extend((node,) if made is None else made)
    if count:
        del scope.graph.node[:]
        scope.graph.node.extend(nodes)
        scope.changed()
    return count


def _is_foreign(node: NodeProto) -> bool:
    """Whether a node is somebody else's operator with a name of ONNX's."""
    return bool(node.domain) and onnx.defs.has(node.op_type)


def _rewritten(scope: Scope, node: NodeProto, rules: Sequence[Rule]) -> list[NodeProto] | None:
    if _is_foreign(node):
        return None
    for place, rule in enumerate(rules):
        made = rule(scope, node)
        if made is not None:
            rest = rules[place + 1 :]
            nodes: list[NodeProto] = []
            for part in made:
                again = _rewritten(scope, part, rest)
                nodes.extend((part,) if again is None else again)
            return nodes
    return None
