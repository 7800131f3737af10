"""Why the graph around a site cannot be run, in words for people."""

from __future__ import annotations

import re
from typing import Final

import onnx

from sfa_onnx.passes.candidate import Refusal

__all__ = ["first_line", "unknown_attribute", "unrunnable"]

# What onnxruntime puts in front of a failed condition: source file, line and signature.
_ORIGIN: Final = re.compile(r"/\S+\.(?:h|cc):\d+ \S+\([^)]*\)(?: const)? ")
_LONGEST: Final = 300


def first_line(error: Exception) -> str:
    """The first line of an error, without places in a runtime's own sources."""
    return _ORIGIN.sub("", str(error).strip().splitlines()[0])[:_LONGEST]


def unrunnable(model: onnx.ModelProto, errors: list[str], at: str) -> Refusal:
    """The refusal of a site whose graph `model` failed with `errors`, one per choice of sizes."""
    found = unknown_attribute(model)
    if found is None:
        return Refusal(f"the site could not be run at any probe size: {errors[0]}", at)
    node, name, opset = found
    return Refusal(
        f"{node.op_type} {node.name or node.output[0]} has the attribute {name}, which opset"
        f" {opset} does not know: the site cannot be run (onnxruntime rejects such a file, too)",
        node.output[0],
        f"remove {name}, or convert the model to the opset that has it",
    )


def unknown_attribute(model: onnx.ModelProto) -> tuple[onnx.NodeProto, str, int] | None:
    """(node, attribute, opset) of the first attribute that its operator does not have."""
    opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)
    for node in model.graph.node:
        if node.domain not in ("", "ai.onnx") or not onnx.defs.has(node.op_type):
            continue
        try:
            known = onnx.defs.get_schema(node.op_type, opset, "").attributes
        except onnx.defs.SchemaError:
            continue
        for attribute in node.attribute:
            if attribute.name not in known:
                return node, attribute.name, opset
    return None
