"""Function bodies of the vendor's fused norms, so that any runtime takes files that hold them."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import onnx
from onnx import FunctionProto, ModelProto, NodeProto, TensorProto, helper

from sfa_onnx.files.onnx_attrs import graphs

__all__ = ["NORM_KEYS", "add_norm_bodies"]

_DOMAIN: Final = "npu"
_EPSILON: Final = 1e-6  # what CANN's parser plug-ins always write
_OPSET: Final = 18
_INPUTS: Final = {"NPURmsNorm": ("x", "gamma"), "NPUAddRmsNorm": ("x1", "x2", "gamma")}
_OUTPUTS: Final = {"NPURmsNorm": ("y", "rstd"), "NPUAddRmsNorm": ("y", "rstd", "x")}
NORM_KEYS: Final = frozenset((_DOMAIN, name) for name in _INPUTS)


def add_norm_bodies(model: ModelProto) -> None:
    """Add, in place, the body of every vendor norm in domain `npu`, of inner graphs, too."""
    present = {(f.domain, f.name) for f in model.functions}
    nodes = (n for graph in graphs(model.graph) for n in graph.node)
    used = {n.op_type for n in nodes if (n.domain, n.op_type) in NORM_KEYS}
    for name in sorted(used):
        if (_DOMAIN, name) not in present:
            model.functions.append(_body(name))


def _body(name: str) -> FunctionProto:
    """Y = x / sqrt(mean(x^2) + 1e-6) * gamma over gamma's axes, in float32; rstd; x = x1 + x2."""
    nodes: list[NodeProto] = []

    def add(op_type: str, inputs: list[str], output: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(op_type, inputs, [output], **attributes))
        return output

    def constant(value: Any, output: str) -> str:
        tensor = onnx.numpy_helper.from_array(np.asarray(value), output)
        return add("Constant", [], output, value=tensor)

    if name == "NPUAddRmsNorm":
        add("Add", ["x1", "x2"], "x")
    wide = add("Cast", ["x"], "x_wide", to=TensorProto.FLOAT)
    scale = add("Cast", ["gamma"], "gamma_wide", to=TensorProto.FLOAT)
    zero, one = constant(np.int64(0), "zero"), constant(np.int64(1), "one")
    rank = add("Size", [add("Shape", ["gamma"], "gamma_shape")], "gamma_rank")
    axes = add("Range", [add("Neg", [rank], "first"), zero, one], "axes")  # -rank .. -1
    square = add("Mul", [wide, wide], "square")
    mean = add("ReduceMean", [square, axes], "mean", keepdims=1)
    inside = add("Add", [mean, constant(np.float32(_EPSILON), "epsilon")], "inside")
    add("Reciprocal", [add("Sqrt", [inside], "root")], "rstd")
    unit = add("Mul", [wide, "rstd"], "unit")
    add("CastLike", [add("Mul", [unit, scale], "scaled"), "x"], "y")
    imports = [helper.make_opsetid("", _OPSET)]
    return helper.make_function(_DOMAIN, name, _INPUTS[name], _OUTPUTS[name], nodes, imports)
