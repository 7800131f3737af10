"""Shapes for questions that concern no site: a contradiction elsewhere is no answer, not an end."""

from __future__ import annotations

from sfa_onnx.passes.shapes.concrete import Concrete, Shape, SizesMeetError

__all__ = ["known_shape"]


def known_shape(sizes: Concrete, value: str) -> Shape | None:
    """The shape of `value`; None where it is not known, or sizes on the way contradict."""
    try:
        return sizes.shape(value)
    except SizesMeetError:
        return None
