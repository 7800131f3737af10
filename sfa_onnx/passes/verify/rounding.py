"""Roundings that float64 hides and the operator does not make: of dequantised int8 rows.

The operator multiplies codes and scales in float32 or better. A graph of a wider type that rounds
the products to a narrower one computes with other keys (4e-3 apart in bfloat16).
"""

from __future__ import annotations

import onnx

from sfa_onnx.passes.candidate import Candidate, Refusal, Role
from sfa_onnx.passes.graph.index import GraphIndex
from sfa_onnx.passes.shapes.concrete import Concrete
from sfa_onnx.passes.shapes.types import MANTISSA

__all__ = ["rounded_rows"]

_T = onnx.TensorProto
_ENDS = frozenset(("Attention", "Einsum", "FusedMatMul", "Gemm", "MatMul"))  # rows end here


def rounded_rows(index: GraphIndex, sizes: Concrete, candidate: Candidate) -> Refusal | None:
    """Why int8 rows times their scales are not what the operator reads; None if they are.

    Codes alone are exact in every type. Products may be as narrow as the query.
    """
    by_role = {o.role: o for o in candidate.operands}
    query, codes = by_role.get(Role.QUERY), by_role.get(Role.LATENT_INT8)
    if query is None or codes is None:
        return None
    wanted = MANTISSA.get(query.elem_type, 0)
    coded, products = {codes.value}, set[str]()
    for i in sorted({*candidate.nodes, *candidate.support}):
        node = index.nodes[i]
        if node.op_type in _ENDS:
            continue
        inputs = set(node.input)
        made = node.op_type in ("Mul", "DequantizeLinear") and bool(inputs & coded)
        if not (made or inputs & (coded | products)):
            continue
        (products if made or inputs & products else coded).update(o for o in node.output if o)
        kind = sizes.elem_type(node.output[0])
        if node.output[0] in products and MANTISSA.get(kind, wanted) < wanted:
            narrow, wide = (_T.DataType.Name(k) for k in (kind, query.elem_type))
            return Refusal(
                f"{index.label(i)} rounds the dequantised rows to {narrow}, which is narrower than"
                f" the query ({wide})",
                node.output[0],
                "dequantise in the type of the query; the operator does not round rows",
                final=True,
            )
    return None
