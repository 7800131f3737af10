"""The `Attention` operator (opset 23 and newer) as products and masks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import onnx

from sfa_onnx.passes.axes import ZERO, Expr, Label, fresh
from sfa_onnx.passes.axes_trace import Ref, Stop, Tracer
from sfa_onnx.passes.bind_mask import additive, boolean
from sfa_onnx.passes.bind_scores import Scores, Term
from sfa_onnx.passes.shapes_rules import attributes

__all__ = ["Parts", "read_attention"]


@dataclass(frozen=True)
class Parts:
    """An attention before its scores are taken apart.

    Attributes:
        value: element of the value operand.
        key: label that runs over the keys.
        others: labels of the weights besides `key`.
        scores: takes the scores apart.
    """

    value: Ref
    key: Label
    others: set[Label]
    scores: Callable[[], Scores]


def read_attention(tracer: Tracer, node: onnx.NodeProto, out: Ref) -> Parts:
    """Operands of an Attention node with [B, N, S, D] inputs.

    Raises:
        Stop: it does more than softmax(scale * q.k + mask) v, or has 3-D inputs.
    """
    a = attributes(node)
    _plain(tracer, node, a)
    q, k, v = (tracer.shape(n) for n in node.input[:3])
    if not len(q) == len(k) == len(v) == 4:
        raise Stop("Attention with 3-D inputs is not read", out.value, "use [B, N, S, D] inputs")
    batch, head, row, column = out.coords
    key, inner = fresh("t", k[2]), fresh("d", q[3])
    group = head.floordiv(q[1] // k[1]) if k[1] > 1 else ZERO
    own = Expr.of(key)
    value = Ref(node.input[2], (_of(batch, v[0]), group, own, column))
    term = Term(
        Ref(node.input[0], (_of(batch, q[0]), _of(head, q[1]), _of(row, q[2]), Expr.of(inner))),
        Ref(node.input[1], (_of(batch, k[0]), group, own, Expr.of(inner))),
        inner,
        float(a.get("scale", q[3] ** -0.5)),
    )
    others = {x for c in (batch, head, row) for x in c.labels}

    def scores() -> Scores:
        found = Scores([term])
        if len(node.input) > 3 and node.input[3]:
            ref = tracer.operand(node.input[3], (batch, head, row, own))
            if tracer.sizes.elem_type(ref.value) == onnx.TensorProto.BOOL:
                found.masks.extend(boolean(tracer, ref, positive=True))
            else:
                found.masks.extend(additive(tracer, ref))
        return found

    return Parts(value, key, others, scores)


def _of(coordinate: Expr, size: int) -> Expr:
    return ZERO if size == 1 else coordinate


def _plain(tracer: Tracer, node: onnx.NodeProto, a: dict[str, object]) -> None:
    name = tracer.index.label(tracer.index.producer[node.output[0]])
    for attribute, what in (("is_causal", "its own causal mask"), ("softcap", "a soft-cap")):
        if a.get(attribute):
            raise Stop(f"Attention {name} applies {what}", node.output[0])
    if any(node.input[4:]):
        raise Stop(f"Attention {name} keeps a cache of its own", node.output[0])
    for extra in node.output[1:]:
        if extra and (tracer.index.uses(extra) or tracer.index.is_graph_output(extra)):
            raise Stop(f"a second output of Attention {name} is used: {extra}", extra)
