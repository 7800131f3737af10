"""Caches that a model copies whole at every call, in at a graph input and out at an output."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import onnx

from sfa_onnx.ascend.checks.context import Context
from sfa_onnx.ascend.checks.tensors import nbytes
from sfa_onnx.ascend.checks.view import Dims, Scope
from sfa_onnx.ascend.chips import Chip

__all__ = ["CopyEstimate", "copies", "dim_size", "dims_product"]

_US: Final = 1e6


@dataclass(frozen=True)
class CopyEstimate:
    """A cache that comes in through a graph input and leaves, whole, through an output."""

    input: str
    output: str
    bytes: int | None  # read and written
    us: float | None


def dim_size(dims: Dims | None, axis: int, bound: Mapping[str, int]) -> int | None:
    """One dim as a number, symbols bound by name; None where it is open."""
    if dims is None or not -len(dims) <= axis < len(dims):
        return None
    dim = dims[axis]
    return bound.get(dim) if isinstance(dim, str) else dim


def dims_product(dims: Dims | None, bound: Mapping[str, int]) -> int | None:
    """The number of elements, or None where a dim is open."""
    sizes = [dim_size(dims, i, bound) for i in range(len(dims))] if dims is not None else [None]
    known = [s for s in sizes if s is not None]
    return math.prod(known) if len(known) == len(sizes) else None


def copies(ctx: Context, chip: Chip, bound: Mapping[str, int]) -> Iterator[CopyEstimate]:
    """Every output that carries on (almost) the whole of an input."""
    root = ctx.view.root
    for value in root.graph.output:
        source = _cache_input(root, value.name)
        if source is None:
            continue
        size = sum(
            s if (s := _bytes(ctx, root, name, bound)) is not None else -(1 << 62)
            for name in (source, value.name)
        )
        known = size >= 0
        us = size / chip.hbm_bytes * _US if known else None
        yield CopyEstimate(source, value.name, size if known else None, us)


def _cache_input(root: Scope, name: str) -> str | None:
    """The graph input whose (almost) whole content output `name` carries on, if any."""
    for _ in range(16):
        node = root.producer(name)
        if node is None:
            return name if name in root.inputs else None
        if node.op_type in ("ScatterND", "ScatterElements", "TensorScatter", "Identity", "Cast"):
            name = node.input[0]
        elif node.op_type == "Concat":
            name = next((i for i in node.input if i in root.inputs), "")
        elif node.op_type == "Where" and len(node.input) == 3:
            name = next((i for i in node.input[1:] if i in root.inputs), "")
        else:
            return None
    return None


def _bytes(ctx: Context, scope: Scope, name: str, bound: Mapping[str, int]) -> int | None:
    shape = ctx.view.shape(scope, name)
    if shape is None or dims_product(shape, bound) is None:
        return None
    sizes = [dim_size(shape, i, bound) or 0 for i in range(len(shape))]
    return nbytes(onnx.TensorProto(data_type=ctx.view.dtype(scope, name), dims=sizes))
