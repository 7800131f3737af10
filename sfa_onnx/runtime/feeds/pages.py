"""Inputs of a model whose caches were converted to pages: table, lengths and slots that agree."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ValueInfoProto

from sfa_onnx.kv_convert.interface import BLOCK_TABLE, LENGTHS_KV, SLOT_MAPPING, Interface
from sfa_onnx.runtime.feeds.sizes import Sizes, is_cache

__all__ = ["Pages", "plan_pages"]

Array = NDArray[Any]


@dataclass(frozen=True)
class Pages:
    """Sizes and arrays of one call.

    Attributes:
        sizes: symbols of the page inputs.
        arrays: block table [B, M], lengths [B] and slots [B * new rows].
    """

    sizes: dict[str, int]
    arrays: dict[str, Array]


def plan_pages(
    interface: Interface,
    inputs: Mapping[str, ValueInfoProto],
    sizes: Sizes,
    start: int | None,
    rng: np.random.Generator,
) -> Pages:
    """Pages for every sequence, none shared, and slots for the rows of this call.

    Args:
        interface: of the converted model (paged).
        inputs: its inputs.
        sizes: sizes chosen so far: batch, new rows and the caches that stayed float decide.
        start: the first row written, for caches of fixed length; None: behind the past.
        rng: orders the pages.
    """
    batch = sizes.shape(inputs[BLOCK_TABLE])[0]
    new = _new_rows(inputs, sizes, batch)
    packed = [c.packed_in for c in interface.caches if c.packed_in in inputs]
    floats = [n for n in inputs if n not in packed and n not in (BLOCK_TABLE, SLOT_MAPPING)]
    past = sizes.past([n for n in floats if is_cache(n)])
    used = past if start is not None else past + new
    columns = -(-used // interface.block_size)
    table = rng.permutation(batch * columns).reshape(batch, columns)
    where = (past if start is None else start) + np.arange(new)
    pages = table[:, where // interface.block_size] * interface.block_size
    arrays = {
        BLOCK_TABLE: table.astype(np.int32),
        LENGTHS_KV: np.full(batch, used, np.int32),
        SLOT_MAPPING: (pages + where % interface.block_size).astype(np.int32).ravel(),
    }
    wanted = {BLOCK_TABLE: (batch, columns), SLOT_MAPPING: (batch * new,)}
    wanted |= dict.fromkeys(packed, (batch * columns,))
    found = {
        dim.dim_param: size
        for name, dims in wanted.items()
        if name in inputs
        for dim, size in zip(inputs[name].type.tensor_type.shape.dim, dims, strict=False)
        if dim.dim_param
    }
    return Pages(found, {n: a for n, a in arrays.items() if n in inputs})


def _new_rows(inputs: Mapping[str, ValueInfoProto], sizes: Sizes, batch: int) -> int:
    """New rows per sequence: as the slots say, or the tokens of the call."""
    slots = inputs.get(SLOT_MAPPING)
    dim = None if slots is None else slots.type.tensor_type.shape.dim[0]
    if dim is not None and (dim.dim_value or len(sizes.uses.get(dim.dim_param, ())) > 1):
        return max(sizes.shape(slots)[0] // batch, 1) if slots is not None else 1
    ids = (v for n, v in inputs.items() if "ids" in n and "position" not in n)
    shapes = (sizes.shape(v) for v in ids)
    return next((s[1] for s in shapes if len(s) == 2), 1)
