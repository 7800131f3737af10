"""Products with a tensor of one axis: MatMul gives it no row, or no column."""

from __future__ import annotations

import onnx

from sfa_onnx.passes.axes.asking import Tracing
from sfa_onnx.passes.axes.expr import Expr, fresh
from sfa_onnx.passes.axes.steps import Dot, Ref

__all__ = ["vector_product"]


def vector_product(tracer: Tracing, node: onnx.NodeProto, ref: Ref) -> Dot | None:
    """Rows [.., M, K] times a vector [K], or a vector times columns [.., K, N]."""
    if node.op_type != "MatMul":
        return None
    a, b = node.input[:2]
    label = fresh("d", tracer.shape(a)[-1])
    inner, own = Expr.of(label), ref.coords
    left = (*own, inner) if len(tracer.shape(a)) > 1 else (inner,)
    right = (*own[:-1], inner, *own[-1:]) if len(tracer.shape(b)) > 1 else (inner,)
    return Dot(tracer.operand(a, left), tracer.operand(b, right), label, 1.0)
