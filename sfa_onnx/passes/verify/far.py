"""Scores far from 0: exponentials that no maximum is taken from vanish or overflow in float32.

In float64, in which sites are verified, they do not. So the original runs once more in its own
types; what it loses there the operator does not lose, and that is noted.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray

from sfa_onnx.passes.verify.execute import Executable
from sfa_onnx.passes.verify.inputs import in_own_types, inputs
from sfa_onnx.passes.verify.problem import Draw, Problem

__all__ = ["far_scores"]

_FAR: Final = 300.0  # exp of it is a number in float64, and not in float32
_SMALL: Final = 1e-3  # of the largest result: what may be 0 by rounding alone
_LOST: Final = (
    "scores that are all beyond +-88 (exponentials without a shift by the row's own maximum):"
    " zeros or NaN before, their softmax after"
)


def far_scores(problem: Problem, model: onnx.ModelProto, wide: Executable) -> set[str]:
    """Whether the original loses rows whose scores are far from 0, as an assumption.

    Args:
        problem: the site at some sizes.
        model: the original, in its own types.
        wide: the same in float64.
    """
    try:
        own = Executable(model)
        for shift in (-_FAR, _FAR):
            feeds = inputs(problem, Draw(94, lengths="full", shift=shift))
            if _loses(wide.run(feeds)[0], own.run(in_own_types(problem.candidate, feeds))[0]):
                return {_LOST}
    except (RuntimeError, ValueError, TypeError):
        return set()  # there is no kernel for its types: what it would lose nobody knows
    return set()


def _loses(wide: NDArray[Any], own: NDArray[Any]) -> bool:
    """Whether elements are NaN, infinite or 0 in the narrow types alone."""
    want, got = (np.asarray(a, np.float64) for a in (wide, own))
    known = np.isfinite(want)
    if want.shape != got.shape or not known.any():
        return False
    large = known & (np.abs(want) > _SMALL * np.abs(want[known]).max())
    return bool((known & ~np.isfinite(got)).any() or (large & (got == 0)).any())
