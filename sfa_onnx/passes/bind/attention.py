"""The `Attention` operator (opset 23 and newer) as products and masks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import onnx

from sfa_onnx.files.onnx_attrs import attributes
from sfa_onnx.passes.axes.expr import ZERO, Expr, Label, fresh
from sfa_onnx.passes.axes.trace import Causal, Ref, Stop, Tracer
from sfa_onnx.passes.bind.literals import Visible
from sfa_onnx.passes.bind.mask import additive, boolean
from sfa_onnx.passes.bind.precision import narrower
from sfa_onnx.passes.bind.scores import Scores, Term
from sfa_onnx.passes.bind.site import Statistic

__all__ = ["Parts", "read_attention", "split_heads"]


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
    sinks: Ref | None = None
    statistics: Sequence[Statistic] = ()


def read_attention(tracer: Tracer, node: onnx.NodeProto, out: Ref) -> Parts:
    """Operands of an Attention node with [B, N, S, D] or [B, S, N * D] inputs.

    `out` is an element of its output; of a 3-D one, as `split_heads` gives it.

    Raises:
        Stop: it does more than softmax(scale * q.k + mask) v.
    """
    a = attributes(node)
    _plain(tracer, node, a)
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
    key, inner = fresh("t", keys.rows), fresh("d", query.width)
    group = head.floordiv(query.heads // keys.heads) if keys.heads > 1 else ZERO
    own = Expr.of(key)
    value = values.element(batch, group, own, column)
    term = Term(
        query.element(batch, head, row, Expr.of(inner)),
        keys.element(batch, group, own, Expr.of(inner)),
        inner,
        float(a.get("scale", query.width**-0.5)),
    )
    others = {x for c in (batch, head, row) for x in c.labels}

    def scores() -> Scores:
        found = Scores([term])
        if a.get("is_causal"):
            rows = tuple(sorted(row.labels, key=str))
            name = tracer.join(Causal(row, rows, key))
            found.masks.append(Visible(Ref(name, (*map(Expr.of, rows), own))))
        if len(node.input) > 3 and node.input[3]:
            ref = tracer.operand(node.input[3], (batch, head, row, own))
            if tracer.sizes.elem_type(ref.value) == onnx.TensorProto.BOOL:
                found.masks.extend(boolean(tracer, ref, positive=True))
            else:
                found.masks.extend(additive(tracer, ref))
        return found

    return Parts(value, key, others, scores)


def split_heads(tracer: Tracer, node: onnx.NodeProto, out: tuple[Expr, ...]) -> tuple[Expr, ...]:
    """The element `out` of an Attention's output, a merged [N * D] axis told by head and column."""
    if len(out) != 3:
        return out
    query, value = _Heads.of(tracer, node, 0), _Heads.of(tracer, node, 2)
    head, column = fresh("n", query.heads), fresh("v", value.width)
    return (*out[:2], Expr.of(head) * value.width + Expr.of(column))


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
                f"the heads of the Attention input {name} {list(shape)} are not told",
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


def _plain(tracer: Tracer, node: onnx.NodeProto, a: dict[str, object]) -> None:
    """Check that nothing but scale and mask is asked for."""
    name = f"Attention {tracer.index.label(tracer.index.producer[node.output[0]])}"
    for attribute, what, hint in _MORE:
        if a.get(attribute):
            raise Stop(f"{name} applies {what}", node.output[0], hint)
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
    if isinstance(precision, int) and narrower(precision, types):
        raise Stop(
            f"{name} rounds its softmax to {onnx.TensorProto.DataType.Name(precision)}, which is"
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


_MORE = (("softcap", "a soft-cap", "the operator has no soft-cap"),)
