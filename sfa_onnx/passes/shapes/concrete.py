"""Concrete sizes for a graph: every symbolic dim becomes a number, and shape chains are computed.

Exporters spell sizes as chains of Shape, Gather, Concat, Range ... that only say what a number is.
With a number in place of every symbol these chains are simply evaluated, and each Reshape, Expand
or Slice has concrete targets. The numbers are a `Size` each, which knows the expression it stands
for (`size.py`), unless the caller chooses them. Only ancestors of what is asked for are visited.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import NoReturn, TypeVar

import numpy as np
import onnx

from sfa_onnx.files.onnx_attrs import attributes
from sfa_onnx.files.sound_tensors import RANK
from sfa_onnx.operator.op import INT64_MAX
from sfa_onnx.passes.graph.index import GraphIndex
from sfa_onnx.passes.shapes.dims import size_of
from sfa_onnx.passes.shapes.fold import FOLD, fold
from sfa_onnx.passes.shapes.fold_open import counts, keeps_open, numbers_of
from sfa_onnx.passes.shapes.form import Atom, Form
from sfa_onnx.passes.shapes.kept import kept_by
from sfa_onnx.passes.shapes.meet import Swap, made_equal, of_quotient
from sfa_onnx.passes.shapes.rules import RULES, Shape
from sfa_onnx.passes.shapes.schema import infer_by_schema
from sfa_onnx.passes.shapes.size import CollisionError, StandIns, form_of, is_open
from sfa_onnx.passes.shapes.types import type_step

__all__ = ["Concrete", "Shape", "SizesMeetError"]

_Found = TypeVar("_Found")

_FEW = 64  # elements of a value whose entries may be sizes
_LAID_OUT = frozenset(("ConstantOfShape", "Range"))  # open sizes decide their length only
_FOLD_LIMIT = 1 << 20  # elements of one evaluated value


class SizesMeetError(ValueError):
    """Sizes that differ meet on one axis."""


class _Unify(Exception):  # noqa: N818 - control flow, never seen outside
    """Two sizes turned out to be the same."""

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
        """Assign sizes: those of `symbols`, stand-ins for the rest (`second`: other ones)."""
        self.index = index
        self.symbols: dict[str, int] = dict(symbols or {})
        self._start = int(second)
        self._home = StandIns(self._start)
        dims = [d for shape in index.entering.values() for d in shape or () if isinstance(d, str)]
        for dim in dims:
            if dim.isidentifier() and dim not in self.symbols:
                self.symbols[dim] = self._home.symbol(dim)
        for dim in dims:
            if size_of(dim, self.symbols) is None:
                self.symbols[dim] = self._home.symbol(dim)
        self._shapes: dict[str, Shape | None] = {}
        self._values: dict[str, np.ndarray | None] = {}
        self._moving: set[str] = set()  # values that were computed of stand-ins
        self._asking = False
        self._types: dict[str, int] = {}

    @property
    def dynamic(self) -> bool:
        """Whether any value that enters has a dim without a number."""
        shapes = self.index.entering.values()
        return any(not isinstance(d, int) for dims in shapes for d in dims or ("?",))

    @property
    def equal(self) -> tuple[tuple[str, str], ...]:
        """(what it is, symbol) of every symbol that turned out to be another size, or several."""
        forms = ((str(form_of(size)), symbol) for symbol, size in self.symbols.items())
        return tuple((form, symbol) for form, symbol in forms if form != symbol)

    # -- shapes -----------------------------------------------------------------------------------

    def shape(self, value: str) -> Shape | None:
        """The concrete shape of `value`; None when it cannot be known without running the graph.

        Raises: SizesMeetError where sizes meet that cannot be equal.
        """
        known = self._shapes.get(value)
        return known if known is not None else self._settled(lambda: self.look_up(value))

    def declare(self, value: str, shape: Shape, elem_type: int) -> None:
        """Give the shape and type of a value that no node of the graph makes."""
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
            except CollisionError:
                self._redraw()
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
                self._store(name, declared)
                continue
            i = self.index.producer.get(name)
            if i is None:
                self._store(name, self._guess(name))
            elif i not in found:
                found.add(i)
                stack.extend(self.index.nodes[i].input)
        return found

    def _declared(self, value: str) -> Shape | None:
        dims = self.index.shape(value)
        if dims is None:
            return None
        for pair in (of_quotient(d, self.symbols) for d in dims if isinstance(d, str)):
            self.meet(*pair or (1, 1))
        sizes = [d if isinstance(d, int) else size_of(d, self.symbols) for d in dims]
        return None if any(s is None for s in sizes) else tuple(s or 0 for s in sizes)

    def _store(self, value: str, shape: Shape | None) -> None:
        if len(shape or ()) > RANK:  # positions of an open axis, taken for sizes
            shape = None
        self._home.seen(shape or ())
        self._shapes[value] = shape

    def _guess(self, value: str) -> Shape | None:
        """A graph input with nameless dims gets a prime for each of them."""
        dims = self.index.shape(value)
        if dims is None:
            return None
        sizes: list[int] = []
        for d in dims:
            known = d if isinstance(d, int) else size_of(d, self.symbols)
            sizes.append(self._home.symbol(f"{value}_{len(sizes)}") if known is None else known)
        return tuple(sizes)

    def _infer(self, i: int) -> None:
        node = self.index.nodes[i]
        rule = RULES.get(node.op_type)
        outputs: list[Shape | None] | None = None
        if rule is not None:
            try:
                outputs = rule(self, node)
            except SizesMeetError:
                raise
            except (IndexError, ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError):
                outputs = None
        if outputs is None:
            outputs = [self._recognized(i, s) for s in infer_by_schema(self, node)]
        for k, name in enumerate(node.output):
            if name and name not in self._shapes:
                self._store(name, outputs[k] if k < len(outputs) else None)

    def _recognized(self, node: int, shape: Shape | None) -> Shape | None:
        """A shape of plain numbers with the sizes that they stand for."""
        if shape is None or not any(map(is_open, self.symbols.values())):
            return shape
        value = self.index.nodes[node].output[0]
        return tuple(self._home.told(d, value, axis) for axis, d in enumerate(shape))

    def broadcast(self, *shapes: Shape) -> Shape:
        """NumPy broadcasting; two sizes that meet are taken to be the same from then on."""
        first = shapes[0]
        if all(s == first for s in shapes):
            return first
        rank = max(len(s) for s in shapes)
        out = []
        for axis in range(-rank, 0):
            sizes = {s[axis] for s in shapes if len(s) >= -axis} - {1}
            if len(sizes) > 1:
                self._broadcast_apart(*sorted(sizes)[:2])
            out.append(sizes.pop() if sizes else 1)
        return tuple(out)

    def _broadcast_apart(self, a: int, b: int) -> NoReturn:
        """Two sizes are made one, but not two axes of one input: they may be broadcast from 1."""
        pair = {form_of(a).plain, form_of(b).plain}
        if any(pair <= own for own in self._input_symbols):
            raise SizesMeetError(
                f"sizes {form_of(a)} and {form_of(b)} are broadcast to each other, but they are two"
                " axes of one input: the graph also runs where one of them is 1"
            )
        raise _Unify(a, b)

    def meet(self, a: int, b: int) -> None:
        """Sizes that must be equal for the graph to run are one, where symbols can make them so."""
        if a != b and 1 not in (a, b) and self.swaps(a, b):
            raise _Unify(a, b)

    def check(self, node: onnx.NodeProto) -> None:
        """Let all sizes meet that this node makes meet, also where the file declares its result."""
        rule = RULES.get(node.op_type)
        declared = [self.shape(name) for name in node.output]
        if rule is None or node.domain not in ("", "ai.onnx"):
            return

        def ask() -> None:
            try:
                inferred = rule(self, node)
            except (IndexError, ValueError, TypeError, KeyError, ZeroDivisionError):
                return
            for known, found in zip(declared, inferred, strict=False):
                if known is not None and found is not None and len(known) == len(found):
                    for a, b in zip(known, found, strict=True):
                        self.meet(a, b)

        self._settled(ask)

    def swaps(self, a: int, b: int) -> list[Swap]:
        """What symbols must be for two sizes to be one; nothing where that cannot be determined."""
        own = [s for s, size in self.symbols.items() if form_of(size).plain == s]
        return made_equal(form_of(a), form_of(b), own, self._input_symbols) or []

    @functools.cached_property
    def _input_symbols(self) -> list[frozenset[str]]:
        """The symbols of each input."""
        shapes = (self.index.shape(info.name) or () for info in self.index.inputs)
        return [frozenset(d for d in dims if isinstance(d, str)) for dims in shapes]

    def unify(self, what: str, symbol: str) -> None:
        """Take `symbol` to be `what` from now on: another symbol, or an expression of symbols."""
        known = size_of(what, self.symbols)
        if known is not None:
            self._swap([(symbol, form_of(known))])

    def _unify(self, a: int, b: int) -> None:
        swaps = self.swaps(a, b)
        if not swaps:
            raise SizesMeetError(
                f"sizes {form_of(a)} and {form_of(b)} meet on one axis, but the inputs do not"
                " declare them as equal"
            )
        self._swap(swaps)

    def _swap(self, swaps: Iterable[Swap]) -> None:
        for symbol, form in swaps:
            swap: dict[Atom, Form] = {symbol: form}
            self._rename({s: form_of(n).substitute(swap) for s, n in self.symbols.items()})

    def _rename(self, forms: Mapping[str, Form]) -> None:
        self.symbols = {s: self._home.size(form) for s, form in forms.items()}
        self._shapes.clear()
        self._values.clear()
        self._moving.clear()

    def _redraw(self) -> None:
        """Other stand-ins, for two sizes had the same."""
        self._start += 2
        self._home = StandIns(self._start)
        self._rename({s: form_of(size) for s, size in self.symbols.items()})

    def stands_for(self, number: int) -> str:
        """The open size that a plain number is, or is a multiple of; "" where it is none."""
        return self._home.within(number)

    def kept(self, mask: str) -> int:
        """The size of what a mask keeps."""
        return self._home.size(kept_by(self.index.unaliased(mask)))

    def maker(self, value: str) -> onnx.NodeProto | None:
        """The node that makes `value`, for rules."""
        return self.index.real_maker(value)

    # -- values -----------------------------------------------------------------------------------

    def value(self, value: str) -> np.ndarray | None:
        """What `value` holds when constants and sizes alone decide it; None otherwise."""
        found = self._settled(lambda: self._value(value)) if value else None
        return None if found is None else numbers_of(found)

    def entries(self, value: str) -> list[int] | None:
        """As `value`, of integers and flat; those that are open are sizes."""
        found = self._settled(lambda: self._value(value)) if value else None
        if found is None or found.dtype.kind not in "iuO" or not counts(found):
            return None
        return [x if is_open(x) else int(x) for x in found.flat]

    def _value(self, value: str) -> np.ndarray | None:
        if value in self._values:
            return self._values[value]
        self._values[value] = None  # a cycle cannot be, an unfinished entry may
        array = self.index.constant(value)
        if array is None and (node := self.index.maker(value)) is not None:
            array = self._fold(node, value)
        self._values[value] = array
        return array

    def _fold(self, node: onnx.NodeProto, value: str) -> np.ndarray | None:
        if node.op_type in ("Shape", "Size"):
            if (shape := self.look_up(node.input[0])) is None:
                return None
            a, whole = attributes(node), node.op_type == "Size"
            part = (math.prod(shape),) if whole else shape[a.get("start", 0) : a.get("end", None)]
            if any(not is_open(d) and d > INT64_MAX for d in part):  # such a tensor cannot be
                return None
            kind = object if any(map(is_open, part)) else np.int64
            return np.asarray(part[0] if whole else part, kind)
        if node.op_type not in FOLD or node.domain not in ("", "ai.onnx"):
            return None
        inputs: list[np.ndarray | None] = []
        for name in node.input:
            array = self._value(name) if name else None
            if name and array is None:
                return None
            inputs.append(array)
        result = fold(node, inputs, _FOLD_LIMIT)
        found = None if result is None else result[list(node.output).index(value)]
        return found if found is None else self._kept_open(node, inputs, found, value)

    def _kept_open(
        self,
        node: onnx.NodeProto,
        inputs: list[np.ndarray | None],
        found: np.ndarray,
        value: str,
    ) -> np.ndarray:
        """What was computed of stand-ins as sizes of which no more is known; else `found`."""
        opened = [x for x in inputs if x is not None and x.dtype == object]
        lengths = (s for n in node.input[:1] for s in self.look_up(n) or ())
        moves = any(n in self._moving for n in node.input)
        moves |= bool(opened) and not keeps_open(node, inputs) and node.op_type not in _LAID_OUT
        moves |= node.op_type.startswith("Reduce") and any(map(is_open, lengths))
        if not moves or found.dtype == object:
            return found
        self._moving.add(value)
        if found.dtype.kind not in "iu" or found.size > _FEW:
            return found
        told = [self._home.told(int(n), value, i, True) for i, n in enumerate(found.flat)]
        return np.asarray([*told, None], object)[:-1].reshape(found.shape)

    def moves(self, value: str) -> bool:
        """Whether what `value` holds was computed of sizes in a way that others may change."""
        return self.value(value) is not None and value in self._moving

    def scalar(self, value: str) -> float | None:
        """The number in a one-element constant, else None."""
        array = self.value(value)
        return float(array.reshape(-1)[0]) if array is not None and array.size == 1 else None

    # -- element types ----------------------------------------------------------------------------

    def elem_type(self, value: str) -> int:
        """The `TensorProto.DataType` of `value`, inferred where it is not declared; 0 if not.

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
            if found or (node := self.index.maker(value)) is None:
                break
            found, value = type_step(self.index, node, value)
        for name in chain:
            self._types[name] = found
        return found
