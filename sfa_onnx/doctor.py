"""`sfa-onnx doctor`: what this machine has, guarded so that no probe can break the report."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import sfa_onnx
from sfa_onnx.guard.doors import door

__all__ = ["DoctorReport", "Probe", "examine"]

State = Literal["ok", "warning", "missing", "info"]
PACKAGES = (
    ("numpy", True),
    ("ml_dtypes", True),
    ("onnx", True),
    ("onnxruntime", True),
    ("onnx-graphsurgeon", True),
    ("rich", True),
    ("torch", False),
    ("onnxscript", False),
    ("torch_npu", False),
)


@dataclass(frozen=True)
class Probe:
    """One thing looked at."""

    topic: str
    name: str
    state: State
    text: str


@dataclass(frozen=True)
class DoctorReport:
    """Everything `doctor` found; for people and for bug reports."""

    probes: tuple[Probe, ...]

    @property
    def healthy(self) -> bool:
        """Whether nothing that this package needs is missing."""
        return all(probe.state != "missing" for probe in self.probes)


@door
def examine(model: Path | None = None) -> DoctorReport:
    """Look at versions, the compiled library, an installed CANN and a model's weights."""
    groups: list[tuple[str, Callable[[], list[Probe]]]] = [
        ("python", _python),
        ("packages", _packages),
        ("library", _library),
        ("cann", _cann),
        ("torch names", _torch_names),
    ]
    if model is not None:
        groups.append(("weights", lambda: _weights(model)))
    return DoctorReport(tuple(probe for topic, look in groups for probe in _guarded(topic, look)))


def _guarded(topic: str, look: Callable[[], list[Probe]]) -> list[Probe]:
    try:
        return look()
    except Exception as error:
        state: State = "missing" if topic == "weights" else "warning"  # the model that was given
        return [Probe(topic, "probe failed", state, f"{type(error).__name__}: {error}")]


def _python() -> list[Probe]:
    where = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    own = Probe("python", "sfa-onnx", "ok", sfa_onnx.__version__)
    return [own, Probe("python", "python", "ok", where)]


def _packages() -> list[Probe]:
    probes = []
    for name, needed in PACKAGES:
        try:
            probes.append(Probe("packages", name, "ok", importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            state: State = "missing" if needed else "info"
            text = "not installed" if needed else "not installed (optional)"
            probes.append(Probe("packages", name, state, text))
    return probes


def _library() -> list[Probe]:
    import onnxruntime

    from sfa_onnx import runtime
    from sfa_onnx.errors import MissingError

    try:
        path, isa = runtime.library_path(), runtime.kernel_isa()
        runtime.register(onnxruntime.SessionOptions())
    except MissingError as error:
        return [Probe("library", "operator library", "missing", str(error))]
    return [
        Probe("library", "operator library", "ok", str(path)),
        Probe("library", "kernel path", "ok", isa),
    ]


def _cann() -> list[Probe]:
    from sfa_onnx.ascend import doctor

    return [Probe("cann", p.name, p.state, p.text) for p in doctor.examine_cann()]


def _torch_names() -> list[Probe]:
    """Whose each of the vendors' names is, once enabled beside what is installed."""
    if importlib.util.find_spec("torch") is None:
        return [Probe("torch names", "torch", "info", "not installed (optional)")]
    from sfa_onnx import torch as ours
    from sfa_onnx.torch import native

    if not ours.owners():
        ours.enable_ascend_names()
    way = "in C" if native.in_use() else "in Python (C ones need torch 2.10 and a lock)"
    probes = [Probe("torch names", "kernels", "info", way)]
    for package in ("torch_npu", "custom_ops"):
        if importlib.util.find_spec(package) is None:
            continue
        try:
            importlib.import_module(package)
        except ImportError as error:
            probes.append(Probe("torch names", package, "warning", str(error)))
    for name, owner in ours.owners().items():
        probes.append(Probe("torch names", name.replace("::", "."), "ok", owner))
    return probes


def _weights(model: Path) -> list[Probe]:
    from sfa_onnx.files.model import load_model
    from sfa_onnx.files.weights import weights_findings

    found = weights_findings(load_model(model), model.parent)
    lies: dict[bool, State] = {True: "warning", False: "missing"}  # some readers take it, or none
    return [
        Probe("weights", f.location, "ok" if f.ok else lies[bool(f.accepted_by)], f.advice)
        for f in found
    ]
