"""The arrays that put a question to a site: one per operand, in its shape, inside its domain."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from sfa_onnx.guard.budgets import WORKER_BYTES
from sfa_onnx.passes.candidate import Candidate, Operand, Role
from sfa_onnx.passes.verify.geometry import Geometry
from sfa_onnx.passes.verify.packed_rows import draw_rows, row_layout
from sfa_onnx.passes.verify.problem import Draw, Problem
from sfa_onnx.passes.verify.sizes.roles import KEYS

__all__ = ["in_own_types", "inputs"]

Array = NDArray[Any]
_DISTINCT = 1_000_003  # no width divides it: columns and rows of weights differ


def inputs(problem: Problem, draw: Draw) -> dict[str, Array]:
    """One array per operand, floats in float64.

    Raises:
        BudgetError: one of them is too large to be drawn.
    """
    sizes = (math.prod(problem.shapes[o.value]) for o in problem.candidate.operands)
    WORKER_BYTES.check(8 * max(sizes, default=0), "an input of this region, drawn in float64,")
    rng = np.random.default_rng(draw.seed)
    geometry = Geometry.draw(problem, draw, rng)
    values: dict[str, Array] = {}
    for operand in problem.candidate.operands:
        name = operand.value
        if name in problem.constants:
            values[name] = problem.constants[name]
        elif name in geometry.tables:
            shape = problem.shapes[name]
            values[name] = np.resize(geometry.tables[name], shape).astype(_dtype(operand))
        elif operand.role in KEYS:
            values[name] = _keys(problem, operand, draw, geometry.hidden, rng)
        else:
            values[name] = _dense(problem, operand, draw, rng)
    return values


def _dense(problem: Problem, operand: Operand, draw: Draw, rng: np.random.Generator) -> Array:
    """Queries, expansion weights and anything whose values are free."""
    shape = problem.shapes[operand.value]
    if operand.role not in (Role.QUERY, Role.QUERY_ROPE):
        return _typed(_many(shape, rng), operand)
    if draw.query == "zero":
        return np.zeros(shape)
    array = rng.standard_normal(shape)
    if draw.query == "basis":
        array = np.zeros((math.prod(shape[:-1]), shape[-1]))
        hot = rng.integers(0, shape[-1], len(array))
        array[np.arange(len(array)), hot] = 1.0
        array = array.reshape(shape)
    array *= draw.gain * 2.0**-draw.power
    if draw.shift and operand is _shifted(problem, Role.QUERY_ROPE, Role.QUERY):
        array[..., -1] = math.copysign(1.0, draw.shift)
    return array


def _keys(
    problem: Problem, operand: Operand, draw: Draw, hidden: Array, rng: np.random.Generator
) -> Array:
    """Key rows of one operand; `hidden` [rows] marks those that nobody may read."""
    shape = problem.shapes[operand.value]
    count = len(hidden)
    width = math.prod(shape) // count if math.prod(shape) % count == 0 else shape[-1]
    if math.prod(shape) != count * width:
        return _typed(rng.standard_normal(shape), operand)
    if operand.role is Role.PACKED:
        array: Array = _packed(problem, width, draw, hidden, rng)
    else:
        array = _plain_keys(problem, operand, draw, hidden, width, rng)
    if problem.dims.swapped:
        array = array.reshape(*problem.dims.keys, width).swapaxes(0, 1)
    return array.reshape(shape)


def _packed(
    problem: Problem, width: int, draw: Draw, hidden: Array, rng: np.random.Generator
) -> Array:
    """Packed rows [count, D] as the operator reads them."""
    dtype, shift = problem.rope_dtype, abs(draw.shift) / problem.attributes["scale_value"]
    row = row_layout(width, dtype, problem.attributes)
    return draw_rows(row, dtype, draw, hidden, shift, rng)


def _plain_keys(
    problem: Problem,
    operand: Operand,
    draw: Draw,
    hidden: Array,
    width: int,
    rng: np.random.Generator,
) -> Array:
    """Key rows [count, width] of one part of a key, hidden ones poisoned."""
    count = len(hidden)
    array = _visible_keys(operand, draw, count, width, rng)
    if draw.shift and operand is _shifted(problem, Role.KEY_ROPE, Role.LATENT):
        array[:, -1] = abs(draw.shift) / problem.attributes["scale_value"]
    if draw.poison is not None and operand.role is not Role.LATENT_INT8:
        bad = draw.poison * rng.standard_normal((count, width))
        array = np.where(hidden[:, None], bad, array)
    return array


def _visible_keys(
    operand: Operand, draw: Draw, count: int, width: int, rng: np.random.Generator
) -> Array:
    """Ordinary key rows [count, width] of one operand."""
    if operand.role is Role.LATENT_INT8:
        if draw.codes:
            return _codes(count, width, 1 + np.arange(count) // width % 100).astype(np.int8)
        return rng.integers(-128, 128, (count, width)).astype(np.int8)
    if operand.role is Role.SCALE:
        scales = rng.uniform(0.25, 2.0, (count, width)) * draw.width / 64
        signs = rng.choice([-1.0, 1.0], (count, width))
        return np.asarray((scales * signs).astype(np.float32).astype(np.float64))
    if draw.codes and operand.role is Role.LATENT:
        laps = np.arange(count) // width
        return _codes(count, width, 1.0 + 3.0 * laps / max(laps[-1], 1))
    return draw.width * rng.standard_normal((count, width))


def _shifted(problem: Problem, *roles: Role) -> Operand | None:
    """The operand whose last component carries the score shift: rope before nope."""
    return next((o for r in roles if (o := problem.first(r)) is not None), None)


def _codes(count: int, width: int, values: Array) -> Array:
    """Row i has one non-zero entry, at i mod width: rows are linearly distinguished."""
    rows = np.zeros((count, width))
    rows[np.arange(count), np.arange(count) % width] = values
    return rows


def _many(shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    """Normal numbers; of large weights a prime number of them, over and over."""
    count = math.prod(shape)
    return np.resize(rng.standard_normal(min(count, _DISTINCT)), shape)


def _dtype(operand: Operand) -> np.dtype[Any]:
    """The array type of a promoted operand."""
    dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(operand.elem_type))
    return dtype if dtype.kind in "iub" else np.dtype(np.float64)


def _typed(array: Array, operand: Operand) -> Array:
    """Free values in the operand's type: small integers where it is integral."""
    dtype = _dtype(operand)
    return array if dtype == np.float64 else (array * 3).astype(dtype)


def in_own_types(candidate: Candidate, arrays: Mapping[str, Array]) -> dict[str, Array]:
    """What was drawn for a site, in the types that the model gives its operands."""
    kinds = {o.value: o.elem_type for o in candidate.operands}
    return {
        name: array.astype(onnx.helper.tensor_dtype_to_np_dtype(kinds[name]))
        for name, array in arrays.items()
    }
