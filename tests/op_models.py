"""One-node models around our operators, and the mark for tests that need the compiled library."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper

from sfa_onnx import runtime
from sfa_onnx.errors import MissingError
from sfa_onnx.operator.op import KV_CACHE_PACK, OpContract
from tests.attention_cases import BF16, Case


def _library() -> str:
    try:
        return str(runtime.library_path())
    except MissingError:
        return ""


def needs_library(test: Any) -> Any:
    """Skip, saying so, where the operator library was not built."""
    marked = pytest.mark.skipif(not _library(), reason="the operator library was not built")(test)
    return pytest.mark.kernel(marked)


def elem_type(dtype: Any) -> int:
    """The onnx element type; onnx 1.17 does not know ml_dtypes."""
    if dtype == BF16:
        return onnx.TensorProto.BFLOAT16
    return helper.np_dtype_to_tensor_dtype(np.dtype(dtype))


def op_model(case: Case, opset: int = 18, symbolic: bool = True) -> onnx.ModelProto:
    """A model that is the case's one node; `value` is the key again, dims are symbols."""
    names = {t.name: t.name if t.name in case.inputs else "" for t in case.op.inputs}
    if "value" in names:
        names["value"] = "key"
    arrays = {n: a for n, a in case.inputs.items() if n != "value"}
    inputs = [
        helper.make_tensor_value_info(
            n,
            elem_type(a.dtype),
            [f"{n}_{i}" for i in range(a.ndim - 1)] + [a.shape[-1]] if symbolic else a.shape,
        )
        for n, a in arrays.items()
    ]
    return node_model(case.op, list(names.values()), inputs, case.attributes, opset)


def node_model(
    op: OpContract,
    names: list[str],
    inputs: list[onnx.ValueInfoProto],
    attributes: dict[str, Any],
    opset: int = 18,
) -> onnx.ModelProto:
    while names and not names[-1]:
        names.pop()
    count = 3 if attributes.get("return_softmax_lse") else 1
    results = [t.name for t in op.outputs[:count]]
    node = helper.make_node(op.name, names, results, name="site", domain=op.domain, **attributes)
    first = inputs[0].type.tensor_type
    query = next((i.type.tensor_type for i in inputs if i.name == "query"), first)
    kind = onnx.TensorProto.INT8 if op.name == "KvCachePack" else query.elem_type
    dims = [None] * len(query.shape.dim)
    kinds = [kind, *[onnx.TensorProto.FLOAT] * (count - 1)]
    outputs = [
        helper.make_tensor_value_info(name, elem, dims)
        for name, elem in zip(results, kinds, strict=True)
    ]
    graph = helper.make_graph([node], "one_node", inputs, outputs)
    imports = [helper.make_opsetid("", opset), helper.make_opsetid(op.domain, op.version)]
    return helper.make_model(graph, opset_imports=imports, ir_version=9)


def pack_model(arrays: dict[str, Any], opset: int = 18, **attributes: Any) -> onnx.ModelProto:
    """A model with one `KvCachePack` for these arrays."""
    inputs = [
        helper.make_tensor_value_info(n, elem_type(a.dtype), [f"{n}{i}" for i in range(a.ndim)])
        for n, a in arrays.items()
    ]
    names = [t.name if t.name in arrays else "" for t in KV_CACHE_PACK.inputs]
    return node_model(KV_CACHE_PACK, names, inputs, attributes, opset)


def plain(model: onnx.ModelProto) -> ort.InferenceSession:
    """A session without our library: the function body runs."""
    onnx.checker.check_model(model, full_check=True)
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
