"""A body of If, Loop or Scan, seen together with the scopes around it.

Reading one run of a body, its nodes and all outer nodes make one flat graph: captured values have
producers, outer constants are constants, and a mask or RoPE table made outside is traced like any
other. Nothing is copied: the view lays the body's own names over those of its parent.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any, TypeVar

import onnx
from onnx import helper

from sfa_onnx.files.onnx_attrs import control_flow
from sfa_onnx.passes.graph.index import Dim, GraphIndex
from sfa_onnx.passes.graph.sub_graphs import bodies, owners
from sfa_onnx.passes.shapes.concrete import Concrete
from sfa_onnx.passes.shapes.known import known_shape

__all__ = ["ScopeIndex", "body_views"]

V = TypeVar("V")
_ROUNDS = 4  # of widening the sizes of loop states

# A graph without any of these holds no softmax and nothing that looks like attention without one.
_TELLING = frozenset(("Attention", "Einsum", "Exp", "MatMul", "Pow", "Softmax", "TopK"))


class _Layered(dict[str, V]):
    """A graph's own entries over those of the outer scopes, `hidden` names left out."""

    def __init__(self, own: Mapping[str, V], outer: dict[str, V], hidden: AbstractSet[str]) -> None:
        super().__init__(own)
        self._outer, self._hidden = outer, hidden

    def get(self, key: str, default: Any = None) -> Any:
        if dict.__contains__(self, key):
            return dict.__getitem__(self, key)
        return default if key in self._hidden else self._outer.get(key, default)

    def __missing__(self, key: str) -> V:
        if key in self._hidden:
            raise KeyError(key)
        return self._outer[key]

    def __contains__(self, key: object) -> bool:
        return dict.__contains__(self, key) or (key not in self._hidden and key in self._outer)


class _Chained(Sequence[onnx.NodeProto]):
    """Outer nodes, then own ones, without a copy of the outer list for every body."""

    def __init__(self, outer: Sequence[onnx.NodeProto], own: list[onnx.NodeProto]) -> None:
        self._outer, self._own, self._first = outer, own, len(outer)

    def __len__(self) -> int:
        return self._first + len(self._own)

    def __getitem__(self, i: Any) -> Any:
        return self._outer[i] if i < self._first else self._own[i - self._first]


@dataclass(frozen=True)
class _State:
    """A body input and what it is fed from.

    Attributes:
        name: the body input.
        initial: the outer value it is in the first run, or a slice of which it is in every run.
        next: the body output that it is in the next run; "" where every run reads `initial`.
        axis: the axis of `initial` that the runs go along; None where it is taken whole.
    """

    name: str
    initial: str
    next: str = ""
    axis: int | None = None


class ScopeIndex(GraphIndex):
    """Look-ups over one body and everything it can see.

    `nodes` holds the outer nodes first, then the body's own from `first` on. A state of a loop that
    every run hands on unchanged is an Identity of its initial value.

    Attributes:
        parent: the view of the graph that holds the body.
        owner: the node there that runs it.
        trusts: whether declared sizes of what the body computes hold in every run.
    """

    def __init__(
        self, parent: GraphIndex, owner: int, attribute: str, body: onnx.GraphProto
    ) -> None:
        node = parent.nodes[owner]
        states = list(_states(node, body))
        same = _handed_on(body, states)
        fixed = [helper.make_node("Identity", [s.initial], [s.name]) for s in same]
        first = len(parent.nodes) + len(fixed)
        super().__init__(body, parent.opsets, parent.reader, first=first)
        self.parent, self.owner = parent, owner
        self.path = f"{parent.place(owner)}.{attribute}"
        self.nodes = _Chained(parent.nodes, [*fixed, *self.nodes])
        self._bound = {*self._inputs, *self.initializers, *self.producer}
        hidden = self._bound | self._confused()
        for i, s in enumerate(same, len(parent.nodes)):
            self.producer[s.name] = i
            self.consumers.setdefault(s.initial, []).append((i, 0))
            self.consumers.setdefault(s.name, []).append((owner, -1))  # it is not ours to remove
        for name, uses in self.consumers.items():
            if name not in self._bound:
                self.consumers[name] = [*parent.uses(name), *uses]
        self.consumers = _Layered(self.consumers, parent.consumers, self._bound)
        self.producer = _Layered(self.producer, parent.producer, hidden)
        self.initializers = _Layered(self.initializers, parent.initializers, hidden)
        self._entry: dict[str, tuple[int, tuple[Dim, ...] | None]] = {}
        self._made = {o for i in self.own for o in self.nodes[i].output}
        self.trusts = getattr(parent, "trusts", True)
        _Entry(self, [s for s in states if s not in same]).describe()

    def _confused(self) -> set[str]:
        """Outer values made from an outer value of a name that the body uses for something else.

        They are taken as given: a name stands for one value in all that recognition reads.
        """
        again = (n for n in self._bound if n in self.parent.consumers)
        users = {user for name in again for user, _ in self.parent.uses(name)}
        return {o for user in users for o in self.parent.nodes[user].output if o}

    @property
    def repeats(self) -> bool:
        """Whether the body may run more than once where the main graph runs once."""
        looped = control_flow(self.parent.nodes[self.owner]) != "If"
        return looped or (isinstance(self.parent, ScopeIndex) and self.parent.repeats)

    def binds(self, value: str) -> bool:
        """Whether the body itself makes or takes `value`, rather than seeing an outer one."""
        return value in self._bound

    @property
    def inputs(self) -> Sequence[onnx.ValueInfoProto]:
        """Inputs of the body and of every scope around it."""
        outer = (v for v in self.parent.inputs if v.name not in self._bound)
        own = (v for v in self.graph.input if v.name not in self.producer)
        return [*outer, *own]

    @property
    def returned(self) -> Sequence[str]:
        """What nodes with bodies make, in the body and around it."""
        own = {*self._bound, *self.parent.nodes[self.owner].output}  # its results come later
        return [*(name for name in self.parent.returned if name not in own), *super().returned]

    @functools.cached_property
    def entering(self) -> dict[str, tuple[Dim, ...] | None]:
        """As the graph's own, with what enters the scopes around it in front."""
        hidden = {*self._bound, *self.parent.nodes[self.owner].output}
        outer = {n: dims for n, dims in self.parent.entering.items() if n not in hidden}
        own = [v.name for v in self.graph.input if v.name not in self.producer]
        return outer | {name: self.shape(name) for name in (*own, *super().returned)}

    def is_graph_input(self, value: str) -> bool:
        """Whether `value` is fed to the body by its owner, or to the model."""
        if value in self._bound:
            return super().is_graph_input(value) and value not in self.producer
        return self.parent.is_graph_input(value)

    def is_default(self, value: str) -> bool:
        """Whether the model stores a value that its caller may replace."""
        return value not in self._bound and self.parent.is_default(value)

    def is_given(self, value: str) -> bool:
        """As `is_graph_input`, and what nodes with bodies return."""
        return super().is_given(value) if value in self._bound else self.parent.is_given(value)

    def giver(self, value: str) -> str:
        """The node that returns a value, or that runs the body whose input it is."""
        if value not in self._bound:
            return self.parent.giver(value)
        if value in self.producer:
            return super().giver(value)
        return f"{self.parent.nodes[self.owner].op_type} {self.parent.label(self.owner)}"

    def is_graph_output(self, value: str) -> bool:
        """Whether `value` is returned by the graph that makes it."""
        if value in self._bound:
            return super().is_graph_output(value)
        return self.parent.is_graph_output(value)

    def elem_type(self, value: str) -> int:
        """As the graph's own; states of a loop have their initial value's type."""
        if value in self._entry:
            return self._entry[value][0]
        return super().elem_type(value)

    def shape(self, value: str) -> tuple[Dim, ...] | None:
        """As the graph's own; states of a loop have the sizes that no run changes."""
        if value in self._entry:
            return self._entry[value][1]
        if not self.trusts and value in self._made:
            return None
        return super().shape(value)

    def layer(self, node: int) -> str:
        """The torch module of a node, or of the node that runs the body."""
        if node < len(self.parent.nodes):
            return self.parent.layer(node)
        return super().layer(node) or self.parent.layer(self.owner)

    def _info(self, value: str) -> onnx.ValueInfoProto | None:
        found = super()._info(value)
        if found is not None or value in self._bound:
            return found
        return self.parent._info(value)


class _Entry:
    """Types and sizes of what enters a body from run to run.

    A declaration is believed only where a run hands the size on: exporters write down the sizes of
    the first run, also of a cache that grows. Sizes that change become symbols of their own.
    """

    def __init__(self, view: ScopeIndex, states: list[_State]) -> None:
        self.view = view
        self.states = states
        self.declared = {s.name for s in states if None not in (view.shape(s.name) or (None,))}

    def describe(self) -> None:
        """Give every state declared or initial sizes, then widen those that a run changes."""
        if not self.states:
            return
        outer = [Concrete(self.view.parent, second=second) for second in (False, True)]
        for state in self.states:
            elem = self.view.elem_type(state.name) or outer[0].elem_type(state.initial)
            self.view._entry[state.name] = (elem, self._initial(state, outer))
        trusted, self.view.trusts = self.view.trusts, False
        rounds = 0
        while self._widen(everything=rounds > _ROUNDS):
            rounds += 1
        self.view.trusts = trusted and not rounds
        self.view.__dict__.pop("entering", None)

    def _dims(self, state: _State) -> tuple[Dim, ...] | None:
        return self.view._entry[state.name][1]

    def _initial(self, state: _State, outer: list[Concrete]) -> tuple[Dim, ...] | None:
        """Declared sizes where there are some, else those of the initial value."""
        given = self.view.shape(state.name)
        if state.name in self.declared:
            return given
        first, second = (known_shape(sizes, state.initial) for sizes in outer)
        if first is None or second is None or len(first) != len(second):
            return given
        dims: list[Dim] = []
        for axis, pair in enumerate(zip(first, second, strict=True)):
            if state.axis is None or axis != state.axis % len(first):
                dims.append(_told(pair, outer))
        if given is not None and len(given) == len(dims):
            dims = [a if a is not None else b for a, b in zip(given, dims, strict=True)]
        return tuple(
            self._symbol(state, axis) if dim is None else dim for axis, dim in enumerate(dims)
        )

    def _symbol(self, state: _State, axis: int) -> str:
        return re.sub(r"\W", "_", f"{self.view.path}_{state.name}_{axis}")

    def _free(self, state: _State, axis: int) -> None:
        elem, dims = self.view._entry[state.name]
        changed = list(dims or ())
        changed[axis] = self._symbol(state, axis)
        self.view._entry[state.name] = (elem, tuple(changed))
        self.view.__dict__.pop("entering", None)  # it was computed before

    def _widen(self, *, everything: bool) -> bool:
        """Free the sizes that one run changes, or all of them; whether there were any."""
        changed = False
        for sizes in [Concrete(self.view, second=second) for second in (False, True)]:
            for state in self.states:
                before = known_shape(sizes, state.name)
                after = known_shape(sizes, state.next) if state.next else before
                if after is None and state.name in self.declared:
                    continue
                for axis, dim in enumerate(self._dims(state) or ()):
                    kept = _same(before, after, axis) and not (everything and state.next)
                    if not kept and dim != self._symbol(state, axis):
                        self._free(state, axis)
                        changed = True
        return changed


def _same(before: tuple[int, ...] | None, after: tuple[int, ...] | None, axis: int) -> bool:
    """Whether two shapes of one rank agree on an axis."""
    if before is None or after is None or len(before) != len(after):
        return False
    return before[axis] == after[axis]


def _told(pair: tuple[int, int], outer: list[Concrete]) -> Dim:
    """A size under both assignments as a number or a symbol; None for anything else."""
    if pair[0] == pair[1]:
        return pair[0]
    for symbol, size in outer[0].symbols.items():
        if (size, outer[1].symbols.get(symbol)) == pair:
            return symbol
    return None


def _states(owner: onnx.NodeProto, body: onnx.GraphProto) -> Iterator[_State]:
    """What feeds each input of a body."""
    names = [v.name for v in body.input]
    kind = control_flow(owner)
    if kind == "Loop":
        following = [v.name for v in body.output][1:]
        for name, initial, after in zip(names[2:], owner.input[2:], following, strict=False):
            yield _State(name, initial, after)
    if kind == "Scan":
        given = {a.name: helper.get_attribute_value(a) for a in owner.attribute if a.name != "body"}
        count = len(names) - int(given["num_scan_inputs"])
        axes = given.get("scan_input_axes") or [0] * (len(names) - count)
        for k, (name, initial) in enumerate(zip(names, owner.input, strict=False)):
            if k < count:
                yield _State(name, initial, body.output[k].name)
            else:
                yield _State(name, initial, axis=int(axes[k - count]))


def _handed_on(body: onnx.GraphProto, states: Iterable[_State]) -> list[_State]:
    """States that every run returns as they were, and whose initial value the body can read."""
    names = {v.name for v in (*body.input, *body.initializer)}
    names = names.union(*(n.output for n in body.node))
    copies = {o: n.input[0] for n in body.node if n.op_type == "Identity" for o in n.output}
    found = []
    for state in states:
        value = state.next
        while value != state.name and value in copies:
            value = copies[value]
        if value == state.name and state.initial not in names:
            found.append(state)
    return found


def _starts_a_site(node: onnx.NodeProto) -> bool:
    """Whether a node may be the softmax of a site, or belong to what is listed beside sites."""
    return node.op_type in _TELLING


def body_views(
    index: GraphIndex, telling: Callable[[onnx.NodeProto], bool] = _starts_a_site
) -> Iterator[ScopeIndex]:
    """The views of all bodies below `index` that hold a telling node, outer ones first."""
    for owner in index.owners:
        for name, body in bodies(index.nodes[owner]).items():
            if _holds(body, telling):
                view = ScopeIndex(index, owner, name, body)
                yield view
                yield from body_views(view, telling)


def _holds(graph: onnx.GraphProto, telling: Callable[[onnx.NodeProto], bool]) -> bool:
    """Whether a graph or one of its bodies holds a telling node."""
    inner = (body for node in owners(graph) for body in bodies(node).values())
    return any(map(telling, graph.node)) or any(_holds(body, telling) for body in inner)
