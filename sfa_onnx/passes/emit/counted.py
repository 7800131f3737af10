"""0, 1, 2 ... as a constant: of a size that a graph may hold."""

from __future__ import annotations

import numpy as np

from sfa_onnx.guard.budgets import CONSTANT_BYTES

__all__ = ["counted"]


def counted(count: int) -> np.ndarray:
    """The int64 numbers from 0 to `count` - 1.

    Raises:
        BudgetError: they are more than the budget of one constant.
    """
    CONSTANT_BYTES.check(8 * count, f"counting {count} positions in a constant")
    return np.arange(count, dtype=np.int64)
