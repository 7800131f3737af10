"""Chunks of keys put together: weights over t < a and over t < b are weights over t < a + b.

Loops over chunks of a selection, and partial softmaxes that are merged, come as one sum per chunk.
Where chunk i is the whole at t + start_i, the whole is one element of the tensors that were cut;
what was computed chunk by chunk (indices, masks) is joined by a Concat in the replacement.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from sfa_onnx.passes.axes.expr import Expr, Label, Quot, Read, Rem, fresh
from sfa_onnx.passes.axes.trace import Joined, Ref, Stop, Tracer
from sfa_onnx.passes.bind.paths import deepen, one_element
from sfa_onnx.passes.values.arithmetic import addends, coefficient
from sfa_onnx.passes.values.attention import Weight
from sfa_onnx.passes.values.terms import Term, dot, element, number

__all__ = ["Join", "join_chunks", "starts"]

_ALIKE = 1e-6


def join_chunks(tracer: Tracer, parts: Sequence[tuple[Weight, Ref]], at: str) -> tuple[Weight, Ref]:
    """All parts as one range of keys.

    Raises:
        Stop: they are not chunks of one whole.
    """
    numbers = starts(tracer, [w.label for w, _ in parts], [r for _, r in parts])
    order = sorted(range(len(parts)), key=numbers.__getitem__)  # keys have no order of their own
    sizes = [parts[i][0].label.size for i in order]
    weights, refs = zip(*(parts[i] for i in order), strict=True)
    whole = [sum(sizes[:i]) for i in range(len(sizes))]
    join = Join(tracer, [w.label for w in weights], whole, at)
    return join.weight(weights), join.ref(refs)


def starts(tracer: Tracer, labels: Sequence[Label], refs: Sequence[Ref]) -> list[int]:
    """Where chunks begin: what is added to their labels, or the numbers that single ones have."""
    paths = [_numbers(tracer, ref) for ref in refs]
    for value in reversed(paths[0]):
        found = [p[value] for p in paths if value in p]
        if len(found) < len(paths) or len({len(f) for f in found}) > 1:
            continue
        for column in zip(*found, strict=True):
            runs = [
                (x, 1) in e.terms if x.size > 1 else not e.labels & set(labels)
                for x, e in zip(labels, column, strict=True)
            ]
            numbers = [e.const for e in column]
            if all(runs) and len(set(numbers)) == len(numbers):
                return numbers
    return [0] * len(refs)


def _numbers(tracer: Tracer, ref: Ref) -> dict[str, list[Expr]]:
    """Every index expression on the way from an element to where it is stored, by tensor."""
    return {s.ref.value: list(_exprs(s.ref.coords)) for s in deepen(tracer, ref)}


def _exprs(coords: Sequence[Expr]) -> Iterator[Expr]:
    for c in coords:
        yield c
        for read in c.reads:
            yield from _exprs(read.coords)


class Join:
    """Puts chunks together over one new label."""

    def __init__(
        self, tracer: Tracer, labels: list[Label], starts: list[int], at: str, name: str = "t"
    ) -> None:
        """`labels` run over the chunks, which begin at `starts`; `name` is that of the whole."""
        self.tracer, self.labels, self.starts, self.at = tracer, labels, starts, at
        self.whole = fresh(name, starts[-1] + labels[-1].size)

    def weight(self, weights: Sequence[Weight]) -> Weight:
        """The weight of a key of the whole."""
        exponent = self._sum([list(addends(w.exponent)) for w in weights])
        flags = [self._flag(f, weights[1:]) for f in weights[0].flags]
        if any(len(w.flags) != len(flags) for w in weights):
            raise self._differ("masks")
        return Weight(self.whole, exponent, tuple(flags))

    def _sum(self, chunks: list[list[Term]]) -> Term:
        found = []
        for first in chunks[0]:
            same = [first]
            for other in chunks[1:]:
                match = next((x for x in other if self._fits(first, x, len(same))), None)
                if match is None:
                    raise self._differ("scores")
                other.remove(match)
                same.append(match)
            by, _ = coefficient(first)
            whole = self._term([coefficient(x)[1] for x in same])
            found.append(whole if by == 1 else Term("mul", (number(by), whole)))
        if any(chunks[1:]) and any(chunks[1:][0]):
            raise self._differ("scores")
        return found[0] if len(found) == 1 else Term("add", tuple(found))

    def _fits(self, first: Term, other: Term, which: int) -> bool:
        (a, x), (b, y) = coefficient(first), coefficient(other)
        if x.op != y.op or abs(a - b) > _ALIKE * abs(a):
            return False
        if x.op == "dot":
            return all(self._rows((_side(x, i), _side(y, i)), which) for i in (0, 1))
        return x.op == "element"

    def _rows(self, refs: tuple[Ref, Ref], which: int) -> bool:
        """Whether two factors are one element of the whole, or of rows of one tensor."""
        stored = {deepen(self.tracer, r)[-1].ref.value for r in refs}
        return self._pair(refs, which) or len(stored) == 1

    def _pair(self, refs: tuple[Ref, Ref], which: int) -> bool:
        labels, starts = [self.labels[0], self.labels[which]], [0, self.starts[which]]
        join = Join(self.tracer, labels, starts, self.at)
        return join.same(refs) is not None

    def _flag(self, flag: Term, others: Sequence[Weight]) -> Term:
        """A condition of the whole; chunk by chunk if need be."""
        chunks = [flag]
        for weight in others:
            same = [f for f in weight.flags if self._alike(flag, f)]
            exact = [f for f in same if self._pair((_leaf(flag), _leaf(f)), len(chunks))]
            own = exact or same
            if len(own) != 1:
                raise self._differ("masks")
            chunks.append(own[0])
        return self._term(chunks)

    def _alike(self, a: Term, b: Term) -> bool:
        """Whether two conditions are made by the same operator."""
        makers = [self.tracer.index.maker(_leaf(x).value) for x in (a, b)]
        kinds = {"" if m is None else m.op_type for m in makers}
        return _kind(a) == _kind(b) and len(kinds) == 1

    def _term(self, chunks: Sequence[Term]) -> Term:
        first = chunks[0]
        if first.op == "not":
            return Term("not", (self._term([c.args[0] for c in chunks]),))
        if first.op == "dot":
            query, key = (self.ref([_side(c, i) for c in chunks]) for i in (0, 1))
            return dot(query, key, first.factors[2])
        if first.op == "element":
            refs = [c.ref for c in chunks]
            whole = self.same(refs)  # what is gathered is read as it was gathered
            reads = whole is not None and any(c.reads for c in whole.coords)
            return element(self.virtual(refs) if whole is None or reads else whole)
        raise self._differ("masks")

    # -- elements -------------------------------------------------------------------------------

    def ref(self, refs: Sequence[Ref]) -> Ref:
        """One element for those of all chunks: of a common tensor, or by joined indices.

        Raises:
            Stop: there is none.
        """
        if (found := self.same(refs)) is not None:
            return found
        deep = [deepen(self.tracer, r)[-1].ref for r in refs]
        if len({r.value for r in deep}) != 1:
            raise self._differ("rows")
        coords = [self._expr(list(c)) for c in zip(*(r.coords for r in deep), strict=True)]
        return Ref(deep[0].value, tuple(coords))

    def same(self, refs: Sequence[Ref]) -> Ref | None:
        """The element of the first tensor that all were cut from, if they are one element."""
        return one_element(self.tracer, refs, self._lifted)

    def _lifted(self, chunks: list[Expr]) -> Expr | None:
        """The coordinate of the whole that is, in every chunk, the one of that chunk."""
        wide = next((i for i, label in enumerate(self.labels) if label.size > 1), None)
        if wide is None:
            whole = self._counted(chunks)
        else:
            own = Expr.of(self.whole) + -self.starts[wide]
            whole = chunks[wide].substitute({self.labels[wide]: own})
        same = whole is not None and all(
            whole.substitute({self.whole: Expr.of(label) + start}) == c
            for label, start, c in zip(self.labels, self.starts, chunks, strict=True)
        )
        return whole if same else None

    def _counted(self, chunks: list[Expr]) -> Expr | None:
        """A coordinate that grows by equal steps from single key to single key."""
        first, second = chunks[:2]
        total = Expr.of(self.whole) * (second.const - first.const) + first.const
        for terms in zip(*(_by_kind(c) for c in chunks), strict=False):
            atom = terms[0][0]
            if isinstance(atom, Read):
                reads = [
                    a.coords for a, _ in terms if isinstance(a, Read) and a.value == atom.value
                ]
                if len(reads) < len(terms):
                    return None
                inner = [self._counted(list(c)) for c in zip(*reads, strict=True)]
                if None in inner:
                    return None
                atom = Read(atom.value, tuple(c for c in inner if c is not None))
            if not isinstance(atom, Label | Read | Quot | Rem):
                return None
            total = total + Expr.of(atom) * terms[0][1]
        return total

    def _expr(self, chunks: list[Expr]) -> Expr:
        """One coordinate for those of all chunks."""
        if (whole := self._lifted(chunks)) is not None:
            return whole
        total = Expr(chunks[0].const)
        if any(c.const != total.const or len(c.terms) != len(chunks[0].terms) for c in chunks):
            raise self._differ("rows")
        for terms in zip(*(_by_kind(c) for c in chunks), strict=True):
            total = total + self._atom([a for a, _ in terms]) * terms[0][1]
        return total

    def _atom(self, atoms: Sequence[object]) -> Expr:
        first = atoms[0]
        if all(isinstance(a, Read) for a in atoms):
            refs = [Ref(a.value, a.coords) for a in atoms if isinstance(a, Read)]
            whole = self.same(refs) or self.virtual(refs)
            return Expr.of(Read(whole.value, whole.coords))
        for kind, apply in ((Quot, Expr.floordiv), (Rem, Expr.mod)):
            cut = [a for a in atoms if isinstance(a, kind)]
            if len(cut) == len(atoms) and len({a.by for a in cut}) == 1:
                return apply(self._expr([a.expr for a in cut]), cut[0].by)
        if isinstance(first, Label) and all(a == first for a in atoms):
            return Expr.of(first)
        raise self._differ("rows")

    def virtual(self, refs: Sequence[Ref]) -> Ref:
        """An element of the Concat of what each chunk has."""
        rows = sorted({x for r in refs for x in r.labels} - set(self.labels), key=str)
        if any(x.size > 1 and x not in r.labels for r, x in zip(refs, self.labels, strict=True)):
            raise self._differ("rows")
        parts = tuple(zip(refs, self.labels, strict=True))
        name = self.tracer.join(Joined(parts, tuple(rows), self.whole))
        return Ref(name, (*map(Expr.of, rows), Expr.of(self.whole)))

    def _differ(self, what: str) -> Stop:
        return Stop(
            f"the {what} of {len(self.labels)} ranges of keys are not chunks of one whole",
            self.at,
            "expected every chunk to be computed alike, from slices of the same tensors",
        )


def _side(product: Term, which: int) -> Ref:
    """The query (0) or the key (1) of a product."""
    return product.factors[1] if which else product.factors[0]


def _kind(flag: Term) -> str:
    return f"not {flag.args[0].op}" if flag.op == "not" else flag.op


def _leaf(flag: Term) -> Ref:
    own = flag.args[0] if flag.op == "not" else flag
    return own.ref if own.op == "element" else Ref("", ())


def _by_kind(expr: Expr) -> list[tuple[object, int]]:
    """Terms in an order that does not depend on the names of tensors."""
    return sorted(expr.terms, key=lambda t: (type(t[0]).__name__, t[1], _name(t[0])))


def _name(atom: object) -> str:
    return atom.name if isinstance(atom, Label) else ""
