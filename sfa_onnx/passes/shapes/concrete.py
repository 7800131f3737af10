"""Concrete sizes for a graph: every symbolic dim becomes a number, and shape chains are computed.

Exporters spell sizes as chains of Shape, Gather, Concat, Range ... that only say what a number is.
With a number in place of every symbol (a large prime of its own, unless the caller chooses) these
chains are simply evaluated, and each Reshape, Expand or Slice has concrete targets. Only ancestors
of what is asked for are visited.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

import numpy as np
import onnx

from sfa_onnx.files.onnx_attrs import attributes
from sfa_onnx.guard.guarded import infer_node
from sfa_onnx.passes.graph.index import GraphIndex
from sfa_onnx.passes.shapes.dims import size_of
from sfa_onnx.passes.shapes.fold import FOLD, fold
from sfa_onnx.passes.shapes.rules import RULES, Shape
from sfa_onnx.passes.shapes.types import type_step

__all__ = ["Concrete", "Shape", "SizesMeetError"]

_Found = TypeVar("_Found")

# Far above any top-k, so that Min(2048, S2) is 2048, and no product of two equals a third.
_PRIMES = (10007, 10039, 10061, 10067, 10079, 10093, 10103, 10133, 10141, 10159, 10169, 10181)
_PRIMES_2 = (3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41)  # below any top-k: Min(2048, S2) is S2
_APART = 8  # sizes that are nearer to each other than this are taken for S2 and S2 - 1
_FOLD_LIMIT = 1 << 20  # elements of one evaluated value


def _more_primes() -> Iterator[int]:
    """Primes above all others in use, well apart."""
    last = 20_000
    for n in itertools.count(20_011, 2):
        if n - last >= _APART and all(n % d for d in range(3, math.isqrt(n) + 1, 2)):
            last = n
            yield n


class SizesMeetError(ValueError):
    """Sizes that differ meet on one axis."""


class _Unify(Exception):  # noqa: N818 - control flow, never seen outside
    """Two symbols turned out to be the same size."""

    def __init__(self, a: int, b: int) -> None:
        self.pair = (a, b)


class Concrete:
    """Sizes and integer values of a graph under one assignment of its symbols.

    Attributes:
        symbols: symbol -> size, for every symbol of the graph's inputs.
    """

    def __init__(
        self, index: GraphIndex, symbols: Mapping[str, int] | None = None, *, second: bool = False
    ) -> None:
        """Assign sizes: those of `symbols`, primes for the rest (`second`: other primes)."""
        self.index = index
        self.symbols: dict[str, int] = dict(symbols or {})
        primes = itertools.chain(_PRIMES_2 if second else _PRIMES, _more_primes())
        for dims in index.entering.values():
            for dim in dims or ():
                if isinstance(dim, str) and dim.isidentifier() and dim not in self.symbols:
                    self.symbols[dim] = next(primes)
        for dims in index.entering.values():
            for dim in dims or ():
                if isinstance(dim, str) and size_of(dim, self.symbols) is None:
                    self.symbols[dim] = next(primes)
        self._fresh = primes
        self._shapes: dict[str, Shape | None] = {}
        self._values: dict[str, np.ndarray | None] = {}
        self._asking = False
        self._types: dict[str, int] = {}

    @property
    def dynamic(self) -> bool:
        """Whether any value that enters has a dim without a number."""
        shapes = self.index.entering.values()
        return any(not isinstance(d, int) for dims in shapes for d in dims or ("?",))

    @property
    def equal(self) -> tuple[tuple[str, str], ...]:
        """Pairs of symbols that turned out to be one size."""
        first: dict[int, str] = {}
        pairs = ((first.setdefault(size, symbol), symbol) for symbol, size in self.symbols.items())
        return tuple((a, b) for a, b in pairs if a != b)

    # -- shapes -----------------------------------------------------------------------------------

    def shape(self, value: str) -> Shape | None:
        """The concrete shape of `value`; None when it cannot be known without running the graph."""
        return self._settled(lambda: self.look_up(value))

    def declare(self, value: str, shape: Shape, elem_type: int) -> None:
        """Tell the shape and type of a value that no node of the graph makes."""
        self._shapes[value], self._types[value] = shape, elem_type

    def _settled(self, ask: Callable[[], _Found | None]) -> _Found | None:
        """The answer once all sizes that meet on the way to it are made one."""
        if self._asking:  # a rule asks: the question it serves starts again
            return ask()
        for _ in range(len(self.symbols) + 1):  # each round makes two of them one
            self._asking = True
            try:
                return ask()
            except _Unify as same:
                self._unify(*same.pair)
            finally:
                self._asking = False
        return None

    def look_up(self, value: str) -> Shape | None:
        """As `shape`, for rules: sizes that meet end the rule, and all is inferred anew."""
        if value in self._shapes:
            return self._shapes[value]
        for i in sorted(self._unknown_ancestors(value)):
            self._infer(i)
        return self._shapes.get(value)

    def _unknown_ancestors(self, value: str) -> set[int]:
        """Nodes that must be inferred, none of whose shapes the file declares usably."""
        found: set[int] = set()
        stack = [value]
        while stack:
            name = stack.pop()
            if not name or name in self._shapes:
                continue
            if (declared := self._declared(name)) is not None:
                self._shapes[name] = declared
                continue
            i = self.index.producer.get(name)
            if i is None:
                self._shapes[name] = self._guess(name)
            elif i not in found:
                found.add(i)
                stack.extend(self.index.nodes[i].input)
        return found

    def _declared(self, value: str) -> Shape | None:
        dims = self.index.shape(value)
        if dims is None:
            return None
        sizes = [d if isinstance(d, int) else size_of(d, self.symbols) for d in dims]
        return None if any(s is None for s in sizes) else tuple(int(s or 0) for s in sizes)

    def _guess(self, value: str) -> Shape | None:
        """A graph input with nameless dims gets a prime for each of them."""
        dims = self.index.shape(value)
        if dims is None:
            return None
        sizes: list[int] = []
        for d in dims:
            known = d if isinstance(d, int) else size_of(d, self.symbols)
            sizes.append(next(self._fresh) if known is None else known)
        return tuple(sizes)

    def _infer(self, i: int) -> None:
        node = self.index.nodes[i]
        rule = RULES.get(node.op_type)
        outputs: list[Shape | None] | None = None
        if rule is not None:
            try:
                outputs = rule(self, node)
            except (IndexError, ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError):
                outputs = None
        if outputs is None:
            outputs = _infer_by_schema(self, node)
        for k, name in enumerate(node.output):
            if name and name not in self._shapes:
                self._shapes[name] = outputs[k] if k < len(outputs) else None

    def broadcast(self, *shapes: Shape) -> Shape:
        """NumPy broadcasting; two symbols that meet are taken to be the same size from then on."""
        first = shapes[0]
        if all(s == first for s in shapes):
            return first
        rank = max(len(s) for s in shapes)
        out = []
        for axis in range(-rank, 0):
            sizes = {s[axis] for s in shapes if len(s) >= -axis} - {1}
            if len(sizes) > 1:
                raise _Unify(*sorted(sizes)[:2])
            out.append(sizes.pop() if sizes else 1)
        return tuple(out)

    def unify(self, a: str, b: str) -> None:
        """Take symbols `a` and `b` to be the same size from now on."""
        keep, drop = self.symbols[a], self.symbols[b]
        self.symbols = {s: keep if n == drop else n for s, n in self.symbols.items()}
        self._shapes.clear()
        self._values.clear()

    def _unify(self, a: int, b: int) -> None:
        own = set(self.symbols.values())
        keep, drop = (a, b) if b in own else (b, a)
        pairs = [(keep, drop)] if drop in own else self._factors(a, b)
        if not pairs:
            raise SizesMeetError(
                f"sizes {self._told(a)} and {self._told(b)} meet on one axis, but the inputs do not"
                " declare them as equal"
            )
        swap = {drop: keep for keep, drop in pairs}
        self.symbols = {s: swap.get(n, n) for s, n in self.symbols.items()}
        self._shapes.clear()
        self._values.clear()

    def _factors(self, a: int, b: int) -> list[tuple[int, int]]:
        """Which sizes are equal when two merged axes such as B*S1 are; empty: it cannot be told.

        The symbols are paired in the order in which the inputs declare them, and only where no two
        axes of one input become the same size by it.
        """
        common = math.gcd(a, b)
        sizes = list(dict.fromkeys(self.symbols.values()))
        left, right = ([n for n in sizes if rest % n == 0] for rest in (a // common, b // common))
        if not left and right == [b // common]:
            return [(a // common, b // common)]
        if not right and left == [a // common]:
            return [(b // common, a // common)]
        if math.prod(left) != a // common or math.prod(right) != b // common:
            return []
        pairs = list(zip(left, right, strict=False))
        taken = {n: n for n in sizes} | {drop: keep for keep, drop in pairs}
        for info in self.index.inputs:
            dims = self.index.shape(info.name) or ()
            own = {self.symbols[d] for d in dims if isinstance(d, str) and d in self.symbols}
            if len({taken[n] for n in own}) < len(own):
                return []
        return pairs if len(left) == len(right) else []

    def _told(self, size: int) -> str:
        """A size as a product of the inputs' symbols."""
        names = []
        for symbol, prime in self.symbols.items():
            if size % prime == 0:
                names.append(symbol)
                size //= prime
        return "*".join([*([str(size)] if size > 1 or not names else []), *names])

    def maker(self, value: str) -> onnx.NodeProto | None:
        """The node that makes `value`, for rules."""
        return self.index.origin(value)

    # -- values -----------------------------------------------------------------------------------

    def value(self, value: str) -> np.ndarray | None:
        """What `value` holds when constants and sizes alone decide it; None otherwise."""
        return self._settled(lambda: self._value(value)) if value else None

    def _value(self, value: str) -> np.ndarray | None:
        if value in self._values:
            return self._values[value]
        self._values[value] = None  # a cycle cannot be, an unfinished entry may
        array = self.index.constant(value)
        if array is None and (node := self.index.node_of(value)) is not None:
            array = self._fold(node, value)
        self._values[value] = array
        return array

    def _fold(self, node: onnx.NodeProto, value: str) -> np.ndarray | None:
        if node.op_type in ("Shape", "Size"):
            shape = self._shape_or_none(node.input[0])
            if shape is None:
                return None
            if node.op_type == "Size":
                return np.asarray(math.prod(shape), np.int64)
            a = attributes(node)
            return np.asarray(shape[a.get("start", 0) : a.get("end", None)], np.int64)
        if node.op_type not in FOLD or node.domain not in ("", "ai.onnx"):
            return None
        inputs: list[np.ndarray | None] = []
        for name in node.input:
            array = self._value(name) if name else None
            if name and array is None:
                return None
            inputs.append(array)
        result = fold(node, inputs, _FOLD_LIMIT)
        return None if result is None else result[list(node.output).index(value)]

    def _shape_or_none(self, value: str) -> Shape | None:
        # Inside shape inference the ancestors are already in order; outside, infer them first.
        return self.look_up(value)

    def scalar(self, value: str) -> float | None:
        """The number in a one-element constant, else None."""
        array = self.value(value)
        return float(array.reshape(-1)[0]) if array is not None and array.size == 1 else None

    # -- element types ----------------------------------------------------------------------------

    def elem_type(self, value: str) -> int:
        """The `TensorProto.DataType` of `value`, inferred where the file does not tell; 0 if not.

        Follows first data inputs upward, so it costs the length of one chain.
        """
        chain: list[str] = []
        found = 0
        while value and not found:
            if value in self._types:
                found = self._types[value]
                break
            chain.append(value)
            found = self.index.elem_type(value)
            if found or (node := self.index.node_of(value)) is None:
                break
            found, value = type_step(self.index, node, value)
        for name in chain:
            self._types[name] = found
        return found


def _infer_by_schema(sizes: Concrete, node: onnx.NodeProto) -> list[Shape | None]:
    """Ask onnx's own inference for one node; nothing when it knows nothing either."""
    nothing: list[Shape | None] = [None] * len(node.output)
    version = sizes.index.opsets.get(node.domain if node.domain != "ai.onnx" else "", 18)
    types: dict[str, onnx.TypeProto] = {}
    data: dict[str, onnx.TensorProto] = {}
    for name in node.input:
        if not name:
            continue
        shape = sizes.look_up(name)
        if shape is None:
            return nothing
        elem = sizes.elem_type(name) or onnx.TensorProto.FLOAT
        types[name] = onnx.helper.make_tensor_type_proto(elem, shape)
        array = sizes.value(name)
        if array is not None and array.dtype.kind in "ib":
            data[name] = onnx.numpy_helper.from_array(array, name)
    inferred = infer_node(node, version, types, data, sizes.index.opsets)
    if inferred is None:
        return nothing
    return [_shape_of_type(inferred.get(name)) for name in node.output]


def _shape_of_type(proto: onnx.TypeProto | None) -> Shape | None:
    if proto is None or not proto.tensor_type.HasField("shape"):
        return None
    dims = proto.tensor_type.shape.dim
    return tuple(d.dim_value for d in dims) if all(d.HasField("dim_value") for d in dims) else None
