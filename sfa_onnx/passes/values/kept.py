"""Reductions over what a mask keeps: over all places of the mask, those left out hidden.

`sum(u, f(nonzero[u]))` is `sum(t, [mask[t]] f(t))`. Where the mask is flattened rows, as for a
scatter whose entries are listed one by one, `t` is taken apart into the axes that it runs over.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Protocol

from sfa_onnx.passes.axes.expr import Expr, Label, Quot, Read, Rem, fresh, label_of, split
from sfa_onnx.passes.axes.kept import among_all
from sfa_onnx.passes.axes.trace import Move, Ref
from sfa_onnx.passes.values.pointwise import Reads
from sfa_onnx.passes.values.terms import ZERO, Term, dot, element, index, number

__all__ = ["over_kept"]


class Asks(Reads, Protocol):
    """What is asked of a reader."""

    def is_bool(self, value: str) -> bool:
        """Whether a tensor holds conditions."""


def over_kept(r: Asks, kind: str, label: Label, mask: str, body: Term) -> Term | None:
    """A reduction over an axis of what `mask` keeps; None: it depends on places among the kept."""
    shape = r.tracer.shape(mask)
    own = fresh("t", math.prod(shape))
    whole = _among(r, body, label, Expr.of(own))
    if whole is None:
        return None
    place = Ref(mask, split(Expr.of(own), shape))
    # what switches entries off is not looked into: a tensor has to hold it
    shown = element(place) if kind == "any" and r.is_bool(mask) else r.term(place)
    if not r.is_bool(mask):
        shown = r.n.negate(r.n.make("eq", (shown, ZERO)))
    whole = _positions(r, whole)
    axes, at = _axes(own, (whole, shown))
    whole, shown = (t.rename({own: at}, r.n.make) for t in (whole, shown))
    if kind == "sum":
        whole = r.n.mul(r.n.flag(shown), whole)
    elif kind in ("any", "all"):
        hidden = r.n.negate(shown)
        sides = ("and", (shown, whole)) if kind == "any" else ("or", (hidden, whole))
        whole = r.n.make(*sides)
    else:
        whole = r.n.where(shown, whole, number(-math.inf if kind == "maximum" else math.inf))
    for axis in axes:  # those that are named by a position go first
        whole = r.over(kind, axis, whole)
    return whole


def _among(r: Asks, term: Term, label: Label, place: Expr) -> Term | None:
    """A term with a kept place read at a place of the whole mask."""
    if label not in term.labels:
        return term
    if term.op == "element":
        ref = among_all(r.tracer, term.ref, label, place)
        while ref is not None and ref.value in r.tracer.wholes:
            step = r.tracer.step(ref)
            if not isinstance(step, Move):
                break
            ref = step.ref
        if ref is not None and r.is_bool(ref.value) and r.tracer.fill(ref.value) is not None:
            return r.term(ref)
        return None if ref is None else element(ref)
    if term.op == "dot":
        query, key, inner = term.factors
        sides = [among_all(r.tracer, x, label, place) for x in (query, key)]
        return None if sides[0] is None or sides[1] is None else dot(sides[0], sides[1], inner)
    args = [_among(r, a, label, place) for a in term.args]
    known = tuple(a for a in args if a is not None)
    own = term.op in ("index", "pieces") or len(known) < len(args)
    return None if own else r.n.make(term.op, known, term.data)


def _axes(own: Label, terms: tuple[Term, ...]) -> tuple[list[Label], Expr]:
    """The axes that a label runs over, as quotients and remainders of it show, and itself by them.

    One label where they do not divide each other.
    """
    cuts = sorted({own.size, *(c for t in terms for c in _cuts(t, own))})
    steps = [1, *(c for c in cuts if c != 1)]
    if any(b % a for a, b in itertools.pairwise(steps)) or steps[-1] != own.size:
        return [own], Expr.of(own)
    axes = [fresh("t", b // a) for a, b in itertools.pairwise(steps)]
    at = Expr()
    for axis, step in zip(axes, steps, strict=False):
        at = at + Expr.of(axis) * step
    return axes[::-1], at


def _cuts(term: Term, own: Label) -> Iterator[int]:
    """What a label is divided by in a term."""
    for part in term.walk():
        coords = part.ref.coords if part.op == "element" else ()
        coords = (part.expr,) if part.op == "index" else coords
        if part.op == "dot":
            coords = (*part.factors[0].coords, *part.factors[1].coords)
        for coordinate in coords:
            yield from _divided(coordinate, own)


def _divided(expr: Expr, own: Label) -> Iterator[int]:
    for atom, _ in expr.terms:
        if isinstance(atom, Read):
            for coordinate in atom.coords:
                yield from _divided(coordinate, own)
        elif isinstance(atom, Quot | Rem):
            scale = _scale(atom.expr, own)
            if scale:
                yield scale * atom.by
            yield from _divided(atom.expr, own)


def _scale(expr: Expr, own: Label) -> int:
    """What a label was divided by already; 0 where it is not the label."""
    if label_of(expr) == own:
        return 1
    atom = expr.terms[0][0] if len(expr.terms) == 1 and not expr.const else None
    if isinstance(atom, Quot):
        return _scale(atom.expr, own) * atom.by
    return _scale(atom.expr, own) if isinstance(atom, Rem) else 0


def _positions(r: Asks, term: Term) -> Term:
    """A term whose indices are read where they lie, and are positions where they only number."""
    if not term.args:
        return term
    if term.op == "mod" and term.args[0].op == "element":
        own = r.tracer.index_value(term.args[0].ref, term.width)
        low, high = own.bounds or (-1, 0)
        if low >= 0 and high < term.width:
            return index(own)
        atom = own.terms[0][0] if len(own.terms) == 1 and not own.const else None
        read = isinstance(atom, Read) and own.terms[0][1] == 1
        inner = element(Ref(atom.value, atom.coords)) if read and isinstance(atom, Read) else None
        return term if inner is None else r.n.make("mod", (inner,), term.width)
    return r.n.make(term.op, tuple(_positions(r, a) for a in term.args), term.data)
