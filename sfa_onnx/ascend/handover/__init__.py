"""Everything ATC needs for a model, in one folder."""

from __future__ import annotations

from sfa_onnx.ascend.handover.folder import (
    HandoverReport,
    compare_against,
    write,
)

__all__ = [
    "HandoverReport",
    "compare_against",
    "write",
]
