"""Running and comparing models in onnxruntime with our operator library."""

from __future__ import annotations

from sfa_onnx.runtime.bound import BoundSession, bind_caches
from sfa_onnx.runtime.ort import kernel_isa, library_path, register, run, session

__all__ = [
    "BoundSession",
    "bind_caches",
    "kernel_isa",
    "library_path",
    "register",
    "run",
    "session",
]
