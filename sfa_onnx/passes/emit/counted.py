"""Whole numbers as a constant: of a size that a graph, and a tensor, may hold."""

from __future__ import annotations

import numpy as np

from sfa_onnx.guard.budgets import CONSTANT_BYTES
from sfa_onnx.passes.axes.steps import Stop

__all__ = ["counted", "whole"]


def counted(count: int) -> np.ndarray:
    """The int64 numbers from 0 to `count` - 1.

    Raises:
        BudgetError: they are more than the budget of one constant.
    """
    CONSTANT_BYTES.check(8 * count, f"counting {count} positions in a constant")
    return np.arange(count, dtype=np.int64)


def whole(numbers: list[int], at: str) -> np.ndarray:
    """An int64 vector.

    Raises:
        Stop: a number does not fit; sizes of the file multiply to more than any tensor has.
    """
    if any(not -(1 << 63) <= n < 1 << 63 for n in numbers):
        raise Stop(f"sizes that no tensor has: {numbers} do not fit 64 bits", at)
    return np.asarray(numbers, np.int64)
