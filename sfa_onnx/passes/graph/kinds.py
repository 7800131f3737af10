"""Kinds of operators, each named once: what recognition follows, looks through, or ends at."""

from __future__ import annotations

from typing import Final

import onnx

__all__ = [
    "BITS",
    "BODIES",
    "COMPARISONS",
    "CONDITIONS",
    "ELEMENTWISE",
    "GATHERS",
    "LAYOUT",
    "ONNX_DOMAINS",
    "ORDERS",
    "PARTS",
    "PRODUCTS",
    "REDUCTIONS",
    "RESHAPES",
    "SIZES",
    "VIEWS",
    "is_foreign",
    "own_type",
    "told_apart",
]

ONNX_DOMAINS: Final = ("", "ai.onnx")
_RUNTIME: Final = "com.microsoft"
# Operators that onnxruntime has under ONNX's names and that do the same.
_SAME: Final = frozenset(("DequantizeLinear", "Gelu", "QuantizeLinear", "Range", "Trilu"))

# Every element as it is, ..
RESHAPES: Final = frozenset(("Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"))
LAYOUT: Final = RESHAPES | {"Expand", "Transpose"}  # .. in other places,
VIEWS: Final = LAYOUT | {"Cast"}  # .. or in another type;
PARTS: Final = VIEWS | {"Slice", "Split"}  # or some of them.
GATHERS: Final = frozenset(("Gather", "GatherElements", "GatherND"))

# One element of each operand makes one of the result.
ORDERS: Final = frozenset(("Greater", "GreaterOrEqual", "Less", "LessOrEqual"))
COMPARISONS: Final = ORDERS | {"Equal"}
CONDITIONS: Final = COMPARISONS | {"And", "IsInf", "IsNaN", "Not", "Or", "Xor"}
BITS: Final = frozenset(
    ("BitCast", "BitShift", "BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor")
)
ELEMENTWISE: Final = (
    (CONDITIONS | BITS)
    | {"Abs", "Add", "Cast", "Ceil", "Clip", "Div", "Exp", "Floor", "Max", "Min", "Mod", "Mul"}
    | {"Neg", "Pow", "Reciprocal", "Round", "Sign", "Sub", "Sum", "Where"}
)

# Many elements make one.
REDUCTIONS: Final = frozenset(("ReduceL1", "ReduceMax", "ReduceMin", "ReduceSum"))
PRODUCTS: Final = frozenset(
    ("Einsum", "FusedMatMul", "Gemm", "MatMul", "MatMulInteger", "QLinearMatMul")
)

SIZES: Final = frozenset(("Shape", "Size"))
BODIES: Final = frozenset(("If", "Loop", "Scan"))


def told_apart(node: onnx.NodeProto) -> onnx.NodeProto:
    """A node of another domain: as a copy under a name of its own where ONNX has its name too.

    Whatever asks for a type then needs not ask for the domain. onnxruntime's own operators keep the
    names under which they do what ONNX's do.
    """
    if node.domain in ONNX_DOMAINS or not onnx.defs.has(node.op_type):
        return node
    if node.domain == _RUNTIME and node.op_type in _SAME:
        return node
    apart = onnx.NodeProto()
    apart.CopyFrom(node)
    apart.op_type = f"{node.domain}::{node.op_type}"
    return apart


def own_type(node: onnx.NodeProto) -> str:
    """The type of a node as the file has it."""
    return node.op_type.removeprefix(f"{node.domain}::")


def is_foreign(node: onnx.NodeProto) -> bool:
    """Whether a node, as an index shows it, is neither ONNX's nor one of onnxruntime's own."""
    return "::" in node.op_type or node.domain not in (*ONNX_DOMAINS, _RUNTIME)
