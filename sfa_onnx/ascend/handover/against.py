"""Outputs of a device against the model in onnxruntime, with the device's roundings in mind."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from sfa_onnx.ascend.flavour.nodes import is_ours
from sfa_onnx.ascend.handover.data import read_arrays
from sfa_onnx.errors import UsageError
from sfa_onnx.files.model import load_model
from sfa_onnx.operator import reference
from sfa_onnx.operator.contract import Rounding

if TYPE_CHECKING:
    from sfa_onnx.runtime.compare.difference import CompareReport

__all__ = ["compare_against", "npu_rounding"]

Array = NDArray[Any]
_FACTOR = 4.0  # times the rounding of one operator: several layers, other kernels around it


@functools.cache
def npu_rounding(dtype: str) -> float:
    """Relative error of the NPU kernel's roundings, by the reference's two modes on one problem.

    Args:
        dtype: "bfloat16" or "float16".
    """
    rng = np.random.default_rng(0)
    kind: Any = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float16
    query = rng.standard_normal((1, 2, 8, 512)).astype(kind)
    key = rng.standard_normal((1, 128, 1, 512)).astype(kind)
    rope = [rng.standard_normal((1, n, h, 64)).astype(kind) for n, h in ((2, 8), (128, 1))]
    indices = np.tile(np.arange(64, dtype=np.int32), (1, 2, 1, 1))
    attributes = {"scale_value": 576**-0.5, "layout_query": "BSND", "layout_kv": "BSND"}
    attributes |= {"sparse_mode": 0, "sparse_block_size": 1, "attention_mode": 2}
    exact, npu = (
        reference.sparse_flash_attention(
            query, key, key, indices, None, None, None, *rope, mode=mode, **attributes
        ).astype(np.float64)
        for mode in ("exact", "npu")
    )
    return float(np.linalg.norm(npu - exact) / np.linalg.norm(exact))


def compare_against(
    model: str | Path,
    folder: str | Path,
    *,
    atol: float | None = None,
    rtol: float | None = None,
    rounding: Rounding = "npu",
) -> CompareReport:
    """Run a model in onnxruntime on the device's inputs and compare with the device's outputs.

    Args:
        model: the judge: the fused model or the original.
        folder: a hand-over folder after run_om.py (inputs/, outputs/), or its outputs/ folder.
        atol: absolute bound; default by type, widened by the NPU kernel's own roundings.
        rtol: relative bound; default by type.
        rounding: of our operators in onnxruntime; the device's own unless set otherwise.

    Raises:
        UsageError: the folder lacks inputs or outputs, or an output's size is not the model's.
    """
    from sfa_onnx import runtime
    from sfa_onnx.runtime.compare.difference import CompareReport, OutputRow

    path, root = Path(model), Path(folder)
    root = root.parent if (root / "outputs.json").is_file() and root.name == "outputs" else root
    feeds = read_arrays(root / "inputs", "inputs.json")
    device = read_arrays(root / "outputs", "outputs.json")
    judged = runtime.run(path, feeds, rounding=rounding)
    report = CompareReport(str(path), str(root))
    extra = _extra(load_model(path), report) if atol is None else 0.0
    for name, mine in judged.items():
        if name not in device:
            report.notes.append(f"output {name}: the device gave none")
            report.missing = f"the device gave no output {name}"
            continue
        if device[name].size != mine.size:
            raise UsageError(
                f"output {name}: the device gave {device[name].size} elements, the model"
                f" {list(mine.shape)}; were both run on the same inputs?"
            )
        theirs = device[name].reshape(mine.shape)
        report.outputs.append(OutputRow(name, _difference(mine, theirs, atol, rtol, extra)))
    return report


def _extra(model: Any, report: CompareReport) -> float:
    """The relative error to allow for the NPU's roundings; 0 without a node of ours."""
    if not any(is_ours(node) for node in model.graph.node):
        return 0.0
    worst = max(npu_rounding("bfloat16"), npu_rounding("float16"))
    report.notes.append(
        f"tolerance: {_FACTOR:g} x {worst:.2g} (the NPU kernel's roundings, by the reference)"
    )
    return _FACTOR * worst


def _difference(
    mine: Array, theirs: Array, atol: float | None, rtol: float | None, extra: float
) -> Any:
    from sfa_onnx.runtime.compare.difference import measure

    plain = measure(mine, theirs, atol=atol, rtol=rtol)
    if plain.passed or not extra or mine.dtype.kind in "iub":
        return plain
    wide = mine.astype(np.float64)
    rms = float(np.sqrt(np.mean(wide * wide))) if wide.size else 0.0
    relative = max(plain.rtol, extra) if rtol is None else rtol
    return measure(mine, theirs, atol=max(plain.atol, extra * rms), rtol=relative)
