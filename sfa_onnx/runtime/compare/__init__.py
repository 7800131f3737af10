"""Is the fused model the same? Each fused site alone, then the whole graph."""

from __future__ import annotations

from sfa_onnx.runtime.compare.run import (
    compare,
)

__all__ = [
    "compare",
]
