"""The CANN lines this tool knows, and how their ONNX parsers differ: one table for everybody.

A line stands for its releases: "9.2" for the betas of 2026 and the development line behind them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from sfa_onnx.errors import UsageError

__all__ = ["CANN_VERSIONS", "DEFAULT_CANN", "Cann", "cann"]


@dataclass(frozen=True)
class Cann:
    """How one CANN line's ONNX parser behaves where lines differ."""

    version: str
    facts: tuple[str, ...]  # releases whose recorded facts stand for this one
    many_domains: bool  # several opset imports are fine (fixed after 9.1)
    int4: bool  # int4 tensors are known
    checks_arity: bool  # surplus inputs are refused instead of dropped
    bad_number_code: str  # a non-numeric external_data value
    keeps_loose_constants: bool  # a constant that nothing else touches survives
    reuses_inputs: bool  # GE's builder knows outputs that share an input's memory


_VERSIONS: Final = {
    "8.5": Cann("8.5", ("8.5",), False, False, False, "E19999", False, False),
    # 9.0 was read, not run: its parser is 9.1's but for the older external_data error.
    "9.0": Cann("9.0", ("8.5", "9.1"), False, False, False, "E19999", False, True),
    "9.1": Cann("9.1", ("9.1",), False, False, False, "E10001", False, True),
    "9.2": Cann("9.2", ("9.2",), True, True, True, "E10001", True, True),
}
CANN_VERSIONS: Final = tuple(_VERSIONS)
DEFAULT_CANN: Final = "9.1"


def cann(version: str) -> Cann:
    """The line called `version`.

    Raises:
        UsageError: not one of `CANN_VERSIONS`.
    """
    if version not in _VERSIONS:
        raise UsageError(
            f"CANN version {version!r} is not known: expected one of {', '.join(_VERSIONS)}"
        )
    return _VERSIONS[version]
