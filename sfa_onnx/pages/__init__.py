"""Reports as files that people read: one self-contained HTML page, or Markdown for a review."""

from __future__ import annotations

from sfa_onnx.pages.write import (
    page_form,
    write_comparison,
    write_fusion,
)

__all__ = [
    "page_form",
    "write_comparison",
    "write_fusion",
]
