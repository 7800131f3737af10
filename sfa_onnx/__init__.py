"""DeepSeek sparse attention: from an exported ONNX file to an Ascend NPU, proved at every step."""

from __future__ import annotations

__version__ = "0.1.0"
