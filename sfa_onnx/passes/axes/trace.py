"""Trace elements of one site back through the graph, within a budget of steps."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator

import onnx

from sfa_onnx.files.onnx_attrs import attributes
from sfa_onnx.passes.axes.expr import ZERO, Expr, Label, Read
from sfa_onnx.passes.axes.kept import whole_step
from sfa_onnx.passes.axes.one_hot import picked
from sfa_onnx.passes.axes.rules import STEPS
from sfa_onnx.passes.axes.steps import (
    Causal,
    Dot,
    Joined,
    Leaf,
    Move,
    Pieces,
    Product,
    Ref,
    Scaled,
    Step,
    Stop,
    is_float,
)
from sfa_onnx.passes.axes.tables import known_index
from sfa_onnx.passes.graph.index import GraphIndex
from sfa_onnx.passes.graph.kinds import VIEWS
from sfa_onnx.passes.shapes.concrete import Concrete, Shape
from sfa_onnx.passes.shapes.kept import kept_mask
from sfa_onnx.passes.shapes.meet import of_view
from sfa_onnx.passes.shapes.size import form_of, is_open

__all__ = [
    "Causal",
    "Dot",
    "Joined",
    "Move",
    "Pieces",
    "Product",
    "Ref",
    "Scaled",
    "Stop",
    "Tracer",
    "UnifyError",
    "is_float",
]

_FILLED = VIEWS | {"CastLike", "Tile"}
_SOURCES = frozenset(("TopK", "MatMul", "If", "Loop", "Scan", "RandomUniform", "RandomNormal"))
_TINY = 64  # elements of a constant that is compared by content


class UnifyError(Exception):
    """Two symbols must be one size for the attention to make sense; bind again with them equal."""

    def __init__(self, a: str, b: str) -> None:
        super().__init__(f"{a} = {b}")
        self.pair = (a, b)


class Tracer:
    """Traces elements of one site back through the graph, within a budget of steps."""

    def __init__(self, index: GraphIndex, sizes: Concrete, other: Concrete, budget: int) -> None:
        """`other` assigns other sizes to the symbols: what agrees in both is static."""
        self.index, self.sizes, self.other = index, sizes, other
        self.budget = budget
        self.stem = ""  # how new names begin
        self._representatives: dict[str, str] = {}
        self._equal: dict[object, str] = {}
        self.seen: Callable[[Ref, bool], bool] | None = None  # of the attention that is bound
        self.lows: set[float] = set()  # numbers that hide keys, as they were read
        self.terms: list[str] | None = None  # normal form and identities, where they are wanted
        self.masks: frozenset[str] = frozenset()  # inputs that the caller asserts to be masks
        self.flags: frozenset[str] = frozenset()  # and those to be 0 or 1
        self.scales: frozenset[str] = frozenset()  # and those not to be negative
        self.joined: dict[str, Joined | Causal] = {}  # tensors that only a replacement has
        self.products: dict[str, tuple[tuple[Label, ...], Product]] = {}  # that nobody needs
        self.wholes: dict[str, tuple[str, int]] = {}  # that only recognition looks through
        self.opaque = False  # True: index tensors are read as they are, without arithmetic
        self.tables = False  # True: but for constant tables of positions
        self.followed = False  # whether anything was read that an opaque tracer reads otherwise

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

    def join(self, chunks: Joined | Causal) -> str:
        """A name for the tensor that chunks make up, or a mask; the same ones have one name."""
        for name, known in self.joined.items():
            own = [r for r, _ in chunks.parts]
            if known == chunks or (own and [r for r, _ in known.parts] == own):
                return name
        name = f"{self.stem}/chunks_{len(self.joined)}"
        self.joined[name] = chunks
        made = [self.sizes.elem_type(ref.value) for ref, _ in chunks.parts[:1]]
        kind = made[0] if made else int(onnx.TensorProto.BOOL)
        self._declare(name, (*chunks.rows, chunks.whole, *chunks.last), kind)
        return name

    def product(self, a: Ref, b: Ref) -> Ref:
        """An element of the product of two tensors, which no node of the graph makes."""
        labels = tuple(sorted(a.labels | b.labels, key=str))
        name = f"{self.stem}/product_{len(self.products)}"
        self.products[name] = labels, Product(a, b)
        self._declare(name, labels, int(onnx.TensorProto.FLOAT))
        return Ref(name, tuple(map(Expr.of, labels)))

    def _declare(self, name: str, axes: Iterable[Label], kind: int) -> None:
        """Give a new tensor an axis per label, of the label's size under either assignment."""
        known = {size: symbol for symbol, size in reversed(self.sizes.symbols.items())}
        for sizes in (self.sizes, self.other):
            shape = tuple(sizes.symbols.get(known.get(x.size, ""), x.size) for x in axes)
            sizes.declare(name, shape, kind)

    def whole(self, value: str, axis: int) -> str:
        """A name for `value`, were nothing left out along an axis of what a mask keeps."""
        for name, known in self.wholes.items():
            if known == (value, axis):
                return name
        name = f"{self.stem}/whole_{len(self.wholes)}"
        self.wholes[name] = value, axis
        for sizes in (self.sizes, self.other):
            shape = list(sizes.shape(value) or ())
            shape[axis] = math.prod(sizes.shape(kept_mask(shape[axis])) or ())
            sizes.declare(name, tuple(shape), self.sizes.elem_type(value))
        return name

    def made(self, ref: Ref) -> Shape:
        """The shape of a tensor that the graph has, or a replacement makes.

        Raises:
            Stop: it has none of all rows, only of those that a mask picks.
        """
        if ref.value in self.wholes:
            raise Stop(f"rows of {self.wholes[ref.value][0]} are picked by a mask", ref.value)
        return self.shape(ref.value)

    def static(self, value: str, axis: int) -> bool:
        """Whether this dim has the same size whatever the symbols are."""
        own, other = self.shape(value)[axis], self.other.shape(value)
        return not self.open(own) and other is not None and other[axis] == own

    def open(self, size: int) -> bool:
        """Whether a size changes with the sizes of the inputs, or is not known not to."""
        return is_open(size) or bool(self.sizes.stands_for(size))

    def holds_nothing(self, value: str) -> bool:
        """Whether a tensor has no element, such as the rope of a layer without one.

        Whatever made it does not matter: not the layers in front of it, nor their weights.
        """
        return 0 in (self.sizes.shape(value) or ())

    def scalar(self, value: str) -> float | None:
        """The number in a one-element constant that does not depend on any dynamic size."""
        number = self.sizes.scalar(value)
        return number if number is not None and number == self.other.scalar(value) else None

    def fill(self, value: str, *, folded: bool = True) -> float | None:
        """The number a constant tensor holds everywhere: scalars, expanded ones, filled tables.

        `folded`: also where sizes decide it.
        """
        for _ in range(16):
            fill = self.index.fill_value(value)
            if fill is not None:
                return fill
            node = self.index.maker(value)
            if node is None:
                return None
            if node.op_type == "ConstantOfShape":
                tensor = attributes(node).get("value")
                number = 0 if tensor is None else onnx.numpy_helper.to_array(tensor).reshape(-1)[0]
                return float(number)
            if node.op_type == "Mul":  # ones * -inf
                a, b = (self.fill(n, folded=folded) for n in node.input)
                return None if a is None or b is None else a * b
            if node.op_type not in _FILLED:
                return self._folded_fill(value) if folded else None
            value = node.input[0]
        return None

    def _folded_fill(self, value: str) -> float | None:
        known = self.sizes.value(value)
        if known is None or known.size == 0 or self.sizes.moves(value):
            return None
        flat = known.reshape(-1)
        return float(flat[0]) if bool((flat == flat[0]).all()) else None

    def unify(self, a: int, b: int) -> None:
        """Sizes `a` and `b` meet on one axis: where symbols can make them equal, start again so.

        Raises:
            UnifyError: they are.
        """
        for symbol, form in self.sizes.swaps(a, b)[:1]:
            raise UnifyError(str(form), symbol)

    def same_rows(self, indices: str, data: str, axis: int) -> None:
        """Every row of `data` has indices along `axis`; ONNX allows fewer rows of indices.

        Raises:
            UnifyError: two symbols must be equal for that.
            Stop: the indices have fewer rows, whatever the symbols are.
        """
        for i, (own, size) in enumerate(zip(self.shape(indices), self.shape(data), strict=True)):
            if i == axis or own == size:
                continue
            if is_open(own) and is_open(size):
                self.unify(own, size)
            else:
                raise Stop(
                    f"{indices} has size {form_of(own)} on axis {i} and {data} has"
                    f" {form_of(size)}: indices for a part of the rows are not supported",
                    indices,
                )

    def same_count(self, source: Shape, target: Shape) -> None:
        """A view keeps the number of elements.

        Raises:
            UnifyError: symbols must be equal for that.
        """
        if (pair := of_view(source, target, self.sizes.symbols)) is not None:
            raise UnifyError(pair[1], pair[0])

    def shown(self, condition: Ref, holds: bool) -> bool:
        """Whether keys are seen only where a condition says `holds`: others have no weight."""
        return self.seen is not None and self.seen(condition, holds)

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
        if (made := self.products.get(ref.value)) is not None:
            swap = dict(zip(made[0], ref.coords, strict=True))
            return Product(made[1].a.substitute(swap), made[1].b.substitute(swap))
        if (picked_from := self.wholes.get(ref.value)) is not None:
            return whole_step(self, *picked_from, ref)
        node = self.index.maker(ref.value)
        if node is None or (rule := STEPS.get(node.op_type)) is None:
            return Leaf(ref)
        try:
            step = rule(self, node, ref) or Leaf(ref)
        except (IndexError, ValueError) as error:
            raise self._contradicting(node) from error
        return (picked(self, step) or step) if isinstance(step, Dot) else step

    def moves(self, ref: Ref) -> Iterator[Ref]:
        """`ref`, and the elements behind it that it is, each of them moved only."""
        while True:
            yield ref
            step = self.step(ref) if self.index.maker(ref.value) is not None else None
            if not isinstance(step, Move):
                return
            ref = step.ref

    def _contradicting(self, node: onnx.NodeProto) -> Stop:
        """What is said where ranks and sizes around a node cannot be those of its operator."""
        known = ((n, self.index.shape(n)) for n in (*node.input, *node.output) if n)
        shapes = ", ".join(f"{n!r} {list(s)}" for n, s in known if s is not None)
        name = node.name or node.output[0]
        return Stop(
            f"the shapes around {node.op_type} {name!r} contradict each other: {shapes}",
            node.output[0],
            "export the model again, or drop its declared shapes and infer them anew",
        )

    def operand(self, value: str, coords: tuple[Expr, ...]) -> Ref:
        """`value` as it is broadcast to the shape that `coords` address."""
        shape = self.shape(value)
        own = coords[len(coords) - len(shape) :]
        return Ref(value, tuple(ZERO if d == 1 else c for c, d in zip(own, shape, strict=True)))

    @contextlib.contextmanager
    def following(self) -> Iterator[None]:
        """Index arithmetic is followed inside, whatever it is outside: that of constant tables."""
        was, self.opaque = self.opaque, False
        try:
            yield
        finally:
            self.opaque = was

    def index_value(self, ref: Ref, size: int = 0) -> Expr:
        """What an integer tensor holds at `ref`, as far as arithmetic shows.

        `size` is that of the axis it indexes: an index modulo that size is the index, wrapped.
        """
        self.spend(ref.value)
        # Also where index tensors are opaque, a number is a number.
        known = known_index(self.sizes, ref)
        if known is not None and (not self.opaque or self.tables or not known.terms):
            self.followed |= bool(known.terms)
            return known
        if not self.opaque:
            node = self.index.maker(ref.value)
            arithmetic = None if node is None else self._index_arithmetic(node, ref, size)
            if arithmetic is not None:
                self.followed = True
                return arithmetic
        step = self.step(ref)
        if isinstance(step, Move) and not is_float(self.sizes.elem_type(step.ref.value)):
            made = any(not isinstance(a, Label) for c in step.ref.coords for a, _ in c.terms)
            if not (self.tables and made):  # a table of rows stays one, however it was made
                return self.index_value(step.ref, size)
        return Expr.of(Read(self.representative(ref.value), ref.coords))

    def representative(self, value: str, depth: int = 24) -> str:
        """The first value of the graph that is computed exactly like `value`.

        Exporters repeat index arithmetic for every gather; equal arithmetic is one tensor.
        """
        if value in self._representatives:
            return self._representatives[value]
        key: object = value
        node = self.index.maker(value)
        if (known := self._number(value)) is not None:
            key = known
        elif node is not None and depth and node.op_type not in _SOURCES:
            self.spend(value)
            inputs = tuple(self.representative(n, depth - 1) for n in node.input)
            named = sorted((a.name, a.SerializeToString()) for a in node.attribute)
            which = list(node.output).index(value)
            key = (node.domain, node.op_type, which, inputs, tuple(named))
        found = self._equal.setdefault(key, value)
        self._representatives[value] = found
        return found

    def equals(self, value: str) -> list[str]:
        """`value` and the values met so far that are computed exactly like it."""
        own = self.representative(value)
        return [value, *(v for v, r in self._representatives.items() if r == own and v != value)]

    def _number(self, value: str) -> object:
        """What a small constant holds, or a number that sizes alone decide, for comparison."""
        array = self.index.constant(value)
        if array is not None:
            small = array.size <= _TINY
            return (array.dtype.str, array.shape, array.tobytes()) if small else None
        array, other = self.sizes.value(value), self.other.value(value)
        if array is None or other is None or array.dtype.kind not in "iu" or array.size > _TINY:
            return None
        return (array.dtype.str, array.shape, array.tobytes(), other.tobytes())

    def _wrapped(self, node: onnx.NodeProto, size: int) -> str:
        """The x of where(x < 0, x + size, x), as some libraries wrap indices before a gather."""
        test, shifted = (self.index.real_maker(n) for n in node.input[:2])
        if not size or test is None or shifted is None:
            return ""
        if (test.op_type, shifted.op_type) != ("Less", "Add"):
            return ""
        own = self.index.unaliased(node.input[2])
        same = {self.index.unaliased(n.input[0]) for n in (test, shifted)} == {own}
        zero, by = self.sizes.scalar(test.input[1]), self.sizes.scalar(shifted.input[1])
        return own if same and zero == 0 and by == size else ""

    def _index_arithmetic(self, node: onnx.NodeProto, ref: Ref, size: int) -> Expr | None:
        op = node.op_type
        if op == "Mod" and size and self.sizes.scalar(node.input[1]) == size:
            return self.index_value(self.operand(node.input[0], ref.coords))
        if op == "Where" and (wrapped := self._wrapped(node, size)):
            return self.index_value(self.operand(wrapped, ref.coords), size)
        if op in ("Add", "Sub"):
            a, b = (self.index_value(self.operand(n, ref.coords)) for n in node.input)
            return a + b if op == "Add" else a - b
        if op == "Mul":
            for value, other in (node.input, reversed(node.input)):
                by = self.sizes.scalar(other)
                by = self.fill(other) if by is None else by
                if by is not None and by == int(by):
                    return self.index_value(self.operand(value, ref.coords)) * int(by)
        return None
