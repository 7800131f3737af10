"""Sizes that verification asks for, by axis. Missing axes take `DEFAULTS`."""

from __future__ import annotations

__all__ = ["BASES", "DEFAULTS", "OPENED", "OPENED_EFFORT", "OPENED_OTHERS", "OTHERS"]

# Wanted sizes, tried in this order until the original graph runs.
BASES: tuple[dict[str, int], ...] = (
    {"B": 3, "S1": 3, "S2": 17, "K": 6},
    {"B": 1, "S1": 3, "S2": 17, "K": 6},
    {"B": 3, "S1": 1, "S2": 17, "K": 6},
    {"B": 1, "S1": 1, "S2": 17, "K": 6},
    {"B": 2, "S1": 2, "S2": 64, "K": 16},
    {"B": 1, "S1": 1, "S2": 640, "K": 16},
)
OTHERS: tuple[dict[str, int], ...] = (
    {"B": 1, "S1": 1, "S2": 8, "K": 8},
    {"B": 2, "S1": 5, "S2": 9, "K": 6},
    {"B": 4, "S1": 2, "S2": 7, "K": 12},
    {"B": 2, "S1": 4, "S2": 64, "K": 33},
)
# The same for sizes that the file fixes: in the order that they have there.
OPENED: tuple[dict[str, int], ...] = (
    {"B": 3, "S1": 5, "S2": 23, "K": 10, "T": 17, "T2": 41},
    {"B": 3, "S1": 13, "S2": 23, "K": 10, "T": 17, "T2": 41},
    {"B": 3, "S1": 19, "S2": 64, "K": 40, "T": 29, "T2": 90},
    {"B": 30, "S1": 5, "S2": 33, "K": 13, "T": 61, "T2": 90},
    {"B": 3, "S1": 19, "S2": 45, "K": 13, "M": 7, "pages": 26, "T": 29, "T2": 61},
    {"B": 1, "S1": 5, "S2": 700, "K": 10, "T": 17, "T2": 700},
)
OPENED_OTHERS: tuple[dict[str, int], ...] = (
    {"B": 1, "S1": 3, "S2": 19, "K": 9, "T": 23, "T2": 45},
    {"B": 2, "S1": 14, "S2": 20, "K": 11, "T": 23, "T2": 45},
    {"B": 1, "S1": 3, "S2": 97, "K": 33, "T": 40, "T2": 97},
    {"B": 1, "S1": 41, "S2": 50, "K": 33, "T": 40, "T2": 97},
    {"B": 1, "S1": 9, "S2": 300, "K": 11, "T": 40, "T2": 300},
)
OPENED_EFFORT = 2.0  # seconds of a run at another size; K = 33 straddles what stays small
DEFAULTS = {"N1": 3, "T": 7, "T2": 23, "M": 3, "pages": 14, "slots": 4, "width": 16}
