"""The table of identities: what makes terms equal, one row per equation.

A row is an equation, its condition and a rule that applies it. To add one, write the rule beside
its kin and give both sides in the notation of the tests; where there is a condition, a left side
that violates it as well. `tests/test_values.py` evaluates both sides in float64, and removes each
row in turn.
"""

from __future__ import annotations

from typing import Final

from sfa_onnx.passes.values import arithmetic, exponential, flags, logic, lonely, relu
from sfa_onnx.passes.values.identity import Identity, Normal

__all__ = ["RELUS", "TABLE", "normal"]

TABLE: Final[tuple[Identity, ...]] = (
    *(*arithmetic.ROWS, *exponential.ROWS),
    *(*lonely.ROWS, *flags.ROWS, *logic.ROWS),
)
# what only the scores of a selection are read by: attention has no relu
RELUS: Final[tuple[Identity, ...]] = relu.ROWS


def normal(*without: str, relus: bool = False) -> Normal:
    """A normaliser with the whole table, but for the rows named; `relus`: with `RELUS` as well."""
    table = (*TABLE, *RELUS) if relus else TABLE
    return Normal([row for row in table if row.name not in without])
