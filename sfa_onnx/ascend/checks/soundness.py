"""Before any rule of CANN: is the file a sound ONNX model, and do its shapes make sense?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import onnx

from sfa_onnx.ascend.checks.finding import Finding
from sfa_onnx.ascend.checks.view import ModelView
from sfa_onnx.files.empty_views import label, settled, unsettled
from sfa_onnx.files.sound import problems

__all__ = ["broken", "inferred", "open_and_empty"]

_TOLD: Final = 8  # problems that get a finding of their own
_AGAIN: Final = "export the model again, or repair it: no runtime loads it either"


def broken(model: onnx.ModelProto) -> Iterator[Finding]:
    """What breaks the rules of the format, whatever CANN makes of it.

    Raises:
        BudgetError: the functions would unfold into too many nodes.
    """
    found = problems(model)
    for text in found[:_TOLD]:
        yield Finding("not-sound", "error", "graph", text, hint=_AGAIN, evidence="model")
    if len(found) > _TOLD:
        text = f"{len(found) - _TOLD} more such faults"
        yield Finding("not-sound", "error", "graph", text, hint=_AGAIN, evidence="model")


def open_and_empty(view: ModelView) -> Iterator[Finding]:
    """Reshapes whose open size no number of elements tells."""
    nodes = [*unsettled(view.model)]
    told = settled(view.model)[1] if nodes else ()
    for node in nodes:
        mended = any(line.startswith(label(node)) for line in told)
        step = "`--fix` writes the size that its input has" if mended else "write the size"
        yield Finding(
            "reshape-open-empty",
            "error",
            "graph",
            "Reshape asks for -1 beside 0 (allowzero = 1), which ONNX forbids: a tensor without"
            " elements fits every size, and onnxruntime refuses the model",
            node.name or node.output[0],
            hint=step,
            evidence="model",
            fixable=mended,
        )


def inferred(view: ModelView) -> Iterator[Finding]:
    """Declared sizes below zero, and shapes that onnx's inference refuses or dies over."""
    for value in (*view.model.graph.input, *view.model.graph.output):
        sizes = [d.dim_value for d in value.type.tensor_type.shape.dim]
        if sizes and min(sizes) < 0:
            yield Finding(
                "negative-size",
                "warning",
                "graph",
                f"{value.name!r} is declared with the size {min(sizes)}; read here as an open one",
                hint="name the dim in the export (dynamic_axes, dynamic_shapes)",
                evidence="model",
            )
    if view.inference_problem:
        yield Finding(
            "no-inference",
            "warning",
            "graph",
            f"onnx infers no shapes for this model: {view.inference_problem}",
            hint="shapes that contradict each other are the usual reason; export the model again",
            evidence="model",
        )
