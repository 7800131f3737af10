"""Which float type a comparison is judged by, and the same model in another precision.

Two models of different types are compared in the wider one; what the narrower one rounds off at
every step is the floor below which nothing can be measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper

from sfa_onnx.operator.op import QUANT_LIGHTNING_INDEXER
from sfa_onnx.runtime.elem_types import ElemTypes
from sfa_onnx.runtime.twin import FLOATS, twin, uses

__all__ = ["as_typed", "in_other_precision", "narrowest"]

Array = NDArray[Any]
_NARROW: Final = {"bfloat16": TensorProto.BFLOAT16, "float16": TensorProto.FLOAT16}


def narrowest(before: ModelProto, after: ModelProto) -> tuple[str | None, bool]:
    """The type whose bounds hold (None: each tensor's own), and whether one model alone has it."""
    for name, kind in _NARROW.items():
        has = [uses(model, kind) for model in (before, after)]
        if has[1] and not has[0] and kind == TensorProto.FLOAT16 and _scales_keys(after):
            continue  # the scales of int8 index keys are all there is of it
        if has[0] != has[1]:
            return name, True
        if all(has) and name == "bfloat16":
            return name, False
    return None, False


def _scales_keys(model: ModelProto) -> bool:
    return any(node.op_type == QUANT_LIGHTNING_INDEXER.name for node in model.graph.node)


def in_other_precision(
    model: ModelProto, dtype: str | None, *, narrower: bool, known: ElemTypes | None = None
) -> ModelProto:
    """The model as it would be with more, or with less, precision: their distance is the noise.

    Args:
        model: the judge, or a region of it.
        dtype: as `narrowest` says.
        narrower: the type is not the model's own: every result is rounded to it.
        known: types of the values of the model as it was.
    """
    if dtype is None:
        return twin(model, FLOATS, TensorProto.DOUBLE)
    if narrower:
        return twin(model, FLOATS, TensorProto.FLOAT, rounded=_NARROW[dtype], known=known)
    # The original rounds at every step; its float32 twin hardly at all.
    kinds = [_NARROW[dtype]]
    return twin(model, kinds, TensorProto.FLOAT, rounded=_NARROW[dtype], known=known)


def as_typed(feeds: Mapping[str, Array], types: ElemTypes) -> dict[str, Array]:
    """Float arrays in the type that a model declares for them."""
    return {name: _typed(array, types.of(name)) for name, array in feeds.items()}


def _typed(array: Array, kind: int | None) -> Array:
    if kind not in FLOATS or array.dtype.kind in "iub":
        return array
    return array.astype(helper.tensor_dtype_to_np_dtype(kind))
