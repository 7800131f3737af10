"""DeepSeek sparse attention: from an exported ONNX file to an Ascend NPU, proved at every step."""

from __future__ import annotations

from sfa_onnx import schema as _schema  # noqa: F401  (registers the operators with onnx)

__version__ = "0.1.0"
