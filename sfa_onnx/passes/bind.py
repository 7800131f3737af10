"""Bind one anchor: which values of the graph are query, key rows, value, masks and scale."""

from __future__ import annotations

from dataclasses import replace

from sfa_onnx.passes.axes import Expr, Label
from sfa_onnx.passes.axes_trace import Dot, Move, Ref, Stop, Tracer
from sfa_onnx.passes.bind_attention import Parts, read_attention, split_heads
from sfa_onnx.passes.bind_axes import check_rows, splits, take_masks, tell_rows
from sfa_onnx.passes.bind_heads import check_heads
from sfa_onnx.passes.bind_mask import boolean
from sfa_onnx.passes.bind_precision import check_precision
from sfa_onnx.passes.bind_rows import (
    Columns,
    State,
    require_one,
    same_addresses,
    same_rows,
    trace_columns,
)
from sfa_onnx.passes.bind_scores import Scores, Term, read_scores, sums_products
from sfa_onnx.passes.bind_site import Anchor, Query, Site
from sfa_onnx.passes.index import GraphIndex

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
    if anchor.padded:
        raise Stop(
            f"the exponentials are divided by {anchor.padded}, which is not their plain sum (an"
            " epsilon, a floor or a sink)",
            anchor.padded,
            "expected exp(s) / sum(exp(s)): the operator's weights add up to 1",
        )
    fused = anchor.form == "Attention"
    out_node, out = (anchor.node, anchor.weights) if fused else _weighted_sum(tracer, anchor)
    if anchor.divided is not None:
        out_node, out = anchor.divided, tracer.index.nodes[anchor.divided].output[0]
    bound.append(f"weighted sum {tracer.index.label(out_node)}")
    labels = [Label(f"o{i}", d) for i, d in enumerate(tracer.shape(out))]
    coords = tuple(Expr.of(x) for x in labels)
    if fused:
        coords = split_heads(tracer, tracer.index.nodes[out_node], coords)
    for _ in range(8):
        site = _bind_at(tracer, anchor, out_node, Ref(out, coords), bound)
        swap = splits(site)
        if not swap:
            check_rows(site)
            check_heads(site)
            check_precision(site)
            return site
        coords = tuple(c.substitute(swap) for c in coords)
    raise Stop("the axes of the attention cannot be told apart", out)


def _bind_at(tracer: Tracer, anchor: Anchor, out_node: int, out: Ref, bound: list[str]) -> Site:
    if anchor.form == "Attention":
        parts = read_attention(tracer, tracer.index.nodes[anchor.node], out)
    else:
        parts = _read_softmax(tracer, anchor, out)
    column = _value_column(parts.value, parts.others | {parts.key})
    value = require_one(trace_columns(tracer, parts.value, column), "the value", parts.value.value)
    bound.append("value " + value.deep.ref.value)
    scores = parts.scores()
    bound.append("scores " + ", ".join(dict.fromkeys(t.k.value for t in scores.terms)))
    site = _keys(tracer, scores, parts.key, value, anchor)
    site.out, site.out_node, site.column = out, out_node, column
    site.score_axes = scores.axes
    site.products = [t.product for t in scores.terms if t.product]
    site.bound = bound
    take_masks(site, scores.masks)
    same_addresses(tracer, site.nope, site.rope)
    tell_rows(site, parts.others)
    return site


def _read_softmax(tracer: Tracer, anchor: Anchor, out: Ref) -> Parts:
    """The operands of a softmax and the product that uses it."""
    step = tracer.step(_summed(tracer, anchor, out))
    if not isinstance(step, Dot) or step.factor != 1:
        raise Stop("the weighted sum of values is not a plain product", out.value)
    zeroed: list[tuple[Ref, bool]] = []
    weights, value_ref = _sides(tracer, anchor, step, zeroed)
    axis = anchor.axis % len(weights.coords)
    if weights.coords[axis] != Expr.of(step.label):
        raise Stop(
            f"the softmax runs along axis {anchor.axis}, the weighted sum along another one",
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
        scores.masks.extend(boolean(tracer, mask, positive=True))
    for condition, positive in zeroed:
        if not all(m in scores.masks for m in boolean(tracer, condition, positive=positive)):
            raise Stop(
                f"weights are set to zero by {condition.value} behind the softmax, and the scores"
                " are not hidden by the same mask in front of it",
                condition.value,
                "mask the scores instead of the weights: what remains then adds up to 1",
            )
    return scores


def _summed(tracer: Tracer, anchor: Anchor, out: Ref) -> Ref:
    """The element of the weighted sum that makes `out`: itself, or what is divided afterwards."""
    if anchor.divided is None:
        return out
    ref = tracer.operand(tracer.index.nodes[anchor.divided].input[0], out.coords)
    while isinstance(step := tracer.step(ref), Move):
        ref = step.ref
    return ref


def _weighted_sum(tracer: Tracer, anchor: Anchor) -> tuple[int, str]:
    """The one product that consumes the weights; nobody else may."""
    index = tracer.index
    seen, todo, found = {anchor.weights}, [anchor.weights], []
    while todo:
        value = todo.pop()
        tracer.spend(value)
        if index.is_graph_output(value):
            raise Stop(
                f"the attention weights are a graph output ({value})",
                value,
                "export the model without returning attention weights",
            )
        for i, _ in index.uses(value):
            node = index.nodes[i]
            sums = node.op_type == "ReduceSum" and anchor.divided is not None
            if sums or node.op_type in ("Shape", "Size"):
                continue
            if node.op_type in ("MatMul", "Einsum", "FusedMatMul", "Gemm"):
                found.append(i)
            elif (summed := _summed_product(index, i)) is not None:
                found.append(summed)
            elif node.op_type in _CARRIES_WEIGHTS:
                todo += [o for o in node.output if o and o not in seen]
                seen.update(node.output)
            else:
                raise _other_use(index, i, value)
    if len(set(found)) != 1:
        names = ", ".join(index.label(i) for i in found) or "nothing"
        raise Stop(f"the attention weights are multiplied by {names}; expected one product", value)
    return found[0], index.nodes[found[0]].output[0]


def _summed_product(index: GraphIndex, i: int) -> int | None:
    """The sum over keys that alone uses node `i`, a product: (weights * value).sum(keys)."""
    uses = index.uses(index.nodes[i].output[0]) if index.nodes[i].op_type == "Mul" else []
    alone = len(uses) == 1 and uses[0][1] == 0
    return uses[0][0] if alone and sums_products(index, index.nodes[uses[0][0]]) else None


def _other_use(index: GraphIndex, i: int, value: str) -> Stop:
    node = index.nodes[i]
    if node.op_type in ("Slice", "Split", "Gather"):
        return Stop(
            f"{node.op_type} {index.label(i)} cuts a column off the attention weights: scores of a"
            " sink were joined to those of the keys (Concat)",
            value,
            "the operator has no sink",
        )
    return Stop(
        f"the attention weights are also used by {node.op_type} {index.label(i)}",
        value,
        "only the weighted sum of values may use them",
    )


_CARRIES_WEIGHTS = frozenset(
    ("Cast", "Dropout", "Expand", "Identity", "IsNaN", "Reshape", "Squeeze", "Transpose")
) | frozenset(("Unsqueeze", "Where", "Flatten", "And", "Greater", "IsInf", "Less"))
_TESTS = 8


def _sides(
    tracer: Tracer, anchor: Anchor, step: Dot, zeroed: list[tuple[Ref, bool]]
) -> tuple[Ref, Ref]:
    """(element of the weights, element of the value) of the weighted sum.

    `zeroed` takes the masks (and which of their values shows) that set weights to zero.
    """
    for weights, value in ((step.a, step.b), (step.b, step.a)):
        ref = _to_weights(tracer, anchor, weights, zeroed)
        if ref is not None:
            return ref, value
    raise Stop(
        "something other than a cast, a view or a NaN guard lies between softmax and weighted sum",
        anchor.weights,
    )


def _to_weights(
    tracer: Tracer, anchor: Anchor, ref: Ref, zeroed: list[tuple[Ref, bool]] | None = None
) -> Ref | None:
    """The element of the weights that `ref` is; None when it is something else."""
    while ref.value != anchor.weights:
        back = _behind_infinity(tracer, anchor, ref) or tracer.step(ref)
        if isinstance(back, Move):
            ref = back.ref
            continue
        node = tracer.index.node_of(ref.value)
        if zeroed is None or node is None or node.op_type != "Where":
            return None
        condition, first, second = (tracer.operand(n, ref.coords) for n in node.input)
        positive = tracer.fill(second.value) == 0
        if not positive and tracer.fill(first.value) != 0:
            return None
        zeroed.append((condition, positive))
        ref = first if positive else second
    return ref


def _behind_infinity(tracer: Tracer, anchor: Anchor, ref: Ref) -> Move | None:
    """Behind Where(weights are infinite, number, x), as nan_to_num leaves it: they never are."""
    index = tracer.index
    node = index.origin(ref.value)
    if node is None or node.op_type != "Where" or tracer.fill(node.input[1]) is None:
        return None
    tests = [node.input[0]]
    for name in tests:
        test = index.origin(name)
        if test is not None and test.op_type in ("And", "Cast") and len(tests) < _TESTS:
            tests += test.input
        elif test is not None and test.op_type == "IsInf":
            tested = tracer.operand(test.input[0], ref.coords)
            same = _to_weights(tracer, anchor, tested) is not None
            return Move(tracer.operand(node.input[2], ref.coords)) if same else None
    return None


def _value_column(value: Ref, known: set[Label]) -> Label:
    own = sorted(value.labels - known, key=str)
    if len(own) > 1:
        raise Stop(f"the value {value.value} has several column axes", value.value)
    return own[0] if own else Label("column", 1)


def _keys(tracer: Tracer, scores: Scores, key: Label, value: Columns, anchor: Anchor) -> Site:
    """Which key columns are the value, which are rope."""
    wanted = frozenset(s.ref.value for s in value.path)
    pairs: list[tuple[Term, Columns]] = []
    for term in scores.terms:
        q, k = _query_and_key(term, key)
        term = Term(q, k, term.label, term.factor, term.product)
        pairs += [(term, part) for part in trace_columns(tracer, k, term.label, wanted)]
    nope, reason = None, ""
    as_wide = [p for p in pairs if p[1].label.size == value.label.size]
    for pair in [*as_wide, *(p for p in pairs if p not in as_wide)]:
        differs = same_rows(pair[1], value)
        if not differs:
            nope = pair
            break
        reason = reason or differs
    if nope is None:
        raise Stop(
            f"the value is not the key's nope part: {reason}",
            value.deep.ref.value,
            "the operator reads keys and values from the same rows",
        )
    return _paired(tracer, nope, [p for p in pairs if p is not nope], key, value, anchor)


def _query_and_key(term: Term, key: Label) -> tuple[Ref, Ref]:
    in_q, in_k = key in term.q.labels, key in term.k.labels
    if in_q == in_k:
        raise Stop("both or none of the factors of the scores run over the keys", term.k.value)
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
        head, tail = _cut_columns(columns, width)
        rest, columns = [(term, tail), *rest], head
    if len(rest) > 1:
        raise Stop(
            f"the key has {len(rest)} parts besides the value's columns"
            f" ({', '.join(c.deep.ref.value for _, c in rest)}); expected one (rope)",
            term.k.value,
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


def _query(term: Term, columns: Columns) -> Query:
    swap = {term.label: Expr.of(columns.label) + columns.low}
    return Query(term.q.substitute(swap) if term.label != columns.label else term.q, columns.label)


def _cut_columns(columns: Columns, width: int) -> tuple[Columns, Columns]:
    """The first `width` columns and the rest."""
    parts = []
    for start, stop in ((0, width), (width, columns.label.size)):
        own = Label(f"{columns.label.name}[{start}:{stop}]", stop - start)
        swap = {columns.label: Expr.of(own) + start}
        path = tuple(State(s.ref.substitute(swap), s.factor) for s in columns.path)
        parts.append(replace(columns, label=own, low=columns.low + start, path=path))
    return parts[0], parts[1]
