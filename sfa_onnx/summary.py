"""What is inside a model file, read without its weights."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import TensorProto

from sfa_onnx.files.model import load_model
from sfa_onnx.files.onnx_attrs import graphs
from sfa_onnx.guard.doors import door
from sfa_onnx.operator.op import find_op

__all__ = ["Summary", "summarise", "value_text"]


@dataclass(frozen=True)
class Summary:
    """Header facts of one model; sizes in bytes."""

    ir_version: int
    producer: str
    opsets: dict[str, int]
    nodes: int
    op_counts: dict[str, int]
    functions: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    initializers: int
    weight_bytes: int  # as declared by the initializers; nothing is read
    external_files: tuple[str, ...]
    own_ops: dict[str, int]  # operators of ours already in the graph
    file_bytes: int = 0


@door
def summarise(path: Path) -> Summary:
    """Read the graph of `path` (never its weights) and count.

    Raises:
        ModelError: the file is missing or not an ONNX model.
    """
    model = load_model(path)
    graph = model.graph
    every = list(graphs(graph))
    nodes = [node for inner in every for node in inner.node]
    tensors = [tensor for inner in every for tensor in inner.initializer]
    counts = Counter(_op_name(node) for node in nodes)
    own = Counter(n.op_type for n in nodes if find_op(n.domain, n.op_type))
    return Summary(
        ir_version=model.ir_version,
        producer=f"{model.producer_name} {model.producer_version}".strip(),
        opsets={entry.domain or "ai.onnx": entry.version for entry in model.opset_import},
        nodes=len(nodes),
        op_counts=dict(counts.most_common()),
        functions=tuple(f"{f.domain}::{f.name}" for f in model.functions),
        inputs=tuple(value_text(value) for value in graph.input),
        outputs=tuple(value_text(value) for value in graph.output),
        initializers=len(tensors),
        weight_bytes=sum(_declared_bytes(tensor) for tensor in tensors),
        external_files=tuple(sorted(_external_files(tensors))),
        own_ops=dict(own),
        file_bytes=Path(path).stat().st_size,
    )


def value_text(value: onnx.ValueInfoProto) -> str:
    """'latent float16[batch, 4096, 512]': a graph input or output in one line."""
    tensor = value.type.tensor_type
    name = TensorProto.DataType.Name(tensor.elem_type).lower()
    if not tensor.HasField("shape"):
        return f"{value.name} {name}[?]"
    dims = ", ".join(_dim_text(dim) for dim in tensor.shape.dim)
    return f"{value.name} {name}[{dims}]"


def _dim_text(dim: onnx.TensorShapeProto.Dimension) -> str:
    return str(dim.dim_value) if dim.HasField("dim_value") else dim.dim_param or "?"


def _op_name(node: onnx.NodeProto) -> str:
    return f"{node.domain}::{node.op_type}" if node.domain else node.op_type


def _declared_bytes(tensor: TensorProto) -> int:
    count = 1
    for dim in tensor.dims:
        count *= dim
    try:
        return count * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    except (KeyError, ValueError):  # a type this onnx does not know: count it as bytes
        return count


def _external_files(tensors: list[TensorProto]) -> set[str]:
    return {
        entry.value
        for tensor in tensors
        if tensor.data_location == TensorProto.EXTERNAL
        for entry in tensor.external_data
        if entry.key == "location"
    }
