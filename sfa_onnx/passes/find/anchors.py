"""Where attention may be: every normalisation over keys, in any spelling."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import onnx

from sfa_onnx.files.onnx_attrs import attributes
from sfa_onnx.passes.bind.literals import HIDDEN
from sfa_onnx.passes.bind.site import Anchor
from sfa_onnx.passes.graph.index import GraphIndex

__all__ = ["CONTRIB", "anchors"]

_PRODUCTS = frozenset(("MatMul", "Einsum", "FusedMatMul", "Gemm"))
# Operators of onnxruntime that hold a softmax: listed when a selection feeds them, never bound.
CONTRIB = frozenset(
    ("Attention", "BiasSoftmax", "DecoderMaskedMultiHeadAttention", "DecoderMaskedSelfAttention")
) | frozenset(
    ("GroupQueryAttention", "LongformerAttention", "MultiHeadAttention", "PackedAttention")
)
CONTRIB |= {"PackedMultiHeadAttention", "PagedAttention", "QAttention", "SparseAttention"}
_SUMS = frozenset(("ReduceSum", "ReduceL1"))  # of exponentials, which are positive
_SPREADS = ("Cast", "Identity", "Unsqueeze", "Reshape", "Expand")  # a total over its keys
_LOOSE = frozenset(
    ("Cast", "Mul", "Div", "Where", "ScatterND", "Identity", "Unsqueeze", "Reshape", "Log", "Add")
) | frozenset(("Expand", "Max"))

_BOUNDS = frozenset(("Clip", "Max", "Min"))  # of a maximum
_COPIES = ("Cast", "Identity")


def anchors(index: GraphIndex) -> list[Anchor]:
    """Every softmax of the graph, in any spelling, in graph order."""
    found = list(_all(index))
    inner = {a.inner for a in found}
    return [a for a in found if a.node not in inner]


def _all(index: GraphIndex) -> Iterator[Anchor]:
    for i in index.own:
        node = index.nodes[i]
        op = node.op_type
        if op == "Softmax":
            axis = attributes(node).get("axis", -1 if index.opsets.get("", 18) >= 13 else 1)
            yield Anchor(i, node.input[0], int(axis), node.output[0])
        elif op == "Attention" and node.domain in ("", "ai.onnx"):
            yield Anchor(i, node.input[0], -1, node.output[0], form="Attention")
        elif op in CONTRIB and node.domain == "com.microsoft":
            yield Anchor(i, node.input[0], -1, node.output[0], form=f"com.microsoft {op}")
        elif op in ("Div", "Mul"):
            found = _divided(index, i) or _divided_afterwards(index, i) or _renormalised(index, i)
            if found is not None:
                yield found
        elif op == "LpNormalization" and attributes(node).get("p", 2) == 1:
            if (found := _lp_normalised(index, i)) is not None:
                yield found
        elif op in ("Exp", "Pow"):
            found = _less_logsumexp(index, i)
            if found is not None:
                yield found


def _exponential(index: GraphIndex, value: str) -> tuple[int, str, float] | None:
    """(node, exponent, ln of the base) of Exp(x) or Pow(2, x), behind casts."""
    for _ in range(4):
        i = index.producer.get(value)
        if i is None:
            return None
        node = index.nodes[i]
        if node.op_type == "Exp":
            return i, node.input[0], 1.0
        if node.op_type == "Pow":
            base = index.constant(node.input[0])
            number = 0.0 if base is None or base.size != 1 else float(base.reshape(-1)[0])
            if number <= 1:
                return None
            return i, node.input[1], _logarithm(number)
        if node.op_type not in ("Cast", "Identity"):
            return None
        value = node.input[0]
    return None


def _logarithm(base: float) -> float:
    """The natural logarithm of a base; a rounded e counts as e."""
    return 1.0 if abs(base - math.e) < 1e-6 else math.log(base)


def _quotient(index: GraphIndex, node: onnx.NodeProto) -> tuple[str, str] | None:
    """(a, b) of a / b, also written as a * Reciprocal(b), or a * (1 / b)."""
    if node.op_type == "Div":
        return node.input[0], node.input[1]
    for own, other in ((0, 1), (1, 0)):
        inverse = index.real_maker(node.input[other])
        inverse = _behind(index, inverse, _SPREADS)
        if inverse is None:
            continue
        if inverse.op_type == "Reciprocal":
            return node.input[own], inverse.input[0]
        if inverse.op_type == "Pow" and _is_number(index, inverse.input[1], -1):
            return node.input[own], inverse.input[0]
        if inverse.op_type == "Div" and _is_number(index, inverse.input[0], 1):
            return node.input[own], inverse.input[1]
    return None


def _is_number(index: GraphIndex, value: str, number: float) -> bool:
    found = index.constant(value)
    return found is not None and found.size == 1 and float(found.reshape(-1)[0]) == number


def _divided(index: GraphIndex, i: int) -> Anchor | None:
    """exp(s - max) / sum(exp(s - max)), with or without the maximum."""
    node = index.nodes[i]
    quotient = _quotient(index, node)
    if quotient is None:
        return None
    above, mask = index.unaliased(quotient[0]), ""
    exponential = _exponential(index, above)
    if exponential is None and (masked := _masked(index, above)) is not None:
        exponential, mask = masked
    total, added = _divisor(index, quotient[1])
    if exponential is None or total is None:
        return None
    summed = _exponential(index, total.input[0])
    same = index.unaliased(total.input[0]) == above
    if not same and (mask or summed is None or summed[0] != exponential[0]):
        return None
    axis = _axis(index, total)
    if axis is None:
        return None
    _, exponent, base = exponential
    scores = _unshifted(index, exponent)
    if scores == exponent and _chosen(index, quotient[1]):
        added = quotient[1]  # sums of exponentials that vanish are replaced, not those of no key
    weights = node.output[0]
    return Anchor(i, scores, axis, weights, base, "exp / sum", mask=mask, extra_divisor=added)


def _chosen(index: GraphIndex, value: str) -> bool:
    """Whether a divisor is guarded."""
    node = _behind(index, index.node_of(value), _SPREADS)
    return node is not None and node.op_type == "Where"


def _divisor(index: GraphIndex, value: str) -> tuple[onnx.NodeProto | None, str]:
    """(the sum that a divisor is, the value that is more than it, if any)."""
    total = index.node_of(value)
    while total is not None and total.op_type in _SPREADS:
        total = index.node_of(total.input[0])
    if total is not None and total.op_type == "Where":
        total = _unguarded(index, total)
    added = ""
    if total is not None and total.op_type in ("Add", "Clip", "Max"):  # sum + eps: to be refused
        added = total.output[0]
        sums = (index.real_maker(n) for n in total.input if n)
        total = next((n for n in sums if n is not None and n.op_type in _SUMS), None)
    return (total if total is not None and total.op_type in _SUMS else None), added


def _unguarded(index: GraphIndex, node: onnx.NodeProto) -> onnx.NodeProto | None:
    """The sum of Where(sum == 0, number, sum): 0 / number is 0 as well."""
    test = _behind(index, index.real_maker(node.input[0]), _COPIES)
    if test is None or test.op_type not in ("Equal", "Greater", "LessOrEqual"):
        return None
    kept, other = node.input[:0:-1] if test.op_type != "Greater" else node.input[1:]
    if not _filled(index, other) or not _is_number(index, test.input[1], 0):
        return None
    total, tested = (_behind(index, index.real_maker(n), _COPIES) for n in (kept, test.input[0]))
    if total is None or tested is None or total.op_type not in _SUMS:
        return None
    same = tested.op_type == total.op_type and tested.input[0] == total.input[0]
    return total if same else None


def _filled(index: GraphIndex, value: str) -> float | None:
    """The number that a tensor holds everywhere."""
    node = index.node_of(value)
    while node is not None and node.op_type in _SPREADS:
        value = node.input[0]
        node = index.node_of(value)
    if node is not None and node.op_type == "ConstantOfShape":
        tensor = attributes(node).get("value")
        return 0.0 if tensor is None else float(onnx.numpy_helper.to_array(tensor).reshape(-1)[0])
    return index.fill_value(value)


def _renormalised(index: GraphIndex, i: int) -> Anchor | None:
    """P * mask / sum(p * mask) of p = softmax(s): the softmax of what the mask leaves."""
    quotient = _quotient(index, index.nodes[i])
    above = "" if quotient is None else index.unaliased(quotient[0])
    kept = _kept(index, above)
    if quotient is None or kept is None:
        return None
    total, added = _divisor(index, quotient[1])
    softmax, mask, keeps = kept
    axis = None if total is None else _axis(index, total)
    if total is None or axis is None or index.unaliased(total.input[0]) != above:
        return None
    node = index.nodes[softmax]
    own = int(attributes(node).get("axis", -1 if index.opsets.get("", 18) >= 13 else 1))
    shape = index.shape(node.output[0]) or index.shape(node.input[0])
    if own != axis and (shape is None or own % len(shape) != axis % len(shape)):
        return None
    return Anchor(
        i,
        node.input[0],
        axis,
        index.nodes[i].output[0],
        form="softmax, divided by its sum",
        mask=mask,
        extra_divisor=added,
        keeps=keeps,
        inner=softmax,
    )


def _kept(index: GraphIndex, value: str) -> tuple[int, str, bool] | None:
    """(softmax, mask, which of its values keeps) of softmax(s) * mask or Where(mask, p, 0)."""
    node = index.real_maker(value)
    if node is None or node.op_type not in ("Mul", "Where"):
        return None
    orders = ((0, 1), (1, 0)) if node.op_type == "Mul" else ((1, 2), (2, 1))
    for own, other in orders:
        made = _behind(index, index.real_maker(node.input[own]), ("Cast",))
        if made is None or made.op_type != "Softmax":
            continue
        softmax = index.producer[made.output[0]]
        if node.op_type == "Mul":
            return softmax, node.input[other], True
        if index.fill_value(node.input[other]) == 0:
            return softmax, node.input[0], own == 1
    return None


def _lp_normalised(index: GraphIndex, i: int) -> Anchor | None:
    """exp(s) over its own sum, as one node."""
    node = index.nodes[i]
    exponential = _exponential(index, node.input[0])
    if exponential is None:
        return None
    _, exponent, base = exponential
    axis = int(attributes(node).get("axis", -1))
    scores = _unshifted(index, exponent)
    return Anchor(i, scores, axis, node.output[0], base, "exp / sum")


def _unshifted(index: GraphIndex, exponent: str) -> str:
    """The scores of an exponent from which their maximum is subtracted."""
    shifted = index.real_maker(exponent)
    if shifted is not None and shifted.op_type == "Sub":
        source = index.unaliased(shifted.input[0])
        most = _unbounded(index, shifted.input[1])
        if most and _reaches(index, most, ("ReduceMax",), source):
            return str(shifted.input[0])
    return exponent


def _unbounded(index: GraphIndex, value: str) -> str:
    """The maximum behind its bounds; "" where scores reach one: all exponentials may be 0 then."""
    node = _behind(index, index.real_maker(value), _SPREADS)
    while node is not None and node.op_type in _BOUNDS:
        limits = {n: index.fill_value(n) for n in node.input if n}
        if any(x is not None and abs(x) < -HIDDEN for x in limits.values()):
            return ""
        inner = [n for n, x in limits.items() if x is None]
        if len(inner) != 1:
            return ""
        value = inner[0]
        node = _behind(index, index.real_maker(value), _SPREADS)
    return value


def _masked(index: GraphIndex, value: str) -> tuple[tuple[int, str, float], str] | None:
    """The exponential and the mask of exp(x) * mask."""
    node = index.real_maker(value)
    if node is None or node.op_type != "Mul":
        return None
    for own, other in ((0, 1), (1, 0)):
        if (found := _exponential(index, node.input[own])) is not None:
            return found, node.input[other]
    return None


def _divided_afterwards(index: GraphIndex, i: int) -> Anchor | None:
    """(exp(s - max) @ v) / sum(exp(s - max))."""
    quotient = _quotient(index, index.nodes[i])
    if quotient is None or quotient[0] != index.nodes[i].input[0]:
        return None
    product, total = index.real_maker(quotient[0]), index.real_maker(quotient[1])
    product = _behind(index, product, ("Cast", "Reshape", "Transpose", "Squeeze"))
    total = _behind(index, total, ("Cast", "Identity", "Unsqueeze", "Reshape", "Transpose"))
    if product is None or total is None or total.op_type not in _SUMS:
        return None
    summed = _exponential(index, total.input[0])
    axis = _axis(index, total)
    if product.op_type not in _PRODUCTS or summed is None or axis is None:
        return None
    if not any(_same_exponential(index, n, summed[0]) for n in product.input):
        return None
    exponential, exponent, base = summed
    scores = _unshifted(index, exponent)
    weights = index.nodes[exponential].output[0]
    return Anchor(exponential, scores, axis, weights, base, "exp, divided by its sum", i)


def _behind(
    index: GraphIndex, node: onnx.NodeProto | None, ops: tuple[str, ...]
) -> onnx.NodeProto | None:
    while node is not None and node.op_type in ops:
        node = index.real_maker(node.input[0])
    return node


def _same_exponential(index: GraphIndex, value: str, node: int) -> bool:
    maker = _behind(index, index.real_maker(value), ("Expand",))
    found = None if maker is None else _exponential(index, maker.output[0])
    return found is not None and found[0] == node


def _less_logsumexp(index: GraphIndex, i: int) -> Anchor | None:
    """exp(s - logsumexp(s)), also in base 2 and with the log-sum patched where it is -inf."""
    node = index.nodes[i]
    exponential = _exponential(index, node.output[0])
    if exponential is None:
        return None
    _, exponent, base = exponential
    shifted = index.real_maker(exponent)
    if shifted is not None and shifted.op_type == "LogSoftmax" and base == 1:
        last = attributes(shifted).get("axis", -1 if index.opsets.get("", 18) >= 13 else 1)
        return Anchor(i, shifted.input[0], int(last), node.output[0], 1.0, "exp(log_softmax)")
    if shifted is None or shifted.op_type != "Sub":
        return None
    scores, normaliser = shifted.input
    total = _reaches(index, normaliser, ("ReduceLogSumExp", "ReduceLogSum", "ReduceSum"), "")
    if total is None:
        return None
    axis = _axis(index, total)
    if axis is None:
        return None
    return Anchor(i, scores, axis, node.output[0], base, "exp(s - logsumexp)")


def _reaches(
    index: GraphIndex,
    value: str,
    ops: tuple[str, ...],
    source: str,
    through: frozenset[str] = _LOOSE,
) -> onnx.NodeProto | None:
    """The reduction that `value` is made from (`source`: what it must reduce, if given)."""
    stack, seen = [value], set[str]()
    while stack and len(seen) < 64:
        name = stack.pop()
        node = index.node_of(name)
        if node is None or name in seen:
            continue
        seen.add(name)
        if node.op_type in ops:
            return node if not source or index.unaliased(node.input[0]) == source else None
        if node.op_type in through:
            stack += node.input
    return None


def _axis(index: GraphIndex, node: onnx.NodeProto) -> int | None:
    """The one axis of a reduction."""
    given = index.constant(node.input[1]) if len(node.input) > 1 and node.input[1] else None
    axes = attributes(node).get("axes") if given is None else np.asarray(given).reshape(-1)
    return int(axes[0]) if axes is not None and len(axes) == 1 else None
