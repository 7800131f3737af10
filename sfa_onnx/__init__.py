"""DeepSeek sparse attention: from an exported ONNX file to an Ascend NPU, proved at every step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sfa_onnx.operator.on_import import register_with_onnx
from sfa_onnx.version import __version__

if TYPE_CHECKING:
    from sfa_onnx.fusion import fuse
    from sfa_onnx.report import FuseReport, SiteReport, VerifyRecord, to_json
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

# Loaded on first use: onnx, onnxruntime and the passes take a second that the import need not.
_LAZY = {
    "fuse": "sfa_onnx.fusion",
    "unfuse": "sfa_onnx.unfusion",
    **dict.fromkeys(("FuseReport", "SiteReport", "VerifyRecord", "to_json"), "sfa_onnx.report"),
}

register_with_onnx()


def __getattr__(name: str) -> Any:
    """The names of `_LAZY`."""
    if name in _LAZY:
        import importlib

        value = getattr(importlib.import_module(_LAZY[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'sfa_onnx' has no attribute {name!r}")


def __dir__() -> list[str]:
    """All public names, loaded or not."""
    return sorted({*globals(), *__all__})
