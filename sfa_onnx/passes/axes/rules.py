"""What each operator does to an element: the step back from its output to its inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np
import onnx

from sfa_onnx.files.onnx_attrs import attributes
from sfa_onnx.passes.axes.asking import Tracing
from sfa_onnx.passes.axes.expr import ZERO, Expr, Label, fresh, merge, split
from sfa_onnx.passes.axes.joined import join_parts
from sfa_onnx.passes.axes.named import axis_of
from sfa_onnx.passes.axes.places import chosen
from sfa_onnx.passes.axes.reduced import reduced
from sfa_onnx.passes.axes.steps import Dot, Move, Pieces, Product, Ref, Scaled, Step, is_float
from sfa_onnx.passes.axes.vectors import vector_product
from sfa_onnx.passes.axes.writes import all_written, assigned_where, window
from sfa_onnx.passes.shapes.rules import einsum_terms, slice_bounds, sliced

__all__ = ["STEPS"]

_T = onnx.TensorProto
_SIGNED: Final = (_T.INT8, _T.INT16, _T.INT32, _T.INT64, _T.UINT8)
_BYTES: Final = (_T.INT8, _T.UINT8, _T.INT16)  # too narrow for token numbers
_Rule = Callable[[Tracing, onnx.NodeProto, Ref], Step | None]


# -- movement -------------------------------------------------------------------------------------


def _cast(tracer: Tracing, node: onnx.NodeProto, ref: Ref) -> Step | None:
    source, target = tracer.sizes.elem_type(node.input[0]), int(attributes(node)["to"])
    wraps = target in _BYTES and source not in (target, _T.BOOL)  # token 300 is 44 in uint8
    widening = source in _SIGNED and not wraps and (is_float(target) or target in _SIGNED)
    if (is_float(source) and is_float(target)) or widening:
        return Move(Ref(node.input[0], ref.coords))
    return None


def _same(tracer: Tracing, node: onnx.NodeProto, ref: Ref) -> Step | None:
    del tracer
    return Move(Ref(node.input[0], ref.coords)) if ref.value == node.output[0] else None


def _dropout(tracer: Tracing, node: onnx.NodeProto, ref: Ref) -> Step | None:
    """Nothing, unless it runs in training mode."""
    trains = len(node.input) > 2 and node.input[2] and tracer.scalar(node.input[2]) != 0
    return None if trains else _same(tracer, node, ref)


def _reshape(tracer: Tracing, node: onnx.NodeProto, ref: Ref) -> Step | None:
    source, target = tracer.shape(node.input[0]), tracer.shape(ref.value)
    if 0 in source:  # no element has a place there
        return None
    if [d for d in source if d != 1] == [d for d in target if d != 1]:
        kept = iter(c for c, d in zip(ref.coords, target, strict=True) if d != 1)
        return Move(Ref(node.input[0], tuple(ZERO if d == 1 else next(kept) for d in source)))
    tracer.same_count(source, target)
    return Move(Ref(node.input[0], split(merge(ref.coords, target), source)))


def _transpose(tracer: Tracing, node: onnx.NodeProto, ref: Ref) -> Step:
    del tracer
    rank = len(ref.coords)
    perm = attributes(node).get("perm") or list(range(rank))[::-1]
    coords = [ZERO] * rank
    for out, source in enumerate(perm):
        coords[source] = ref.coords[out]
    return Move(Ref(node.input[0], tuple(coords)))


def _expand(tracer: Tracing, node: onnx.NodeProto, ref: Ref) -> Step:
    return Move(tracer.operand(node.input[0], ref.coords))


def _tile(tracer: Tracing, node: onnx.NodeProto, ref: Ref) -> Step:
    shape, target = tracer.shape(node.input[0]), tracer.shape(ref.value)
    sizes = zip(ref.coords, shape, target, strict=True)  # an axis that is not repeated stays
    coords = (ZERO if d == 1 else c if d == n else c.mod(d) for c, d, n in sizes)
    return Move(Ref(node.input[0], tuple(coords)))


def _slice(tracer: Tracing, node: onnx.NodeProto, ref: Ref) -> Step | None:
    shape, coords = tracer.shape(node.input[0]), list(ref.coords)
    inputs = [None, *(tracer.sizes.value(n) if n else None for n in node.input[1:])]
    if any(a is None and n for a, n in zip(inputs[1:], node.input[1:], strict=True)):
        return None
    bounds = slice_bounds(attributes(node), inputs, len(shape))
    for start, end, axis, step in zip(*bounds, strict=True):
        if start < 0 and tracer.open(shape[axis]) and not tracer.open(-start):
            return None  # x[-8:] begins elsewhere in every run
        coords[axis] = coords[axis] * step + sliced(start, end, step, shape[axis]).start
    return Move(Ref(node.input[0], tuple(coords)))


def _split(tracer: Tracing, node: onnx.NodeProto, ref: Ref) -> Step:
    axis = axis_of(node, len(ref.coords))
    before = list(node.output)[: list(node.output).index(ref.value)]
    offset = sum(tracer.shape(name)[axis] for name in before)
    coords = (*ref.coords[:axis], ref.coords[axis] + offset, *ref.coords[axis + 1 :])
    return Move(Ref(node.input[0], coords))


def _sequence_at(tracer: Tracing, node: onnx.NodeProto, ref: Ref) -> Step | None:
    """A part of SplitToSequence with given sizes: what Split has as an output."""
    maker = tracer.index.real_maker(node.input[0])
    if maker is None or maker.op_type != "SplitToSequence" or len(maker.input) < 2:
        return None
    parts, which = tracer.sizes.value(maker.input[1]), tracer.scalar(node.input[1])
    if parts is None or parts.ndim != 1 or which is None or which < 0:
        return None
    axis = axis_of(maker, len(ref.coords))
    coords = list(ref.coords)
    coords[axis] = coords[axis] + int(parts[: int(which)].sum())
    return Move(Ref(maker.input[0], tuple(coords)))


def _concat(tracer: Tracing, node: onnx.NodeProto, ref: Ref) -> Step | None:
    axis = axis_of(node, len(ref.coords))
    if (joined := join_parts(tracer, ref, node.input, axis)) is not None:
        return joined
    edges = [0]
    for name in node.input:
        edges.append(edges[-1] + tracer.shape(name)[axis])
    ranges = [(edges[i], edges[i + 1], name, -edges[i]) for i, name in enumerate(node.input)]
    return _by_range(ref, axis, [r for r in ranges if r[0] < r[1]])


def _by_range(ref: Ref, axis: int, ranges: list[tuple[int, int, str, int]]) -> Step | None:
    """The piece(s) of [low, high) -> (value, shift) that coordinate `axis` of `ref` falls into."""
    position = ref.coords[axis]
    if position.bounds is None:
        return None
    low, high = position.bounds
    parts = []
    for start, stop, name, shift in ranges:
        coords = list(ref.coords)
        coords[axis] = position + shift
        piece = Ref(name, tuple(coords))
        if start <= low and high < stop:
            return Move(piece)
        parts.append((start, stop, piece))
    if len(position.terms) != 1 or position.terms[0][1] != 1:
        return None
    label = position.terms[0][0]
    if not isinstance(label, Label):
        return None
    cut = [
        (max(a - position.const, 0), min(b - position.const, label.size), r) for a, b, r in parts
    ]
    return Pieces(label, tuple((a, b, r) for a, b, r in cut if a < b))


def _scatter(tracer: Tracing, node: onnx.NodeProto, ref: Ref) -> Step | None:
    """A window written in place at constant positions: along one axis, a range is the update's."""
    if 0 in (tracer.sizes.shape(node.input[2]) or ()):  # what x[:, :0] = y leaves behind
        return Move(Ref(node.input[0], ref.coords))
    if (written := assigned_where(tracer, node, ref)) is not None:  # x[x != x] = 0
        scrubs = _tests_nan(tracer, written[0].value, node.input[0], holds=True)
        zero = tracer.fill(written[1].value) == 0
        return Move(Ref(node.input[0], ref.coords)) if scrubs and zero else None
    own = window(tracer, node)
    if own is None:
        return None
    axis, low, high = own
    if (names := all_written(tracer, node)) and (whole := join_parts(tracer, ref, names, axis)):
        return whole
    size = tracer.shape(node.input[0])[axis]
    ranges = [(low, high, node.input[2], -low)]
    ranges += [(0, low, node.input[0], 0)] if low else []
    ranges += [(high, size, node.input[0], 0)] if high < size else []
    return _by_range(ref, axis, sorted(ranges))


# -- gathers --------------------------------------------------------------------------------------


def _gather(tracer: Tracing, node: onnx.NodeProto, ref: Ref) -> Step:
    axis = axis_of(node, len(tracer.shape(node.input[0])))
    rank = len(tracer.shape(node.input[1]))
    own = ref.coords[axis : axis + rank]
    at = chosen(tracer, Ref(node.input[1], own), tracer.shape(node.input[0])[axis])
    coords = (*ref.coords[:axis], at, *ref.coords[axis + rank :])
    return Move(Ref(node.input[0], coords))


def _gather_elements(tracer: Tracing, node: onnx.NodeProto, ref: Ref) -> Step:
    axis = axis_of(node, len(ref.coords))
    tracer.same_rows(node.input[1], node.input[0], axis)
    coords, size = list(ref.coords), tracer.shape(node.input[0])[axis]
    coords[axis] = chosen(tracer, Ref(node.input[1], ref.coords), size)
    return Move(Ref(node.input[0], tuple(coords)))


def _gather_nd(tracer: Tracing, node: onnx.NodeProto, ref: Ref) -> Step:
    batch = int(attributes(node).get("batch_dims", 0))
    data, indices = tracer.shape(node.input[0]), tracer.shape(node.input[1])
    outer = ref.coords[: len(indices) - 1]
    at = tuple(
        chosen(tracer, Ref(node.input[1], (*outer, Expr(j))), data[batch + j])
        for j in range(indices[-1])
    )
    return Move(Ref(node.input[0], (*outer[:batch], *at, *ref.coords[len(indices) - 1 :])))


# -- arithmetic -----------------------------------------------------------------------------------


def _mul(tracer: Tracing, node: onnx.NodeProto, ref: Ref) -> Step | None:
    a, b = node.input
    for value, other in ((a, b), (b, a)):
        if (factor := tracer.scalar(other)) is not None and tracer.shape(value) == tracer.shape(
            ref.value
        ):
            return Scaled(Ref(value, ref.coords), factor)
    for value, other in ((a, b), (b, a)):
        over = tracer.index.real_maker(other)
        if over is not None and over.op_type == "Reciprocal":
            divisor = tracer.operand(over.input[0], ref.coords)
            return Product(tracer.operand(value, ref.coords), divisor, inverse=True)
    return Product(tracer.operand(a, ref.coords), tracer.operand(b, ref.coords))


def _div(tracer: Tracing, node: onnx.NodeProto, ref: Ref) -> Step | None:
    divisor = tracer.scalar(node.input[1])
    same = tracer.shape(node.input[0]) == tracer.shape(ref.value)
    if divisor is None and is_float(tracer.sizes.elem_type(ref.value)):
        over = tracer.index.real_maker(node.input[1])
        if over is not None and over.op_type == "Reciprocal":  # a / (1 / b)
            names, inverse = (node.input[0], over.input[0]), False
        else:
            names, inverse = (node.input[0], node.input[1]), True
        a, b = (tracer.operand(name, ref.coords) for name in names)
        return Product(a, b, inverse)
    return Scaled(Ref(node.input[0], ref.coords), 1 / divisor) if divisor and same else None


def _neg(tracer: Tracing, node: onnx.NodeProto, ref: Ref) -> Step | None:
    floats = is_float(tracer.sizes.elem_type(node.input[0]))
    return Scaled(Ref(node.input[0], ref.coords), -1.0) if floats else None


def _scrubbed(tracer: Tracing, node: onnx.NodeProto, ref: Ref) -> Step | None:
    """Where(x is NaN, 0, x): x, as far as x is a number; rows of hidden keys are no matter."""
    condition = tracer.operand(node.input[0], ref.coords)
    for kept, other, holds in ((2, 1, True), (1, 2, False)):
        if tracer.fill(node.input[other]) != 0:
            continue
        nan = _tests_nan(tracer, node.input[0], node.input[kept], holds)
        if nan or tracer.shown(condition, not holds):
            return Move(tracer.operand(node.input[kept], ref.coords))
    return None


def _tests_nan(tracer: Tracing, condition: str, value: str, holds: bool) -> bool:
    """Whether a condition says `holds` exactly where `value` is NaN: IsNaN(x), x != x."""
    index = tracer.index
    test = index.real_maker(condition)
    while test is not None and test.op_type in ("Cast", "Not"):  # bool to bool, or turned
        holds = holds != (test.op_type == "Not")
        test = index.real_maker(test.input[0])
    if test is None or test.op_type not in ("IsNaN", "Equal"):
        return False
    same = {index.unaliased(n) for n in test.input} == {index.unaliased(value)}
    return same and holds == (test.op_type == "IsNaN")


def _matmul(tracer: Tracing, node: onnx.NodeProto, ref: Ref) -> Step | None:
    if any(len(tracer.shape(name)) < 2 for name in node.input[:2]):
        return vector_product(tracer, node, ref)
    flags, batch, (m, n) = attributes(node), ref.coords[:-2], ref.coords[-2:]
    a = tracer.shape(node.input[0])
    rows = 0 if flags.get("transBatchA") else -2
    label = fresh("d", a[rows] if flags.get("transA") else a[-1])
    inner = Expr.of(label)
    last_a = (inner, m) if flags.get("transA") else (m, inner)
    last_b = (n, inner) if flags.get("transB") else (inner, n)
    left = _factor(tracer, node.input[0], (*batch, *last_a), bool(flags.get("transBatchA")))
    right = _factor(tracer, node.input[1], (*batch, *last_b), bool(flags.get("transBatchB")))
    return Dot(left, right, label, float(flags.get("alpha", 1.0)))


def _factor(tracer: Tracing, value: str, coords: tuple[Expr, ...], outside: bool) -> Ref:
    """An operand of a product; `outside`: its rows lie in front of its batch."""
    if not outside:
        return tracer.operand(value, coords)
    shape = tracer.shape(value)
    own = coords[len(coords) - len(shape) :]
    own = (own[-2], *own[:-2], own[-1])
    return Ref(value, tuple(ZERO if d == 1 else c for c, d in zip(own, shape, strict=True)))


def _gemm(tracer: Tracing, node: onnx.NodeProto, ref: Ref) -> Step | None:
    flags = attributes(node)
    plain = len(node.input) < 3 or not node.input[2] or flags.get("beta", 1.0) == 0
    return _matmul(tracer, node, ref) if plain or tracer.fill(node.input[2]) == 0 else None


def _einsum(tracer: Tracing, node: onnx.NodeProto, ref: Ref) -> Step | None:
    shapes = [tracer.shape(n) for n in node.input]
    terms, out = einsum_terms(attributes(node)["equation"], [len(s) for s in shapes])
    factor = 1.0
    parts = []
    for name, term, shape in zip(node.input, terms, shapes, strict=True):
        number = None if shape else tracer.scalar(name)
        factor *= 1.0 if number is None else number
        parts += [(name, term, shape)] if number is None else []
    if len(parts) != 2:
        return None
    at = dict(zip(out, ref.coords, strict=True))
    sizes = {c: d for _, t, s in parts for c, d in zip(t, s, strict=True)}
    inner = [c for c in sizes if c not in out]
    if any(not all(c in t for _, t, _ in parts) for c in inner) or any(
        len(set(t)) < len(t) for _, t, _ in parts
    ):
        return None
    wide = [c for c in inner if sizes[c] > 1] or inner[:1]
    if len(wide) != 1:
        return None
    label = fresh("d", sizes[wide[0]])
    at.update({c: Expr.of(label) if c == wide[0] else ZERO for c in inner})
    a, b = (
        Ref(n, tuple(ZERO if d == 1 else at[c] for c, d in zip(t, s, strict=True)))
        for n, t, s in parts
    )
    return Dot(a, b, label, factor)


def _reduce_sum(tracer: Tracing, node: onnx.NodeProto, ref: Ref) -> Step | None:
    """A product of two tensors, summed over one axis of both: a contraction written out."""
    under = reduced(tracer, node, ref)
    if under is None or len(under[1]) != 1:
        return None
    (label,), factor = under[1], 1.0
    step = tracer.step(under[0])
    while isinstance(step, Move | Scaled):
        factor *= step.factor if isinstance(step, Scaled) else 1.0
        step = tracer.step(step.ref)
    if (
        not isinstance(step, Product)
        or step.inverse
        or not all(label in r.labels for r in (step.a, step.b))
    ):
        return None
    return Dot(step.a, step.b, label, factor)


def _dequantize(tracer: Tracing, node: onnx.NodeProto, ref: Ref) -> Step | None:
    if len(node.input) > 2 and node.input[2]:
        zero = tracer.index.constant(node.input[2])
        if zero is None or bool(np.asarray(zero).any()):
            return None
    a, shape = attributes(node), tracer.shape(node.input[1])
    axis, block = int(a.get("axis", 1)), int(a.get("block_size", 0))
    if len(shape) == 1 and not block and len(ref.coords) > 1:
        scale = Ref(node.input[1], (ref.coords[axis % len(ref.coords)],))
    elif len(shape) == len(ref.coords) and block:
        axis %= len(ref.coords)
        coords = tuple(c.floordiv(block) if i == axis else c for i, c in enumerate(ref.coords))
        scale = tracer.operand(node.input[1], coords)
    else:
        return None
    return Product(Ref(node.input[0], ref.coords), scale)


STEPS: Final[dict[str, _Rule]] = {
    "Cast": _cast,
    "CastLike": _same,
    "Concat": _concat,
    "DequantizeLinear": _dequantize,
    "Div": _div,
    "Dropout": _dropout,
    "Einsum": _einsum,
    "Expand": _expand,
    "Flatten": _reshape,
    "FusedMatMul": _matmul,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "Gemm": _gemm,
    "Identity": _same,
    "MatMul": _matmul,
    "Mul": _mul,
    "Neg": _neg,
    "ReduceSum": _reduce_sum,
    "Reshape": _reshape,
    "ScatterElements": _scatter,
    "ScatterND": _scatter,
    "Slice": _slice,
    "SequenceAt": _sequence_at,
    "Split": _split,
    "Squeeze": _reshape,
    "Tile": _tile,
    "Transpose": _transpose,
    "Unsqueeze": _reshape,
    "Where": _scrubbed,
}
