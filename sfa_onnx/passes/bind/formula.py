"""An attention read off the normal form of its result: operands, scale and masks.

Whatever the graph spells between products and result is one term (`values`); this module hands its
leaves to those that know stored rows and masks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from sfa_onnx.passes.axes.expr import ZERO, Expr, Label, fresh
from sfa_onnx.passes.axes.trace import Move, Ref, Scaled, Stop, Tracer
from sfa_onnx.passes.bind.joined import join_chunks
from sfa_onnx.passes.bind.literals import Literal, Visible
from sfa_onnx.passes.bind.mask import Masks
from sfa_onnx.passes.bind.site import AttentionRegion, Sinks, Statistic
from sfa_onnx.passes.bind.statistics import statistics
from sfa_onnx.passes.bind.tiles import Span, Tile, join_columns, join_tiles
from sfa_onnx.passes.bind.unfit import unfit
from sfa_onnx.passes.values.arithmetic import addends, coefficient
from sfa_onnx.passes.values.attention import ALIKE, Attention, UnclearError, Weight, as_attention
from sfa_onnx.passes.values.read import Reader
from sfa_onnx.passes.values.table import normal
from sfa_onnx.passes.values.terms import Term

__all__ = ["Parts", "Product", "Scores", "read_formula"]


@dataclass(frozen=True)
class Product:
    """`factor` * sum over `label` of q * k, one part of the scores."""

    q: Ref
    k: Ref
    label: Label
    factor: float
    product: str = ""  # the value that holds this part of the scores, before any mask


@dataclass
class Scores:
    """The scores in normal form: products are added, masks hide."""

    terms: list[Product] = field(default_factory=list)
    masks: list[Literal] = field(default_factory=list)
    axes: dict[str, tuple[Expr, ...]] = field(default_factory=dict)  # every score tensor
    products: list[str] = field(default_factory=list)  # every value that holds part of a score


@dataclass(frozen=True)
class Parts:
    """An attention before its scores are taken apart.

    Attributes:
        value: element of the value operand.
        key: label that runs over the keys.
        others: labels of the weights besides `key`.
        scores: takes the scores apart.
        sinks: one more score per head, without a row.
        statistics: what leaves the attention besides its result.
    """

    value: Ref
    key: Label
    others: set[Label]
    scores: Callable[[], Scores]
    sinks: Sinks | None = None
    statistics: Sequence[Statistic] = ()


def read_formula(tracer: Tracer, region: AttentionRegion, out: Ref) -> Parts:
    """Operands of the attention whose result is `out`.

    Raises:
        Stop: the term of the result is not the operator's.
    """
    reader = Reader(tracer, normal(), region.inner)
    tracer.seen, tracer.lows = None, set()
    term = reader.term(out)
    if tracer.terms is not None:
        tracer.terms[:] = [f"{region.result} = {term}", *map(str, reader.n.fired)]
    try:
        found = _by_columns(reader, term, region.result)
    except Stop as stop:
        raise unfit(reader, region, stop) from None
    parts = [(w, r[0] if len(r) == 1 else tracer.product(r[0], r[1])) for w, r in found.parts]
    weight, value = parts[0]
    if len(parts) > 1:
        weight, value = join_chunks(tracer, parts, region.result)
    key = fresh("t", weight.label.size)
    swap = {weight.label: Expr.of(key)}
    flags = tuple(f.rename(swap) for f in weight.flags)
    weight, value = Weight(key, weight.exponent.rename(swap), flags), value.substitute(swap)
    known = set(flags)

    def seen(condition: Ref, holds: bool) -> bool:
        term = reader.term(condition)
        term = term if holds else reader.n.negate(term)
        return set(term.args if term.op == "and" else (term,)) <= known

    tracer.seen = seen
    others = set().union(weight.exponent.labels, *(f.labels for f in weight.flags)) - {key}
    sinks = _sinks(tracer, found.sinks, region.result)
    told, all_told = statistics(tracer, region, reader, found.total)
    if sinks is not None and not all_told:
        plain = [a for a in addends(found.total) if a.op == "sum"]
        own, all_told = statistics(tracer, region, reader, reader.n.add(*plain))
        told, sinks = (own, replace(sinks, behind=True)) if all_told else (told, sinks)

    def scores() -> Scores:
        return _scores(reader, region, weight, found.conditions)

    return Parts(value, key, others, scores, sinks, told)


def _by_columns(reader: Reader, term: Term, at: str) -> Attention:
    """The attention that a term is, or that every range of its columns is.

    Raises:
        Stop: it is none.
    """
    if term.op != "pieces":
        return as_attention(term, at)
    label, ranges = term.ranges
    spans = [Span(fresh("o", high - low), low) for low, high in ranges]
    found = [
        as_attention(part.rename({label: Expr.of(s.label) + s.start}, reader.n.make), at)
        for s, part in zip(spans, term.args, strict=True)
    ]
    first, rows = found[0], None
    same = all(replace(x, parts=()) == replace(first, parts=()) for x in found)
    if same and all(len(x.parts) == 1 and x.parts[0][0] == first.parts[0][0] for x in found):
        rows = join_columns(reader.tracer, [x.parts[0][1] for x in found], spans, label)
    if rows is None:
        raise Stop(
            f"ranges of columns of {at} are weighted sums that differ in more than their columns",
            at,
            "weigh all columns of a row alike",
        )
    return replace(first, parts=((first.parts[0][0], rows),))


def _sinks(tracer: Tracer, exponents: tuple[Term, ...], at: str) -> Sinks | None:
    """One more score per head: tensors times numbers.

    Raises:
        Stop: there are several, or it is computed from something else.
    """
    if not exponents:
        return None
    own = addends(exponents[0])
    leaves = [coefficient(a) for a in own if not a.is_number()]
    if len(exponents) == 1 and all(rest.op == "element" for _, rest in leaves):
        parts = tuple(_stored(tracer, by, rest.ref) for by, rest in leaves)
        return Sinks(parts, sum(a.value for a in own if a.is_number()))
    told = " and ".join(f"exp({e})" for e in exponents)
    raise Stop(
        f"the exponentials are divided by their sum and {told[:160]}",
        at,
        "the operator takes one sink per head, a tensor, as it is",
    )


def _whole(by: float) -> float:
    """A factor without the rounding of log2(e) ln(2)."""
    return round(by) if round(by) and abs(by - round(by)) <= ALIKE else by


def _stored(tracer: Tracer, by: float, ref: Ref) -> tuple[float, Ref]:
    """A factor and an element of a sink, taken from in front of views and constant factors."""
    while isinstance(step := tracer.step(ref), Move | Scaled):
        by, ref = by * (step.factor if isinstance(step, Scaled) else 1.0), step.ref
    return _whole(by), _flat(tracer, ref)


def _flat(tracer: Tracer, ref: Ref) -> Ref:
    """An element of a constant, at 0 along every axis that it is the same along."""
    table = tracer.index.mask_table(ref.value)
    if table is None or table.ndim != len(ref.coords):
        return ref
    same = [bool((table == table.take([0], i)).all()) for i in range(table.ndim)]
    return Ref(ref.value, tuple(ZERO if s else c for c, s in zip(ref.coords, same, strict=True)))


def _scores(
    reader: Reader, region: AttentionRegion, weight: Weight, conditions: tuple[Term, ...]
) -> Scores:
    products = [name for names in reader.products.values() for name in names]
    found, masks = Scores(axes=reader.axes, products=products), Masks(reader.tracer)
    tiles: list[Tile] = []
    for addend in addends(weight.exponent):
        if (tile := Tile.of(addend, weight.label)) is not None:
            tiles.append(tile)
        elif (stop := _take(reader, found, masks, addend)) is not None:
            raise unfit(reader, region, stop)
    if tiles:
        query, key, inner = join_tiles(reader.tracer, tiles)
        found.terms.append(Product(query, key, inner, tiles[0].by, products[0]))
    if not found.terms:
        raise Stop(
            f"no product of queries and keys leads to the scores {region.scores}",
            region.scores,
            "export the products of queries and keys together with the softmax",
        )
    for flag in weight.flags:
        masks.take(*_shown(reader, flag, masks))
    for condition in conditions:
        leaves = bool(region.sides)
        _take_condition(reader, condition, weight, masks, leaves=leaves)
    found.masks = masks.literals()
    if (told := reader.tracer.terms) is not None:
        told[1:1] = [f"a key is seen where {term}" for term in masks.found]
        told += map(str, masks.reader.n.fired)
    return found


def _take(reader: Reader, found: Scores, masks: Masks, addend: Term) -> Stop | None:
    """One addend of a score: a product, or a mask; what it is instead."""
    by, rest = coefficient(addend)
    if rest.op == "dot":
        query, key, inner = rest.factors
        swap = {inner: Expr.of(own := fresh("d", inner.size))}
        position = min(len(found.terms), len(found.products) - 1)
        name = found.products[position] if found.products else ""
        found.terms.append(Product(query.substitute(swap), key.substitute(swap), own, by, name))
        return None
    if rest.op == "element" and rest.ref.value not in reader.opaque:
        masks.take(*masks.added(rest.ref, negated=by < 0))
        return None
    return UnclearError(
        f"{addend} on the score path is not part of softmax(scale * q.k + mask)",
        found.products[0] if found.products else "",
        "only products, constant factors, masks of 0 and -inf, casts and views may make the scores",
    )


def _shown(reader: Reader, flag: Term, masks: Masks) -> tuple[Term, Visible]:
    """A condition that a key is seen under, and the mask that it is read from."""
    positive = True
    if flag.op in ("or", "and", "any", "all") and (held := reader.holder(flag)) is not None:
        return masks.shown(held[0], positive=held[1])
    if flag.op == "not":
        flag, positive = flag.args[0], False
    if flag.op == "element":
        return masks.shown(flag.ref, positive=positive)
    if flag.op == "eq" and flag.args[0].op == "element" and not positive and masks.found:
        return masks.added(flag.args[0].ref)  # finite where the mask does not hide
    raise Stop(f"keys are hidden where {flag}, which is no mask of this graph")


def _take_condition(
    reader: Reader, condition: Term, weight: Weight, masks: Masks, *, leaves: bool
) -> None:
    """A row is zeroed where no key is seen; a condition of its own hides all of its keys.

    Raises:
        Stop: statistics of such rows leave the attention (`leaves`), and are no zeros.
    """
    own = _looked_into(masks, condition)
    if own.op == "any":
        inner = own.args[0].rename({own.label: Expr.of(weight.label)})
        parts = inner.args if inner.op == "and" else (inner,)
        if all(p in weight.flags or _known(reader, p, masks) for p in parts):
            return
    if leaves or weight.label in condition.labels:
        raise Stop(
            f"the result is set to zero unless {condition}, and the scores are not hidden by the"
            " same mask",
            next(iter(reader.axes), ""),
            "mask the scores instead of the result",
        )
    masks.take(*_shown(reader, condition, masks))  # no key is seen: the row is zero


def _looked_into(masks: Masks, condition: Term) -> Term:
    """A condition, as it is made of those of single keys."""
    own = condition.args[0] if condition.op == "not" else condition
    if own.op != "element":
        return condition
    return masks.shown(own.ref, positive=own is condition)[0]


def _known(reader: Reader, part: Term, masks: Masks) -> bool:
    """Whether a condition is among those that keys are seen under."""
    own, _ = (part, None) if part in masks.found else _shown(reader, part, masks)
    return all(p in masks.found for p in (own.args if own.op == "and" else (own,)))
