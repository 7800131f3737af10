"""Terms over labelled axes: what an element is, as `axes` says where it lies.

A term is an operator, its arguments and perhaps some data. Leaves are numbers, elements of tensors
that stay as they are, and products of queries and keys. Reductions bind a label.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from functools import cached_property
from typing import Any, Final, cast

from sfa_onnx.passes.axes.expr import Expr, Label
from sfa_onnx.passes.axes.steps import Ref

__all__ = [
    "FALSE",
    "ONE",
    "REDUCTIONS",
    "TRUE",
    "ZERO",
    "Term",
    "dot",
    "element",
    "index",
    "number",
    "show",
]

REDUCTIONS: Final = frozenset(("sum", "maximum", "minimum", "any", "all"))
_SIGNS: Final = {"add": " + ", "mul": " * ", "and": " and ", "or": " or "} | {
    "eq": " == ",
    "lt": " < ",
    "le": " <= ",
}


class Term:
    """An operator applied to terms; immutable, compared by content.

    Attributes:
        op: `number` (data: float), `element` (data: `Ref`), `index` (data: `Expr`, a position),
            `dot` (data: query and key `Ref` and the label they are summed over), `pieces` (data:
            label and ranges; one argument per range), `add mul pow exp log max min abs`,
            `where flag and or not eq lt le isnan`, `mod` (data: a width),
            `sum maximum minimum any all` (data: label).
        args: its arguments.
        data: what the operator needs besides.
    """

    __slots__ = ("__dict__", "_hash", "args", "data", "op")

    def __init__(self, op: str, args: tuple[Term, ...] = (), data: Hashable = None) -> None:
        self.op, self.args, self.data = op, args, data
        self._hash = hash((op, args, data))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, Term) or self._hash != other._hash:
            return False
        return (self.op, self.data, self.args) == (other.op, other.data, other.args)

    def __repr__(self) -> str:
        return show(self)

    @cached_property
    def labels(self) -> frozenset[Label]:
        """Free labels: every axis that the element depends on."""
        found: frozenset[Label] = frozenset().union(*(a.labels for a in self.args))
        if self.op == "element":
            return found | self.ref.labels
        if self.op == "index":
            return found | self.expr.labels
        if self.op == "dot":
            query, key, label = self.factors
            return found | (query.labels | key.labels) - {label}
        if self.op in REDUCTIONS:
            return found - {self.label}
        return found | {self.ranges[0]} if self.op == "pieces" else found

    @cached_property
    def height(self) -> int:
        """How many reductions lie within each other."""
        inner = max((a.height for a in self.args), default=0)
        return inner + (self.op in REDUCTIONS)

    @cached_property
    def order(self) -> str:
        """What arguments of commutative operators are sorted by."""
        return show(self)

    @property
    def value(self) -> float:
        """The number that a `number` is."""
        return cast(float, self.data)

    @property
    def ref(self) -> Ref:
        """The tensor element that an `element` is."""
        return cast(Ref, self.data)

    @property
    def expr(self) -> Expr:
        """The position that an `index` is."""
        return cast(Expr, self.data)

    @property
    def width(self) -> int:
        """What a `mod` is taken by."""
        return cast(int, self.data)

    @property
    def label(self) -> Label:
        """The label of a reduction."""
        return cast(Label, self.data)

    @property
    def factors(self) -> tuple[Ref, Ref, Label]:
        """Query, key and label of a `dot`."""
        return cast(tuple[Ref, Ref, Label], self.data)

    @property
    def ranges(self) -> tuple[Label, tuple[tuple[int, int], ...]]:
        """The label of `pieces`, and the range in which each argument holds."""
        return cast(tuple[Label, tuple[tuple[int, int], ...]], self.data)

    @property
    def exponent(self) -> int:
        """That of a `pow`."""
        return cast(int, self.data)

    def is_number(self, value: float | None = None) -> bool:
        """Whether this is a number (that one)."""
        return self.op == "number" and (value is None or self.data == value)

    def walk(self) -> Iterator[Term]:
        """This and every term inside, each once."""
        stack, seen = [self], set[Term]()
        while stack:
            here = stack.pop()
            if here not in seen:
                seen.add(here)
                yield here
                stack += here.args

    def rename(self, swap: Mapping[Label, Expr], make: Callable[..., Term] | None = None) -> Term:
        """This with free labels replaced; `make` builds what has changed (default: as it is)."""
        swap = {k: v for k, v in swap.items() if k in self.labels}
        if not swap:
            return self
        data: Any = self.data
        if self.op in ("element", "index"):
            data = data.substitute(swap)
        elif self.op == "dot":
            query, key, label = self.factors
            data = (query.substitute(dict(swap)), key.substitute(dict(swap)), label)
        args = tuple(a.rename(swap, make) for a in self.args)
        return (make or Term)(self.op, args, data)


def number(value: float) -> Term:
    """A number."""
    return Term("number", (), float(value))


ZERO: Final = number(0.0)
ONE: Final = number(1.0)
TRUE: Final = Term("true")
FALSE: Final = Term("false")


def element(ref: Ref) -> Term:
    """An element of a tensor that is not looked into."""
    return Term("element", (), ref)


def index(expr: Expr) -> Term:
    """A position, as a number."""
    return Term("index", (), expr)


def dot(query: Ref, key: Ref, label: Label) -> Term:
    """The sum over `label` of two elements' product, neither of which is looked into."""
    return Term("dot", (), (query, key, label))


def show(term: Term) -> str:
    """The term as people write it."""
    match term.op:
        case "number":
            return f"{term.value:g}"
        case "element":
            return f"{term.ref.value}[{', '.join(map(str, term.ref.coords))}]"
        case "index":
            return f"({term.data})"
        case "dot":
            query, key, _ = term.factors
            return f"<{_short(query)}, {_short(key)}>"
        case "true" | "false":
            return term.op
        case "pow":
            return f"{show(term.args[0])}^{term.data}"
        case "flag":
            return f"[{show(term.args[0])}]"
        case "mod":
            return f"{show(term.args[0])} mod {term.data}"
    inner = [show(a) for a in term.args]
    if term.op in _SIGNS:
        return f"({_SIGNS[term.op].join(inner)})"
    if term.op in REDUCTIONS:
        inner = [term.label.name, *inner]
    if term.op == "pieces":
        inner = [
            term.ranges[0].name,
            *(f"{a}:{b} {x}" for (a, b), x in zip(term.ranges[1], inner, strict=True)),
        ]
    return f"{term.op}({', '.join(inner)})"


def _short(ref: Ref) -> str:
    return f"{ref.value}[{', '.join(map(str, ref.coords))}]"
