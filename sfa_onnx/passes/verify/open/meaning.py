"""What the constants of a site mean, so that its shapes hold together at any size.

The nodes are visited in order under three choices of sizes at once: those of the file, and two of
large primes. The meaning of a constant is the simplest expression of sizes that keeps the node's
shapes consistent under all three; where several do, they are tried one after the other.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from sfa_onnx.files.onnx_attrs import attributes
from sfa_onnx.passes.graph.index import GraphIndex
from sfa_onnx.passes.shapes.concrete import Concrete, SizesMeetError
from sfa_onnx.passes.shapes.form import Form
from sfa_onnx.passes.verify.open.graph import SHAPE_INPUTS, SiteGraph
from sfa_onnx.passes.verify.sizes.forms import SMALL, Forms
from sfa_onnx.passes.verify.sizes.tables import Band, Entries, Fill, Rule, Stairs, rule_of

__all__ = ["Decision", "Meanings", "meanings"]

Array = NDArray[Any]
_PRIMES = (
    (40009, 40013, 40031, 40037, 40039, 40063, 40087, 40093, 40099, 40111, 40123, 40127),
    (50021, 50023, 50033, 50047, 50051, 50053, 50069, 50077, 50087, 50093, 50101, 50111),
)
_AXES = {"Unsqueeze": (1,), "Squeeze": (1,), "Slice": (3, 4), "CumSum": (1,)}
_WORKS = frozenset(("Add", "Ceil", "Div", "Floor", "Max", "Min", "Mod", "Mul", "Neg", "Sub"))
_MOVES = frozenset(("Cast", "Concat", "Expand", "Gather", "Reshape", "Slice", "Squeeze", "Where"))
_SPREADING = _WORKS | _MOVES | {"Identity", "Tile", "Transpose", "Unsqueeze"}
_ALIGNED = frozenset(("Concat", "GatherElements", "ScatterElements"))
_FEW = 4  # numbers of a table that are taken one by one; longer ones must follow a rule
_COMBINATIONS = 256  # meanings of one node's constants that are tried together
_CHOICES = 4  # consistent ones that are kept
_WALKS = 48
_WORDS = (onnx.TensorProto.INT32, onnx.TensorProto.INT64)


@dataclass(frozen=True)
class Decision:
    """What one constant means: a rule, with its dims and its numbers as forms of sizes."""

    array: Array
    rule: Rule | None  # None: the array as it is
    shape: tuple[Form, ...]
    numbers: tuple[Form, ...] = ()

    @property
    def opened(self) -> bool:
        """Whether a size enters."""
        return any(not f.fixed for f in (*self.shape, *self.numbers))

    def at(self, sizes: Mapping[str, int]) -> Array:
        """The constant at these sizes."""
        shape = tuple(f(sizes) for f in self.shape)
        numbers = tuple(f(sizes) for f in self.numbers)
        dtype = self.array.dtype
        match self.rule:
            case Entries():
                return np.array(numbers).reshape(shape).astype(dtype)
            case Fill(value=value):
                return np.full(shape, numbers[0] if numbers else value, dtype)
            case Stairs():
                return self.rule.at(shape, numbers[0], numbers[1:]).astype(dtype)
            case Band():
                return self.rule.at(shape, numbers).astype(dtype)
        return self.array


@dataclass
class Meanings:
    """The meaning of every constant.

    Attributes:
        decisions: use of a constant -> what it means.
        rules: numbers above `SMALL` that are no sizes and stand where positions are computed.
        values: numbers that are taken for sizes there.
    """

    decisions: dict[str, Decision] = field(default_factory=dict)
    rules: set[int] = field(default_factory=set)
    values: set[Form] = field(default_factory=set)


class _Sizes(Concrete):
    """Sizes of the opened site; those that differ may not meet."""

    def _unify(self, a: int, b: int) -> None:
        raise SizesMeetError(f"{a} and {b} meet")

    def put(self, name: str, decision: Decision) -> None:
        """Let `name` be what was decided."""
        self._shapes[name] = tuple(f(self.symbols) for f in decision.shape)
        small = isinstance(decision.rule, Entries) or decision.array.size <= SMALL
        self._values[name] = decision.at(self.symbols) if small else None

    def forget(self, names: Sequence[str]) -> None:
        """Infer these again."""
        for name in names:
            self._shapes.pop(name, None)
            self._values.pop(name, None)


def meanings(
    graph: SiteGraph,
    index: GraphIndex,
    forms: Forms,
    fixed: set[int],
    stuck: dict[str, None] | None = None,
) -> Iterator[Meanings]:
    """What each constant of `graph` may mean; nothing where no choice is consistent.

    A number that is both a size that is opened and one that stays (128 pages of 128 tokens) is
    taken for the former first; then for the latter, wherever shapes do not decide.

    Args:
        graph: the site and its replacement.
        index: of `graph.model`, inputs declared in symbols.
        forms: the symbols and their sizes in the file.
        fixed: sizes of axes that stay (heads, widths, page sizes).
        stuck: takes the names of tables that follow no rule.
    """
    both = sorted(n for n in fixed if n > SMALL and forms.known(n) is not None)[:2]
    for count in range(len(both) + 1):
        for stay in itertools.combinations(both, count):
            start = partial(_Pass, graph, index, forms, fixed, frozenset(stay))
            found = _search(start, {} if stuck is None else stuck)
            if found is not None:
                yield found


def _search(walk: Callable[[Mapping[int, int]], _Pass], stuck: dict[str, None]) -> Meanings | None:
    """The first walk that ends well; where one stops, the latest choices are changed first."""
    todo: list[dict[int, int]] = [{}]
    for _ in range(_WALKS):
        if not todo:
            return None
        ranks = todo.pop()
        one = walk(ranks)
        if (found := one.run()) is not None:
            return found
        stuck.update(one.stuck)
        latest = max(ranks, default=-1)
        more = [
            {**ranks, at: rank}
            for at, n in one.counts.items()
            if at > latest
            for rank in range(1, n)
        ]
        todo += more  # in order of nodes: the latest is tried first
    return None


class _Pass:
    """One walk over the nodes; `ranks` picks among a node's consistent meanings."""

    def __init__(
        self,
        graph: SiteGraph,
        index: GraphIndex,
        forms: Forms,
        fixed: set[int],
        stay: frozenset[int],
        ranks: Mapping[int, int],
    ) -> None:
        self._graph, self._forms, self._fixed = graph, forms, fixed
        self._stay, self._ranks = stay, ranks
        primes = [dict(zip(forms.sizes, line, strict=False)) for line in _PRIMES]
        self._sizes = [_Sizes(index, s) for s in (forms.sizes, *primes)]
        self._positions: set[str] = set()
        self.counts: dict[int, int] = {}
        self.found = Meanings()
        self.stuck: dict[str, None] = {}  # tables without a rule

    def run(self) -> Meanings | None:
        """Decide node by node; None at the first that fits no meaning."""
        for at, node in enumerate(self._graph.nodes):
            choices = list(itertools.islice(self._choices(node), _CHOICES))
            if not choices:
                return None
            self.counts[at] = len(choices)
            rank = min(self._ranks.get(at, 0), len(choices) - 1)
            if not self._fits(node, choices[rank]):
                return None
            self._keep(node, choices[rank])
            self._spread(node)
        pairs = self._graph.replaced.items()
        same = (s.shape(a) == s.shape(b) is not None for s in self._sizes for a, b in pairs)
        return self.found if all(same) else None

    def _choices(self, node: onnx.NodeProto) -> Iterator[dict[str, Decision]]:
        """Meanings of the node's constants that keep its shapes consistent, simplest first."""
        options = {}
        for k, name in enumerate(node.input):
            if name in self._graph.constants:
                options[name] = self._constant(node, k)
        names = list(options)
        ranked = sorted(
            itertools.islice(
                itertools.product(*(range(len(options[n])) for n in names)), _COMBINATIONS
            ),
            key=sum,
        )
        for ranks in ranked:
            choice = {n: options[n][r] for n, r in zip(names, ranks, strict=True)}
            if self._fits(node, choice):
                yield choice
        edges = [n for k, n in enumerate(node.input) if n in self._graph.edges]
        for name in edges:  # what is computed does not fit: its number at the file's sizes might
            array = self._sizes[0].value(name)
            if array is not None and array.dtype.kind == "i" and array.ndim <= 1:
                for decision in self._entries(array, shape_input=True):
                    base = {n: options[n][0] for n in names}
                    if self._fits(node, {**base, name: decision}):
                        yield {**base, name: decision}

    def _constant(self, node: onnx.NodeProto, k: int) -> list[Decision]:
        """What the constant at input k of a node may mean."""
        array = self._graph.constants[node.input[k]]
        kept = _kept(array)
        if k in _AXES.get(node.op_type, ()) or (node.op_type.startswith("Reduce") and k):
            return [kept]
        dims = [self._dim(d) for d in array.shape]
        shapes = list(itertools.product(*dims))
        shape_input = k in SHAPE_INPUTS.get(node.op_type, ())
        if shape_input or k == 1:
            cut = self._cut_axes(node)
            if cut is not None and not any(self._grows(node.input[0], axis) for axis in cut):
                return [kept]
        few = SMALL if shape_input else _FEW
        if array.ndim <= 1 and array.size <= few and shapes == [kept.shape]:
            integral = array.dtype.kind in "iu"
            if integral or (self._positional(node) and _whole(array)):
                return self._entries(array, shape_input=shape_input)
            return [kept]
        rule = rule_of(array)
        if rule is None:
            if all(f.fixed for s in shapes[:1] for f in s):
                return [kept]
            self.stuck[node.input[k].rpartition("@")[0]] = None
            return []
        return [d for s in shapes for d in self._ruled(array, rule, s)]

    def _cut_axes(self, node: onnx.NodeProto) -> list[int] | None:
        """Axes of the first input that a node takes positions of; None for other nodes."""
        if node.op_type == "Slice":
            axes = self._graph.constants.get(node.input[3]) if len(node.input) > 3 else None
            return None if axes is None else [int(a) for a in axes.reshape(-1)]
        axis = int(attributes(node).get("axis", 0))
        return [axis] if node.op_type in ("Gather", "GatherElements", "Split") else None

    def _grows(self, value: str, axis: int) -> bool:
        """Whether an axis is opened."""
        shapes = [s.shape(value) for s in self._sizes]
        return len({s[axis] for s in shapes if s}) > 1

    def _dim(self, size: int) -> list[Form]:
        if size <= SMALL:
            return [Form(const=size)]
        found = [f for f in self._forms.of(size) if abs(f.const) <= 1 or f.fixed]
        kept = Form(const=size)
        ahead = size in self._fixed and (not found or size in self._stay)
        return list(dict.fromkeys([kept, *found] if ahead else [*found, kept]))

    def _entries(self, array: Array, *, shape_input: bool) -> list[Decision]:
        """Entry by entry."""
        flat = [int(v) for v in array.reshape(-1)]
        options = [self._number(v, shape_input=shape_input) for v in flat]
        shape = tuple(Form(const=d) for d in array.shape)
        combinations = sorted(
            itertools.islice(itertools.product(*(enumerate(o) for o in options)), 512),
            key=lambda c: sum(rank for rank, _ in c),
        )
        rule = Entries(tuple(flat))
        return [Decision(array, rule, shape, tuple(f for _, f in c)) for c in combinations]

    def _number(self, value: int, *, shape_input: bool) -> list[Form]:
        found = self._forms.of(value)
        kept = Form(const=value)
        if value in self._fixed:
            ahead = value in self._stay or self._forms.known(value) is None
            found = [kept, *found] if ahead else [found[0], kept, *found[1:]]
        elif shape_input:
            found = [*found, kept]
        return list(dict.fromkeys(found))

    def _ruled(self, array: Array, rule: Rule, shape: tuple[Form, ...]) -> Iterator[Decision]:
        numbers = [self._number(n, shape_input=False)[:3] for n in rule.numbers]
        if array.dtype.kind in "fb" and isinstance(rule, Fill):
            numbers = []
        for forms in itertools.islice(itertools.product(*numbers), 8):
            yield Decision(array, rule, shape, forms)

    def _fits(self, node: onnx.NodeProto, choice: Mapping[str, Decision]) -> bool:
        """Whether the node's shapes follow, under every choice of sizes."""
        for sizes in self._sizes:
            sizes.forget([o for o in node.output if o])
            sizes.forget([i for i in node.input if i in self._graph.edges])
            for name, decision in choice.items():
                sizes.put(name, decision)
            try:
                if any(sizes.shape(o) is None for o in node.output if o):
                    return False
                if not _sound(sizes, self._sizes[0], node):
                    return False
            except (SizesMeetError, ValueError):
                return False
        return True

    def _keep(self, node: onnx.NodeProto, choice: Mapping[str, Decision]) -> None:
        """Enter the meaning, and note numbers in places where positions are computed."""
        self.found.decisions.update(choice)
        for k, name in enumerate(node.input):
            decision = choice.get(name)
            if decision is None:
                continue
            shape_input = k in SHAPE_INPUTS.get(node.op_type, ()) and node.op_type != "Slice"
            if shape_input or k in _AXES.get(node.op_type, ()):
                continue
            for form in decision.numbers:
                if not form.fixed:
                    self.found.values.add(form)
                elif SMALL < abs(form.const) < 1 << 31 and abs(form.const) not in self._fixed:
                    self.found.rules.add(abs(form.const))

    def _positional(self, node: onnx.NodeProto) -> bool:
        """Whether a float constant of this node meets positions that were cast to float."""
        return any(name in self._positions for name in node.input)

    def _spread(self, node: onnx.NodeProto) -> None:
        """Note floats that hold positions."""
        source = node.op_type == "Cast" and self._sizes[0].elem_type(node.input[0]) in _WORDS
        if source or (node.op_type in _SPREADING and self._positional(node)):
            self._positions.update(node.output)


def _kept(array: Array) -> Decision:
    return Decision(array, rule=None, shape=tuple(Form(const=d) for d in array.shape))


def _whole(array: Array) -> bool:
    return bool(np.isfinite(array).all() and (array == np.round(array)).all())


def _sound(sizes: _Sizes, true: _Sizes, node: onnx.NodeProto) -> bool:
    """Conditions that shape rules do not check: nothing is cut off or made up."""
    if node.op_type == "Reshape":
        before, after = sizes.shape(node.input[0]), sizes.shape(node.output[0])
        return math.prod(before or ()) == math.prod(after or (0,))
    if node.op_type == "Split" and len(node.input) > 1:
        axis = int(attributes(node).get("axis", 0))
        whole, parts = (sizes.shape(node.input[0]) or (0,))[axis], sizes.value(node.input[1])
        return parts is None or int(parts.sum()) == whole
    if node.op_type.startswith("Scatter") and not _updates_fit(sizes, node):
        return False
    if node.op_type in _ALIGNED and not _aligned(sizes, true, node):
        return False
    if node.op_type == "Slice":  # an axis that stays is cut as it is in the file
        shapes = [s.shape(node.input[0]) or () for s in (true, sizes)]
        ends = [s.shape(node.output[0]) or () for s in (true, sizes)]
        return all(a != b or c == d for a, b, c, d in zip(*shapes, *ends, strict=True))
    return True


def _aligned(sizes: _Sizes, true: _Sizes, node: onnx.NodeProto) -> bool:
    """Whether inputs that are equally long in the file, but for one axis, still are."""
    names = node.input if node.op_type == "Concat" else node.input[:2]
    now = [sizes.shape(name) or () for name in names]
    then = [true.shape(name) or () for name in names]
    axis = int(attributes(node).get("axis", 0)) % max(len(now[0]), 1)
    return all(
        a == first or i == axis or before != held
        for shape, was in zip(now, then, strict=True)
        for i, (a, first, before, held) in enumerate(zip(shape, now[0], was, then[0], strict=True))
    )


def _updates_fit(sizes: _Sizes, node: onnx.NodeProto) -> bool:
    """Whether a scatter has one update per index."""
    data, indices, updates = (sizes.shape(name) or () for name in node.input[:3])
    if node.op_type == "ScatterElements":
        return indices == updates
    return updates == (*indices[:-1], *data[indices[-1] :])
