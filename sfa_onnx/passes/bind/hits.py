"""Selections written as hits: which of the indices equals which key, reduced over the indices."""

from __future__ import annotations

import numpy as np
import onnx

from sfa_onnx.files.onnx_attrs import attributes
from sfa_onnx.passes.axes.expr import Expr, Label, fresh, label_of
from sfa_onnx.passes.axes.trace import Move, Pieces, Ref, Tracer
from sfa_onnx.passes.bind.literals import Literal, Selected

__all__ = ["counts", "is_table", "pointed", "reduced"]

_VIEWS = ("Cast", "Identity", "Slice", "Unsqueeze", "Squeeze", "Reshape", "Transpose", "Expand")


def counts(tracer: Tracer, value: str) -> bool:
    """Whether a tensor of numbers flags or counts: 0 and 1 that are written or added up."""
    for _ in range(16):
        node = tracer.index.maker(value)
        if node is None or node.op_type == "Constant":
            return is_table(tracer, value)
        if node.op_type in ("ReduceSum", "ReduceMax", "OneHot"):
            return True
        if node.op_type in ("ScatterElements", "ScatterND"):
            return all(_counted(tracer, node.input[i]) for i in (0, 2))
        if node.op_type not in _VIEWS:
            return False
        value = node.input[0]
    return False


def _counted(tracer: Tracer, value: str) -> bool:
    fill = tracer.fill(value)
    if fill is not None:
        return fill in (0, 1)
    is_bool = tracer.sizes.elem_type(value) == onnx.TensorProto.BOOL
    node = tracer.index.real_maker(value)
    cast = node is not None and node.op_type == "Cast"
    made = cast and node is not None and tracer.sizes.elem_type(node.input[0])
    return is_bool or made == onnx.TensorProto.BOOL or counts(tracer, value)


def is_table(tracer: Tracer, value: str) -> bool:
    """Whether `value` is a constant table of 0 and 1."""
    if not tracer.shape(value):
        return False
    table = tracer.index.mask_table(value)
    return table is not None and table.size > 1 and bool(((table == 0) | (table == 1)).all())


def reduced(tracer: Tracer, node: onnx.NodeProto, ref: Ref) -> list[Literal] | None:
    """any(indices == arange(keys)), or one_hot(indices, keys), over the slots; None: neither."""
    source = node.input[0]
    shape = tracer.shape(source)
    axes = tracer.sizes.value(node.input[1]) if len(node.input) > 1 else None
    given = attributes(node).get("axes") if axes is None else np.asarray(axes).reshape(-1).tolist()
    if given is None or len(given) != 1:
        return None
    axis = int(given[0]) % len(shape)
    slot = fresh("slot", shape[axis])
    coords = list(ref.coords)
    if attributes(node).get("keepdims", 1):
        coords[axis] = Expr.of(slot)
    else:
        coords.insert(axis, Expr.of(slot))
    hit = Ref(source, tuple(coords))
    valid: list[Ref] = []
    for _ in range(16):
        maker = tracer.index.maker(hit.value)
        if maker is None:
            return None
        if maker.op_type == "OneHot":
            return _one_hot(tracer, maker, hit, slot)
        if maker.op_type == "Equal":
            break
        if maker.op_type == "And":
            a, b = (tracer.operand(n, hit.coords) for n in maker.input)
            equal_first = _is_equal(tracer, a.value)
            valid.append(b if equal_first else a)
            hit = a if equal_first else b
            continue
        if maker.op_type == "Cast":
            hit = Ref(maker.input[0], hit.coords)
            continue
        step = tracer.step(hit)
        if isinstance(step, Pieces) or not isinstance(step, Move):
            return None
        hit = step.ref
    else:
        return None
    operands = [tracer.operand(n, hit.coords) for n in maker.input]
    for indices, positions in (operands, operands[::-1]):
        key = label_of(tracer.index_value(positions))
        if key is not None and key != slot and slot in indices.labels and len(valid) < 2:
            if key in indices.labels:
                continue
            switch = valid[0] if valid else None
            return [Selected(indices, slot, key.size, wraps=False, valid=switch)]
    return None


def _one_hot(tracer: Tracer, node: onnx.NodeProto, ref: Ref, slot: Label) -> list[Literal] | None:
    """one_hot(indices, keys) with 0 and 1, summed over the slots."""
    values = tracer.index.constant(node.input[2])
    if values is None:
        values = tracer.index.mask_table(node.input[2])  # 0.0 and 1.0
    if values is None or values.size != 2 or not (values.flat[0] == 0 < values.flat[1]):
        return None
    axis = int(attributes(node).get("axis", -1)) % len(ref.coords)
    key = label_of(ref.coords[axis])
    indices = Ref(node.input[0], ref.coords[:axis] + ref.coords[axis + 1 :])
    if key is None or slot not in indices.labels:
        return None
    return [Selected(indices, slot, tracer.shape(ref.value)[axis])]


def _is_equal(tracer: Tracer, value: str) -> bool:
    node = tracer.index.maker(value)
    return node is not None and node.op_type == "Equal"


def pointed(tracer: Tracer, node: onnx.NodeProto, ref: Ref) -> Selected | None:
    """What ScatterND writes at points of which all coordinates but one are the point's own axes."""
    points, shape = node.input[1], tracer.shape(node.input[0])
    at = [fresh(f"axis{i}", size) for i, size in enumerate(tracer.shape(points)[:-1])]
    if tracer.shape(points)[-1] != len(shape):
        return None
    columns = [Ref(points, (*map(Expr.of, at), Expr(i))) for i in range(len(shape))]
    where: dict[Label, Expr] = {}
    free = []
    for axis, column in enumerate(columns):
        own = label_of(tracer.index_value(column, shape[axis]))
        if own in at and own not in where and own.size == shape[axis]:
            where[own] = ref.coords[axis]
        elif shape[axis] > 1:
            free.append(axis)
    rest = [x for x in at if x not in where and x.size > 1]
    if len(free) != 1 or len(rest) != 1:
        return None
    ones = {x: Expr(0) for x in at if x.size == 1 and x not in where}
    return Selected(columns[free[0]].substitute({**where, **ones}), rest[0], shape[free[0]])
