"""Canonical <-> ATC flavour of a fused model."""

from __future__ import annotations

from sfa_onnx.ascend.flavour.model import (
    FLAVOUR_KEY,
    AtcModel,
    convert,
    from_atc,
    is_atc,
    to_atc,
)

__all__ = [
    "FLAVOUR_KEY",
    "AtcModel",
    "convert",
    "from_atc",
    "is_atc",
    "to_atc",
]
