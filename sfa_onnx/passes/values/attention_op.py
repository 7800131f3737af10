"""The `Attention` operator (opset 23 and newer) as a term: products, masks and weighted rows."""

from __future__ import annotations

import math
from dataclasses import dataclass

import onnx

from sfa_onnx.files.onnx_attrs import attributes
from sfa_onnx.passes.axes.expr import ZERO, Expr, Label, fresh
from sfa_onnx.passes.axes.trace import Causal, Ref, Stop, Tracer
from sfa_onnx.passes.shapes.types import MANTISSA
from sfa_onnx.passes.values.pointwise import Reads
from sfa_onnx.passes.values.terms import Term, dot, element, number

__all__ = ["attention_term", "is_attention", "split_heads"]

_T = onnx.TensorProto


def is_attention(node: onnx.NodeProto) -> bool:
    """Whether it is the standard operator."""
    return node.op_type == "Attention" and node.domain in ("", "ai.onnx")


def attention_term(reader: Reads, node: onnx.NodeProto, out: Ref) -> Term:
    """The element `out` of an Attention with [B, N, S, D] or [B, S, N * D] inputs.

    Raises:
        Stop: it does more than softmax(scale * q.k + mask) v.
    """
    tracer, n = reader.tracer, reader.n
    _plain(tracer, node)
    query, keys, values = (_Heads.of(tracer, node, i) for i in range(3))
    if len({x.flat for x in (query, keys, values)}) != 1:
        raise Stop(
            "the inputs of Attention have different ranks",
            out.value,
            "give it query, key and value of one rank",
        )
    if query.flat:
        batch, row, merged = out.coords
        head, column = merged.floordiv(values.width), merged.mod(values.width)
    else:
        batch, head, row, column = out.coords
    key, inner = fresh("t", keys.rows), fresh("inner", query.width)
    group = head.floordiv(query.heads // keys.heads) if keys.heads > 1 else ZERO
    own = Expr.of(key)
    product = dot(
        query.element(batch, head, row, Expr.of(inner)),
        keys.element(batch, group, own, Expr.of(inner)),
        inner,
    )
    scale = float(attributes(node).get("scale", query.width**-0.5))
    scores = n.mul(number(scale), product)
    if attributes(node).get("is_causal"):
        scores = n.where(_causal(tracer, row, key), scores, number(-math.inf))
    if len(node.input) > 3 and node.input[3]:
        mask = tracer.operand(node.input[3], (batch, head, row, own))
        read = reader.term(mask)
        if tracer.sizes.elem_type(mask.value) == _T.BOOL:
            scores = n.where(read, scores, number(-math.inf))
        else:
            scores = n.add(scores, read)
    weight = n.exp(scores)
    rows = reader.over(
        "sum", key, n.mul(weight, element(values.element(batch, group, own, column)))
    )
    return n.mul(rows, n.power(reader.over("sum", key, weight), -1))


def split_heads(tracer: Tracer, node: onnx.NodeProto, out: tuple[Expr, ...]) -> tuple[Expr, ...]:
    """The element `out` of an Attention's output, a merged [N * D] axis split."""
    if len(out) != 3:
        return out
    query, value = _Heads.of(tracer, node, 0), _Heads.of(tracer, node, 2)
    head, column = fresh("n", query.heads), fresh("v", value.width)
    return (*out[:2], Expr.of(head) * value.width + Expr.of(column))


def _causal(tracer: Tracer, row: Expr, key: Label) -> Term:
    rows = tuple(sorted(row.labels, key=str))
    name = tracer.join(Causal(row, rows, key))
    return element(Ref(name, (*map(Expr.of, rows), Expr.of(key))))


@dataclass(frozen=True)
class _Heads:
    """An input of Attention: [B, N, S, D], or flat: [B, S, N * D]."""

    value: str
    batches: int
    heads: int
    rows: int
    width: int
    flat: bool

    @classmethod
    def of(cls, tracer: Tracer, node: onnx.NodeProto, position: int) -> _Heads:
        name, a = node.input[position], attributes(node)
        shape = tracer.shape(name)
        if len(shape) == 4:
            return cls(name, *shape, flat=False)
        heads = int(a.get("kv_num_heads" if position else "q_num_heads", 0))
        if len(shape) != 3 or not heads or shape[2] % heads:
            raise Stop(
                f"the heads of the Attention input {name} {list(shape)} are not stated",
                name,
                "set q_num_heads and kv_num_heads to divisors of the width",
            )
        return cls(name, shape[0], heads, shape[1], shape[2] // heads, flat=True)

    def element(self, batch: Expr, head: Expr, row: Expr, column: Expr) -> Ref:
        batch, head, row = _of(batch, self.batches), _of(head, self.heads), _of(row, self.rows)
        if self.flat:
            return Ref(self.value, (batch, row, head * self.width + column))
        return Ref(self.value, (batch, head, row, column))


def _of(coordinate: Expr, size: int) -> Expr:
    return ZERO if size == 1 else coordinate


def _plain(tracer: Tracer, node: onnx.NodeProto) -> None:
    """Check that nothing but scale and mask is asked for."""
    a = attributes(node)
    name = f"Attention {tracer.index.label(tracer.index.producer[node.output[0]])}"
    if a.get("softcap"):
        raise Stop(f"{name} applies a soft-cap", node.output[0], "the operator has no soft-cap")
    if max(int(a.get(f"{side}_window_size", -1)) for side in ("left", "right")) >= 0:
        raise Stop(
            f"{name} hides keys by a window of its own",
            node.output[0],
            "hide them in attn_mask",
        )
    if any(node.input[4:6]):
        raise Stop(
            f"{name} keeps a cache of its own (past_key, past_value)",
            node.output[0],
            "join old and new keys in front of it (Concat), and give it the whole cache",
        )
    if any(node.input[6:]):
        raise Stop(
            f"{name} hides keys by nonpad_kv_seqlen ({node.input[6]})",
            node.output[0],
            "hide them in attn_mask",
        )
    precision = a.get("softmax_precision")
    types = [tracer.sizes.elem_type(n) for n in node.input[:2]]
    bits = [MANTISSA.get(t, 0) for t in types]
    if isinstance(precision, int) and MANTISSA.get(precision, 0) < min(bits):
        raise Stop(
            f"{name} rounds its softmax to {_T.DataType.Name(precision)}, which is"
            " narrower than the query and the keys",
            node.output[0],
            "leave out softmax_precision: the operator keeps scores and weights in float32",
        )
    for extra in node.output[1:]:
        if extra and (tracer.index.uses(extra) or tracer.index.is_graph_output(extra)):
            raise Stop(
                f"a second output of {name} is used: {extra}",
                extra,
                "only the result may leave the attention: the operator returns nothing else",
            )
