"""DeepSeek sparse attention: from an exported ONNX file to an Ascend NPU, proved at every step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sfa_onnx.operator import schema as _schema  # noqa: F401  (registers the operators with onnx)
from sfa_onnx.report import FuseReport, SiteReport, VerifyRecord, to_json
from sfa_onnx.version import __version__

if TYPE_CHECKING:
    from sfa_onnx.fusion import fuse
    from sfa_onnx.unfusion import unfuse

__all__ = [
    "FuseReport",
    "SiteReport",
    "VerifyRecord",
    "__version__",
    "fuse",
    "to_json",
    "unfuse",
]

# Loaded on first use: onnxruntime and the passes take a second that `import sfa_onnx` need not.
_LAZY = {"fuse": "sfa_onnx.fusion", "unfuse": "sfa_onnx.unfusion"}


def __getattr__(name: str) -> Any:
    """The functions of `_LAZY`."""
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'sfa_onnx' has no attribute {name!r}")
