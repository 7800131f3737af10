"""Bind one attention: which values of the graph are query, key rows, value, masks and scale."""

from __future__ import annotations

from sfa_onnx.passes.axes.expr import Expr, Label
from sfa_onnx.passes.axes.trace import Ref, Stop, Tracer
from sfa_onnx.passes.bind.axes import check_rows, rows_changed, splits, take_masks, tell_rows
from sfa_onnx.passes.bind.formula import Product, Scores, read_formula
from sfa_onnx.passes.bind.heads import check_heads
from sfa_onnx.passes.bind.nans import check_nan
from sfa_onnx.passes.bind.paths import deepen
from sfa_onnx.passes.bind.precision import check_precision
from sfa_onnx.passes.bind.rows import (
    Columns,
    apart,
    cut_columns,
    require_one,
    same_addresses,
    same_rows,
    trace_columns,
)
from sfa_onnx.passes.bind.site import AttentionRegion, Query, Site
from sfa_onnx.passes.values.attention_op import is_attention, split_heads

__all__ = ["bind"]


def bind(tracer: Tracer, region: AttentionRegion, bound: list[str]) -> Site:
    """Take the attention of `region` apart.

    Args:
        tracer: with a budget for this site.
        region: from `find`.
        bound: filled with what was understood, for the report of a refusal.

    Raises:
        Stop: it is not the operator's mathematics, or not recognisably so.
        NotASite: nothing selects keys.
    """
    out = region.result
    bound.append(f"weighted sum {tracer.index.label(tracer.index.producer[out])}")
    labels = [Label(f"o{i}", d) for i, d in enumerate(tracer.shape(out))]
    coords = tuple(Expr.of(x) for x in labels)
    made = tracer.index.maker(out)
    if made is not None and is_attention(made):
        coords = split_heads(tracer, made, coords)
    for _ in range(8):
        site = _bind_at(tracer, region, Ref(out, coords), bound)
        swap = splits(site)
        if not swap:
            check_rows(site)
            check_heads(site)
            check_precision(site)
            check_nan(site)
            return site
        coords = tuple(c.substitute(swap) for c in coords)
    raise Stop(
        "the axes of the attention cannot be distinguished",
        out,
        "keep batch, tokens, heads and width on axes of their own around the attention",
    )


def _bind_at(tracer: Tracer, region: AttentionRegion, out: Ref, bound: list[str]) -> Site:
    parts = read_formula(tracer, region, out)
    column = _value_column(parts.value, parts.others | {parts.key})
    value = require_one(trace_columns(tracer, parts.value, column), "the value", parts.value.value)
    bound.append("value " + value.deep.ref.value)
    scores = parts.scores()
    bound.append("scores " + ", ".join(dict.fromkeys(t.k.value for t in scores.terms)))
    site = _keys(tracer, scores, parts.key, value, region)
    site.out, site.column = out, column
    site.score_axes, site.products = scores.axes, scores.products
    site.bound = bound
    take_masks(site, scores.masks)
    same_addresses(tracer, site.nope, site.rope)
    tell_rows(site, parts.others)
    site.sinks, site.statistics = parts.sinks, list(parts.statistics)
    if site.sinks is not None and not site.sinks.labels <= set(site.heads):
        raise Stop(
            f"the sink {site.sinks.parts[0][1].value} is not one number per head",
            site.sinks.parts[0][1].value,
            "the operator takes sinks [N1], the same for every batch and token",
        )
    return site


def _value_column(value: Ref, known: set[Label]) -> Label:
    own = sorted(value.labels - known, key=str)
    if len(own) > 1:
        raise Stop(
            f"the value {value.value} has several column axes",
            value.value,
            "expected values [.., keys, width], one row for all heads of a token",
        )
    return own[0] if own else Label("column", 1)


def _keys(
    tracer: Tracer, scores: Scores, key: Label, value: Columns, region: AttentionRegion
) -> Site:
    """Which key columns are the value, which are rope."""
    wanted = frozenset(s.ref.value for s in value.path)
    pairs: list[tuple[Product, Columns]] = []
    for term in scores.terms:
        q, k = _query_and_key(tracer, term, key, wanted)
        term = Product(q, k, term.label, term.factor, term.product)
        parts = trace_columns(tracer, k, term.label, wanted)
        pairs += [(term, own) for part in parts for own in apart(part, value)]
    nope, reason = None, ""
    as_wide = [p for p in pairs if p[1].label.size == value.label.size]
    for pair in [*as_wide, *(p for p in pairs if p not in as_wide)]:
        differs = same_rows(pair[1], value)
        if not differs:
            nope = pair
            break
        reason = reason or differs
    if nope is None:
        _check_changed(tracer, [c for _, c in pairs])
        raise Stop(
            f"the value is not the key's nope part: {reason}",
            value.deep.ref.value,
            "the operator reads keys and values from the same rows",
        )
    return _paired(tracer, nope, [p for p in pairs if p is not nope], key, value, region)


def _query_and_key(
    tracer: Tracer, term: Product, key: Label, wanted: frozenset[str]
) -> tuple[Ref, Ref]:
    """The factors of a product; of a single key, the one that is read where the value is."""
    in_q, in_k = (
        key in ref.labels
        if key.size > 1
        else any(s.ref.value in wanted for s in deepen(tracer, ref))
        for ref in (term.q, term.k)
    )
    if in_q == in_k:
        raise Stop(
            f"the scores {term.product} are no product of queries and keys: both or none of their"
            " factors run over the keys of the weighted sum",
            term.k.value,
            "expected one factor per query, and one per key",
        )
    return (term.q, term.k) if in_k else (term.k, term.q)


def _paired(
    tracer: Tracer,
    nope: tuple[Product, Columns],
    rest: list[tuple[Product, Columns]],
    key: Label,
    value: Columns,
    region: AttentionRegion,
) -> Site:
    term, columns = nope
    width = value.label.size
    if columns.kind != "expanded" and columns.label.size > width:  # [nope | rope] in one tensor
        head, tail = cut_columns(columns, (0, width, columns.label.size))
        rest, columns = [(term, tail), *rest], head
    if len(rest) > 1:
        _check_changed(tracer, [c for _, c in rest])
        raise Stop(
            f"the key has {len(rest)} parts besides the value's columns"
            f" ({', '.join(c.deep.ref.value for _, c in rest)}); expected one (rope)",
            term.k.value,
            "join them before they are stored: the operator reads a latent and one rope per key",
        )
    rope = rest[0] if rest else None
    return Site(
        tracer=tracer,
        attention=region,
        out=Ref("", ()),
        key=key,
        column=value.label,
        nope=columns,
        nope_query=_query(term, columns),
        rope=rope[1] if rope else None,
        rope_query=_query(*rope) if rope else None,
        value=value,
        scale=term.factor,
        rope_factor=rope[0].factor if rope else term.factor,
    )


def _check_changed(tracer: Tracer, parts: list[Columns]) -> None:
    """Say so where arithmetic behind the gather keeps key columns from being stored rows."""
    for part in parts:
        if (changed := rows_changed(tracer, part.deep.ref.value)) is not None:
            raise changed


def _query(term: Product, columns: Columns) -> Query:
    swap = {term.label: Expr.of(columns.label) + columns.low}
    return Query(term.q.substitute(swap) if term.label != columns.label else term.q, columns.label)
