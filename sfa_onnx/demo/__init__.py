"""The model behind `sfa-onnx demo`: one small sparse-attention decode layer.

`decode_layer.onnx` holds the graph only (`examples/export_demo.py` made it with torch); the
weights are drawn from a seed here, so that nothing random has to be shipped.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Final

import numpy as np
import onnx
from numpy.typing import NDArray

from sfa_onnx.errors import UsageError
from sfa_onnx.files.writing import atomic_write
from sfa_onnx.guard.doors import door

__all__ = ["MODEL", "PAST_LENGTH", "feeds", "materialise"]

MODEL: Final = Path(__file__).with_name("decode_layer.onnx")
PAST_LENGTH: Final = 2047  # with the new token: 2048 cached tokens, 256 of them selected

_RECIPE = re.compile(r"normal mean=(\S+) std=(\S+)")


@door
def materialise(folder: str | Path, seed: int = 0, *, force: bool = False) -> Path:
    """Write the demo model and its weights file into `folder`; the model's path.

    Weights are normal numbers whose mean and spread stand in each initializer's doc string; the
    same seed gives the same bytes everywhere.

    Raises:
        UsageError: a file of that name is there and `force` is not given.
    """
    folder = Path(folder)
    model = onnx.load(MODEL, load_external_data=False)
    stored = [t for t in model.graph.initializer if t.external_data]
    weights = folder / next(e.value for e in stored[0].external_data if e.key == "location")
    target = folder / MODEL.name
    for path in (weights, target):
        if path.exists() and not force:
            raise UsageError(
                f"{path} exists and is not overwritten; give another folder or force=True (--force)"
            )
    folder.mkdir(parents=True, exist_ok=True)
    _write(weights, _weight_bytes(stored, seed))
    _write(target, MODEL.read_bytes())
    return target


@door
def feeds(
    batch: int = 1, past_length: int = PAST_LENGTH, seed: int = 0, model: Path = MODEL
) -> dict[str, NDArray[np.generic]]:
    """Inputs for one decode step: a filled cache and the new token's hidden state.

    Cached rows have unit variance as normalised latents have, and a few stand out, so that
    attention has something to find. Shapes: hidden [B, 1, H], past_* [B, past_length, width],
    position [B] (int64).
    """
    rng = np.random.default_rng(seed)
    open_dims = {"batch": batch, "past_len": past_length}
    out: dict[str, NDArray[np.generic]] = {}
    for value in onnx.load(model, load_external_data=False).graph.input:
        kind = value.type.tensor_type
        shape = [open_dims.get(d.dim_param, d.dim_value) for d in kind.shape.dim]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
        if value.name == "position":
            out[value.name] = np.full(shape, past_length, dtype)
            continue
        rows = rng.standard_normal(shape)
        if value.name.startswith("past_"):
            rows *= np.exp(0.25 * rng.standard_normal((*shape[:2], 1)))
        out[value.name] = rows.astype(dtype)
    return out


def _weight_bytes(tensors: list[onnx.TensorProto], seed: int) -> bytearray:
    """The weights file: every tensor at its offset, each from a stream of its own."""
    blob = bytearray()
    for number, tensor in enumerate(tensors):
        place = {e.key: e.value for e in tensor.external_data}
        recipe = _RECIPE.match(tensor.doc_string)
        assert recipe, f"the packaged demo model has no recipe for {tensor.name}"
        mean, std = map(float, recipe.groups())
        rng = np.random.default_rng([seed, number])
        values = mean + std * rng.standard_normal(math.prod(tensor.dims), dtype=np.float32)
        data = values.astype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)).tobytes()
        blob.extend(bytes(int(place["offset"]) - len(blob)))
        blob.extend(data)
    return blob


def _write(path: Path, data: bytes | bytearray) -> None:
    """All or nothing."""
    atomic_write(path, bytes(data), force=True)
