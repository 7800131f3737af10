"""Index arithmetic for GatherND / ScatterND: what is never negative, wrapping, batch columns."""

from __future__ import annotations

import numpy as np
from onnx import NodeProto, TensorProto

from sfa_onnx.ascend.flavour.scope import Scope
from sfa_onnx.errors import ModelError
from sfa_onnx.files.onnx_attrs import find_attribute

__all__ = ["batched_index", "is_non_negative", "non_negative"]

_ALWAYS = frozenset({"NonZero", "Shape", "Size", "ArgMax", "ArgMin", "Abs", "Relu"})
_PASS_FIRST = frozenset(
    {
        "Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze", "Transpose", "Slice", "Expand",
        "Flatten", "Gather", "GatherElements", "GatherND", "Tile", "Split", "ReduceMax",
        "ReduceMin", "ReduceSum", "CumSum",
    }
)  # fmt: skip
_PASS_ALL = frozenset({"Add", "Mul", "Concat", "Min", "Sum", "Div"})
_UNSIGNED = (TensorProto.UINT8, TensorProto.UINT16, TensorProto.UINT32, TensorProto.UINT64)


def is_non_negative(scope: Scope, name: str) -> bool:
    """Whether a value provably has no negative element (False: not known)."""
    try:
        return _proved(scope, name, 24)
    except IndexError:  # a node without the inputs its operator asks for
        return False


def _proved(scope: Scope, name: str, depth: int) -> bool:
    if scope.dtype(name) in _UNSIGNED:
        return True
    constant = scope.array(name)
    if constant is not None:
        return constant.dtype.kind in "iufb" and bool(np.all(constant.astype(np.float64) >= 0))
    node = scope.producer(name)
    if node is None or depth == 0 or node.domain:
        return False
    if node.op_type in _ALWAYS or (node.op_type == "TopK" and name == node.output[1]):
        return True
    if node.op_type in _PASS_FIRST:
        return _proved(scope, node.input[0], depth - 1)
    if node.op_type == "Mod":  # floor modulo takes the divisor's sign, fmod the dividend's
        fmod = find_attribute(node, "fmod")
        which = node.input[0] if fmod is not None and fmod.i else node.input[1]
        return _proved(scope, which, depth - 1)
    if node.op_type in _PASS_ALL:
        return all(_proved(scope, part, depth - 1) for part in node.input)
    if node.op_type == "Range":  # start, limit, step: counts up from start
        return all(_proved(scope, node.input[i], depth - 1) for i in (0, 2))
    if node.op_type == "Max":
        return any(_proved(scope, part, depth - 1) for part in node.input)
    if node.op_type == "Clip":
        return len(node.input) > 1 and _proved(scope, node.input[1], depth - 1)
    if node.op_type == "Where":
        return _wrapped(scope, node, depth) or all(
            _proved(scope, part, depth - 1) for part in node.input[1:]
        )
    return False


def _wrapped(scope: Scope, node: NodeProto, depth: int) -> bool:
    """Where(x < 0, x + size, x): what `non_negative` itself writes."""
    test, added, plain = (
        scope.producer(node.input[0]),
        scope.producer(node.input[1]),
        node.input[2],
    )
    if test is None or added is None or test.op_type != "Less" or added.op_type != "Add":
        return False
    zero = scope.array(test.input[1])
    if zero is None or np.any(zero != 0) or test.input[0] != plain or added.input[0] != plain:
        return False
    return _proved(scope, added.input[1], depth - 1)


def non_negative(
    scope: Scope, data: str, index: str, label: str, batch: int
) -> tuple[list[NodeProto], str]:
    """Wrap negative index tuples the way ONNX does: index + size of the axis it addresses."""
    if is_non_negative(scope, index):
        return [], index
    nodes, sizes = _addressed(scope, data, index, label, batch)
    zero = scope.constant(0, f"{label}/zero")
    below = scope.node("Less", [index, zero], f"{label}/negative")
    plus = scope.node("Add", [index, sizes], f"{label}/wrapped")
    args = [below.output[0], plus.output[0], index]
    dims = scope.dims(index)
    pick = scope.node("Where", args, f"{label}/index", dtype=TensorProto.INT64, dims=dims)
    return [*nodes, below, plus, pick], str(pick.output[0])


def _addressed(
    scope: Scope, data: str, index: str, label: str, batch: int
) -> tuple[list[NodeProto], str]:
    """The sizes of the axes that index tuples address: shape(data)[batch : batch + depth]."""
    dims = scope.dims(index)
    depth = dims[-1] if dims else None
    shape = scope.node("Shape", [data], f"{label}/data_shape")
    nodes = [shape]
    start, axis = (scope.constant([v], f"{label}/bound") for v in (batch, 0))
    if depth is not None:
        end = scope.constant([batch + depth], f"{label}/bound")
    else:  # the tuples' length is known at run time only
        whole = scope.node("Shape", [index], f"{label}/index_dims")
        last = scope.constant([-1], f"{label}/last")
        count = scope.node("Gather", [whole.output[0], last], f"{label}/depth", axis=0)
        add = scope.node("Add", [count.output[0], start], f"{label}/end")
        nodes, end = [shape, whole, count, add], add.output[0]
    cut = scope.node("Slice", [shape.output[0], start, end, axis], f"{label}/sizes")
    return [*nodes, cut], str(cut.output[0])


def batched_index(scope: Scope, index: str, label: str, batch: int) -> tuple[list[NodeProto], str]:
    """Put the batch position in front of every index tuple, so that batch_dims can be 0."""
    rank = scope.rank(index)
    if rank is None:
        raise ModelError(f"node {label!r}: GatherND batch_dims={batch}, index of unknown rank")
    shape = scope.node("Shape", [index], f"{label}/index_shape")
    bounds = [scope.constant([v], f"{label}/bound") for v in (0, -1, 0)]
    lead = scope.node("Slice", [shape.output[0], *bounds], f"{label}/lead")
    one = scope.constant([1], f"{label}/one")
    column = scope.node("Concat", [lead.output[0], one], f"{label}/column_shape", axis=0)
    start, step = scope.constant(0, f"{label}/start"), scope.constant(1, f"{label}/step")
    nodes, columns = [shape, lead, column], []
    for axis in range(batch):
        at = scope.constant(axis, f"{label}/axis")
        size = scope.node("Gather", [shape.output[0], at], f"{label}/size", axis=0)
        iota = scope.node("Range", [start, size.output[0], step], f"{label}/iota")
        form = scope.constant([-1 if i == axis else 1 for i in range(rank)], f"{label}/form")
        across = scope.node("Reshape", [iota.output[0], form], f"{label}/across")
        args = [across.output[0], column.output[0]]
        spread = scope.node("Expand", args, f"{label}/batch_column")
        nodes += [size, iota, across, spread]
        columns.append(spread.output[0])
    joined = scope.node("Concat", [*columns, index], f"{label}/full_index", axis=-1)
    return [*nodes, joined], joined.output[0]
