"""Inputs and outputs as files in graph order: written for the device, read back for comparing."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import ml_dtypes
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto

from sfa_onnx.errors import ModelError, UsageError
from sfa_onnx.files.json_form import form_problem, parsed
from sfa_onnx.files.writing import atomic_stream, atomic_write

__all__ = ["read_arrays", "write_inputs", "write_output_names"]

Array = NDArray[Any]
_UNSAFE = re.compile(r"[^A-Za-z0-9_.-]+")
# Types NumPy files cannot name travel as integers of their width.
_NARROW: dict[int, str] = {  # older onnx calls these float32
    TensorProto.BFLOAT16: "bfloat16",
    TensorProto.FLOAT8E4M3FN: "float8_e4m3fn",
    TensorProto.FLOAT8E5M2: "float8_e5m2",
}
_CARRIERS = {"bfloat16": "uint16", "float8_e4m3fn": "uint8", "float8_e5m2": "uint8"}
_LISTING: Final = [{"name": str, "file": str, "dtype": str, "numpy": str, "shape": [None]}]


def _file(index: int, name: str, suffix: str) -> str:
    return f"{index:03d}_{_UNSAFE.sub('_', name)}{suffix}"


def _entry(index: int, name: str, dtype: str, shape: list[Any]) -> dict[str, Any]:
    return {
        "name": name,
        "dtype": dtype,
        "numpy": _CARRIERS.get(dtype, dtype),
        "shape": shape,
        "file": _file(index, name, ".bin"),
    }


def write_inputs(model: ModelProto, feeds: Mapping[str, Array], folder: Path) -> list[Path]:
    """Write every graph input as .bin and .npy, numbered in graph order, and inputs.json.

    Raises:
        UsageError: an input of the graph has no array.
    """
    constants = {t.name for t in model.graph.initializer}
    names = [v.name for v in model.graph.input if v.name not in constants]
    missing = [n for n in names if n not in feeds]
    if missing:
        raise UsageError(f"inputs: no array for {', '.join(missing)}; the graph wants {names}")
    folder.mkdir(parents=True, exist_ok=True)
    entries, written = [], []
    for index, name in enumerate(names):
        array = np.ascontiguousarray(feeds[name])
        entry = _entry(index, name, str(array.dtype), list(np.shape(feeds[name])))
        carried = array.view(entry["numpy"]).reshape(entry["shape"])
        path = folder / entry["file"]
        atomic_write(path, carried.tobytes(), force=True)
        with atomic_stream(path.with_suffix(".npy"), force=True) as stream:
            np.save(stream, carried)
        entries.append(entry)
        written += [path, path.with_suffix(".npy")]
    listing = json.dumps(entries, indent=2) + "\n"
    atomic_write(folder / "inputs.json", listing.encode(), force=True)
    return [*written, folder / "inputs.json"]


def write_output_names(model: ModelProto, path: Path) -> Path:
    """outputs.json: name, type and shape of every graph output, in order."""
    entries = []
    for index, value in enumerate(model.graph.output):
        tensor = value.type.tensor_type
        if not tensor.elem_type:
            raise ModelError(
                f"output {value.name!r} has no element type in the file; declare it, e.g. by"
                " onnx.shape_inference.infer_shapes, and hand the model over again"
            )
        dtype = _NARROW.get(tensor.elem_type) or str(
            np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type))
        )
        shape = [
            d.dim_value if d.HasField("dim_value") else d.dim_param or "?" for d in tensor.shape.dim
        ]
        entries.append(_entry(index, value.name, dtype, shape))
    atomic_write(path, (json.dumps(entries, indent=2) + "\n").encode(), force=True)
    return path


def read_arrays(folder: Path, listing: str) -> dict[str, Array]:
    """Read what `listing` (inputs.json, outputs.json) names, with the types of the graph.

    Raises:
        UsageError: the listing or one of its files is missing, or not of its form.
    """
    path = folder / listing
    if not path.is_file():
        raise UsageError(f"{path}: not found; expected the folder that run_om.py filled")
    try:
        entries = parsed(path.read_bytes())
    except ValueError as error:
        raise UsageError(f"{path}: not a listing of arrays: {error}") from error
    if problem := form_problem(entries, _LISTING, "the listing"):
        raise UsageError(f"{path}: not a listing of arrays: {problem}; run run_om.py again")
    return {entry["name"]: _read_array(folder, listing, entry) for entry in entries}


def _read_array(folder: Path, listing: str, entry: dict[str, Any]) -> Array:
    data = folder / entry["file"]
    if data.parent != folder or "\0" in entry["file"]:
        raise UsageError(f"{listing}: {entry['file']!r} is no file name; run run_om.py again")
    if not data.is_file():
        raise UsageError(f"{data}: not found, though {listing} names it")
    try:
        kind = entry["dtype"]
        dtype = np.dtype(getattr(ml_dtypes, kind) if kind in _CARRIERS else kind)
        stored = np.dtype(entry["numpy"])
        flat: Array = np.fromfile(data, dtype=stored).view(dtype)
        known = all(type(d) is int for d in entry["shape"])
        return flat.reshape(entry["shape"]) if known else flat
    except (TypeError, ValueError) as error:
        raise UsageError(f"{data}: is not what {listing} says of it: {error}") from error
