"""Absorption: per-head keys and values expanded from a latent become queries in latent space."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sfa_onnx.passes.axes_trace import Stop

if TYPE_CHECKING:
    from sfa_onnx.passes.build_site import Built, _Plan

__all__ = ["absorbed"]


def absorbed(plan: _Plan) -> Built:
    """Not there yet."""
    raise Stop("absorption", plan.site.nope.path[0].ref.value)
