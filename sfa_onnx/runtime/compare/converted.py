"""The same data for a model whose caches were converted to packed rows."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from sfa_onnx.kv_convert.interface import (
    BLOCK_TABLE,
    SLOT_MAPPING,
    CacheEntry,
    Interface,
    adapt_feeds,
)

__all__ = ["converted_feeds"]

Array = NDArray[Any]


def converted_feeds(
    interface: Interface, feeds: dict[str, Array], outputs: dict[str, Array]
) -> dict[str, Array]:
    """Feeds of the float model -> feeds of the converted one, slots of new rows included.

    Where a run writes is not said by the interface, so it is read off a run of the float model: a
    grown cache has its new rows at the end, a fixed one where it changed.

    Args:
        interface: of the converted model.
        feeds: inputs of the float model.
        outputs: what the float model made of them.
    """
    cache = next((c for c in interface.caches if c.latent_in in feeds), None)
    if cache is None or cache.latent_out not in outputs:
        return adapt_feeds(interface, feeds)
    before, after = (_by_row(x, cache) for x in (feeds[cache.latent_in], outputs[cache.latent_out]))
    grown = after.shape[1] - before.shape[1]
    adapted = adapt_feeds(interface, feeds, new_tokens=max(grown, 0))
    if grown == 0 and SLOT_MAPPING in adapted:
        written = (before != after).any(-1)
        table, size = adapted[BLOCK_TABLE], interface.block_size
        slots = [
            int(table[b, p // size]) * size + p % size
            for b in range(len(written))
            for p in np.flatnonzero(written[b])
        ]
        adapted[SLOT_MAPPING] = np.asarray(slots, np.int32)
    return adapted


def _by_row(array: Array, cache: CacheEntry) -> Array:
    """A labelled float cache as [B, S, width]."""
    labels = [label for label in cache.latent_axes if label != "1"]
    dims = zip(array.shape, cache.latent_axes, strict=True)
    x = array.reshape([n for n, label in dims if label != "1"])
    if "B" not in labels:
        x, labels = x[None], ["B", *labels]
    return np.asarray(x.transpose([labels.index(label) for label in "BSC"]))
