"""The plug-in as a vendor package."""

from __future__ import annotations

from pathlib import Path

from sfa_onnx.errors import MissingError

__all__ = ["plugin_root"]


def plugin_root() -> Path:
    """The folder of the plug-in's sources: in the installed package, else in the source tree."""
    here = Path(__file__).parent
    for folder in (here / "plugin_sources", here.parents[1] / "kernels" / "ascend"):
        if (folder / "plugin" / "register.cc").is_file():
            return folder
    raise MissingError(f"the plug-in's sources are neither in {here} nor in a source tree above it")
