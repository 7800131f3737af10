"""What the worker does for us: onnx's C++ and onnxruntime, over bytes and arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import onnxruntime as ort
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from sfa_onnx.guard.serve import keep, kept

__all__ = ["evaluate", "infer_node", "infer_shapes", "inline", "open_stage", "run_stage"]

Array = NDArray[Any]


def infer_shapes(model: bytes, data_prop: bool) -> bytes:
    """Onnx's shape inference, serialised in and out."""
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=data_prop)
    return bytes(inferred.SerializeToString())


def infer_node(
    node: bytes, version: int, types: Mapping[str, bytes], data: Mapping[str, bytes],
    opsets: Mapping[str, int],
) -> dict[str, bytes]:  # fmt: skip
    """Onnx's shape inference of one node: output name -> serialised TypeProto."""
    proto = onnx.NodeProto.FromString(node)
    schema = onnx.defs.get_schema(proto.op_type, version, proto.domain)
    inferred = onnx.shape_inference.infer_node_outputs(
        schema,
        proto,
        {name: onnx.TypeProto.FromString(t) for name, t in types.items()},
        {name: onnx.TensorProto.FromString(t) for name, t in data.items()},
        opset_imports=[onnx.helper.make_opsetid(d, v) for d, v in opsets.items()],
    )
    return {name: bytes(kind.SerializeToString()) for name, kind in inferred.items()}


def inline(model: bytes, functions: Sequence[tuple[str, str]] | None) -> bytes:
    """Local functions inlined, all or those named by (domain, name)."""
    proto = onnx.ModelProto.FromString(model)
    if functions is None:
        done = onnx.inliner.inline_local_functions(proto)
    else:
        done = onnx.inliner.inline_selected_functions(proto, list(functions))
    return bytes(done.SerializeToString())


def open_stage(model: bytes, fallback: bool) -> tuple[int, str, list[tuple[str, str]]]:
    """Open a session of one thread without optimisations.

    Args:
        model: standard operators only.
        fallback: take onnx's reference implementation where onnxruntime has no kernel.

    Returns:
        Its number, "onnxruntime" or "onnx.reference", and (name, type) of its outputs.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    try:
        session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as first:  # no kernel in double, or an invalid graph
        if not fallback:
            raise
        try:
            return keep(ReferenceEvaluator(onnx.load_from_string(model))), "onnx.reference", []
        except Exception as second:
            raise RuntimeError(f"{first}; {second}") from second
    return keep(session), "onnxruntime", [(o.name, o.type) for o in session.get_outputs()]


def run_stage(number: int, outputs: Sequence[str], feeds: Mapping[str, Array]) -> list[Array]:
    """Run what `open_stage` opened."""
    results = kept(number).run(list(outputs), dict(feeds))
    return [np.asarray(r) for r in results]


def evaluate(
    model: bytes, outputs: Sequence[str] | None, feeds: Mapping[str, Array]
) -> list[Array]:
    """Run a model once in onnx's reference implementation."""
    done: Any = ReferenceEvaluator(onnx.load_from_string(model)).run(outputs, dict(feeds))
    return [np.asarray(r) for r in done]
