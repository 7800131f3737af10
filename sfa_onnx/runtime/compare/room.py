"""Whether a whole model fits this machine's memory."""

from __future__ import annotations

import math
import os
from typing import Final

from onnx import ModelProto, helper

from sfa_onnx.errors import ModelError

__all__ = ["check_room", "weight_bytes"]

_MEMORY_SHARE: Final = 0.6  # of this machine's memory for a model's weights


def weight_bytes(model: ModelProto) -> int:
    """Size of all weights as they are stored."""
    sizes = (
        math.prod(t.dims) * helper.tensor_dtype_to_np_dtype(t.data_type).itemsize
        for t in model.graph.initializer
    )
    return sum(sizes)


def check_room(model: ModelProto) -> None:
    """Refuse to run a whole model that would not fit: a killed process reports nothing."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    need = weight_bytes(model)
    if need > _MEMORY_SHARE * memory:
        raise ModelError(
            f"its weights take {need / 1e9:.0f} GB and this machine has {memory / 1e9:.0f} GB"
        )
