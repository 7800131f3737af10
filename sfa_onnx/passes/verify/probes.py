"""The questions put to every site. Each one exists because some look-alike passes all others.

A gating probe that fails refuses the site, and its `reason` says what that means. Informative
probes ask about the edges of the operator's domain, where originals differ by design.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from sfa_onnx.passes.candidate import Role
from sfa_onnx.passes.verify.packed_rows import normal_powers, subnormal_power
from sfa_onnx.passes.verify.problem import Draw, Problem
from sfa_onnx.passes.verify.sizes.dims import Dims

__all__ = ["BOUND", "PROBES", "Probe"]

BOUND = 1e-9  # relative to the largest output
_POISON = 1e4

Ask = Callable[[Problem], Iterator[tuple[Problem, Draw]]]


@dataclass(frozen=True)
class Probe:
    """One probe: what it asks and what a disagreement means.

    Attributes:
        ask: the problems (a site at some sizes) and draws to run.
        gating: whether disagreement refuses the site.
    """

    name: str
    reason: str
    ask: Ask
    gating: bool = True


def _same(*draws: Draw) -> Ask:
    return lambda problem: iter([(problem, draw) for draw in draws])


def _values(problem: Problem) -> Iterator[tuple[Problem, Draw]]:
    for seed, width in ((11, 1.0), (12, 1.0), (13, 4.0)):
        yield problem, Draw(seed, width=width)


def _nope_bytes(problem: Problem) -> Iterator[tuple[Problem, Draw]]:
    if problem.first(Role.PACKED) is not None:
        yield problem, Draw(70, query="zero", part="nope")


def _scale_bytes(problem: Problem) -> Iterator[tuple[Problem, Draw]]:
    if problem.first(Role.PACKED) is not None:
        for n, power in enumerate(normal_powers(np.float32)):
            yield problem, Draw(71 + n, query="zero", part="scale", power=power)


def _rope_bytes(problem: Problem) -> Iterator[tuple[Problem, Draw]]:
    """Binades across the range; half precision ropes near zero are subnormal, so these count."""
    if problem.first(Role.PACKED) is None or not problem.attributes["rope_head_dim"]:
        return
    dtype = problem.rope_dtype
    powers = normal_powers(dtype)
    if dtype == np.float16:
        powers = (*powers, subnormal_power(dtype))
    for n, power in enumerate(powers):
        yield problem, Draw(74 + n, gain=2.0, part="rope", power=power)


def _subnormal_bytes(problem: Problem) -> Iterator[tuple[Problem, Draw]]:
    """Numbers below 1e-38, which processors and graphs may take for zero."""
    if problem.first(Role.PACKED) is None:
        return
    power = subnormal_power(np.float32)
    yield problem, Draw(78, query="zero", part="scale", power=power)
    if problem.rope_dtype != np.float16 and problem.attributes["rope_head_dim"]:
        power = subnormal_power(problem.rope_dtype)
        yield problem, Draw(79, gain=2.0, part="rope", power=power)


def _poison(problem: Problem) -> Iterator[tuple[Problem, Draw]]:
    """Rows nobody selects are huge, while scores stay moderate (finite masks must hold)."""
    for seed, spread in ((21, 30.0), (22, 5.0)):
        gain = spread / (_POISON * problem.attributes["scale_value"] * 24)
        yield problem, Draw(seed, gain=gain, poison=_POISON, selection="shared")


def _nan(problem: Problem) -> Iterator[tuple[Problem, Draw]]:
    """NaN in rows nobody selects, once with every key visible and once as it comes."""
    yield problem, Draw(27, poison=math.nan, selection="shared", lengths="full")
    yield problem, Draw(28, poison=math.nan, selection="shared")


def _edges(problem: Problem) -> Iterator[tuple[Problem, Draw]]:
    yield from ((problem, Draw(30 + seed, lengths="edge")) for seed in range(3))
    yield problem, Draw(33, lengths="full")
    yield problem, Draw(34, lengths="short")
    for n, other in enumerate(problem.others[:2]):
        yield problem.resized(*other), Draw(35 + n)


def _selection(problem: Problem) -> Iterator[tuple[Problem, Draw]]:
    """Index rows as free as the domain allows: duplicates, holes, any order, few valid ones."""
    domain = problem.indices.domain
    if not domain.distinct:
        yield problem, Draw(41, selection="duplicates")
        yield problem, Draw(42, selection="duplicates", lengths="short")
    if domain.negative_allowed:
        yield problem, Draw(43, selection="single")
    for n, other in enumerate(problem.others):
        if _crowded(other[1]):
            yield problem.resized(*other), Draw(46 + n)
    if not domain.valid_first:
        yield problem, Draw(44, selection="shuffled", lengths="short")


def _crowded(dims: Dims) -> bool:
    """More index entries than keys: some must be duplicates or negative."""
    return dims.slots > dims.capacity


def _sizes(problem: Problem) -> Iterator[tuple[Problem, Draw]]:
    """Other sizes of the axes that the model leaves open; see `sizes.variations`."""
    for n, other in enumerate(problem.others):
        if _crowded(other[1]):
            continue
        yield problem.resized(*other), Draw(60 + n, codes=n % 2 == 1, lengths="full")


PROBES: tuple[Probe, ...] = (
    Probe(
        "nope bytes",
        "the first bytes of a packed row are not decoded as signed int8 times the tile's scale",
        _nope_bytes,
    ),
    Probe(
        "scale bytes",
        "the last bytes of a packed row are not decoded as one little-endian float32 scale per"
        " tile of the row's first bytes",
        _scale_bytes,
    ),
    Probe(
        "rope bytes",
        "the rope bytes of a packed row are not decoded as little-endian numbers of the query's"
        " type",
        _rope_bytes,
    ),
    Probe("values", "the result differs from the fused operator's on random inputs", _values),
    Probe(
        "read-out",
        "the keys that are averaged are not the selected ones, or the value is not the key's"
        " nope part",
        _same(
            Draw(14, query="zero", codes=True),
            Draw(15, query="zero", codes=True, selection="shared"),
        ),
    ),
    Probe("poison", "a token outside the selection is read", _poison),
    Probe("nan", "a token outside the selection turns the fused result into NaN", _nan),
    Probe(
        "basis",
        "a score is not scale * (query . key) over all components",
        _same(*(Draw(16 + n, query="basis", gain=128.0) for n in range(3))),
    ),
    Probe(
        "shift up",
        "the softmax depends on a shift of all scores (a clip or a cap)",
        _same(Draw(23, shift=300.0)),
    ),
    Probe(
        "shift down",
        "the softmax depends on a shift of all scores (a sink, an epsilon or a clip)",
        _same(Draw(24, shift=-300.0)),
    ),
    Probe(
        "contrast",
        "scores that are far apart or nearly equal are treated differently",
        _same(Draw(25, gain=20.0), Draw(26, gain=1e-8)),
    ),
    Probe(
        "lengths",
        "a key at the edge of the valid length or of the causal rule is treated differently",
        _edges,
    ),
    Probe(
        "selection",
        "the graph counts duplicate, negative or late indices differently from the operator",
        _selection,
    ),
    Probe("sizes", "the result differs at other sizes of the open axes", _sizes),
    Probe(
        "subnormal bytes",
        "scales or ropes below 1e-38 are taken for other numbers",
        _subnormal_bytes,
        gating=False,
    ),
)
