"""Parts of a Concat that are slices of one tensor: a loop over sequences, written out.

Reference code and exporters write `stack([kv[b][idx[b]] for b in range(B)])`. Part `b` is an
element of the stored tensors at a number; where that number grows evenly from part to part, all
parts together are one element, at an expression of the position in the Concat.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from sfa_onnx.passes.axes.asking import Tracing
from sfa_onnx.passes.axes.expr import Expr, Label, Quot, Read, Rem, fresh
from sfa_onnx.passes.axes.steps import Move, Pieces, Product, Ref, Scaled, Step

__all__ = ["join_parts"]

_MOST: Final = 256  # parts: what a loop over sequences or tokens may have, written out
_DEEP: Final = 8  # products and joins that parts may have behind each other


def join_parts(tracer: Tracing, ref: Ref, names: Sequence[str], axis: int) -> Step | None:
    """What `ref` (an element of the Concat of `names` along `axis`) is a part of, if they agree.

    Every part has the same size along `axis`, and is the same chain of views, constant factors and
    products down to the same tensors; only numbers in index expressions differ, by equal steps.

    Returns:
        The common step; None where parts differ in more than such numbers.
    """
    sizes = {tracer.shape(name)[axis] for name in names}
    if not 1 < len(names) <= _MOST or len(sizes) != 1 or not ref.coords[axis].labels:
        return None
    size = sizes.pop()
    if size == 0:
        return None
    own = fresh("part", size)
    coords = (*ref.coords[:axis], Expr.of(own), *ref.coords[axis + 1 :])
    position = ref.coords[axis]
    join = _Join(tracer, ref, position.floordiv(size), own, position.mod(size))
    return join.step([Ref(name, coords) for name in names], _DEEP)


class _Join:
    """Puts parts together: part `number`, element `inside` of it (`own` while parts are traced)."""

    def __init__(self, tracer: Tracing, whole: Ref, number: Expr, own: Label, inside: Expr) -> None:
        self.tracer, self.whole = tracer, whole
        self.number, self.own, self.inside = number, own, inside

    def step(self, refs: list[Ref], depth: int) -> Step | None:
        """One step that holds for every part."""
        factor = 1.0
        while depth:
            steps = self._steps(refs)
            if steps is None:
                return None
            first = steps[0]
            if not isinstance(first, Move | Scaled):
                return self._inner(steps, factor, depth - 1)
            factor *= first.factor if isinstance(first, Scaled) else 1.0
            refs = [s.ref for s in steps if isinstance(s, Move | Scaled)]
            if (ref := self.ref(refs)) is not None:
                return Move(ref) if factor == 1.0 else Scaled(ref, factor)
        return None

    def _steps(self, refs: list[Ref]) -> list[Step] | None:
        """The next step of every part; None when their kinds or factors differ."""
        steps: list[Step] = []
        for ref in refs:
            step = self.tracer.step(ref)
            same = not steps or type(step) is type(steps[0])
            if not same or _factor(step) != _factor(steps[0] if steps else step):
                return None
            steps.append(step)
        return steps

    def _inner(self, steps: list[Step], factor: float, depth: int) -> Step | None:
        """Parts that are products, or that are put together from other parts."""
        products = [s for s in steps if isinstance(s, Product)]
        if len(products) == len(steps):
            a, b = self._down([s.a for s in products], depth), None
            if isinstance(a, Move | Scaled):
                b = self._down([s.b for s in products], depth)
            if isinstance(a, Move | Scaled) and isinstance(b, Move | Scaled):
                both = factor * _factor(a) * _factor(b)
                same = len({s.inverse for s in products}) == 1
                whole = Product(a.ref, b.ref, products[0].inverse)
                return whole if both == 1.0 and same else None
        pieces = [s for s in steps if isinstance(s, Pieces)]
        if len(pieces) == len(steps) and factor == 1.0:
            return self._pieces(pieces, depth)
        return None

    def _pieces(self, pieces: list[Pieces], depth: int) -> Step | None:
        first = pieces[0]
        ranges = [[(a, b) for a, b, _ in p.parts] for p in pieces]
        if first.label == self.own or any(
            p.label != first.label or r != ranges[0] for p, r in zip(pieces, ranges, strict=True)
        ):
            return None
        parts = []
        for i, (low, high) in enumerate(ranges[0]):
            inner = self._down([p.parts[i][2] for p in pieces], depth)
            if isinstance(inner, Product):  # seen again from the whole, within this range alone
                parts.append((low, high, self.whole))
            elif isinstance(inner, Move):
                parts.append((low, high, inner.ref))
            else:
                return None
        return Pieces(first.label, tuple(parts))

    def _down(self, refs: list[Ref], depth: int) -> Step | None:
        """The parts as one element, here or further down."""
        ref = self.ref(refs)
        return Move(ref) if ref is not None else self.step(refs, depth)

    def ref(self, refs: list[Ref]) -> Ref | None:
        """One element for all of `refs`, which differ in evenly growing numbers only."""
        if len({r.value for r in refs}) != 1:
            return None
        coords = [self._expr(list(c)) for c in zip(*(r.coords for r in refs), strict=True)]
        found = tuple(c for c in coords if c is not None)
        if len(found) != len(coords):
            return None
        return Ref(refs[0].value, found).substitute({self.own: self.inside})

    def _expr(self, exprs: list[Expr]) -> Expr | None:
        if all(e == exprs[0] for e in exprs):
            return exprs[0]
        total = self._grown([e.const for e in exprs])
        if total is None or len({len(e.terms) for e in exprs}) != 1:
            return None
        if total.terms and any(atom == self.own for atom, _ in exprs[0].terms):
            return None  # pieces of one axis put together again, not one tensor per part
        for terms in zip(*(e.terms for e in exprs), strict=True):
            atom = self._atom([a for a, _ in terms])
            if atom is None or len({c for _, c in terms}) != 1:
                return None
            total = total + atom * terms[0][1]
        return total

    def _grown(self, numbers: list[int]) -> Expr | None:
        """Numbers that grow by equal steps, each `run` times in a row, and begin again."""
        first, count = numbers[0], len(numbers)
        run = next((i for i, n in enumerate(numbers) if n != first), 0)
        if not run:
            return Expr(first)
        by = numbers[run] - first
        period = next((i for i in range(2, count // run) if numbers[i * run] == first), count)
        if by < 0 or any(n != first + i // run % period * by for i, n in enumerate(numbers)):
            return None
        return self.number.floordiv(run).mod(period) * by + first

    def _atom(self, atoms: list[object]) -> Expr | None:
        first = atoms[0]
        if all(a == first for a in atoms) and isinstance(first, Label | Read | Quot | Rem):
            return Expr.of(first)
        for kind, apply in ((Quot, Expr.floordiv), (Rem, Expr.mod)):
            cut = [a for a in atoms if isinstance(a, kind)]
            if len(cut) == len(atoms) and len({a.by for a in cut}) == 1:
                whole = self._expr([a.expr for a in cut])
                return None if whole is None else apply(whole, cut[0].by)
        reads = [a for a in atoms if isinstance(a, Read)]
        if len(reads) != len(atoms):
            return None
        inner = self.ref_of_reads(reads)
        return None if inner is None else Expr.of(inner)

    def ref_of_reads(self, reads: list[Read]) -> Read | None:
        """One index read for those of all parts."""
        if len({r.value for r in reads}) != 1:
            return None
        coords = [self._expr(list(c)) for c in zip(*(r.coords for r in reads), strict=True)]
        found = tuple(c for c in coords if c is not None)
        return Read(reads[0].value, found) if len(found) == len(coords) else None


def _factor(step: Step) -> float:
    return step.factor if isinstance(step, Scaled) else 1.0
