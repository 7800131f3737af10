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
    "KNOWN_DOMAINS",
    "LAYOUT",
    "ORDERS",
    "PARTS",
    "PRODUCTS",
    "REDUCTIONS",
    "RESHAPES",
    "SIZES",
    "VIEWS",
    "own_type",
    "told_apart",
]

# Domains in which a name of ONNX's says what an operator does.
KNOWN_DOMAINS: Final = ("", "ai.onnx", "com.microsoft")

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

    Whatever asks for a type then needs not ask for the domain.
    """
    if not onnx.defs.has(node.op_type):
        return node
    apart = onnx.NodeProto()
    apart.CopyFrom(node)
    apart.op_type = f"{node.domain}::{node.op_type}"
    return apart


def own_type(node: onnx.NodeProto) -> str:
    """The type of a node as the file has it."""
    return node.op_type.removeprefix(f"{node.domain}::")
