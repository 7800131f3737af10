"""The axes that the operator's language has names for, at one choice of sizes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ["Dims"]


@dataclass(frozen=True)
class Dims:
    """What the shapes of indices, keys and tables say.

    Attributes:
        batches: B.
        rows: shape of the indices without their last axis.
        batch_axis: axis of `rows` that runs over batches; None when there is one batch.
        slots: K.
        capacity: S2, key slots per sequence (TND keys: all keys together).
        keys: axes that number key rows: (B, S2), (T2,) or (pages, page size).
        swapped: keys lie as [S2, B, ...].
    """

    batches: int
    rows: tuple[int, ...]
    batch_axis: int | None
    slots: int
    capacity: int
    keys: tuple[int, ...]
    swapped: bool = False

    @property
    def count(self) -> int:
        """Number of query rows."""
        return int(np.prod(self.rows, dtype=np.int64))

    def named(self) -> dict[str, int]:
        """The sizes for the record."""
        return {
            "B": self.batches,
            "S1": self.count // max(self.batches, 1),
            "S2": self.capacity,
            "K": self.slots,
        }
