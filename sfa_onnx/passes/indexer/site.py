"""A bound selection: operands as the indexer takes them, and what of the graph they replace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import onnx

from sfa_onnx.passes.axes.expr import Expr, Label, Read
from sfa_onnx.passes.axes.places import axis_labels, is_view
from sfa_onnx.passes.axes.trace import Ref, Stop, Tracer
from sfa_onnx.passes.bind.paths import State, deepen
from sfa_onnx.passes.indexer.formula import Formula, read_formula
from sfa_onnx.passes.indexer.masks import Masks, Prefix, sort_masks
from sfa_onnx.passes.indexer.regions import SelectionRegion
from sfa_onnx.passes.indexer.sorts import first_of_all
from sfa_onnx.passes.shapes.form import Call
from sfa_onnx.passes.shapes.size import form_of
from sfa_onnx.passes.shapes.types import MANTISSA

__all__ = ["Selection", "bind_selection"]

_T = onnx.TensorProto
_POOLS: Final = frozenset(
    ("AveragePool", "GlobalAveragePool", "LpPool", "MaxPool", "ReduceMax", "ReduceMean")
)


@dataclass
class Selection:
    """A lightning indexer of the graph.

    Attributes:
        formula: its scores.
        batch, tokens: the rows that select: those that distinguish sequences, and the others.
        masks: by kind.
        elem_type: the operator's type of query and key.
        query, key: where those of each part may be taken from, nearest to the product first.
        count: how many keys a row selects at most.
        constant_k: whether the graph always selects so many.
        mode: the operator's sparse_mode.
        lengths: the prefixes that are given by lengths.
        by_row: whether every query row is a sequence of its own, with its own length.
        cut: the first `count` of all keys in order, where the TopK sorts them all.
        bound: what was understood, in order.
    """

    tracer: Tracer
    region: SelectionRegion
    formula: Formula
    batch: list[Label]
    tokens: list[Label]
    masks: Masks
    elem_type: int
    query: list[list[State]]
    key: list[list[State]]
    count: int
    constant_k: bool
    mode: int = 0
    lengths: tuple[Prefix, ...] = ()
    by_row: bool = False
    cut: str = ""
    bound: list[str] = field(default_factory=list)

    @property
    def node(self) -> onnx.NodeProto:
        """The TopK."""
        return self.tracer.index.nodes[self.region.node]

    @property
    def indices(self) -> str:
        """What lists the selected keys: the TopK's output, or the part of it that is used."""
        return self.cut or self.node.output[1]

    @property
    def axis(self) -> int:
        """The axis of scores and indices that it selects along."""
        return self.region.axis % (len(self.formula.rows) + 1)

    def apart(self, coords: Sequence[Expr]) -> tuple[tuple[Expr, ...], Expr]:
        """(coordinates of the row, the other one) of an element of what the TopK gives."""
        return (*coords[: self.axis], *coords[self.axis + 1 :]), coords[self.axis]

    def chosen(self, slot: Expr) -> Read:
        """The key in a slot of the row."""
        rows = tuple(Expr.of(x) for x in self.formula.rows)
        return Read(self.node.output[1], (*rows[: self.axis], slot, *rows[self.axis :]))


def bind_selection(tracer: Tracer, region: SelectionRegion, bound: list[str]) -> Selection:
    """Read a selection as the operator's.

    Args:
        tracer: of the graph.
        region: where it may be.
        bound: collects what was understood so far.

    Raises:
        Stop: it is something else; the reason says what.
    """
    node = tracer.index.nodes[region.node]
    formula = read_formula(tracer, region)
    heads = 1
    for label in formula.heads:
        heads *= label.size
    bound.append(f"scores: {heads} heads x {formula.width}, key {formula.key.value}")
    rows = [x for x in formula.rows if x.size > 1]
    stored = frozenset(x for part in formula.parts for x in part.key.labels)
    batch = [x for x in rows if x in stored]
    tokens = [x for x in rows if x not in stored]
    _check_labels(formula, rows, batch)
    masks = sort_masks(tracer, formula.masks, rows, batch, formula.keys)
    cut = first_of_all(tracer, node, formula.keys)
    count, constant_k = (cut.count, False) if cut is not None else _count(tracer, node)
    elem_type, query, key = _sides(tracer, formula)
    site = Selection(
        tracer, region, formula, batch, tokens, masks, elem_type, query, key, count, constant_k
    )
    site.cut = cut.value if cut is not None else ""
    _order(site)
    bound.append(_told(site))
    site.bound = bound
    return site


def _told(site: Selection) -> str:
    kinds = ["causal"] * (site.mode == 3) + ["lengths"] * bool(site.lengths)
    kinds += ["a sequence per row"] * site.by_row
    kinds += ["padding"] * bool(site.masks.padding) + ["rows"] * bool(site.masks.rows)
    scaled = [scale.ref.value for part in site.formula.parts for scale in part.key_by]
    by = f"; keys times {', '.join(dict.fromkeys(scaled))}" if scaled else ""
    return f"masks: {', '.join(kinds) or 'none'}; top {site.count}{by}"


def _check_labels(formula: Formula, rows: Sequence[Label], batch: Sequence[Label]) -> None:
    """Every operand runs over what it may run over.

    Raises:
        Stop: one does not.
    """
    heads = {x for x in formula.heads if x.size > 1}
    allowed = [(w.ref, {*rows, *heads}, "weight") for w in formula.weights]
    for part in formula.parts:
        allowed.append((part.query, {*rows, *heads, part.column}, "query"))
        allowed.append((part.key, {*batch, formula.keys, part.column}, "key"))
        allowed += [(by.ref, {*rows, *heads}, "factor of queries") for by in part.query_by]
        stored = {*batch, formula.keys}
        allowed += [(scale.ref, stored, "factor of keys") for scale in part.key_by]
    for ref, labels, what in allowed:
        if strange := ref.labels - labels:
            names = ", ".join(sorted(x.name for x in strange))
            raise Stop(f"the {what} {ref.value} also runs over {names}", ref.value)
    told = (*(p.query for p in formula.parts), *(w.ref for w in formula.weights))
    if heads and not heads & {x for ref in told for x in ref.labels}:
        raise Stop("heads are distinguished by nothing", formula.query.value)
    for part in formula.parts:
        _check_keys(formula, part.key)


def _check_keys(formula: Formula, key: Ref) -> None:
    """Every stored key is looked at.

    Raises:
        Stop: keys are pooled or gathered.
    """
    pooled = [c for c in key.coords if formula.keys in c.labels]
    if not pooled:
        raise Stop(f"{key.value} is no row of keys", key.value)
    if len(pooled) != 1 or axis_labels(pooled[0]) is None:
        raise Stop(
            f"keys are read at {pooled[0]} of {key.value}: they are pooled or gathered",
            key.value,
            "the indexer looks at every stored key",
        )


def _check_stored(tracer: Tracer, path: Sequence[State]) -> None:
    """Keys are tokens, not blocks of them.

    Raises:
        Stop: they are pooled.
    """
    made = tracer.index.real_maker(path[-1].ref.value)
    if made is not None and made.op_type in _POOLS:
        raise Stop(
            f"keys are pooled by {made.op_type}: {path[-1].ref.value} holds blocks of tokens",
            path[-1].ref.value,
            "the indexer looks at every stored key",
        )


def _count(tracer: Tracer, node: onnx.NodeProto) -> tuple[int, bool]:
    """How many keys are selected at most, and whether always so many."""
    given = node.input[1]
    constant = tracer.index.constant(given)
    if constant is not None:
        return int(constant.reshape(-1)[0]), True
    entries = tracer.sizes.entries(given)
    form = form_of(entries[0]) if entries else None
    if form is not None and form.fixed:
        return form.const, False
    call = form.alone if form is not None else None
    if isinstance(call, Call) and call.name == "Min":
        fixed = [a.const for a in call.arguments if a.fixed]
        if len(fixed) == 1:
            return fixed[0], False
    raise Stop(
        f"how many keys are selected ({given}) is neither a constant nor min(constant, keys)"
        + (f": {form}" if form is not None else ""),
        given,
        "the operator's sparse_count is an attribute",
    )


def _sides(tracer: Tracer, formula: Formula) -> tuple[int, list[list[State]], list[list[State]]]:
    """The operator's type, and the tensors that queries and keys may be taken from."""
    refs = [ref for part in formula.parts for ref in (part.query, part.key)]
    paths = [_exact(tracer, ref) for ref in refs]
    kinds = [tracer.sizes.elem_type(p[-1].ref.value) for p in paths]
    own = kinds[0] if len(set(kinds)) == 1 else _T.FLOAT
    if any(part.query_by or part.key_by for part in formula.parts):
        own = _T.FLOAT  # products with scales are rounded
    if own not in (_T.FLOAT, _T.FLOAT16, _T.BFLOAT16):
        raise Stop(
            f"the scores are computed in {_T.DataType.Name(own)}", formula.query.value,
            "the operator takes float32, float16 and bfloat16",
        )  # fmt: skip
    for kind, ref in zip(kinds, refs, strict=True):
        if MANTISSA.get(kind, 99) > MANTISSA[own]:
            raise Stop(f"{ref.value} is {_T.DataType.Name(kind)}", ref.value)
    for path in paths[1::2]:
        _check_stored(tracer, path)
    usable = [_usable(tracer, path, own) for path in paths]
    return own, usable[::2], usable[1::2]


def _exact(tracer: Tracer, ref: Ref) -> list[State]:
    """The element and those behind it that are the same number, but for a positive factor."""
    kept: list[State] = []
    for state in deepen(tracer, ref):
        bits = MANTISSA.get(tracer.sizes.elem_type(state.ref.value), 0)
        last = MANTISSA[tracer.sizes.elem_type(kept[-1].ref.value)] if kept else bits
        if not bits or bits > last or state.factor <= 0:
            break
        kept.append(state)
    if not kept:
        raise Stop(f"{ref.value} is no float tensor", ref.value)
    return kept


def _usable(tracer: Tracer, path: list[State], elem_type: int) -> list[State]:
    """States that are views, those of the operator's type first."""
    views = [s for s in path if is_view(s.ref)]
    if not views:
        raise Stop(
            f"{path[0].ref.value} is read at {path[0].ref.coords}, which is no view: rows and heads"
            " cannot be distinguished",
            path[0].ref.value,
        )
    own = [s for s in views if tracer.sizes.elem_type(s.ref.value) == elem_type]
    return own or views


def _order(site: Selection) -> None:
    """Decide how prefixes are given to the operator: by sparse_mode, lengths, or row by row."""
    keys, tokens, left = site.formula.keys, site.tokens, site.masks.prefixes
    if not left:
        return
    row = _row_in(left[0].bound, tokens)
    if len(left) > 1 or (tokens and row is None):
        along = [p.bound.labels | (p.ref.labels if p.ref is not None else set()) for p in left]
        site.lengths, site.by_row = left, any(set(tokens) & labels for labels in along)
        return
    rest = left[0].bound - (Expr.of(row) if row is not None else Expr())
    site.mode = 3 if row is not None else 0
    if rest == Expr(keys.size - (row.size if row is not None else 1)):
        return
    site.lengths = left
    if row is not None and not rest.terms:  # the last row's bound may lie behind the last key
        site.mode, site.by_row = 0, True


def _row_in(bound: Expr, tokens: Sequence[Label]) -> Label | None:
    """The one label of query rows that the bound grows with, by 1."""
    inside = [x for x in tokens if x in bound.labels]
    if len(inside) != 1 or len(tokens) != 1:
        return None
    (row,) = inside
    rest = bound - Expr.of(row)
    return row if row not in rest.labels else None
