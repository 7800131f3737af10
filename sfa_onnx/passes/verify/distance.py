"""How far two results are apart."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "UNDEFINED",
    "empty_rows",
    "mostly_empty",
    "mostly_undefined",
    "relative_error",
    "without_keys",
]

Array = NDArray[Any]
UNDEFINED = "rows that see keys, and are NaN all the same: the softmax of those keys after"
_NOTHING = 1e-12  # of results around 1
_LONELY_MAX = 0.5  # share of empty rows beyond which a draw shows nothing


def mostly_empty(want: Array, got: Array) -> bool:
    """Whether more rows than not have no key (NaN, which the operator has as 0): nothing shows."""
    return want.shape == got.shape and _empty(want, got).mean() > _LONELY_MAX


def _empty(want: Array, got: Array) -> Array:
    return np.asarray(np.isnan(want) & (got == 0.0))


def mostly_undefined(want: Array, got: Array) -> bool:
    """Whether more elements than not are NaN before and numbers after: nothing shows."""
    return want.shape == got.shape and bool(_undefined(want, got).mean() > _LONELY_MAX)


def _undefined(want: Array, got: Array) -> Array:
    return np.asarray(np.isnan(want) & np.isfinite(got))


def without_keys(before: str) -> str:
    """The assumption that rows without a visible key, which the operator zeroes, do not matter."""
    return f"rows without a visible key: {before} before, zeros after"


def empty_rows(want: Array, got: Array) -> set[str]:
    """What becomes of rows without a visible key, given a draw with some; nothing if both agree.

    The operator's exact zeros show where they are: no other element of random values is one.
    """
    if want.shape != got.shape or not (zero := got == 0.0).any():
        return set()
    lonely = want[zero]
    if np.isnan(lonely).any():
        return {without_keys("NaN")}
    return {without_keys("average")} if np.abs(lonely).max() > _NOTHING else set()


def relative_error(want: Array, got: Array, lonely: set[str] | None = None) -> float:
    """Largest difference relative to the largest expected value; inf where infinities differ.

    NaN where the operator gives exact zeros is a row without any key: an edge of the domain on
    which originals differ by design. It is noted in `lonely`, not judged. So is NaN where the
    operator gives numbers: an exponential of -inf - -inf, say, in a chunk without keys.
    """
    if want.shape != got.shape:
        return math.inf
    if lonely is not None and (undefined := _undefined(want, got)).any():
        if mostly_undefined(want, got):
            return math.inf
        if _empty(want, got).any():
            lonely.add(without_keys("NaN"))
        if (got[undefined] != 0).any():
            lonely.add(UNDEFINED)
        want, got = want[~undefined], got[~undefined]
    finite = np.isfinite(want)
    if (finite != np.isfinite(got)).any() or not np.array_equal(
        want[~finite], got[~finite], equal_nan=True
    ):
        return math.inf
    if not finite.any():
        return 0.0
    scale = float(np.abs(want[finite]).max()) or 1.0
    return float(np.abs(want[finite] - got[finite]).max()) / scale
