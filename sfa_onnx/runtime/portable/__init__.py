"""Bodies of standard operators: models that run without our library."""

from __future__ import annotations

from sfa_onnx.runtime.portable.model import (
    has_body,
    make_portable,
    unfuse,
)

__all__ = [
    "has_body",
    "make_portable",
    "unfuse",
]
