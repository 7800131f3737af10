"""Public figures of Ascend chips, one die each; a die is one device for ATC.

Read in public configuration files of simulators and cost models and in press reports (core counts,
clock, bandwidth) and product pages (memory); none was measured here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from sfa_onnx.errors import UsageError

__all__ = ["Chip", "chip_of", "family_of"]


@dataclass(frozen=True)
class Chip:
    """One die. Rates per second; memory in bytes."""

    name: str
    cube_cores: int
    vector_cores: int
    clock_hz: float
    memory: int

    # Per core and cycle: 16x16x16 multiply-adds in 16-bit types, twice that in int8.
    macs_per_cycle: int = 16 * 16 * 16
    hbm_bytes: float = 1.6e12
    gather_bytes: float = 1.62e12  # HBM to the vector cores' buffers, all of them at work
    l2_bytes: int = 192 << 20

    @property
    def flops(self) -> float:
        """16-bit FLOP/s of the cube cores (a multiply-add counts as two)."""
        return 2.0 * self.macs_per_cycle * self.cube_cores * self.clock_hz

    @property
    def ridge(self) -> float:
        """FLOP per byte at which compute and memory take equally long."""
        return self.flops / self.hbm_bytes


_GIB: Final = 1 << 30
_FULL: Final = Chip("Ascend 910B1/B2/B3", 24, 48, 1.85e9, 64 * _GIB)
_SMALL: Final = Chip("Ascend 910B4", 20, 40, 1.85e9, 32 * _GIB)
_SLOW: Final = Chip("Ascend 910B4-1", 20, 40, 1.65e9, 64 * _GIB)
_A3: Final = Chip("Ascend 910_93 (one of two dies)", 24, 48, 1.85e9, 64 * _GIB)


def family_of(soc_version: str) -> str:
    """A2, A3 or 950.

    Raises:
        UsageError: not a chip of these families.
    """
    name = soc_version.lower()
    for family, prefix in (("A3", "ascend910_93"), ("A2", "ascend910b"), ("950", "ascend950")):
        if name.startswith(prefix):
            return family
    raise UsageError(
        f"SoC version {soc_version!r}: expected Ascend910B1 to Ascend910B4 (A2), Ascend910_93xx"
        " (A3) or Ascend950...; `npu-smi info` shows the chip's name"
    )


def chip_of(soc_version: str) -> Chip | None:
    """The figures of a chip; None for families without public ones (950).

    Raises:
        UsageError: not a chip of a known family.
    """
    family, name = family_of(soc_version), soc_version.lower()
    if family == "950":
        return None
    if family == "A3":
        return _A3
    if name.startswith("ascend910b4"):
        return _SLOW if name.startswith("ascend910b4-1") else _SMALL
    return _FULL
