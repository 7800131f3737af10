"""What CANN's parser accepts and misreads, rewritten so that it means what the file says.

Each rule rests on a recorded verdict of the real parser (Constant value_*, Shape start/end, Split
num_outputs, GatherND batch_dims and negative indices, ScatterND reduction, Mod's sign, ...). The
last node of a rewrite keeps the name and outputs of the node it replaces.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx
from onnx import NodeProto, TensorProto

from sfa_onnx.ascend.flavour.indices import batched_index, is_non_negative, non_negative
from sfa_onnx.ascend.flavour.scope import Rule, Scope
from sfa_onnx.errors import ModelError
from sfa_onnx.files.onnx_attrs import attribute, attributes, find_attribute

__all__ = ["REPAIRS"]

_INT64_MAX = 2**63 - 1
_UNSIGNED = (2, 4, 12, 13)


def constant_values(scope: Scope, node: NodeProto) -> Sequence[NodeProto] | None:
    """Constant value_float(s), value_int(s), value_string(s), sparse_value -> `value`."""
    if node.op_type != "Constant" or find_attribute(node, "value") is not None:
        return None
    if len(node.attribute) != 1:
        raise ModelError(f"Constant {node.name or node.output[0]!r} carries no value attribute")
    attr = node.attribute[0]
    value = onnx.helper.get_attribute_value(attr)
    if attr.name == "sparse_value":
        tensor = dense(attr.sparse_tensor)
    elif attr.name.startswith("value_string"):
        dims = [] if attr.name == "value_string" else [len(value)]
        texts = [value] if attr.name == "value_string" else list(value)
        tensor = onnx.helper.make_tensor(node.output[0], TensorProto.STRING, dims, texts)
    elif attr.name.startswith(("value_float", "value_int")):
        kind = np.float32 if attr.name.startswith("value_float") else np.int64
        tensor = onnx.numpy_helper.from_array(np.asarray(value, dtype=kind), node.output[0])
    else:
        raise ModelError(f"Constant {node.name!r}: unknown attribute {attr.name}")
    return [scope.replace(node, "Constant", [], value=tensor)]


def dense(sparse: onnx.SparseTensorProto) -> TensorProto:
    """The dense form of a sparse constant.

    Raises:
        ModelError: its parts lie in an external file.
    """
    if any(t.data_location == TensorProto.EXTERNAL for t in (sparse.values, sparse.indices)):
        raise ModelError(
            f"the sparse tensor {sparse.values.name!r} lies in an external file, which is not read"
            " here; store it in the model, or dense"
        )
    values = onnx.numpy_helper.to_array(sparse.values)
    indices = onnx.numpy_helper.to_array(sparse.indices)
    nothing = "" if values.dtype.kind == "O" else 0
    full = np.full(math.prod(sparse.dims), nothing, dtype=values.dtype)
    flat = indices if indices.ndim == 1 else np.ravel_multi_index(tuple(indices.T), sparse.dims)
    full[flat] = values
    return onnx.numpy_helper.from_array(full.reshape(tuple(sparse.dims)), sparse.values.name)


def shape_range(scope: Scope, node: NodeProto) -> Sequence[NodeProto] | None:
    """Shape start/end -> Shape, then Slice: the parser ignores both attributes."""
    if node.op_type != "Shape" or not node.attribute:
        return None
    start, end = int(attribute(node, "start", 0)), int(attribute(node, "end", _INT64_MAX))
    if start == 0 and end == _INT64_MAX:
        return [scope.replace(node, "Shape", node.input)]
    whole = scope.node("Shape", node.input, f"{node.name}/whole", dtype=TensorProto.INT64)
    ends = [
        scope.constant([v], f"{node.name}/{word}")
        for v, word in ((start, "start"), (end, "end"), (0, "axis"))
    ]
    return [whole, scope.replace(node, "Slice", [whole.output[0], *ends])]


def split_outputs(scope: Scope, node: NodeProto) -> Sequence[NodeProto] | None:
    """Split num_outputs -> explicit sizes, or one Slice per part when the length is not known."""
    if node.op_type != "Split" or find_attribute(node, "num_outputs") is None:
        return None
    parts, axis = int(attribute(node, "num_outputs", 0)), int(attribute(node, "axis", 0))
    dims = scope.dims(node.input[0])
    length = dims[axis] if dims is not None and -len(dims) <= axis < len(dims) else None
    if length is not None:
        chunk = -(-length // parts)
        sizes = [chunk] * (parts - 1) + [length - chunk * (parts - 1)]
        if sizes[-1] < 0:
            raise ModelError(f"node {node.name!r}: Split of length {length} into {parts} parts")
        split = scope.constant(sizes, f"{node.name}/sizes")
        return [scope.replace(node, "Split", [node.input[0], split], axis=axis)]
    return _sliced(scope, node, parts, axis)


def _sliced(scope: Scope, node: NodeProto, parts: int, axis: int) -> list[NodeProto]:
    shape = scope.node("Shape", [node.input[0]], f"{node.name}/shape")
    where = scope.constant([axis], f"{node.name}/axis")
    length = scope.node("Gather", [shape.output[0], where], f"{node.name}/length", axis=0)
    rounding = scope.constant([parts - 1], f"{node.name}/rounding")
    padded = scope.node("Add", [length.output[0], rounding], f"{node.name}/padded")
    count = scope.constant([parts], f"{node.name}/parts")
    chunk = scope.node("Div", [padded.output[0], count], f"{node.name}/chunk")
    nodes = [shape, length, padded, chunk]
    bounds = [scope.constant([0], f"{node.name}/zero")]
    for i in range(1, parts):
        times = scope.constant([i], f"{node.name}/at")
        edge = scope.node("Mul", [chunk.output[0], times], f"{node.name}/edge")
        nodes.append(edge)
        bounds.append(edge.output[0])
    bounds.append(scope.constant([_INT64_MAX], f"{node.name}/end"))
    for i, out in enumerate(node.output):
        args = [node.input[0], bounds[i], bounds[i + 1], where]
        cut = scope.node("Slice", args, f"{node.name}/part", outputs=[out])
        if i == 0:
            cut.name = node.name
        nodes.append(cut)
    return nodes


def gather_nd(scope: Scope, node: NodeProto) -> Sequence[NodeProto] | None:
    """GatherND: batch_dims becomes explicit index columns; negative indices are made positive."""
    if node.op_type != "GatherND":
        return None
    batch = int(attribute(node, "batch_dims", 0))
    nodes, index = non_negative(scope, node.input[0], node.input[1], node.name, batch)
    if batch:
        more, index = batched_index(scope, index, node.name, batch)
        nodes += more
    if not nodes and not batch:
        return None
    return [*nodes, scope.replace(node, "GatherND", [node.input[0], index])]


def scatter_nd(scope: Scope, node: NodeProto) -> Sequence[NodeProto] | None:
    """ScatterND with a reduction -> ScatterElements over rows; negative indices made positive."""
    if node.op_type != "ScatterND":
        return None
    reduction = str(attribute(node, "reduction", "none"))
    data, index, updates = node.input
    nodes, index = non_negative(scope, data, index, node.name, 0)
    if reduction == "none":
        if not nodes:
            return None
        return [*nodes, scope.replace(node, "ScatterND", [data, index, updates])]
    return [*nodes, *_scatter_rows(scope, node, index, reduction)]


def _scatter_rows(scope: Scope, node: NodeProto, index: str, reduction: str) -> list[NodeProto]:
    """Data as [rows, inner], one row number per index tuple: sum of index * stride."""
    data, updates, label = node.input[0], node.input[2], node.name
    dims = scope.dims(index)
    depth = dims[-1] if dims else None
    if depth is None:
        raise ModelError(
            f"node {label!r}: ScatterND reduction={reduction} with an index depth that is not known"
            " statically; CANN's parser ignores the reduction. Export with static index shape"
        )
    shape = scope.node("Shape", [data], f"{label}/shape")
    nodes = [shape]
    stride, rows = "", ""
    columns = scope.constant([-1], f"{label}/last")
    for axis in reversed(range(depth)):
        at = scope.constant([axis], f"{label}/at")
        column = scope.node("Gather", [index, at], f"{label}/column", axis=-1)
        flat = scope.node("Reshape", [column.output[0], columns], f"{label}/flat")
        size = scope.node("Gather", [shape.output[0], at], f"{label}/size", axis=0)
        nodes += [column, flat, size]
        term = flat.output[0]
        if stride:
            scaled = scope.node("Mul", [term, stride], f"{label}/scaled")
            total = scope.node("Add", [rows, scaled.output[0]], f"{label}/row")
            step = scope.node("Mul", [stride, size.output[0]], f"{label}/stride")
            nodes += [scaled, total, step]
            rows, stride = total.output[0], step.output[0]
        else:
            rows, stride = term, size.output[0]
    rest = (scope.dims(data) or (None,) * (depth + 1))[depth:]
    inner_size = None if None in rest else math.prod(d for d in rest if d is not None)
    counts = (dims or (None,))[:-1]
    height = None if None in counts else math.prod(d for d in counts if d is not None)
    known = (rows, stride, shape.output[0], (height, inner_size))
    return nodes + _scatter_flat(scope, node, *known, reduction, updates)


def _scatter_flat(
    scope: Scope,
    node: NodeProto,
    rows: str,
    count: str,
    shape: str,
    rows_dims: tuple[int | None, int | None],
    reduction: str,
    updates: str,
) -> list[NodeProto]:
    label, dtype, table_dims = node.name, scope.dtype(node.input[0]), (None, rows_dims[1])
    rest = scope.constant([-1], f"{label}/rest")
    table = scope.node("Concat", [count, rest], f"{label}/table_shape", axis=0)
    args = [node.input[0], table.output[0]]
    flat = scope.node("Reshape", args, f"{label}/table", dtype=dtype, dims=table_dims)
    wide = scope.node("Shape", [flat.output[0]], f"{label}/table_dims")
    one = scope.constant([1], f"{label}/one")
    inner = scope.node("Gather", [wide.output[0], one], f"{label}/inner", axis=0)
    height = scope.node("Shape", [rows], f"{label}/height")
    target = scope.node("Concat", [height.output[0], inner.output[0]], f"{label}/to", axis=0)
    column = scope.node("Unsqueeze", [rows, one], f"{label}/row_column")
    if scope.opset < 13:
        column = scope.node("Unsqueeze", [rows], f"{label}/row_column", axes=[1])
    args, whole = [column.output[0], target.output[0]], TensorProto.INT64
    spread = scope.node("Expand", args, f"{label}/spread", dtype=whole, dims=rows_dims)
    args = [updates, target.output[0]]
    new = scope.node("Reshape", args, f"{label}/updates", dtype=dtype, dims=rows_dims)
    args = [flat.output[0], spread.output[0], new.output[0]]
    done = scope.node("ScatterElements", args, f"{label}/scattered", axis=0, reduction=reduction)
    back = scope.replace(node, "Reshape", [done.output[0], shape])
    return [table, flat, wide, inner, height, target, column, spread, new, done, back]


def mod_sign(scope: Scope, node: NodeProto) -> Sequence[NodeProto] | None:
    """Mod: both fmod values give one GE node, so make the result independent of its sign rule."""
    if node.op_type != "Mod" or scope.dtype(node.input[0]) in _UNSIGNED:
        return None
    x, y = node.input
    fmod = int(attribute(node, "fmod", 0))
    if is_non_negative(scope, x) and is_non_negative(scope, y):
        return None
    if not fmod and _is_floor_form(scope, node):
        return None
    label, dtype = node.name, scope.dtype(x)
    if fmod:
        top = scope.node("Abs", [x], f"{label}/abs_x", dtype=dtype)
        low = scope.node("Abs", [y], f"{label}/abs_y", dtype=dtype)
        args = [top.output[0], low.output[0]]
        rest = scope.node("Mod", args, f"{label}/rest", dtype=dtype, fmod=1)
        sign = scope.node("Sign", [x], f"{label}/sign", dtype=dtype)
        done = scope.replace(node, "Mul", [sign.output[0], rest.output[0]])
        return [top, low, rest, sign, done]
    first = scope.node("Mod", [x, y], f"{label}/rest", dtype=dtype)
    moved = scope.node("Add", [first.output[0], y], f"{label}/moved", dtype=dtype)
    return [first, moved, scope.replace(node, "Mod", [moved.output[0], y])]


def _is_floor_form(scope: Scope, node: NodeProto) -> bool:
    """Whether a Mod is the inner or outer one of Mod(Mod(x, y) + y, y): right under either rule."""
    added, y = scope.producer(node.input[0]), node.input[1]
    if added is not None and added.op_type == "Add" and added.input[1] == y:
        inner = scope.producer(added.input[0])
        return inner is not None and inner.op_type == "Mod" and inner.input[1] == y
    return any(
        n.op_type == "Add" and list(n.input) == [node.output[0], y] for n in scope.graph.node
    )


def is_inf_sign(scope: Scope, node: NodeProto) -> Sequence[NodeProto] | None:
    """IsInf of one sign: GE's operator has no such attribute, so the sign is tested beside it."""
    if node.op_type != "IsInf":
        return None
    signs = [("detect_negative", "Less"), ("detect_positive", "Greater")]
    wanted = [test for name, test in signs if int(attribute(node, name, 1))]
    if len(wanted) == 2:
        return None
    x, label = node.input[0], node.name
    found = scope.node("IsInf", [x], f"{label}/either")
    if not wanted:
        return [found, scope.replace(node, "Xor", [found.output[0], found.output[0]])]
    zero = scope.constant(0, f"{label}/zero", np.float32)
    nodes = [found]
    if scope.dtype(x) != TensorProto.FLOAT:
        same = scope.node("CastLike", [zero, x], f"{label}/zero_like")
        if scope.dtype(x):
            same = scope.node("Cast", [zero], f"{label}/zero_cast", to=scope.dtype(x))
        nodes, zero = [found, same], same.output[0]
    sign = scope.node(wanted[0], [x, zero], f"{label}/sign")
    return [*nodes, sign, scope.replace(node, "And", [found.output[0], sign.output[0]])]


def pad_axes(scope: Scope, node: NodeProto) -> Sequence[NodeProto] | None:
    """Pad with `axes` (opset 18) -> pads of every axis: GE's operator has no such input."""
    if node.op_type != "Pad" or len(node.input) < 4:
        return None
    mode = attributes(node)
    if not node.input[3]:
        return [scope.replace(node, "Pad", node.input[:3], **mode)]
    axes, rank = scope.array(node.input[3]), scope.rank(node.input[0])
    if axes is None or rank is None:
        raise ModelError(
            f"node {node.name!r}: Pad with computed axes, or of unknown rank; CANN's operator takes"
            " pads of every axis. Export with constant axes"
        )
    wanted = [int(a) % rank for a in axes.ravel()]
    none = 2 * len(wanted)  # index of the zero appended to the pads
    source = [wanted.index(i) if i in wanted else none for i in range(rank)]
    picks = source + [s if s == none else s + len(wanted) for s in source]
    zero = scope.constant([0], f"{node.name}/none")
    longer = scope.node("Concat", [node.input[1], zero], f"{node.name}/pads_and_none", axis=0)
    order = scope.constant(picks, f"{node.name}/order")
    full = scope.node("Gather", [longer.output[0], order], f"{node.name}/pads", axis=0)
    args = [node.input[0], full.output[0], *node.input[2:3]]
    return [longer, full, scope.replace(node, "Pad", args, **mode)]


def softmax_2d(scope: Scope, node: NodeProto) -> Sequence[NodeProto] | None:
    """Softmax before opset 13 means all axes from `axis` on; the parser leaves that to others."""
    if node.op_type not in ("Softmax", "LogSoftmax", "Hardmax") or scope.opset >= 13:
        return None
    axis, rank = int(attribute(node, "axis", 1)), scope.rank(node.input[0])
    if axis == -1 or (rank is not None and axis in (rank - 1, -1)):
        return None
    label = node.name
    flat = scope.node("Flatten", [node.input[0]], f"{label}/rows", axis=axis)
    part = scope.node(node.op_type, [flat.output[0]], f"{label}/by_row", axis=-1)
    shape = scope.node("Shape", [node.input[0]], f"{label}/shape")
    return [flat, part, shape, scope.replace(node, "Reshape", [part.output[0], shape.output[0]])]


def cast_like(scope: Scope, node: NodeProto) -> Sequence[NodeProto] | None:
    """CastLike -> Cast where the type is known: its GE prototype is not part of every release."""
    if node.op_type != "CastLike" or not scope.dtype(node.input[1]):
        return None
    return [scope.replace(node, "Cast", [node.input[0]], to=scope.dtype(node.input[1]))]


REPAIRS: tuple[Rule, ...] = (
    constant_values,
    cast_like,
    shape_range,
    split_outputs,
    gather_nd,
    scatter_nd,
    mod_sign,
    softmax_2d,
    pad_axes,
    is_inf_sign,
)
