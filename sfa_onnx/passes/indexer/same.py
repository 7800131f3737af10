"""Whether two selections are the same, judged by scores."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "ADDED",
    "ORDERED",
    "Difference",
    "compare_entries",
    "compare_indices",
    "flat_rows",
    "margin_at",
]

Array = NDArray[Any]
_HIDDEN: Final = -4.5e3  # half of what hides a key at least
ORDERED: Final = "the original distinguishes hidden keys, and somebody reads them"
ADDED: Final = (
    "hide keys by -inf, or choose (where, masked_fill): adding a number leaves their order"
)


@dataclass(frozen=True)
class Difference:
    """How far scores at selected positions lie apart, or what is wrong besides."""

    error: float
    reason: str = ""

    def worse(self, other: Difference) -> Difference:
        """The worse one."""
        if self.reason or other.reason:
            return self if self.reason else other
        return self if self.error >= other.error else other


def compare_indices(
    scores: Array, want: Array, got: Array, *, exact: bool, ordered: bool = True
) -> Difference:
    """Indices as TopK gives them.

    Args:
        scores: of the original, [.., S2] float64.
        want: positions [.., k] that the original selects.
        got: those of the operator.
        exact: scores are small whole numbers: equal ones must keep the order of their keys.
        ordered: the original sorts what it selects by score.
    """
    if want.shape != got.shape or want.dtype != got.dtype:
        text = f"the indices are {want.dtype} {want.shape}, the operator's {got.dtype} {got.shape}"
        return Difference(0.0, text)
    if got.size == 0:
        return Difference(0.0)
    if got.min() < 0 or got.max() >= scores.shape[-1]:
        return Difference(0.0, f"position {int(got.min())} or {int(got.max())} is none of the keys")
    if (np.diff(np.sort(got, axis=-1), axis=-1) == 0).any():
        return Difference(0.0, "a key is selected twice")
    if not ordered:
        by = (
            np.argsort(-np.take_along_axis(scores, x, -1), -1, kind="stable") for x in (want, got)
        )
        want, got = (np.take_along_axis(x, i, -1) for x, i in zip((want, got), by, strict=True))
    ours = np.take_along_axis(scores, got, -1)
    theirs = np.take_along_axis(scores, want, -1)
    seen = theirs > _HIDDEN
    if not ((ours > _HIDDEN) == seen).all():
        return Difference(0.0, "a hidden key stands before a visible one")
    if not (ours == theirs)[~seen].all():
        return Difference(0.0, ORDERED)
    if not ordered:  # what is equal has no order
        got, want = (np.sort(np.where(seen, x, -1), -1) for x in (got, want))
    if exact and not (np.where(seen, got, 0) == np.where(seen, want, 0)).all():
        return Difference(0.0, "equal scores are in another order")
    return Difference(_distance(np.where(seen, theirs, 0), np.where(seen, ours, 0)))


def compare_entries(scores: Array, want: Array, got: Array, *, exact: bool) -> Difference:
    """Rows of an attention: positions of visible keys first, then -1.

    Args:
        scores: of the original, [.., S2] float64.
        want: entries [.., k] of the original.
        got: those of the operator; they may have a longer tail.
        exact: scores are small whole numbers: equal ones must keep the order of their keys.
    """
    rows, a, b = (flat_rows(x) for x in (scores, want, got))
    if want.ndim != got.ndim or want.shape[:-1] != got.shape[:-1] or len(a) != len(rows):
        return Difference(0.0, f"rows are {want.shape}, the operator's {got.shape}")
    width = max(a.shape[-1], b.shape[-1])
    a, b = (np.pad(x, ((0, 0), (0, width - x.shape[-1])), constant_values=-1) for x in (a, b))
    if not ((a >= 0) == (b >= 0)).all():
        return Difference(0.0, "rows have other numbers of visible keys")
    if b.max(initial=-1) >= rows.shape[-1]:
        return Difference(0.0, f"position {int(b.max())} is none of the keys")
    seen = a >= 0
    distinct = np.sort(np.where(b >= 0, b, -1 - np.arange(width)), axis=-1)
    if (np.diff(distinct, axis=-1) == 0).any():
        return Difference(0.0, "a key is selected twice")
    if exact and not (np.sort(a, -1) == np.sort(b, -1)).all():
        return Difference(0.0, "of equal scores others are selected")
    theirs, ours = (
        np.where(seen, np.take_along_axis(rows, np.maximum(x, 0), -1), 0) for x in (a, b)
    )
    if (ours[seen] <= _HIDDEN).any() and not (theirs[seen] <= _HIDDEN).any():
        return Difference(0.0, "a hidden key is attended to")
    return Difference(_distance(np.sort(theirs, -1), np.sort(ours, -1)))


def flat_rows(x: Array) -> Array:
    """All rows one below the other; rows may be empty."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _distance(want: Array, got: Array) -> float:
    """Largest difference, relative to the largest score of its row; other infinities count."""
    if want.size == 0:
        return 0.0
    same = (want == got) | (np.isnan(want) & np.isnan(got))
    with np.errstate(invalid="ignore"):
        apart = np.where(same, 0.0, np.abs(want - got))
        finite = np.where(np.isfinite(want), np.abs(want), 0)
        scale = np.maximum(finite.max(axis=-1, keepdims=True), 1e-30)
        ratio = apart / scale
    return float(np.where(np.isnan(ratio), np.inf, ratio).max())


def margin_at(scores: Array, count: int) -> float | None:
    """How near a row's last selected key comes to the first one left out, at the nearest.

    Args:
        scores: of the original, [.., S2] float64.
        count: how many keys a row selects.

    Returns:
        The gap relative to the largest score of its row; keys of equal score, and rows whose
        threshold lies among hidden keys, do not count. None: no row leaves a visible key out.
    """
    if not 0 < count < scores.shape[-1]:
        return None
    ranked = -np.sort(-flat_rows(scores), axis=-1)
    last, left = ranked[:, count - 1], ranked[:, count]
    told = (left > _HIDDEN) & (last > left) & np.isfinite(ranked[:, 0])
    if not told.any():
        return None
    seen = np.where(ranked > _HIDDEN, np.abs(ranked), 0)
    largest = seen.max(axis=-1)
    return float(((last[told] - left[told]) / largest[told]).min())
