"""Scores and rows that are computed tile by tile, the scale of a tile behind its product.

The sum over tiles of scale[t] <q[t], x[t]> is <q, scale x>: one product of the query and of rows
that are dequantised in front of it, which is what the operator reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sfa_onnx.passes.axes.expr import Expr, Label, fresh
from sfa_onnx.passes.axes.trace import Ref, Stop, Tracer
from sfa_onnx.passes.bind.paths import deepen, one_element
from sfa_onnx.passes.values.arithmetic import coefficient, factors
from sfa_onnx.passes.values.terms import Term

__all__ = ["Span", "Tile", "join_columns", "join_tiles"]

_ALIKE = 1e-6


@dataclass(frozen=True)
class Span:
    """Columns from `start`, over which `label` runs; of all tiles, `over` runs over them."""

    label: Label
    start: int
    over: Label | None = None


@dataclass(frozen=True)
class Tile:
    """`by` * `scale` * the sum over `label` of query * key; of all tiles, `over` runs over them."""

    by: float
    scale: Ref
    query: Ref
    key: Ref
    label: Label
    over: Label | None = None

    @classmethod
    def of(cls, addend: Term, keys: Label) -> Tile | None:
        """A part of a score over `keys`; None: it is no product with a scale per key."""
        by, rest = coefficient(addend)
        over = rest.label if rest.op == "sum" else None
        own = factors(rest.args[0] if rest.op == "sum" else rest)
        dots = [f for f in own if f.op == "dot"]
        scales = [f for f in own if f.op == "element"]
        if len(own) != 2 or not dots or not scales or keys not in scales[0].labels:
            return None
        one, other, label = dots[0].factors
        if (keys in one.labels) == (keys in other.labels):
            return None
        query, key = (other, one) if keys in one.labels else (one, other)
        return cls(by, scales[0].ref, query, key, label, over)


def join_tiles(tracer: Tracer, tiles: Sequence[Tile]) -> tuple[Ref, Ref, Label]:
    """(query, dequantised key, label) of the product that all tiles make up.

    Raises:
        Stop: they are not the tiles of one row.
    """
    tiles = sorted(tiles, key=lambda t: _start(tracer, t))
    spans = [Span(t.label, _start(tracer, t), t.over) for t in tiles]
    width = sum(t.label.size * (t.over.size if t.over else 1) for t in tiles)
    join = _Join(tracer, spans, fresh("d", width))
    refs = [join.whole([getattr(t, part) for t in tiles]) for part in ("query", "key", "scale")]
    alone = len(tiles) == 1 or all(t.over is None for t in tiles)
    same = alone and all(abs(t.by - tiles[0].by) <= _ALIKE * abs(t.by) for t in tiles)
    if None in refs or not same:
        raise Stop(
            f"scores are scaled by {tiles[0].scale.value} behind the product, and the products are"
            " not those of the tiles of one row",
            tiles[0].scale.value,
            "dequantise the rows in front of the product",
        )
    query, key, scale = (r for r in refs if r is not None)
    return query, tracer.product(key, scale), join.label


def _start(tracer: Tracer, tile: Tile) -> int:
    """The first column of a tile."""
    deep = deepen(tracer, tile.key)[-1].ref
    return next((c.const for c in deep.coords if (tile.label, 1) in c.terms), 0)


def join_columns(
    tracer: Tracer, rows: Sequence[tuple[Ref, ...]], spans: Sequence[Span], label: Label
) -> tuple[Ref, ...] | None:
    """Rows (and scales) of all columns, over `label`, for those of every range of columns."""
    join = _Join(tracer, spans, label)
    ordered = [sorted(own, key=lambda r: deepen(tracer, r)[-1].ref.value) for own in rows]
    if len({len(own) for own in ordered}) > 1:
        return None
    found = [join.whole(list(refs)) for refs in zip(*ordered, strict=True)]
    return None if None in found else tuple(r for r in found if r is not None)


class _Join:
    """Puts tiles together over one label."""

    def __init__(self, tracer: Tracer, spans: Sequence[Span], label: Label) -> None:
        self.tracer, self.spans, self.label = tracer, spans, label

    def whole(self, refs: Sequence[Ref]) -> Ref | None:
        """The element over all columns that every tile has a range of."""
        return one_element(self.tracer, refs, self._lifted, deepest=True)

    def _lifted(self, parts: list[Expr]) -> Expr | None:
        first, width = self.spans[0], self.spans[0].label.size
        own = Expr.of(self.label)
        swap = {first.label: own + -first.start}
        if first.over is not None:
            swap = {first.label: own.mod(width), first.over: own.floordiv(width)}
        for whole in (parts[0].substitute(swap), own.floordiv(width), own):
            if [whole.substitute({self.label: _place(s)}) for s in self.spans] == parts:
                return whole
        return None


def _place(span: Span) -> Expr:
    """The column of the whole that a column of a tile is."""
    own = Expr.of(span.label) + span.start
    return own if span.over is None else Expr.of(span.over) * span.label.size + own
