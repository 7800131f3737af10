"""From an element to where it is stored, by moves and constant factors; where paths meet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sfa_onnx.passes.axes.expr import Expr
from sfa_onnx.passes.axes.trace import Move, Ref, Scaled, Tracer

__all__ = ["State", "deepen", "one_element"]


@dataclass(frozen=True)
class State:
    """A tensor on the way from a contraction to where the rows are stored.

    The operand's element is `factor` times this one.
    """

    ref: Ref
    factor: float = 1.0


def deepen(tracer: Tracer, ref: Ref, factor: float = 1.0) -> list[State]:
    """`ref` and every element behind it, by moves and constant factors only."""
    path = [State(ref, factor)]
    while True:
        step = tracer.step(path[-1].ref)
        if isinstance(step, Move):
            path.append(State(step.ref, path[-1].factor))
        elif isinstance(step, Scaled):
            path.append(State(step.ref, path[-1].factor * step.factor))
        else:
            return path


def one_element(
    tracer: Tracer,
    refs: Sequence[Ref],
    lifted: Callable[[list[Expr]], Expr | None],
    *,
    deepest: bool = False,
) -> Ref | None:
    """The element of a tensor that `refs` were all cut from, the first (or `deepest`) such tensor.

    `lifted` gives the coordinate of which each of theirs is a case; None where they have none.
    """
    paths = [{s.ref.value: s for s in deepen(tracer, r)} for r in refs]
    for value in reversed(paths[0]) if deepest else paths[0]:
        states = [p[value] for p in paths if value in p]
        if len(states) < len(paths) or any(s.factor != 1 for s in states):
            continue
        coords = [lifted(list(c)) for c in zip(*(s.ref.coords for s in states), strict=True)]
        if None not in coords:
            return Ref(value, tuple(c for c in coords if c is not None))
    return None
