"""The same data for a model whose caches were converted to packed rows."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from sfa_onnx.kv_convert.interface import (
    CacheEntry,
    Interface,
    adapt_feeds,
)

__all__ = ["capacity", "converted_feeds"]

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
    if grown > 0 or not cache.in_place:
        return adapt_feeds(interface, feeds, new_tokens=max(grown, 0))
    written = (before != after).any(-1)  # [B, S]
    counts = written.sum(-1)
    first = written.argmax(-1)
    span = np.arange(written.shape[1])
    between = (span >= first[:, None]) & (span < (first + counts)[:, None])
    if len(set(counts.tolist())) != 1 or (written != between).any():
        return adapt_feeds(interface, feeds)  # the model's own positions say where
    return adapt_feeds(interface, feeds, new_tokens=int(counts[0]), start=first)


def capacity(interface: Interface, feeds: dict[str, Array]) -> int | None:
    """Rows per sequence of the float caches; None where none is fed."""
    cache = next((c for c in interface.caches if c.latent_in in feeds), None)
    return None if cache is None else _by_row(feeds[cache.latent_in], cache).shape[1]


def _by_row(array: Array, cache: CacheEntry) -> Array:
    """A labelled float cache as [B, S, width]."""
    labels = [label for label in cache.latent_axes if label != "1"]
    dims = zip(array.shape, cache.latent_axes, strict=True)
    x = array.reshape([n for n, label in dims if label != "1"])
    if "B" not in labels:
        x, labels = x[None], ["B", *labels]
    return np.asarray(x.transpose([labels.index(label) for label in "BSC"]))
