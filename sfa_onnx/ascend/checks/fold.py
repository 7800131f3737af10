"""What a small integer value must be, when constants and static shapes alone decide it."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import onnx

from sfa_onnx.ascend.checks.view import ModelView, Scope
from sfa_onnx.errors import BudgetError, CrashError
from sfa_onnx.files.onnx_attrs import attribute
from sfa_onnx.guard.guarded import evaluate
from sfa_onnx.guard.worker import RemoteError

__all__ = ["provable"]

_FOLDABLE: Final = (
    frozenset(
        ("Add", "Cast", "Ceil", "Concat", "Div", "Equal", "Expand", "Floor", "Gather", "Greater")
    )
    | frozenset(
        ("Identity", "Less", "Max", "Min", "Mod", "Mul", "Neg", "Range", "ReduceMax", "ReduceMin")
    )
    | frozenset(("ReduceProd", "Reshape", "Slice", "Squeeze", "Sub", "Unsqueeze", "Where"))
)
_DEPTH: Final = 24

Array = np.ndarray[Any, Any]


def provable(view: ModelView, scope: Scope, name: str, depth: int = _DEPTH) -> Array | None:
    """The value of `name` if constants and static shapes decide it, else None."""
    known = view.constant(scope, name)
    at = view.resolve_scope(scope, name)
    node = at.producer(name) if at is not None else None
    if known is not None or at is None or node is None or depth == 0:
        return known
    if node.op_type in ("Shape", "Size"):
        return _shape(view, at, node)
    if node.domain not in ("", "ai.onnx") or node.op_type not in _FOLDABLE:
        return None
    if node.op_type in ("Gather", "Slice") and (part := _part(view, at, node, depth)) is not None:
        return part
    feeds: dict[str, Array] = {}
    for source in node.input:
        value = provable(view, at, source, depth - 1) if source else None
        if source and value is None:
            return None
        if value is not None:
            feeds[source] = value
    return _run(node, feeds, view.opset)


def _part(view: ModelView, scope: Scope, node: onnx.NodeProto, depth: int) -> Array | None:
    """Sizes taken out of a shape whose other sizes are open."""
    source = view.resolve_scope(scope, node.input[0])
    shape = source.producer(node.input[0]) if source is not None else None
    dims = view.shape(source, shape.input[0]) if source and shape and shape.input else None
    if shape is None or shape.op_type != "Shape" or shape.attribute or dims is None:
        return None
    feeds: dict[str, Array] = {node.input[0]: np.arange(len(dims))}  # places, instead of sizes
    for name in node.input[1:]:
        value = provable(view, scope, name, depth - 1) if name else None
        if value is None:
            return None
        feeds[name] = value
    places = _run(node, feeds, view.opset)
    sizes = [] if places is None else [dims[i] for i in places.reshape(-1)]
    numbers = [d for d in sizes if isinstance(d, int)]
    if places is None or len(numbers) != len(sizes):
        return None
    return np.asarray(numbers, np.int64).reshape(places.shape)


def _shape(view: ModelView, scope: Scope, node: onnx.NodeProto) -> Array | None:
    dims = view.shape(scope, node.input[0]) if node.input else None
    if dims is None:
        return None
    start, end = attribute(node, "start", 0), attribute(node, "end")
    part = dims[start:end] if node.op_type == "Shape" else dims
    numbers = [d for d in part if isinstance(d, int)]
    if len(numbers) != len(part):
        return None
    values = np.asarray(numbers, np.int64)
    return values if node.op_type == "Shape" else np.asarray(values.prod(), np.int64)


def _run(node: onnx.NodeProto, feeds: dict[str, Array], opset: int) -> Array | None:
    inputs = [
        onnx.helper.make_tensor_value_info(
            name, onnx.helper.np_dtype_to_tensor_dtype(value.dtype), list(value.shape)
        )
        for name, value in feeds.items()
    ]
    bare = onnx.NodeProto()
    bare.CopyFrom(node)
    bare.domain = ""
    outputs = [onnx.helper.make_empty_tensor_value_info(name) for name in node.output]
    graph = onnx.helper.make_graph([bare], "fold", inputs, outputs)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)])
    try:
        return evaluate(model, feeds)[0]
    except (RemoteError, CrashError, BudgetError):  # unproven is the safe answer
        return None
