"""What becomes of a node before an engine is chosen: GE's graph passes, and kernels that decline.

Each rule holds for a GE type on some chips, under a condition that constants and shapes decide. The
passes are those of the vendor's pages (`rewrites` in the support table); what a kernel's own check
declines was read in 8.1.RC1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import onnx

from sfa_onnx.ascend.checks.context import Context, Node
from sfa_onnx.files.onnx_attrs import attribute

__all__ = ["Route", "route"]

_T = onnx.TensorProto
_LONG_AXIS: Final = 1 << 30
_LARGE: Final = 3_072_000  # bytes
_MANY: Final = 2048  # indices
_TOP_K_INPUT: Final = 32_768  # elements


@dataclass(frozen=True)
class Route:
    """The GE types a node runs as, why AI Core declines each of some, and what to know."""

    types: tuple[str, ...]
    declined: tuple[tuple[str, str], ...] = ()  # GE type -> reason
    note: str = ""


def route(ctx: Context, node: Node, types: tuple[str, ...], family: str) -> Route:
    """Follow the passes for one node on one chip family."""
    rules = {
        "Einsum": _einsum,
        "GatherElements": _gather_elements,
        "ScatterElements": _scatter_elements,
        "SplitV": _split,
        "StridedSliceV2": _strided_slice,
        "TensorScatterUpdate": _tensor_scatter,
        "TopK": _top_k,
    }
    rule: Callable[[Context, Node, str], Route] | None = rules.get(types[0]) if types else None
    return Route(types) if rule is None else rule(ctx, node, family)


def _shape(ctx: Context, node: Node, position: int) -> tuple[int, ...] | None:
    """A static shape of an input, else None."""
    if position >= len(node.proto.input):
        return None
    dims = ctx.view.shape(node.scope, node.proto.input[position])
    numbers = tuple(d for d in dims or () if isinstance(d, int))
    return numbers if dims is not None and len(numbers) == len(dims) else None


def _constant(ctx: Context, node: Node, position: int) -> bool:
    if position >= len(node.proto.input):
        return False
    name = node.proto.input[position]
    at = ctx.view.resolve_scope(node.scope, name)
    known = ctx.view.constant(node.scope, name) is not None
    return known or (at is not None and name in at.initializers)


def _top_k(ctx: Context, node: Node, family: str) -> Route:
    if family == "950" or not _constant(ctx, node, 1):
        return Route(("TopKV2",))
    if not attribute(node.proto, "sorted", 1):
        return Route(("TopK",), note="sorted = 0: no pass moves it to AI Core")
    reason = _declines_top_k(ctx, node)
    return Route(("TopK",), note=f"TopKD declines: {reason}") if reason else Route(("TopKD",))


def _declines_top_k(ctx: Context, node: Node) -> str:
    shape, k = _shape(ctx, node, 0), ctx.view.whole_numbers(node.scope, node.proto.input[1])
    axis = int(attribute(node.proto, "axis", -1))
    if shape is None or not -len(shape) <= axis < len(shape):
        return ""
    if shape[axis] == 1:
        return "the sorted axis has size 1"
    few = k is not None and len(k) == 1 and 0 < k[0] < 8
    if few and math.prod(shape) > _TOP_K_INPUT:
        return f"k below 8 over more than {_TOP_K_INPUT} elements"
    return ""


def _scatter_elements(ctx: Context, node: Node, family: str) -> Route:
    static = all(_shape(ctx, node, i) is not None for i in range(3))
    if family == "950" or not static:
        return Route(("ScatterElements",))
    return Route(("ScatterElements",), (("ScatterElements", "static shapes are declined"),))


def _gather_elements(ctx: Context, node: Node, family: str) -> Route:
    types = ("GatherElements",)
    data, index = _shape(ctx, node, 0), _shape(ctx, node, 1)
    if family == "950" or data is None or index is None or len(data) != len(index):
        return Route(types)
    axis = int(attribute(node.proto, "axis", 0)) % max(len(data), 1)
    elem = ctx.view.dtype(node.scope, node.proto.input[0])
    size = math.prod(data) * (onnx.helper.tensor_dtype_to_np_dtype(elem).itemsize if elem else 2)
    if data[axis] > _LONG_AXIS or size > _LONG_AXIS * 2:
        return Route(types, ((types[0], "a gathered axis or data of that size is declined"),))
    last = axis == len(data) - 1 and data[:-1] == index[:-1]
    if not last and size >= _LARGE and math.prod(index) >= _MANY:
        reason = f"{size} bytes gathered by {math.prod(index)} indices are declined"
        return Route(types, ((types[0], reason),))
    return Route(types)


def _strided_slice(ctx: Context, node: Node, family: str) -> Route:
    if family == "950":
        return Route(("StridedSliceV2",))
    given = node.proto.input
    steps = ctx.view.whole_numbers(node.scope, given[4]) if len(given) > 4 else []
    if steps is None or any(s < 0 for s in steps):
        note = "a negative or computed step"
        return Route(("StridedSlice",), (("StridedSlice", note),))
    out = ctx.view.shape(node.scope, node.proto.output[0])
    static = out is not None and all(isinstance(d, int) for d in out)
    return Route(("StridedSliceD",) if static else ("StridedSliceV3",))


def _split(ctx: Context, node: Node, family: str) -> Route:
    if len(node.proto.input) < 2 and not attribute(node.proto, "split"):
        return Route(("Split",))
    if family == "950" or (len(node.proto.input) > 1 and not _constant(ctx, node, 1)):
        return Route(("SplitV",))
    return Route(("SplitVD",))


def _tensor_scatter(ctx: Context, node: Node, family: str) -> Route:
    elem = ctx.view.dtype(node.scope, node.proto.input[0])
    line = ctx.cann.version
    if elem in (_T.BOOL, _T.INT32) or family == "A3" or line == "8.5":
        return Route(("TensorScatterUpdate",), note="no pass is documented to move it")
    note = "by TensorScatterUpdateFusionPass (documented from 9.0): a copy, then rows in place"
    return Route(("TensorMove", "ScatterNdUpdate"), note=note)


def _einsum(_: Context, __: Node, family: str) -> Route:
    if family == "A3":
        return Route(("Einsum",))
    note = "by EinsumPass, documented for A2 and 950"
    return Route(("Transpose", "BatchMatMulV2"), note=note)
