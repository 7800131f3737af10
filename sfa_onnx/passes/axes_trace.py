"""One step back: which elements of a node's inputs an element of its output is made from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
import onnx

from sfa_onnx.passes.axes import ZERO, Expr, Label, Read, fresh, merge, split
from sfa_onnx.passes.index import GraphIndex
from sfa_onnx.passes.shapes import Concrete, Shape
from sfa_onnx.passes.shapes_rules import attributes, einsum_terms, slice_bounds

__all__ = [
    "Dot",
    "Leaf",
    "Move",
    "Pieces",
    "Product",
    "Ref",
    "Scaled",
    "Step",
    "Stop",
    "Tracer",
    "is_float",
]

_T = onnx.TensorProto
_FLOATS: Final = (_T.FLOAT, _T.FLOAT16, _T.BFLOAT16, _T.DOUBLE)
_SIGNED: Final = (_T.INT8, _T.INT16, _T.INT32, _T.INT64, _T.UINT8)


def is_float(elem_type: int) -> bool:
    """Whether a `TensorProto.DataType` is one of the floating types attention is computed in."""
    return elem_type in _FLOATS


class Stop(Exception):  # noqa: N818 - an early return through several frames
    """Recognition ends here: reason, the value it stopped at, and a hint."""

    def __init__(self, reason: str, at: str = "", hint: str = "") -> None:
        super().__init__(reason)
        self.reason, self.at, self.hint = reason, at, hint


@dataclass(frozen=True)
class Ref:
    """One element of `value`, as a function of labels."""

    value: str
    coords: tuple[Expr, ...]

    def substitute(self, swap: dict[Label, Expr]) -> Ref:
        """This with labels replaced."""
        return Ref(self.value, tuple(c.substitute(swap) for c in self.coords))

    @property
    def labels(self) -> frozenset[Label]:
        """Every label the coordinates depend on."""
        return frozenset().union(*(c.labels for c in self.coords))


@dataclass(frozen=True)
class Move:
    """The element is an element of another tensor, perhaps in another float type."""

    ref: Ref


@dataclass(frozen=True)
class Scaled:
    """The element is `factor` times an element of another tensor."""

    ref: Ref
    factor: float


@dataclass(frozen=True)
class Product:
    """The element is the product of one element of each of two tensors."""

    a: Ref
    b: Ref


@dataclass(frozen=True)
class Dot:
    """The element is `factor` * the sum over `label` of a * b."""

    a: Ref
    b: Ref
    label: Label
    factor: float = 1.0


@dataclass(frozen=True)
class Pieces:
    """Which tensor the element comes from depends on `label`: (low, high, element) per range."""

    label: Label
    parts: tuple[tuple[int, int, Ref], ...]


@dataclass(frozen=True)
class Leaf:
    """The element is computed here, or enters the graph here."""

    ref: Ref


Step = Move | Scaled | Product | Dot | Pieces | Leaf
_Rule = Callable[["Tracer", onnx.NodeProto, Ref], "Step | None"]


class Tracer:
    """Traces elements of one site back through the graph, within a budget of steps."""

    def __init__(self, index: GraphIndex, sizes: Concrete, other: Concrete, budget: int) -> None:
        """`other` assigns other sizes to the symbols: what agrees in both is static."""
        self.index, self.sizes, self.other = index, sizes, other
        self.budget = budget
        self.opaque = False  # True: index tensors are read as they are, without arithmetic

    # -- sizes and constants ----------------------------------------------------------------------

    def shape(self, value: str) -> Shape:
        """The concrete shape; stops recognition when it cannot be known."""
        shape = self.sizes.shape(value)
        if shape is None:
            raise Stop(
                f"the shape of {value} is not known",
                value,
                "run onnx.shape_inference on the model first",
            )
        return shape

    def static(self, value: str, axis: int) -> bool:
        """Whether this dim has the same size whatever the symbols are."""
        other = self.other.shape(value)
        return other is not None and other[axis] == self.shape(value)[axis]

    def scalar(self, value: str) -> float | None:
        """The number in a one-element constant that does not depend on any dynamic size."""
        number = self.sizes.scalar(value)
        return number if number is not None and number == self.other.scalar(value) else None

    def spend(self, value: str) -> None:
        """Count one step; stops recognition when the budget is used up."""
        self.budget -= 1
        if self.budget < 0:
            raise Stop(
                "recognition took more steps than its budget allows",
                value,
                "raise max_steps if this graph is meant",
            )

    # -- steps ------------------------------------------------------------------------------------

    def step(self, ref: Ref) -> Step:
        """One step back from `ref`."""
        self.spend(ref.value)
        node = self.index.node_of(ref.value)
        if node is None or (rule := _RULES.get(node.op_type)) is None:
            return Leaf(ref)
        return rule(self, node, ref) or Leaf(ref)

    def operand(self, value: str, coords: tuple[Expr, ...]) -> Ref:
        """`value` as it is broadcast to the shape that `coords` address."""
        shape = self.shape(value)
        own = coords[len(coords) - len(shape) :]
        return Ref(value, tuple(ZERO if d == 1 else c for c, d in zip(own, shape, strict=True)))

    def index_value(self, ref: Ref) -> Expr:
        """What an integer tensor holds at `ref`, as far as arithmetic shows."""
        self.spend(ref.value)
        if not self.opaque:
            if (known := self._known_index(ref)) is not None:
                return known
            node = self.index.node_of(ref.value)
            arithmetic = None if node is None else self._index_arithmetic(node, ref)
            if arithmetic is not None:
                return arithmetic
        step = self.step(ref)
        if isinstance(step, Move) and not is_float(self.sizes.elem_type(step.ref.value)):
            return self.index_value(step.ref)
        return Expr.of(Read(ref.value, ref.coords))

    def _known_index(self, ref: Ref) -> Expr | None:
        """A constant table that is linear in its coordinates: arange, batch offsets, a number."""
        array = self.sizes.value(ref.value)
        if array is None or array.dtype.kind not in "iu" or array.size == 0:
            return None
        origin = int(array.reshape(-1)[0])
        steps = []
        for axis, size in enumerate(array.shape):
            at = tuple(1 if i == axis else 0 for i in range(array.ndim))
            steps.append(int(array[at]) - origin if size > 1 else 0)
        grid = np.full(array.shape, origin, np.int64)
        for axis, by in enumerate(steps):
            shape = [-1 if i == axis else 1 for i in range(array.ndim)]
            grid = grid + (np.arange(array.shape[axis]) * by).reshape(shape)
        if not bool((grid == array).all()):
            return None
        total = Expr(origin)
        for coordinate, by in zip(ref.coords, steps, strict=True):
            total = total + coordinate * by
        return total

    def _index_arithmetic(self, node: onnx.NodeProto, ref: Ref) -> Expr | None:
        op = node.op_type
        if op in ("Add", "Sub"):
            a, b = (self.index_value(self.operand(n, ref.coords)) for n in node.input)
            return a + b if op == "Add" else a - b
        if op == "Mul":
            for value, other in (node.input, reversed(node.input)):
                if (by := self.sizes.scalar(other)) is not None and by == int(by):
                    return self.index_value(self.operand(value, ref.coords)) * int(by)
        return None


# -- movement -------------------------------------------------------------------------------------


def _cast(tracer: Tracer, node: onnx.NodeProto, ref: Ref) -> Step | None:
    source, target = tracer.sizes.elem_type(node.input[0]), int(attributes(node)["to"])
    widening = source in _SIGNED and (is_float(target) or target in _SIGNED)
    if (is_float(source) and is_float(target)) or widening:
        return Move(Ref(node.input[0], ref.coords))
    return None


def _same(tracer: Tracer, node: onnx.NodeProto, ref: Ref) -> Step | None:
    del tracer
    return Move(Ref(node.input[0], ref.coords)) if ref.value == node.output[0] else None


def _reshape(tracer: Tracer, node: onnx.NodeProto, ref: Ref) -> Step:
    source, target = tracer.shape(node.input[0]), tracer.shape(ref.value)
    if [d for d in source if d != 1] == [d for d in target if d != 1]:
        kept = iter(c for c, d in zip(ref.coords, target, strict=True) if d != 1)
        return Move(Ref(node.input[0], tuple(ZERO if d == 1 else next(kept) for d in source)))
    return Move(Ref(node.input[0], split(merge(ref.coords, target), source)))


def _transpose(tracer: Tracer, node: onnx.NodeProto, ref: Ref) -> Step:
    del tracer
    rank = len(ref.coords)
    perm = attributes(node).get("perm") or list(range(rank))[::-1]
    coords = [ZERO] * rank
    for out, source in enumerate(perm):
        coords[source] = ref.coords[out]
    return Move(Ref(node.input[0], tuple(coords)))


def _expand(tracer: Tracer, node: onnx.NodeProto, ref: Ref) -> Step:
    return Move(tracer.operand(node.input[0], ref.coords))


def _tile(tracer: Tracer, node: onnx.NodeProto, ref: Ref) -> Step:
    shape = tracer.shape(node.input[0])
    coords = (c.mod(d) if d > 1 else ZERO for c, d in zip(ref.coords, shape, strict=True))
    return Move(Ref(node.input[0], tuple(coords)))


def _slice(tracer: Tracer, node: onnx.NodeProto, ref: Ref) -> Step | None:
    shape = tracer.shape(node.input[0])
    inputs = [None, *(tracer.sizes.value(n) if n else None for n in node.input[1:])]
    if any(a is None and n for a, n in zip(inputs[1:], node.input[1:], strict=True)):
        return None
    coords = list(ref.coords)
    bounds = slice_bounds(attributes(node), inputs, len(shape))
    for start, end, axis, step in zip(*bounds, strict=True):
        first = range(*slice(start, end, step).indices(shape[axis])).start
        coords[axis] = coords[axis] * step + first
    return Move(Ref(node.input[0], tuple(coords)))


def _split(tracer: Tracer, node: onnx.NodeProto, ref: Ref) -> Step:
    axis = int(attributes(node).get("axis", 0)) % len(ref.coords)
    before = list(node.output)[: list(node.output).index(ref.value)]
    offset = sum(tracer.shape(name)[axis] for name in before)
    coords = list(ref.coords)
    coords[axis] = coords[axis] + offset
    return Move(Ref(node.input[0], tuple(coords)))


def _concat(tracer: Tracer, node: onnx.NodeProto, ref: Ref) -> Step | None:
    axis = int(attributes(node)["axis"]) % len(ref.coords)
    edges = [0]
    for name in node.input:
        edges.append(edges[-1] + tracer.shape(name)[axis])
    ranges = [(edges[i], edges[i + 1], name, -edges[i]) for i, name in enumerate(node.input)]
    return _by_range(ref, axis, [r for r in ranges if r[0] < r[1]])


def _by_range(ref: Ref, axis: int, ranges: list[tuple[int, int, str, int]]) -> Step | None:
    """The piece(s) of [low, high) -> (value, shift) that coordinate `axis` of `ref` falls into."""
    position = ref.coords[axis]
    if position.bounds is None:
        return None
    low, high = position.bounds
    parts = []
    for start, stop, name, shift in ranges:
        coords = list(ref.coords)
        coords[axis] = position + shift
        piece = Ref(name, tuple(coords))
        if start <= low and high < stop:
            return Move(piece)
        parts.append((start, stop, piece))
    if len(position.terms) != 1 or position.terms[0][1] != 1:
        return None
    label = position.terms[0][0]
    if not isinstance(label, Label):
        return None
    cut = [
        (max(a - position.const, 0), min(b - position.const, label.size), r) for a, b, r in parts
    ]
    return Pieces(label, tuple((a, b, r) for a, b, r in cut if a < b))


def _scatter_nd(tracer: Tracer, node: onnx.NodeProto, ref: Ref) -> Step | None:
    """Rows written in place at constant positions: which tensor a row comes from is a range."""
    table = tracer.sizes.value(node.input[1])
    if table is None or table.ndim < 1 or table.shape[-1] != 1 or table.size == 0:
        return None
    rows = table.reshape(-1)
    low = int(rows[0])
    size = tracer.shape(node.input[0])[0]
    low = low + size if low < 0 else low
    if table.ndim != 2 or not bool((rows - rows[0] == np.arange(rows.size)).all()):
        return None
    high = low + rows.size
    ranges = [(low, high, node.input[2], -low)]
    ranges += [(0, low, node.input[0], 0)] if low else []
    ranges += [(high, size, node.input[0], 0)] if high < size else []
    return _by_range(ref, 0, sorted(ranges))


# -- gathers --------------------------------------------------------------------------------------


def _gather(tracer: Tracer, node: onnx.NodeProto, ref: Ref) -> Step:
    axis = int(attributes(node).get("axis", 0)) % len(tracer.shape(node.input[0]))
    rank = len(tracer.shape(node.input[1]))
    own = ref.coords[axis : axis + rank]
    at = tracer.index_value(Ref(node.input[1], own))
    coords = (*ref.coords[:axis], at, *ref.coords[axis + rank :])
    return Move(Ref(node.input[0], coords))


def _gather_elements(tracer: Tracer, node: onnx.NodeProto, ref: Ref) -> Step:
    axis = int(attributes(node).get("axis", 0)) % len(ref.coords)
    coords = list(ref.coords)
    coords[axis] = tracer.index_value(Ref(node.input[1], ref.coords))
    return Move(Ref(node.input[0], tuple(coords)))


def _gather_nd(tracer: Tracer, node: onnx.NodeProto, ref: Ref) -> Step:
    batch = int(attributes(node).get("batch_dims", 0))
    indices = tracer.shape(node.input[1])
    outer = ref.coords[: len(indices) - 1]
    at = tuple(
        tracer.index_value(Ref(node.input[1], (*outer, Expr(j)))) for j in range(indices[-1])
    )
    return Move(Ref(node.input[0], (*outer[:batch], *at, *ref.coords[len(indices) - 1 :])))


# -- arithmetic -----------------------------------------------------------------------------------


def _mul(tracer: Tracer, node: onnx.NodeProto, ref: Ref) -> Step | None:
    a, b = node.input
    for value, other in ((a, b), (b, a)):
        if (factor := tracer.scalar(other)) is not None and tracer.shape(value) == tracer.shape(
            ref.value
        ):
            return Scaled(Ref(value, ref.coords), factor)
    return Product(tracer.operand(a, ref.coords), tracer.operand(b, ref.coords))


def _div(tracer: Tracer, node: onnx.NodeProto, ref: Ref) -> Step | None:
    divisor = tracer.scalar(node.input[1])
    same = tracer.shape(node.input[0]) == tracer.shape(ref.value)
    return Scaled(Ref(node.input[0], ref.coords), 1 / divisor) if divisor and same else None


def _scrubbed(tracer: Tracer, node: onnx.NodeProto, ref: Ref) -> Step | None:
    """Where(IsNaN(x), 0, x): x, as far as x is a number."""
    guard = tracer.index.node_of(node.input[0])
    same = guard is not None and guard.op_type == "IsNaN" and guard.input[0] == node.input[2]
    return (
        Move(Ref(node.input[2], ref.coords)) if same and tracer.scalar(node.input[1]) == 0 else None
    )


def _matmul(tracer: Tracer, node: onnx.NodeProto, ref: Ref) -> Step | None:
    a, b, flags = tracer.shape(node.input[0]), tracer.shape(node.input[1]), attributes(node)
    if len(a) < 2 or len(b) < 2 or flags.get("transBatchA") or flags.get("transBatchB"):
        return None
    label = fresh("d", a[-2] if flags.get("transA") else a[-1])
    inner, batch, (m, n) = Expr.of(label), ref.coords[:-2], ref.coords[-2:]
    last_a = (inner, m) if flags.get("transA") else (m, inner)
    last_b = (n, inner) if flags.get("transB") else (inner, n)
    left = tracer.operand(node.input[0], (*batch, *last_a))
    right = tracer.operand(node.input[1], (*batch, *last_b))
    return Dot(left, right, label, float(flags.get("alpha", 1.0)))


def _gemm(tracer: Tracer, node: onnx.NodeProto, ref: Ref) -> Step | None:
    plain = len(node.input) < 3 or not node.input[2]
    return _matmul(tracer, node, ref) if plain else None


def _einsum(tracer: Tracer, node: onnx.NodeProto, ref: Ref) -> Step | None:
    if len(node.input) != 2:
        return None
    shapes = [tracer.shape(n) for n in node.input]
    terms, out = einsum_terms(attributes(node)["equation"], [len(s) for s in shapes])
    at = dict(zip(out, ref.coords, strict=True))
    sizes = {c: d for t, s in zip(terms, shapes, strict=True) for c, d in zip(t, s, strict=True)}
    inner = [c for c in sizes if c not in out]
    if any(not all(c in t for t in terms) for c in inner) or any(
        len(set(t)) < len(t) for t in terms
    ):
        return None
    wide = [c for c in inner if sizes[c] > 1] or inner[:1]
    if len(wide) != 1:
        return None
    label = fresh("d", sizes[wide[0]])
    at.update({c: Expr.of(label) if c == wide[0] else ZERO for c in inner})
    a, b = (
        Ref(n, tuple(ZERO if d == 1 else at[c] for c, d in zip(t, s, strict=True)))
        for n, t, s in zip(node.input, terms, shapes, strict=True)
    )
    return Dot(a, b, label)


def _dequantize(tracer: Tracer, node: onnx.NodeProto, ref: Ref) -> Step | None:
    if len(node.input) > 2 and node.input[2]:
        zero = tracer.index.constant(node.input[2])
        if zero is None or bool(np.asarray(zero).any()):
            return None
    a, shape = attributes(node), tracer.shape(node.input[1])
    axis, block = int(a.get("axis", 1)), int(a.get("block_size", 0))
    if len(shape) == 1 and not block and len(ref.coords) > 1:
        scale = Ref(node.input[1], (ref.coords[axis % len(ref.coords)],))
    elif len(shape) == len(ref.coords) and block:
        axis %= len(ref.coords)
        coords = tuple(c.floordiv(block) if i == axis else c for i, c in enumerate(ref.coords))
        scale = tracer.operand(node.input[1], coords)
    else:
        return None
    return Product(Ref(node.input[0], ref.coords), scale)


_RULES: Final[dict[str, _Rule]] = {
    "Cast": _cast,
    "CastLike": _same,
    "Concat": _concat,
    "DequantizeLinear": _dequantize,
    "Div": _div,
    "Dropout": _same,
    "Einsum": _einsum,
    "Expand": _expand,
    "Flatten": _reshape,
    "FusedMatMul": _matmul,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "Gemm": _gemm,
    "Identity": _same,
    "MatMul": _matmul,
    "Mul": _mul,
    "Reshape": _reshape,
    "ScatterND": _scatter_nd,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _reshape,
    "Tile": _tile,
    "Transpose": _transpose,
    "Unsqueeze": _reshape,
    "Where": _scrubbed,
}
