"""ScatterElements with a reduction, for CANN lines whose plug-in does not read that attribute.

Up to 9.0 updates overwrite (read in the sources of 8.5.0 to 9.0.1; 9.1.0 hands the attribute on).
The reduction is then written out: every target element compares its position with all indices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import onnx
from onnx import NodeProto, TensorProto

from sfa_onnx.ascend.cann import CANN_VERSIONS
from sfa_onnx.ascend.flavour.indices import is_non_negative
from sfa_onnx.ascend.flavour.reductions import readable_reductions
from sfa_onnx.ascend.flavour.scope import Rule, Scope
from sfa_onnx.errors import ModelError
from sfa_onnx.files.onnx_attrs import attribute

__all__ = ["readable_scatters", "reads_scatter_reduction"]

_DEAF: Final = ("8.5", "9.0")
_STEPS: Final = {"add": "Add", "max": "Max", "min": "Min", "mul": "Mul"}
_TOTALS: Final = {"add": "ReduceSum", "max": "ReduceMax", "min": "ReduceMin", "mul": "ReduceProd"}
_T = TensorProto
_FLOATS: Final = (_T.FLOAT, _T.FLOAT16, _T.DOUBLE)
_INTS: Final = (_T.INT32, _T.INT64)


def reads_scatter_reduction(line: str) -> bool:
    """Whether that line's plug-in of ScatterElements reads `reduction`."""
    return line not in _DEAF


def readable_scatters(line: str | None) -> Rule:
    """The rule for one line, or for all of them (None)."""
    lines = CANN_VERSIONS if line is None else (line,)

    def rule(scope: Scope, node: NodeProto) -> Sequence[NodeProto] | None:
        kind = str(attribute(node, "reduction", "none"))
        if node.op_type != "ScatterElements" or node.domain or kind == "none":
            return None
        if all(reads_scatter_reduction(at) for at in lines):
            return None
        try:
            *nodes, total, step = _written_out(scope, node, kind)
            return [*nodes, *(readable_reductions(line)(scope, total) or [total]), step]
        except ModelError:
            if line is None:  # no form for all lines: as it is, it is right from 9.1 on
                return None
            raise

    return rule


def _written_out(scope: Scope, node: NodeProto, kind: str) -> list[NodeProto]:
    """Data' = data (+) reduction over j of (index[j] == k ? updates[j] : neutral), for every k."""
    data, index, updates = node.input
    dims, given = scope.dims(data), scope.dims(index)
    dtype, label = scope.dtype(data), node.name
    if kind not in _STEPS or dims is None or given is None or dtype not in (*_FLOATS, *_INTS):
        raise _refusal(node, kind)
    axis = int(attribute(node, "axis", 0)) % len(dims)
    if any(dims[i] is None or dims[i] != given[i] for i in range(len(dims)) if i != axis):
        raise _refusal(node, kind)
    nodes, hit = hits(scope, node, axis)
    new = _unsqueeze(scope, updates, axis + 1, f"{label}/new")
    none = _neutral(scope, kind, dtype, label)
    wide = (*given[: axis + 1], *dims[axis:])  # [.., updates, targets, ..]
    args = [hit, new.output[0], none]
    picked = scope.node("Where", args, f"{label}/picked", dtype=dtype, dims=wide)
    total = _reduced(scope, picked.output[0], kind, axis, label)
    step = scope.replace(node, _STEPS[kind], [data, total.output[0]])
    return [*nodes, new, picked, total, step]


def hits(scope: Scope, node: NodeProto, axis: int) -> tuple[list[NodeProto], str]:
    """[.., updates, targets, ..]: whether an update goes to a target; negative indices count."""
    data, index, label = node.input[0], node.input[1], node.name
    nodes: list[NodeProto] = []

    def add(op_type: str, inputs: list[str], part: str, dtype: int = _T.INT64, **kw: Any) -> str:
        nodes.append(scope.node(op_type, inputs, f"{label}/{part}", dtype=dtype, **kw))
        return str(nodes[-1].output[0])

    rank = len(scope.dims(data) or ())
    zero, one = scope.constant(0, f"{label}/zero"), scope.constant(1, f"{label}/one")
    shape = add("Shape", [data], "shape")
    size = add("Gather", [shape, scope.constant(axis, f"{label}/axis")], "size", axis=0)
    steps = add("Range", [zero, size, one], "steps")
    form = [-1 if i == axis + 1 else 1 for i in range(rank + 1)]
    places = add("Reshape", [steps, scope.constant(form, f"{label}/form")], "places")
    signed = index
    if scope.dtype(index) != _T.INT64:
        signed = add("Cast", [index], "index", to=_T.INT64)
    nodes.append(_unsqueeze(scope, signed, axis + 1, f"{label}/column"))
    column = nodes[-1].output[0]
    hit = add("Equal", [column, places], "hit", _T.BOOL)
    if is_non_negative(scope, index):
        return nodes, hit
    behind = add("Sub", [places, size], "from_the_end")
    return nodes, add("Or", [hit, add("Equal", [column, behind], "hit", _T.BOOL)], "hits", _T.BOOL)


def _unsqueeze(scope: Scope, name: str, axis: int, base: str) -> NodeProto:
    dtype = scope.dtype(name)
    if scope.opset < 13:
        return scope.node("Unsqueeze", [name], base, dtype=dtype, axes=[axis])
    return scope.node("Unsqueeze", [name, scope.constant([axis], f"{base}_axis")], base,
                      dtype=dtype)  # fmt: skip


def _reduced(scope: Scope, name: str, kind: str, axis: int, label: str) -> NodeProto:
    op_type, dtype = _TOTALS[kind], scope.dtype(name)
    if scope.opset < (13 if kind == "add" else 18):
        return scope.node(op_type, [name], f"{label}/total", dtype=dtype, axes=[axis], keepdims=0)
    axes = scope.constant([axis], f"{label}/axes")
    return scope.node(op_type, [name, axes], f"{label}/total", dtype=dtype, keepdims=0)


def _neutral(scope: Scope, kind: str, dtype: int, label: str) -> str:
    """What changes nothing: 0 or 1, or the lowest or highest number of the type."""
    numpy = onnx.helper.tensor_dtype_to_np_dtype(dtype)
    if kind in ("add", "mul"):
        value: float = 0 if kind == "add" else 1
    elif dtype in _FLOATS:
        value = -np.inf if kind == "max" else np.inf
    else:
        limits = np.iinfo(numpy)
        value = limits.min if kind == "max" else limits.max
    return scope.constant(value, f"{label}/none", numpy.type)


def _refusal(node: NodeProto, kind: str) -> ModelError:
    return ModelError(
        f"node {node.name!r}: ScatterElements with reduction={kind}; the plug-in of CANN"
        f" {' and '.join(_DEAF)} ignores the reduction, and it is written out only over"
        " numbers, with updates as wide as the data on every other axis. Export without"
        " it, or hand over to a later CANN line"
    )
