"""What a reduction reduces: an element of its input, over labels of its own."""

from __future__ import annotations

import numpy as np
import onnx

from sfa_onnx.files.onnx_attrs import attributes
from sfa_onnx.passes.axes.asking import Tracing
from sfa_onnx.passes.axes.expr import Expr, Label, fresh
from sfa_onnx.passes.axes.named import axes_of
from sfa_onnx.passes.axes.steps import Ref

__all__ = ["reduced"]


def reduced(tracer: Tracing, node: onnx.NodeProto, ref: Ref) -> tuple[Ref, list[Label]] | None:
    """The element that a reduction to `ref` runs over, and its labels; None: axes are unknown."""
    source, a = node.input[0], attributes(node)
    shape, given = tracer.shape(source), a.get("axes")
    if len(node.input) > 1 and node.input[1]:
        known = tracer.sizes.value(node.input[1])
        if known is None:
            return None
        given = np.asarray(known).reshape(-1).tolist()
    if not given and a.get("noop_with_empty_axes"):
        return None
    axes = axes_of(node, given or range(len(shape)), len(shape))
    labels = [fresh("r", shape[axis]) for axis in axes]
    own = list(ref.coords)
    for axis, label in zip(axes, labels, strict=True):
        own[axis : axis + int(a.get("keepdims", 1))] = [Expr.of(label)]
    return Ref(source, tuple(own)), labels
