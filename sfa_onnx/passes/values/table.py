"""The table of identities: what makes terms equal, one row per equation.

A row is an equation, its condition and a rule that applies it. To add one, write the rule beside
its kin and give both sides in the notation of the tests; where there is a condition, a left side
that violates it as well. `tests/test_values.py` evaluates both sides in float64, and removes each
row in turn.
"""

from __future__ import annotations

from typing import Final

from sfa_onnx.passes.values import arithmetic, exponential, flags, logic, lonely, scores
from sfa_onnx.passes.values.identity import Identity, Normal

__all__ = ["SCORES", "TABLE", "normal"]

TABLE: Final[tuple[Identity, ...]] = (
    *(*arithmetic.ROWS, *exponential.ROWS),
    *(*lonely.ROWS, *flags.ROWS, *logic.ROWS),
)
# what only the scores of a selection are read by: attention has no relu, and joins chunks itself
SCORES: Final[tuple[Identity, ...]] = scores.ROWS


def normal(*without: str, scores_too: bool = False) -> Normal:
    """A normaliser with the whole table, and `scores_too`; the rows named are left out."""
    table = (*TABLE, *SCORES) if scores_too else TABLE
    return Normal([row for row in table if row.name not in without])
