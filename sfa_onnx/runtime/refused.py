"""What is behind a refusal of onnxruntime that the file alone explains, and what to do."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx

from sfa_onnx.files.onnx_attrs import attribute

__all__ = ["next_step"]

_EMPTY = "Product cannot be 0 in combination with -1"


def next_step(text: str, model: onnx.ModelProto) -> str:
    """A sentence behind onnxruntime's own message; "" where it says all there is to say.

    Args:
        text: onnxruntime's message.
        model: what it refused; weights need not be there.
    """
    if _EMPTY not in text:
        return ""
    names = ", ".join(_open_and_empty(model.graph))
    return (
        f". {names or 'A Reshape'} asks for -1 beside 0 (allowzero = 1), which ONNX forbids: of a"
        " tensor without elements, as a rope of width 0 is, no size can be inferred. The exporter"
        " wrote it where one open size (the batch of a single-token step) was left. Write that"
        " size into the node, by Shape of its input or as a number, or export several tokens"
    )


def _open_and_empty(graph: onnx.GraphProto) -> Iterator[str]:
    """Reshapes whose constant target holds both."""
    known = {t.name: t for t in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant":
            value = attribute(node, "value")
            known |= {node.output[0]: value} if isinstance(value, onnx.TensorProto) else {}
        if node.op_type != "Reshape" or not attribute(node, "allowzero", 0):
            continue
        target = known.get(node.input[1])
        if target is None or target.data_location == onnx.TensorProto.EXTERNAL:
            continue
        sizes = onnx.numpy_helper.to_array(target)
        if np.any(sizes == 0) and np.any(sizes == -1):
            yield f"{node.name or node.output[0]} (Reshape)"
