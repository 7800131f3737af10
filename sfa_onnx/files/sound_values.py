"""Numbers in attributes of standard operators: axes of a rank, known types, counts above zero."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final

import onnx
from onnx import AttributeProto, NodeProto, TensorProto

from sfa_onnx.files.sound_tensors import RANK

__all__ = ["value_problem"]

_KNOWN: Final = frozenset(TensorProto.DataType.values()) - {TensorProto.UNDEFINED}


def value_problem(node: NodeProto, attribute: AttributeProto) -> str:
    """What is wrong with the number of an attribute, as "is -1, expected ..."; "" when nothing is.

    Args:
        node: a node of a standard operator.
        attribute: one of its attributes, of the type that its schema asks for.
    """
    rule = _RULES.get(attribute.name)
    return "" if rule is None else rule(node, attribute)


def _axis(_node: NodeProto, attribute: AttributeProto) -> str:
    values = attribute.ints if attribute.type == AttributeProto.INTS else [attribute.i]
    bad = next((v for v in values if not -RANK <= v < RANK), None)
    return "" if bad is None else f"is {bad}, expected an axis of a tensor (of {RANK} at most)"


def _batch(_node: NodeProto, attribute: AttributeProto) -> str:
    ok = 0 <= attribute.i < RANK
    return "" if ok else f"is {attribute.i}, expected a number of leading axes"


def _kind(node: NodeProto, attribute: AttributeProto) -> str:
    none = attribute.i == 0 and node.op_type != "Cast"  # "as the input" in some schemas
    if none or attribute.i in _KNOWN:
        return ""
    return f"is {attribute.i}, an element type that onnx {onnx.__version__} does not know"


def _permutation(_node: NodeProto, attribute: AttributeProto) -> str:
    given = list(attribute.ints)
    ok = sorted(given) == list(range(len(given)))
    return "" if ok else f"is {given[:8]}, expected every axis once"


def _parts(node: NodeProto, attribute: AttributeProto) -> str:
    ok = attribute.i == len(node.output)
    return "" if ok else f"is {attribute.i}, expected the number of outputs, {len(node.output)}"


def _scanned(node: NodeProto, attribute: AttributeProto) -> str:
    ok = 0 < attribute.i <= len(node.input)
    return "" if ok else f"is {attribute.i}, expected 1 to {len(node.input)}, the inputs there are"


def _not_negative(_node: NodeProto, attribute: AttributeProto) -> str:
    bad = next((v for v in attribute.ints if v < 0), None)
    return "" if bad is None else f"holds {bad}, expected no negative size"


def _equation(node: NodeProto, attribute: AttributeProto) -> str:
    if node.op_type != "Einsum":
        return ""
    terms, _, result = attribute.s.decode().replace(" ", "").partition("->")
    given = terms.split(",")
    if bad := next((term for term in (*given, result) if not _TERM.fullmatch(term)), ""):
        return f"holds {bad[:20]!r}, expected letters, and at most one '...' for an operand"
    if len(given) != len(node.input):
        return f"speaks of {len(given)} operands, expected {len(node.input)}"
    return ""


_TERM: Final = re.compile(r"[A-Za-z]*(\.\.\.)?[A-Za-z]*")
_RULES: Final[dict[str, Callable[[NodeProto, AttributeProto], str]]] = {
    **dict.fromkeys(("axis", "axes", "scan_input_axes", "scan_output_axes"), _axis),
    **dict.fromkeys(("to", "dtype", "output_dtype", "softmax_precision"), _kind),
    "batch_dims": _batch,
    "equation": _equation,
    "perm": _permutation,
    "num_outputs": _parts,
    "num_scan_inputs": _scanned,
    **dict.fromkeys(("split", "kernel_shape", "strides", "dilations"), _not_negative),
}
