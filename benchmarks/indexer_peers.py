"""The indexer's work by other means, one thread each: onnxruntime's graphs and torch's matmuls.

Every peer selects the same keys; float types that a peer lacks are replaced by float32.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto as T
from onnx import helper as h

from sfa_onnx import runtime
from sfa_onnx.operator.op import LIGHTNING_INDEXER, QUANT_LIGHTNING_INDEXER

Inputs = dict[str, np.ndarray]
Run = Callable[[], Any]
OURS = "our operator in onnxruntime"
_TYPES = {"float32": T.FLOAT, "float16": T.FLOAT16, "bfloat16": T.BFLOAT16, "int8": T.INT8}


def _session(model: onnx.ModelProto) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return runtime.session(model, options)


def _model(nodes: list[onnx.NodeProto], inputs: Inputs, domain: str = "") -> onnx.ModelProto:
    infos = [
        h.make_tensor_value_info(n, _TYPES[a.dtype.name], list(a.shape)) for n, a in inputs.items()
    ]
    kind = T.INT32 if domain else T.INT64
    out = [h.make_tensor_value_info("sparse_indices", kind, None)]
    imports = [h.make_opsetid("", 18)] + ([h.make_opsetid(domain, 1)] if domain else [])
    graph = h.make_graph(nodes, "indexer", infos, out)
    return h.make_model(graph, opset_imports=imports, ir_version=9)


def _ours(inputs: Inputs, attributes: dict[str, Any]) -> Run:
    op = QUANT_LIGHTNING_INDEXER if inputs["query"].dtype == np.int8 else LIGHTNING_INDEXER
    names = [t.name if t.name in inputs else "" for t in op.inputs]
    while not names[-1]:
        names.pop()
    given = op.complete(attributes)
    node = h.make_node(op.name, names, ["sparse_indices"], domain=op.domain, **given)
    session = _session(_model([node], inputs, op.domain))
    return lambda: runtime.run(session, inputs)


def _as_float(inputs: Inputs) -> Inputs:
    """float32 inputs of the same scores."""
    floats = {n: inputs[n].astype(np.float32) for n in ("query", "key", "weights")}
    if "query_dequant_scale" in inputs:
        floats["weights"] *= inputs["query_dequant_scale"].astype(np.float32)
        floats["key"] *= inputs["key_dequant_scale"].astype(np.float32)[..., None]
    return floats


def _exported(inputs: Inputs, attributes: dict[str, Any]) -> Run:
    """The nodes that exporters write, in float32."""
    floats = _as_float(inputs)
    floats["key"] = floats["key"][:, :, 0]
    node = h.make_node
    nodes = [
        node("Einsum", ["query", "key"], ["products"], equation="bshd,btd->bsht"),
        node("Mul", ["products", "scale"], ["scaled"]),
        node("Relu", ["scaled"], ["positive"]),
        node("Unsqueeze", ["weights", "last"], ["column"]),
        node("Mul", ["positive", "column"], ["weighted"]),
        node("ReduceSum", ["weighted", "heads"], ["scores"], keepdims=0),
        node("TopK", ["scores", "count"], ["values", "sparse_indices"]),
    ]
    model = _model(nodes, floats)
    for name, value in (("last", [-1]), ("heads", [2]), ("count", [attributes["sparse_count"]])):
        model.graph.initializer.append(h.make_tensor(name, T.INT64, [1], value))
    model.graph.initializer.append(h.make_tensor("scale", T.FLOAT, [], [1.0]))
    session = _session(model)
    return lambda: session.run(["sparse_indices"], floats)


def _torch(inputs: Inputs, attributes: dict[str, Any], compiled: bool) -> Run:
    """Two matmuls and a top-k in the inputs' own type (int8: its scores by _int_mm)."""
    import torch

    torch.set_num_threads(1)
    count, int8 = attributes["sparse_count"], inputs["query"].dtype == np.int8

    def tensor(array: np.ndarray) -> Any:
        if array.dtype.name == "bfloat16":
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)

    query, key = tensor(inputs["query"][0, 0]), tensor(inputs["key"][0, :, 0])
    weights = tensor(_as_float(inputs)["weights"][0, 0] if int8 else inputs["weights"][0, 0])
    scale = torch.from_numpy(inputs["key_dequant_scale"][0, :, 0]).float() if int8 else None

    def select(query: Any, key: Any, weights: Any) -> Any:
        if not int8:
            return torch.topk(weights @ torch.relu(query @ key.T), count).indices
        scores = weights @ torch.relu(torch._int_mm(query, key.T)).float()
        return torch.topk(scores * scale, count).indices

    body = torch.compile(select) if compiled else select

    def run() -> Any:
        with torch.inference_mode():
            return body(query, key, weights)

    return run


def runs(inputs: Inputs, attributes: dict[str, Any]) -> dict[str, Run]:
    """Ours and every peer that is installed, by name."""
    out = {OURS: _ours(inputs, attributes)}
    out["onnxruntime, graph as exported (f32)"] = _exported(inputs, attributes)
    if importlib.util.find_spec("torch"):
        out["torch eager"] = _torch(inputs, attributes, False)
        out["torch compile"] = _torch(inputs, attributes, True)
    return out
