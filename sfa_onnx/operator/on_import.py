"""Register the operators with onnx when somebody imports onnx, and not before.

Importing onnx takes longer than everything else that `import sfa_onnx` and `sfa-onnx --help` do.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Final

__all__ = ["register_with_onnx"]

_ONNX: Final = "onnx"


def register_with_onnx() -> None:
    """Register now where onnx is loaded, else as soon as it is."""
    if _ONNX in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register() -> None:
    importlib.import_module("sfa_onnx.operator.schema")


class _Finder(importlib.abc.MetaPathFinder):
    """Finds onnx as anybody would, once, and has the operators registered behind it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The spec that the other finders give, with a loader that registers at its end."""
        del path, target
        if fullname != _ONNX:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(_ONNX)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    """onnx's own loader, and then the registration."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        """As the loader does."""
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Run onnx, hand its loader back to it, register."""
        self._loader.exec_module(module)
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        _register()
