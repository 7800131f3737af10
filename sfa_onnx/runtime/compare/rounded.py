"""What a site must give once its cache is int8: the original's site on int8-rounded latents.

Quantising works row by row and tile by tile, so rounding the latents as they stand in the original
(the whole cache that a run leaves, or the rows before they are packed) gives what packed rows hold.
The converted site, on the same inputs, must then agree within the operator's own tolerance; how far
both are from the unrounded original is the loss that int8 costs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, helper

from sfa_onnx.errors import UsageError
from sfa_onnx.files.onnx_attrs import attribute, attributes
from sfa_onnx.kv_convert.interface import CacheEntry, Interface
from sfa_onnx.operator import kv_cache, reference
from sfa_onnx.operator.contract import Rounding
from sfa_onnx.operator.op import (
    QUANT_LIGHTNING_INDEXER,
    SPARSE_FLASH_ATTENTION,
    SPARSE_FLASH_ATTENTION_ANTIQUANT,
    find_op,
)
from sfa_onnx.operator.reference_indexer import quant_lightning_indexer
from sfa_onnx.runtime.compare.extract import Site

__all__ = [
    "in_order",
    "is_selection",
    "judge",
    "other_keys",
    "packs_floats",
    "packs_keys",
    "relative_distance",
    "rounded_values",
]

Array = NDArray[Any]


def packs_floats(node: NodeProto) -> bool:
    """Whether a node quantises (rather than copies int8 and scales)."""
    return node.op_type == "KvCachePack" and not any(node.input[2:3])


def packs_keys(node: NodeProto) -> bool:
    """Whether a node selects by int8 keys: others than the original does, where scores are close.

    What is computed from such a selection is held against the reference on its own inputs.
    """
    return node.op_type == QUANT_LIGHTNING_INDEXER.name


def rounded_values(
    model: ModelProto, site: Site, interface: Interface | None, values: Mapping[str, Array]
) -> dict[str, Array]:
    """The values entering `site` that the converted model quantises, rounded; {} when untold.

    Args:
        model: the converted model.
        site: one of its sites.
        interface: how its caches differ from the original's; None: not at all.
        values: what enters the original's site, and what else is known of its run, by name.
    """
    if interface is not None and interface.caches:
        packed = [c for c in interface.caches if c.kind == "packed"]
        names = ((c, n) for c in packed for n in (c.latent_out or c.latent_in,))
        return {n: _round_cache(values[n], c) for c, n in names if n in values}
    nodes = [model.graph.node[i] for i in site.after]
    casts = {n.output[0]: n for n in nodes if n.op_type == "Cast"}
    rounded: dict[str, Array] = {}
    for node in filter(packs_floats, nodes):
        if len(node.input) > 3 and node.input[3]:
            return {}  # a clipped tile's value depends on an input of its own
        name, kind = node.input[0], None
        if name not in values and name in casts:
            kind = attribute(casts[name], "to")
            name = casts[name].input[0]
        if name not in values:
            return {}
        tile = attribute(node, "tile_size", 128)
        dtype = values[name].dtype if kind is None else helper.tensor_dtype_to_np_dtype(kind)
        rounded[name] = _round(values[name], dtype, tile)
    return rounded


def _round(x: Array, dtype: Any, tile: int) -> Array:
    """Quantised and back, in x's own type; `dtype` is what the operator is given."""
    q, scale = kv_cache.quantise(x.astype(dtype), tile)
    return kv_cache.dequantise(q, scale).astype(x.dtype)


def _round_cache(x: Array, cache: CacheEntry) -> Array:
    """A float cache, latents first along its C axis (rope behind them when it is joint)."""
    axis = cache.latent_axes.index("C")
    moved = np.moveaxis(x, axis, -1).copy()
    latent = np.ascontiguousarray(moved[..., : cache.nope])
    moved[..., : cache.nope] = _round(latent, x.dtype, cache.tile)
    return np.moveaxis(moved, -1, axis)


def judge(node: NodeProto, values: Mapping[str, Array], rounding: Rounding = "exact") -> Array:
    """The reference's first output for one node on its own inputs; a selection `in_order`."""
    op = find_op(node.domain, node.op_type)
    attrs = attributes(node)
    inputs: list[Any] = [values[n] if n else None for n in node.input]
    if op is SPARSE_FLASH_ATTENTION_ANTIQUANT:
        return reference.sparse_flash_attention_antiquant(*inputs, mode=rounding, **attrs)
    if op is SPARSE_FLASH_ATTENTION:
        return reference.sparse_flash_attention(*inputs, mode=rounding, **attrs)
    if op is QUANT_LIGHTNING_INDEXER:
        return in_order(quant_lightning_indexer(*inputs, mode=rounding, **attrs))
    raise UsageError(f"{node.op_type} has no reference to judge by")


def in_order(x: Array) -> Array:
    """A selection's rows by the number of the key: which keys, not in which order."""
    return np.sort(x, axis=-1) if x.dtype.kind in "iu" else x


def is_selection(values: Mapping[str, Array]) -> bool:
    """Whether a site gives whole numbers alone."""
    return all(x.dtype.kind in "iu" for x in values.values())


def other_keys(want: Array, got: Array) -> float:
    """The share of selected keys that only one of two selections [..., K] has."""
    if want.shape != got.shape:
        return 1.0
    pairs = zip(want.reshape(-1, want.shape[-1]), got.reshape(-1, got.shape[-1]), strict=True)
    return float(np.mean([1 - np.isin(a, b).mean() for a, b in pairs] or [0.0]))


def relative_distance(want: Array, got: Array) -> float:
    """Norm of the difference over the norm of `want`; infinite when shapes differ."""
    if want.shape != got.shape:
        return float("inf")
    x, y = want.astype(np.float64), got.astype(np.float64)
    norm, off = float(np.linalg.norm(x)), float(np.linalg.norm(x - y))
    return off / norm if norm else (0.0 if not off else float("inf"))
