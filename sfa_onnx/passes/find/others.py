"""Attention to selected keys that no term is read of: listed with a reason, never bound."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import onnx

from sfa_onnx.passes.axes.trace import Tracer
from sfa_onnx.passes.candidate import Refusal, RefusedSite
from sfa_onnx.passes.find.fed import (
    Seen,
    attention_roots,
    reaches_selection,
)
from sfa_onnx.passes.find.products import NEAR, operands, products_above
from sfa_onnx.passes.graph.index import GraphIndex
from sfa_onnx.passes.graph.kinds import GATHERS, PARTS, PRODUCTS, VIEWS, own_type
from sfa_onnx.passes.graph.walk import above, back, below

__all__ = ["other_attention"]

_FAR = 256  # nodes behind a selection
# What changes no weight's kind: the operator that does is named in the reason.
_QUIET = frozenset(
    ("Add", "Cast", "Concat", "Div", "Dropout", "Equal", "Expand", "Flatten", "Greater", "Identity")
) | frozenset(
    ("IsNaN", "Less", "Max", "Mul", "Neg", "Not", "Reciprocal", "ReduceMax", "ReduceSum", "Reshape")
)
_QUIET |= {"Slice", "Split", "Squeeze", "Sub", "Transpose", "Unsqueeze", "Where"}
# Operators of onnxruntime that hold a softmax.
_CONTRIB = frozenset(
    ("BiasSoftmax", "DecoderMaskedMultiHeadAttention", "DecoderMaskedSelfAttention")
) | frozenset(
    ("GroupQueryAttention", "LongformerAttention", "MultiHeadAttention", "PackedAttention")
)
_CONTRIB |= {"PackedMultiHeadAttention", "PagedAttention", "QAttention", "SparseAttention"}
_CONTRIB |= {"com.microsoft::Attention"}  # ONNX has another one
_READERS = GATHERS | frozenset(("ScatterElements", "ScatterND", "OneHot", "Equal"))


@dataclass(frozen=True)
class _Pair:
    """Two products, and the nodes between them."""

    scores: int
    weighted: int
    other: str  # the second product's other operand
    between: tuple[int, ...]
    sides: tuple[str, ...]  # values that meet the scores on their way


def other_attention(
    tracer: Tracer, products: Sequence[int], taken: set[int], anchors: set[int]
) -> Iterator[RefusedSite]:
    """Weighted sums over selected keys without a softmax, and selections that nobody reads.

    Args:
        tracer: of the graph; nothing is charged to its budget.
        products: as `find.products` lists them.
        taken: nodes of attention that is listed already.
        anchors: nodes that name a region, listed or not.
    """
    index = tracer.index
    contrib = [i for i in index.of_kinds(_CONTRIB) if _is_contrib(index.nodes[i])]
    for i in contrib:
        if reaches_selection(tracer, attention_roots(index.nodes[i])) is Seen.SELECTION:
            yield _opaque(index, i)
    taken = taken | set(contrib)
    for i in products:
        pair = _pair(index, i, taken)
        if pair is not None and _is_fed(tracer, pair) and not _makes_scores(index, i, taken):
            yield _refused(index, pair)
        elif (best := _best_weights(index, i, anchors)) is not None:
            yield _of_weights(index, i, *best)
    if not products:
        return
    for i in index.of_kinds(("Softmax",)):
        if i in taken or i in anchors:
            continue
        if (body := _reader_in_body(index, i)) is not None and _is_selective(tracer, i):
            yield _weighed_in_body(index, i, body)
    if (single := _key_by_key(tracer, taken | anchors)) is not None:
        yield single
    for i in index.of_kinds(("TopK",)):
        node = index.nodes[i]
        if _is_indexer(index, node) and not _is_read(index, node):
            label = index.label(i)
            yield RefusedSite(
                i,
                index.layer(i),
                Refusal(
                    f"TopK {label} selects keys by index scores, but no attention of this graph"
                    " reads the selection",
                    node.output[1],
                    "export the attention together with its indexer: only attention is fused",
                ),
                (f"selection {label}",),
            )


def _key_by_key(tracer: Tracer, taken: Collection[int]) -> RefusedSite | None:
    """The first exponential whose weight meets the row of its own key, one key at a time."""
    index = tracer.index
    for i in index.of_kinds(("Exp", "Softmax")):
        node = index.nodes[i]
        if i in taken or (by := _times_row(index, i)) is None or not _is_selective(tracer, i):
            continue
        label, times = index.label(i), index.label(by)
        refusal = Refusal(
            f"Mul {times} weighs the row of a single key: no axis of keys is summed",
            index.nodes[by].output[0],
            "gather all selected keys of a row at once, and weigh them in one product",
        )
        return RefusedSite(i, index.layer(i), refusal, (f"{node.op_type} {label}",))
    return None


def _times_row(index: GraphIndex, exponential: int) -> int | None:
    """The Mul of a weight, which may be scaled and cut first, and a gathered row of keys."""
    for i, position in below(index, index.nodes[exponential].output, _is_quiet, NEAR):
        node = index.nodes[i]
        if (
            node.op_type == "Mul"
            and position >= 0
            and _is_gathered(index, node.input[1 - position])
        ):
            return i
    return None


def _is_gathered(index: GraphIndex, value: str) -> bool:
    """Whether a value is rows that a gather has read, behind views."""
    *_, made = back(index, value, PARTS, NEAR)
    node = index.maker(made)
    gathered = node is not None and node.op_type in GATHERS
    return gathered and node is not None and node.input[1] not in index.initializers


def _reader_in_body(index: GraphIndex, softmax: int) -> int | None:
    """The node with a body that reads the weights of a softmax, which may be cut or cast first."""
    uses = below(index, index.nodes[softmax].output, _is_quiet, NEAR)
    return next((i for i, position in uses if position < 0), None)


def _is_quiet(node: onnx.NodeProto) -> bool:
    return node.op_type in _QUIET


def _is_selective(tracer: Tracer, softmax: int) -> bool:
    """Whether a softmax is one of products with keys of which some are selected."""
    scores = tracer.index.nodes[softmax].input[0]
    products, _ = products_above(tracer.index, scores) or (set(), set())
    return bool(products) and reaches_selection(tracer, [(scores, 0)]) is Seen.SELECTION


def _weighed_in_body(index: GraphIndex, softmax: int, body: int) -> RefusedSite:
    kind, label = index.nodes[body].op_type, index.label(softmax)
    refusal = Refusal(
        f"the attention weights of Softmax {label} are used in a body of {kind}"
        f" {index.label(body)}, and the softmax lies outside",
        index.nodes[softmax].output[0],
        "compute scores, softmax and weighted sum in one graph",
    )
    return RefusedSite(softmax, index.layer(softmax), refusal, (f"Softmax {label}",))


def _is_contrib(node: onnx.NodeProto) -> bool:
    return node.domain == "com.microsoft"


def _opaque(index: GraphIndex, i: int) -> RefusedSite:
    form, label = f"com.microsoft {own_type(index.nodes[i])}", index.label(i)
    refusal = Refusal(
        f"{form} {label} is an operator of onnxruntime with a softmax inside, which is not taken"
        " apart",
        index.nodes[i].output[0],
        "fuse first, then optimise with onnxruntime (or optimise without attention fusion)",
    )
    return RefusedSite(i, index.layer(i), refusal, (f"{form} {label}",))


def _pair(index: GraphIndex, weighted: int, taken: set[int]) -> _Pair | None:
    """The product of which the operand of another one is made, without softmax between them."""
    factors = operands(index, index.nodes[weighted])
    for own, other in zip(factors, factors[::-1], strict=True):
        found = products_above(index, own, taken)
        if found is None:
            return None
        products, nodes = found
        if products:
            return _between(index, min(products), weighted, other, nodes)
    return None


def _between(index: GraphIndex, scores: int, weighted: int, other: str, nodes: set[int]) -> _Pair:
    way: set[int] = set()
    stack = list(index.nodes[scores].output)
    while stack:
        for i, _ in index.uses(stack.pop()):
            if i in nodes and i not in way:
                way.add(i)
                stack += index.nodes[i].output
    made = {o for i in (*way, scores) for o in index.nodes[i].output}
    sides = [n for i in sorted(way) for n in index.nodes[i].input if n and n not in made]
    return _Pair(scores, weighted, other, tuple(sorted(way)), tuple(sides))


def _is_fed(tracer: Tracer, pair: _Pair) -> bool:
    names = operands(tracer.index, tracer.index.nodes[pair.scores])
    roots = [(n, 1) for n in (*names, pair.other) if n]
    return reaches_selection(tracer, [*roots, *((n, 0) for n in pair.sides)]) is Seen.SELECTION


def _refused(index: GraphIndex, pair: _Pair) -> RefusedSite:
    telling = [i for i in pair.between if index.nodes[i].op_type not in _QUIET]
    first, last = index.label(pair.scores), index.label(pair.weighted)
    if telling:
        anchor = telling[0]
        kind = index.nodes[anchor].op_type
        reason = (
            f"{kind} {index.label(anchor)} makes the weights of {last} from the scores {first}, not"
            " a softmax"
        )
        if kind == "Exp":
            reason += ": the exponentials are not divided by their sum"
    else:
        anchor = pair.weighted
        reason = f"no softmax lies between the products {first} and {last} (linear attention?)"
    hint = "the operator computes softmax(scale * q.k + mask) v over the selected keys only"
    at = next(o for o in index.nodes[anchor].output if o)
    steps = (f"scores {first}", f"weighted sum {last}")
    return RefusedSite(anchor, index.layer(anchor), Refusal(reason, at, hint), steps)


def _makes_scores(index: GraphIndex, product: int, taken: set[int]) -> bool:
    """Whether a softmax comes behind a product, before the next one."""
    ends = PRODUCTS | {"Shape", "TopK"}
    uses = below(index, index.nodes[product].output, lambda n: n.op_type not in ends, NEAR)
    return any(i in taken or index.nodes[i].op_type == "Softmax" for i, _ in uses)


def _best_weights(index: GraphIndex, weighted: int, taken: set[int]) -> tuple[int, int] | None:
    """(softmax, TopK) where the weights of a sum are the best that a softmax of q.k leaves."""
    ends = PRODUCTS | GATHERS | {"Softmax", "Shape", "TopK"}
    factors = operands(index, index.nodes[weighted])
    for i in above(index, factors, lambda n: n.op_type not in ends, NEAR):
        if index.nodes[i].op_type != "TopK":
            continue
        *_, source = back(index, index.nodes[i].input[0], VIEWS, NEAR)
        made = index.producer.get(source)
        if made is not None and (made in taken or index.nodes[made].op_type == "Softmax"):
            scores = products_above(index, index.nodes[made].input[0], set())
            return (made, i) if scores is not None and scores[0] else None
    return None


def _of_weights(index: GraphIndex, weighted: int, softmax: int, best: int) -> RefusedSite:
    name, last = index.label(best), index.label(weighted)
    reason = (
        f"TopK {name} selects keys by the weights of {index.nodes[softmax].op_type}"
        f" {index.label(softmax)} themselves: the operator needs its indices before it runs"
    )
    hint = "select by scores of an indexer in front of the softmax"
    refusal = Refusal(reason, index.nodes[best].output[0], hint)
    return RefusedSite(
        softmax, index.layer(softmax), refusal, (f"selection {name}", f"weighted sum {last}")
    )


def _is_indexer(index: GraphIndex, node: onnx.NodeProto) -> bool:
    """Whether the best of relu(q.k), or of a sum of q.k over heads, are taken."""
    products, nodes = products_above(index, node.input[0], set()) or (set(), set())
    telling = {index.nodes[i].op_type for i in nodes}
    summed = "ReduceSum" in telling or any(_upstream_of(index, i) for i in products)
    return bool(products) and ("Relu" in telling or summed)


def _upstream_of(index: GraphIndex, product: int) -> bool:
    return any(
        (products_above(index, n, set()) or (set(),))[0] for n in index.nodes[product].input if n
    )


def _is_read(index: GraphIndex, node: onnx.NodeProto) -> bool:
    """Whether the indices end in a gather, a mask or an operator that is not standard."""
    if len(node.output) < 2 or not node.output[1]:
        return True
    count = 0
    for i, position in below(index, [node.output[1]], lambda _: True, _FAR):
        user, count = index.nodes[i], count + 1
        if position < 0 or user.op_type in _READERS or user.domain not in ("", "ai.onnx"):
            return True
    return count >= _FAR
