"""Inputs of a model whose caches were converted to pages: table, lengths and slots that agree."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ValueInfoProto

from sfa_onnx.kv_convert.interface import BLOCK_TABLE, LENGTHS_KV, SLOT_MAPPING, Interface
from sfa_onnx.passes.shapes.dims import size_of
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
    known: Mapping[str, int],
    rng: np.random.Generator,
) -> Pages:
    """Pages for every sequence, none shared, and slots for the rows of this call.

    Args:
        interface: of the converted model (paged).
        inputs: its inputs.
        sizes: sizes chosen so far: batch, new rows and the caches that stayed float decide.
        start: the first row written, for caches of fixed length; None: behind the past.
        known: symbols that the caller fixed.
        rng: orders the pages.
    """
    batch = sizes.shape(inputs[BLOCK_TABLE])[0]
    new = _new_rows(interface, inputs, sizes, batch)
    packed = [c.packed_in for c in interface.caches if c.packed_in in inputs]
    floats = [n for n in inputs if n not in packed and n not in (BLOCK_TABLE, SLOT_MAPPING)]
    past = sizes.past([n for n in floats if is_cache(n)])
    size = interface.block_size
    columns = _given(inputs[BLOCK_TABLE], 1, known) or -(-(past + (start is None) * new) // size)
    blocks = [_given(inputs[name], 0, known) for name in packed]
    count = next((n for n in blocks if n), batch * columns)
    used = min(past if start is not None else past + new, columns * size)
    table = np.resize(rng.permutation(count), (batch, columns))
    where = np.maximum((used - new if start is None else start) + np.arange(new), 0)
    arrays = {
        BLOCK_TABLE: table.astype(np.int32),
        LENGTHS_KV: np.full(batch, used, np.int32),
        SLOT_MAPPING: (table[:, where // size] * size + where % size).astype(np.int32).ravel(),
    }
    wanted = {BLOCK_TABLE: (batch, columns), SLOT_MAPPING: (batch * new,)}
    wanted |= dict.fromkeys(packed, (count,))
    found = {
        dim.dim_param: length
        for name, dims in wanted.items()
        if name in inputs
        for dim, length in zip(inputs[name].type.tensor_type.shape.dim, dims, strict=False)
        if dim.dim_param
    }
    return Pages(found, {n: a for n, a in arrays.items() if n in inputs})


def _given(value: ValueInfoProto, axis: int, known: Mapping[str, int]) -> int:
    """The size of a dim that the file or the caller fixes; 0 for an open one."""
    dim = value.type.tensor_type.shape.dim[axis]
    return int(dim.dim_value or size_of(dim.dim_param, known) or 0)


def _new_rows(
    interface: Interface, inputs: Mapping[str, ValueInfoProto], sizes: Sizes, batch: int
) -> int:
    """New rows per sequence: as the conversion noted, or as the slots say."""
    noted = size_of(interface.tokens, sizes.sizes)
    if noted:
        return noted
    slots = inputs.get(SLOT_MAPPING)
    return 1 if slots is None else max(sizes.shape(slots)[0] // batch, 1)
