"""The one question: is an element of the scores `c * sum_h w_h * max(0, <q_h, k>)`, and masks?

What keeps the normal form of a selection's scores from being one is said by name.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from sfa_onnx.passes.assume import SCALES
from sfa_onnx.passes.axes.expr import Expr, Label, fresh
from sfa_onnx.passes.axes.trace import Ref, Stop, Tracer
from sfa_onnx.passes.bind.literals import Literal, Visible
from sfa_onnx.passes.bind.mask import additive, boolean
from sfa_onnx.passes.indexer.alike import join_blocks, join_heads, written
from sfa_onnx.passes.indexer.regions import SelectionRegion
from sfa_onnx.passes.indexer.signs import given_signs, stored_narrow
from sfa_onnx.passes.values.arithmetic import LOW, addends, coefficient, factors
from sfa_onnx.passes.values.read import Reader
from sfa_onnx.passes.values.table import normal
from sfa_onnx.passes.values.terms import Term, number

__all__ = ["Factor", "Formula", "Part", "read_formula"]

_WANTED: Final = "expected sum over heads of weight * relu(query . key)"
_PLAIN: Final = frozenset(("Exp", "Max", "Min", "Pow", "Sqrt"))


@dataclass(frozen=True)
class Factor:
    """A factor of queries, of keys, or of a head's weight.

    Attributes:
        ref: one element per row and head, or per key.
        power: of the element: -1 where it divides.
        outside: one of keys that stands behind the relu, so it must not be negative.
        assumed: graph inputs that are taken for scales, which never are.
        said: graph inputs of which the caller says that they never are.
    """

    ref: Ref
    power: int = 1
    outside: bool = False
    assumed: tuple[str, ...] = ()
    said: tuple[str, ...] = ()


@dataclass(frozen=True)
class Part:
    """One product of query and key under the relu: the columns of its own.

    Attributes:
        query, key: elements that are multiplied, over `column`.
        column: runs over their width.
        factor: how much of it there is next to the first one.
        query_by, key_by: what query and key are multiplied by.
    """

    query: Ref
    key: Ref
    column: Label
    factor: float = 1.0
    query_by: tuple[Factor, ...] = ()
    key_by: tuple[Factor, ...] = ()


@dataclass(frozen=True)
class Formula:
    """The scores of a selection, taken apart.

    Attributes:
        parts: the products that are added up under the relu, side by side as columns.
        heads: labels that are summed over (none: one head).
        weights: their product is a head's weight (none: 1).
        rows: labels of the rows that select, one per axis of the scores but that of the keys
            (size 1: no axis).
        keys: runs over the keys.
        masks: what a key is seen under.
    """

    parts: tuple[Part, ...]
    heads: tuple[Label, ...]
    weights: tuple[Factor, ...]
    rows: tuple[Label, ...]
    keys: Label
    masks: tuple[Visible, ...] = ()

    @property
    def query(self) -> Ref:
        """The first product's query."""
        return self.parts[0].query

    @property
    def key(self) -> Ref:
        """The first product's key."""
        return self.parts[0].key

    @property
    def outside(self) -> tuple[Factor, ...]:
        """Factors of keys that stand behind the relu."""
        return tuple(f for f in self.parts[0].key_by if f.outside)

    @property
    def width(self) -> int:
        """All columns."""
        return sum(part.column.size for part in self.parts)


def read_formula(tracer: Tracer, region: SelectionRegion) -> Formula:
    """Operands and masks of the selection.

    Raises:
        Stop: its scores are something else.
    """
    shape = tracer.shape(region.scores)
    if not shape:
        raise Stop("the scores are a scalar", region.scores)
    axis = region.axis % len(shape)
    rows = tuple(fresh("row", size) for i, size in enumerate(shape) if i != axis)
    keys = fresh("t", shape[axis])
    reader = Reader(tracer, normal(scores_too=True), region.inner)
    reader.turned = region.sign < 0
    tracer.seen = None
    coords = tuple(Expr.of(label) for label in (*rows[:axis], keys, *rows[axis:]))
    term = reader.term(Ref(region.scores, coords))
    if region.sign < 0:  # of equal scores the first is taken either way
        term = reader.n.mul(number(-1), term)
    for label in (keys, *rows):
        term = join_blocks(reader, term, label)
    if tracer.terms is not None:
        tracer.terms[:] = [f"{region.scores} = {term}", *map(str, reader.n.fired)]
    conditions, scores, masks = _hidden(term)
    known = _Parts(reader, region, keys)
    known.take(scores)
    literals: list[Literal] = []
    for condition in conditions:
        literals += _conditions(reader, condition, region)
    for mask in masks:
        literals += additive(tracer, mask)
    return Formula(
        known.sides(rows, keys),
        tuple(known.heads),
        tuple(known.weights),
        rows,
        keys,
        _visible(literals),
    )


def _hidden(term: Term) -> tuple[list[Term], Term, list[Ref]]:
    """(conditions without which a key is hidden, its score, masks that are added)."""
    conditions: list[Term] = []
    masks: list[Ref] = []
    while True:
        if term.op == "where" and term.args[2].is_number() and term.args[2].value < LOW:
            conditions.append(term.args[0])
            term = term.args[1]
            continue
        if term.op != "add":
            return conditions, term, masks
        added = [a for a in addends(term) if a.op == "element"]
        rest = [a for a in addends(term) if a.op != "element"]
        if not added or not rest:
            return conditions, term, masks
        masks += [a.ref for a in added]
        term = rest[0] if len(rest) == 1 else Term("add", tuple(rest))


def _conditions(reader: Reader, term: Term, region: SelectionRegion) -> list[Literal]:
    """The literals of a condition that a key is seen under."""
    if term.op == "and":
        return [lit for part in term.args for lit in _conditions(reader, part, region)]
    positive = term.op != "not"
    inner = term if positive else term.args[0]
    if inner.op == "element":
        return boolean(reader.tracer, inner.ref, positive=positive)
    if inner.op == "eq" and not positive and inner.args[0].op == "element":
        return additive(reader.tracer, inner.args[0].ref)  # finite where the mask does not hide
    raise Stop(
        f"keys are hidden where {term} does not hold, which is no mask of this graph",
        region.scores,
    )


def _visible(literals: list[Literal]) -> tuple[Visible, ...]:
    found: list[Visible] = []
    for literal in literals:
        if not isinstance(literal, Visible):
            raise Stop(
                "the scores are hidden by another selection (group routing, or a selection of"
                " blocks in front)",
                literal.mask.ref.value if literal.mask is not None else "",
                "the indexer looks at every key that lengths and padding leave",
            )
        if literal not in found:
            found.append(literal)
    return tuple(found)


class _Parts:
    """Collects what a score is the product and sum of."""

    def __init__(self, reader: Reader, region: SelectionRegion, keys: Label) -> None:
        self.reader, self.region, self.keys = reader, region, keys
        self.weights: list[Factor] = []
        self.heads: list[Label] = []
        self.scale = 1.0
        self.dots: list[tuple[float, Term]] = []
        self.inside: list[list[Factor]] = []  # under the relu, beside each of the dots
        self.outside: list[Factor] = []  # those of keys behind it

    def take(self, term: Term) -> None:
        """One product, sums within it included."""
        for f in factors(term):
            if f.is_number():
                self.scale *= f.value
            elif (found := self._factor(f)) is not None:
                self._weight(found)
            elif f.op == "sum":
                self.heads.append(f.label)
                self.take(f.args[0])
            elif f.op == "add" and not self.dots and (one := self._one_by_one(f)) is not None:
                self.take(one)
            elif f.op == "max" and not self.dots:
                self._activated(f)
            else:
                raise self._strange(f)
        if not (self.scale > 0 and math.isfinite(self.scale)):
            raise Stop(
                f"scores are multiplied by {self.scale:g}, which is not positive",
                self.region.scores,
                "negate the weights instead",
            )

    def _one_by_one(self, term: Term) -> Term | None:
        """Heads that are added up, as a sum over them."""
        return join_heads(self.reader, term, self.keys)

    def _factor(self, term: Term) -> Factor | None:
        """An element, or a power of one."""
        base, power = (term.args[0], term.exponent) if term.op == "pow" else (term, 1)
        known = base.op == "element" and base.ref.value not in self.reader.opaque
        return Factor(base.ref, power) if known else None

    def _weight(self, factor: Factor) -> None:
        ref = factor.ref
        if self.keys not in ref.labels:
            self.weights.append(factor)
            return
        even, tracer = factor.power % 2 == 0, self.reader.tracer
        given = [] if even else given_signs(tracer, ref)
        if given is None or ref.labels & set(self.heads):
            raise self._by_key(ref)
        said = tuple(n for n in given if n in tracer.scales)
        assumed = tuple(n for n in given if n not in said)
        self.outside.append(replace(factor, outside=True, assumed=assumed, said=said))

    def _by_key(self, ref: Ref, given: Sequence[str] = ()) -> Stop:
        name = written(self.reader.tracer, ref.value)
        why = f", and {given[0]} may be negative" if given else ""
        hint = "the operator has one weight per query row and head; a scale of keys that cannot be"
        hint += " negative belongs to the keys"
        if given and all(map(self.reader.tracer.index.is_given, given)):
            hint += f"; if it never is, say so: {' '.join(f'--assume {SCALES}:{n}' for n in given)}"
        return Stop(f"the weight {name} depends on the key{why}", name, hint)

    def _activated(self, term: Term) -> None:
        """Max(0, c <q, k>)."""
        rest = [a for a in term.args if not a.is_number(0.0)]
        if len(rest) != 1 or len(rest) == len(term.args):
            raise self._strange(term)
        if any(t.op == "sum" for t in rest[0].walk()):
            raise Stop(
                "no lightning indexer: the relu is outside the sum over heads",
                self.region.scores,
                _WANTED,
            )
        for part in addends(rest[0]):
            by, found, beside = self._product(rest[0], part)
            self.dots.append((by, found))
            self.inside.append(beside)

    def _product(self, whole: Term, part: Term) -> tuple[float, Term, list[Factor]]:
        """C <q, k> a b as (c, <q, k>, [a, b])."""
        by, rest = coefficient(part)
        own = factors(rest)
        beside = [by_own for f in own if (by_own := self._factor(f)) is not None]
        dots = [f for f in own if f.op == "dot"]
        found = dots[0] if len(dots) == 1 == len(own) - len(beside) else rest
        if found.op != "dot":
            inside = "masks, biases and weights belong behind it"
            raise Stop(
                f"the relu is of {whole}, not of a product of query and key: {inside}",
                self.region.scores,
                _WANTED,
            )
        if by <= 0:
            raise Stop(
                f"products are multiplied by {by:g} before the relu, which is not positive",
                self.region.scores,
                "negate the query (or the keys) instead",
            )
        return by, found, beside

    def sides(self, rows: tuple[Label, ...], keys: Label) -> tuple[Part, ...]:
        """The products, with queries and keys told apart.

        Raises:
            Stop: there is none, or keys differ by head.
        """
        if not self.dots:
            raise Stop("no product of queries and keys is in the scores", self.region.scores)
        first = self.dots[0][0]
        parts = []
        for (by, dot), beside in zip(self.dots, self.inside, strict=True):
            part = self._sides(dot, by / first, rows, keys)
            inside = tuple(x for x in beside if keys in x.ref.labels)
            of_query = tuple(x for x in beside if keys not in x.ref.labels)
            self._check_stored(part)
            parts.append(replace(part, query_by=of_query, key_by=(*inside, *self.outside)))
        return tuple(parts)

    def _check_stored(self, part: Part) -> None:
        """Only numbers in eight bits have a scale, which is not negative whoever gives it."""
        for scale in self.outside:
            if scale.assumed and not stored_narrow(self.reader.tracer, part.key):
                raise self._by_key(scale.ref, scale.assumed)

    def _sides(self, dot: Term, factor: float, rows: tuple[Label, ...], keys: Label) -> Part:
        a, b, column = dot.factors
        if (keys in a.labels) == (keys in b.labels):
            raise Stop(
                "query and key both depend on the key, or neither does", self.region.scores, _WANTED
            )
        query, key = (b, a) if keys in a.labels else (a, b)
        if own := [h for h in self.heads if h in key.labels]:
            raise Stop(
                f"each of {own[0].size} heads has keys of its own ({key.value})",
                key.value,
                "the operator has one key head",
            )
        own_rows = [x for x in rows if x in query.labels and x not in key.labels]
        if not self.heads and len(own_rows) > 1:
            raise Stop(
                "every head selects keys of its own: nothing is summed over heads",
                self.region.scores,
                "the operator selects once for all heads",
            )
        return Part(query, key, column, factor)

    def _strange(self, term: Term) -> Stop:
        """What is in the place of the relu, by name."""
        met = dict.fromkeys(self.reader.opaque.values())
        inside = {t.op for t in term.walk()}
        if term.op == "dot":
            text = "there is no activation between the products and the sum over heads"
        elif met:
            text = f"{', '.join(met)} stands where a relu is expected"
        elif "max" in inside and term.op == "max":
            text = "the relu is outside the sum over heads, or a floor other than 0"
        elif "exp" in inside or "log" in inside:
            made = self.reader.tracer.index
            ops = dict.fromkeys(
                made.nodes[made.producer[v]].op_type for v in sorted(self.region.inner)
            )
            known = [op for op in ops if op in ("Sigmoid", "Softmax", "Softplus", "Exp", "Gelu")]
            text = f"{', '.join(known) or 'an exponential'} stands where a relu is expected"
        else:
            text = f"{term} is in the scores besides weights, relu and masks"
        return Stop(f"no lightning indexer: {text}", self.region.scores, _WANTED)
