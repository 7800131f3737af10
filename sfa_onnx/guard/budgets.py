"""Budgets: what one model may cost here before it is refused. A refusal names its budget.

They are far above what real models need (DeepSeek-V3.2 has 130,000 nodes) and far below what would
take a machine down. Each can be raised by an environment variable of its own name.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Final

from sfa_onnx.errors import BudgetError, UsageError

__all__ = [
    "CONSTANT_BYTES",
    "INFERENCE",
    "INPUT_BYTES",
    "NODES",
    "REFERENCE_SECONDS",
    "SECONDS",
    "WORKER_BYTES",
    "Budget",
]


@dataclass(frozen=True)
class Budget:
    """One limit.

    Attributes:
        name: as messages and the documentation call it.
        variable: the environment variable that replaces `default`.
        default: the limit, in `unit`.
        unit: what is counted.
    """

    name: str
    variable: str
    default: int
    unit: str

    @property
    def limit(self) -> int:
        """The limit that holds in this process.

        Raises:
            UsageError: the environment variable is not a positive number.
        """
        given = os.environ.get(self.variable)
        if given is None:
            return self.default
        if not given.isdecimal() or int(given) == 0:
            raise UsageError(f"{self.variable}={given!r}: expected a positive number; unset it")
        return int(given)

    def check(self, needed: int, what: str) -> None:
        """Refuse to go on where `what` needs more than this budget.

        Raises:
            BudgetError: it does; the message names the budget and how to raise it.
        """
        if needed > self.limit:
            raise BudgetError(
                f"{what} would take {needed} {self.unit}, beyond the budget of {self.limit} for"
                f" {self.name}; set {self.variable} to raise it if the model is meant so"
            )


NODES: Final = Budget("nodes after inlining", "SFA_ONNX_MAX_NODES", 2_000_000, "nodes")
CONSTANT_BYTES: Final = Budget(
    "one constant made here", "SFA_ONNX_MAX_CONSTANT_BYTES", 1 << 28, "bytes"
)
WORKER_BYTES: Final = Budget(
    "memory of one verification", "SFA_ONNX_MAX_VERIFY_BYTES", 6 << 30, "bytes"
)
INPUT_BYTES: Final = Budget("all inputs drawn here", "SFA_ONNX_MAX_INPUT_BYTES", 4 << 30, "bytes")
INFERENCE: Final = Budget(
    "shape inference", "SFA_ONNX_MAX_INFERENCE_SECONDS", 10, "seconds and one per 100 kB of graph"
)
SECONDS: Final = Budget("one run in the worker", "SFA_ONNX_MAX_SECONDS", 300, "seconds")
REFERENCE_SECONDS: Final = Budget(
    "one run of onnx's reference implementation", "SFA_ONNX_MAX_REFERENCE_SECONDS", 30, "seconds"
)
