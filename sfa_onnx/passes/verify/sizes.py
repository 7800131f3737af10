"""Concrete sizes for a site's axes: what the file declares, and choices for what it leaves open."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx
from onnx import helper, numpy_helper

from sfa_onnx.passes.candidate import Candidate, Refusal, Role
from sfa_onnx.passes.index import GraphIndex
from sfa_onnx.passes.verify.extract import UnverifiableError
from sfa_onnx.passes.verify.layout import atoms

__all__ = ["base_sizes", "fixed_sizes", "variations"]

# Choices for open axes, tried in this order until the original graph runs.
_BASES: tuple[dict[str, int], ...] = (
    {"B": 3, "S1": 3, "S2": 17, "K": 6},
    {"B": 1, "S1": 3, "S2": 17, "K": 6},
    {"B": 3, "S1": 1, "S2": 17, "K": 6},
    {"B": 1, "S1": 1, "S2": 17, "K": 6},
)
_OTHERS: tuple[dict[str, int], ...] = (
    {"B": 1, "S1": 1, "S2": 8, "K": 8},
    {"B": 2, "S1": 5, "S2": 9, "K": 6},
    {"B": 4, "S1": 2, "S2": 7, "K": 12},
    {"B": 2, "S1": 4, "S2": 64, "K": 33},
)
_DEFAULTS = {"N1": 3, "T": 7, "T2": 23, "M": 3, "C": 16, "R": 4}
_CONSTANT_MAX = 600  # integer constants up to this size are straddled by S2


def fixed_sizes(index: GraphIndex, candidate: Candidate) -> dict[str, int]:
    """Axis label -> size, for every axis whose size the file or the binder states."""
    sizes = {k: v for k, v in candidate.sizes.items() if isinstance(v, int)}
    for operand in candidate.operands:
        shape = index.shape(operand.value)
        if shape is None or len(shape) != len(operand.axes):
            continue
        for position, (axis, dim) in enumerate(zip(operand.axes, shape, strict=True)):
            if isinstance(dim, int) and axis != "1" and "*" not in axis:
                sizes.setdefault(axis or f"?{position}", dim)
    return sizes


def base_sizes(candidate: Candidate, fixed: dict[str, int]) -> list[dict[str, int]]:
    """Complete sizes to try, most telling first.

    Raises:
        UnverifiableError: the declared sizes contradict the operator (K > S2 of distinct indices).
    """
    labels = _labels(candidate)
    tries = []
    for base in _BASES:
        wished = {label: fixed.get(label, base.get(label, _default(label))) for label in labels}
        sizes = _consistent(candidate, wished, fixed)
        if sizes is not None and sizes not in tries:
            tries.append(sizes)
    if not tries:
        raise UnverifiableError(
            Refusal(f"the sizes of the site contradict each other: {fixed}", candidate.outputs[0])
        )
    return tries


def variations(
    candidate: Candidate, base: dict[str, int], fixed: dict[str, int], constants: Iterable[int]
) -> list[dict[str, int]]:
    """Other sizes of the open axes: S2 below, at and above K and every integer constant."""
    free = {label for label in base if label not in fixed}
    found: list[dict[str, int]] = []
    keys = "S2" if "S2" in free else "M" if "M" in free else None
    straddled = [n for c in sorted(set(constants)) for n in (c - 1, c, c + 1, 2 * c + 1)]
    marks = [{keys: n, "K": n} for n in straddled if n > 0] if keys else []
    for other in (*_OTHERS, *marks):
        sizes = {**base, **{k: v for k, v in other.items() if k in free}}
        sizes_ok = _consistent(candidate, sizes, fixed)
        if sizes_ok is not None and sizes_ok != base and sizes_ok not in found:
            found.append(sizes_ok)
    return found


def integer_constants(region: onnx.ModelProto) -> set[int]:
    """Small positive integers that a region's constants mention."""
    graph = region.graph
    arrays = [numpy_helper.to_array(t) for t in graph.initializer]
    for attribute in (a for n in graph.node if n.op_type == "Constant" for a in n.attribute):
        value = helper.get_attribute_value(attribute)
        is_tensor = attribute.type == onnx.AttributeProto.TENSOR
        arrays.append(numpy_helper.to_array(value) if is_tensor else np.asarray(value))
    found: set[int] = set()
    for array in arrays:
        if array.dtype.kind in "iu" and array.size <= 8:
            found |= {int(v) for v in array.reshape(-1) if 2 <= v <= _CONSTANT_MAX}
    return found


def _labels(candidate: Candidate) -> list[str]:
    return sorted({label for o in candidate.operands for label in atoms(o.axes)})


def _default(label: str) -> int:
    return _DEFAULTS.get(label, 5)


def _consistent(
    candidate: Candidate, sizes: dict[str, int], fixed: dict[str, int]
) -> dict[str, int] | None:
    """Adapt open sizes to each other; None where the domain forbids the combination."""
    sizes = dict(sizes)
    indices = next((o for o in candidate.operands if o.role is Role.INDICES), None)
    table = next((o for o in candidate.operands if o.role is Role.BLOCK_TABLE), None)
    keys = next((o for o in candidate.operands if o.role in (Role.LATENT, Role.LATENT_INT8)), None)
    if indices is None or keys is None:
        return sizes
    capacity = sizes.get("S2", 0)
    if table is not None:
        pages, page = atoms(keys.axes)[:2]
        mapped = atoms(table.axes)[-1]
        if pages not in fixed:
            sizes[pages] = sizes.get("B", 1) * sizes[mapped] + 2
        capacity = sizes[mapped] * sizes[page]
    slot = atoms(indices.axes)[-1]
    domain = indices.domain
    if domain.distinct and not domain.negative_allowed and capacity and sizes[slot] > capacity:
        if slot in fixed:
            return None
        sizes[slot] = capacity
    if capacity and "S1" in sizes and sizes["S1"] > capacity and "S1" not in fixed:
        sizes["S1"] = capacity
    return sizes
