"""Bind one anchor: which values of the graph are query, key rows, value, masks and scale."""

from __future__ import annotations

from sfa_onnx.passes.axes.expr import Expr, Label
from sfa_onnx.passes.axes.trace import Dot, Ref, Stop, Tracer
from sfa_onnx.passes.bind.attention import Parts, read_attention, split_heads
from sfa_onnx.passes.bind.axes import check_rows, rows_changed, splits, take_masks, tell_rows
from sfa_onnx.passes.bind.formula import read_formula
from sfa_onnx.passes.bind.heads import check_heads
from sfa_onnx.passes.bind.mask import boolean
from sfa_onnx.passes.bind.nans import check_nan
from sfa_onnx.passes.bind.output import at_product, leaves_at
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
from sfa_onnx.passes.bind.scores import Scores, Term, read_scores
from sfa_onnx.passes.bind.site import Anchor, Query, Site
from sfa_onnx.passes.bind.weights import sides, summed, weighted_sum
from sfa_onnx.passes.find.fed import is_weight

__all__ = ["bind"]


def bind(tracer: Tracer, anchor: Anchor, bound: list[str]) -> Site:
    """Take the attention at `anchor` apart.

    Args:
        tracer: with a budget for this site.
        anchor: from `find`.
        bound: filled with what was understood, for the report of a refusal.

    Raises:
        Stop: it is not the operator's mathematics, or not recognisably so.
        NotASite: nothing selects keys.
    """
    if anchor.extra_divisor:
        raise Stop(
            f"the exponentials are divided by {anchor.extra_divisor}, which is not their plain sum"
            " (an epsilon, a floor or a sink)",
            anchor.extra_divisor,
            "expected exp(s) / sum(exp(s)): the operator's weights add up to 1",
        )
    if anchor.form.startswith("com.microsoft"):
        raise Stop(
            f"{anchor.form} {tracer.index.label(anchor.node)} is an operator of"
            " onnxruntime with a softmax inside, which is not taken apart",
            anchor.weights,
            "fuse first, then optimise with onnxruntime (or optimise without attention fusion)",
        )
    fused = anchor.form == "Attention"
    out_node, product, out = _result(tracer, anchor, fused=fused)
    bound.append(f"weighted sum {tracer.index.label(out_node)}")
    labels = [Label(f"o{i}", d) for i, d in enumerate(tracer.shape(out))]
    coords = tuple(Expr.of(x) for x in labels)
    if fused:
        coords = split_heads(tracer, tracer.index.nodes[out_node], coords)
    for _ in range(8):
        site = _bind_at(tracer, anchor, out_node, product, Ref(out, coords), bound)
        swap = splits(site)
        if not swap:
            check_rows(site)
            check_heads(site)
            check_precision(site)
            check_nan(site)
            return site
        coords = tuple(c.substitute(swap) for c in coords)
    raise Stop(
        "the axes of the attention cannot be told apart",
        out,
        "keep batch, tokens, heads and width on axes of their own around the attention",
    )


def _result(tracer: Tracer, anchor: Anchor, *, fused: bool) -> tuple[int, str, str]:
    """(node of the weighted sum, its value, the value that leaves the attention)."""
    if anchor.region is not None:
        out = anchor.region.result
        return tracer.index.producer[out], out, out
    out_node, out = (anchor.node, anchor.weights) if fused else weighted_sum(tracer, anchor)
    if anchor.divided is not None:
        out_node, out = anchor.divided, tracer.index.nodes[anchor.divided].output[0]
    return out_node, out, out if fused else leaves_at(tracer, anchor, out)


def _bind_at(
    tracer: Tracer, anchor: Anchor, out_node: int, product: str, out: Ref, bound: list[str]
) -> Site:
    if anchor.region is not None:
        parts = read_formula(tracer, anchor.region, out)
    elif anchor.form == "Attention":
        parts = read_attention(tracer, tracer.index.nodes[anchor.node], out)
    else:
        parts = _read_softmax(tracer, anchor, at_product(tracer, out, product), out_node)
    column = _value_column(parts.value, parts.others | {parts.key})
    value = require_one(trace_columns(tracer, parts.value, column), "the value", parts.value.value)
    bound.append("value " + value.deep.ref.value)
    scores = parts.scores()
    bound.append("scores " + ", ".join(dict.fromkeys(t.k.value for t in scores.terms)))
    site = _keys(tracer, scores, parts.key, value, anchor)
    site.out, site.out_node, site.column = out, out_node, column
    site.score_axes = scores.axes
    site.products = scores.products or [t.product for t in scores.terms if t.product]
    site.bound = bound
    take_masks(site, scores.masks)
    same_addresses(tracer, site.nope, site.rope)
    tell_rows(site, parts.others)
    site.sinks, site.statistics = parts.sinks, list(parts.statistics)
    if site.sinks is not None and not site.sinks.labels <= set(site.heads):
        raise Stop(
            f"the sink {site.sinks.value} is not one number per head",
            site.sinks.value,
            "the operator takes sinks [N1], the same for every batch and token",
        )
    return site


def _read_softmax(tracer: Tracer, anchor: Anchor, out: Ref, out_node: int) -> Parts:
    """The operands of a softmax and the product that uses it."""
    step = tracer.step(summed(tracer, anchor, out))
    if not isinstance(step, Dot) or step.factor != 1:
        where = tracer.index.label(out_node)
        raise Stop(
            f"the weighted sum {where} of values is not a plain product",
            out.value,
            "expected MatMul or Einsum of weights and values, without a factor",
        )
    zeroed: list[tuple[Ref, bool]] = []
    weights, value_ref = sides(tracer, anchor, step, zeroed)
    axis = anchor.axis % len(weights.coords)
    if weights.coords[axis] != Expr.of(step.label):
        where = tracer.index.label(out_node)
        if is_weight(tracer.index, value_ref.value):
            raise Stop(
                f"{where} mixes the attention weights by {value_ref.value} before the weighted sum",
                out.value,
                "only the weighted sum of values may use the weights",
            )
        raise Stop(
            f"the softmax {tracer.index.label(anchor.node)} runs along axis {anchor.axis}, the"
            " weighted sum along another one",
            anchor.weights,
            "expected the softmax over the keys that are summed",
        )
    others = {x for i, c in enumerate(weights.coords) if i != axis for x in c.labels}
    ref = Ref(anchor.scores, weights.coords)
    return Parts(value_ref, step.label, others, lambda: _masked_scores(tracer, anchor, ref, zeroed))


def _masked_scores(
    tracer: Tracer, anchor: Anchor, ref: Ref, zeroed: list[tuple[Ref, bool]]
) -> Scores:
    """The scores; weights may be set to zero only where the scores are hidden already."""
    scores = read_scores(tracer, ref, anchor.factor)
    if anchor.mask:
        mask = tracer.operand(anchor.mask, ref.coords)
        scores.masks.extend(boolean(tracer, mask, positive=anchor.keeps))
    for condition, positive in zeroed:
        if not all(m in scores.masks for m in boolean(tracer, condition, positive=positive)):
            raise Stop(
                f"weights are set to zero by {condition.value} behind the softmax, and the scores"
                " are not hidden by the same mask in front of it",
                condition.value,
                "mask the scores instead of the weights: what remains then adds up to 1",
            )
    return scores


def _value_column(value: Ref, known: set[Label]) -> Label:
    own = sorted(value.labels - known, key=str)
    if len(own) > 1:
        raise Stop(
            f"the value {value.value} has several column axes",
            value.value,
            "expected values [.., keys, width], one row for all heads of a token",
        )
    return own[0] if own else Label("column", 1)


def _keys(tracer: Tracer, scores: Scores, key: Label, value: Columns, anchor: Anchor) -> Site:
    """Which key columns are the value, which are rope."""
    wanted = frozenset(s.ref.value for s in value.path)
    pairs: list[tuple[Term, Columns]] = []
    for term in scores.terms:
        q, k = _query_and_key(term, key)
        term = Term(q, k, term.label, term.factor, term.product)
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
    return _paired(tracer, nope, [p for p in pairs if p is not nope], key, value, anchor)


def _query_and_key(term: Term, key: Label) -> tuple[Ref, Ref]:
    in_q, in_k = key in term.q.labels, key in term.k.labels
    if key.size == 1:
        raise Stop(
            "each query attends to a single key, whose weight is always 1",
            term.k.value,
            "select two keys or more",
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
    nope: tuple[Term, Columns],
    rest: list[tuple[Term, Columns]],
    key: Label,
    value: Columns,
    anchor: Anchor,
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
        anchor=anchor,
        out=Ref("", ()),
        out_node=-1,
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


def _query(term: Term, columns: Columns) -> Query:
    swap = {term.label: Expr.of(columns.label) + columns.low}
    return Query(term.q.substitute(swap) if term.label != columns.label else term.q, columns.label)
