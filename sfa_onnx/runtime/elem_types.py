"""Element types of values in a model: declared ones first, inferred ones when needed."""

from __future__ import annotations

import onnx
from onnx import ModelProto

from sfa_onnx.files.onnx_attrs import subgraphs
from sfa_onnx.guard.guarded import infer_shapes

__all__ = ["ElemTypes", "light_copy"]

_LARGE = 1024  # bytes; shape inference needs no initializer beyond this


class ElemTypes:
    """Looks up onnx element types; runs shape inference at most once, on a copy without weights."""

    def __init__(self, model: ModelProto) -> None:
        self._model = model
        self._declared = _declared(model)
        self._inferred: dict[str, int] | None = None

    def of(self, value: str) -> int | None:
        """The type of `value`; None when it is unknown."""
        if value not in self._declared and self._inferred is None:
            self._inferred = self._infer()
        return self._declared.get(value) or (self._inferred or {}).get(value)

    def _infer(self) -> dict[str, int]:
        """What onnx infers; nothing for a model that it refuses."""
        inferred, _ = infer_shapes(light_copy(self._model))
        return {} if inferred is None else _declared(inferred)


def light_copy(model: ModelProto) -> ModelProto:
    """A copy in which initializers beyond 1 KiB have lost their bytes."""
    light = ModelProto()
    light.CopyFrom(model)
    for tensor in light.graph.initializer:
        if tensor.ByteSize() > _LARGE:
            kept = onnx.TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
            tensor.CopyFrom(kept)
    return light


def _declared(model: ModelProto) -> dict[str, int]:
    """Types stated anywhere in the model, sub-graphs included."""
    types: dict[str, int] = {}
    stack = [model.graph]
    while stack:
        graph = stack.pop()
        types |= {t.name: t.data_type for t in graph.initializer}
        for info in (*graph.input, *graph.output, *graph.value_info):
            if info.type.tensor_type.elem_type:
                types[info.name] = info.type.tensor_type.elem_type
        for node in graph.node:
            stack += subgraphs(node)
    return types
