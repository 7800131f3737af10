"""What a bound attention is: the vocabulary between binding and building."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from sfa_onnx.passes.axes.expr import Expr, Label
from sfa_onnx.passes.axes.trace import Ref, Stop, Tracer
from sfa_onnx.passes.bind.literals import Kept, Selected, Visible
from sfa_onnx.passes.bind.paths import State, deepen
from sfa_onnx.passes.bind.rows import Columns

__all__ = ["AttentionRegion", "NotASite", "Query", "Sinks", "Site", "Statistic"]


class NotASite(Exception):  # noqa: N818 - an early return: ordinary attention
    """An attention to all keys, as far as binding sees; `refusal` if a selection feeds it."""

    def __init__(self, refusal: Stop | None = None) -> None:
        super().__init__()
        self.refusal = refusal


@dataclass(frozen=True)
class AttentionRegion:
    """Values between products of queries and keys and one result.

    Attributes:
        anchor: the node that names it: its first exponential.
        result: the value that all weighted rows reach.
        inner: the values that depend on scores, products and result included.
        scores: what the first exponential is of.
        weights: what weights rows first.
        sides: other inner values that are read outside, such as log-sum-exps.
        results: `result`, and values behind it that the attention may end at as well.
    """

    anchor: int
    result: str
    inner: frozenset[str]
    scores: str
    weights: str
    sides: tuple[str, ...] = ()
    results: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sinks:
    """One more score per head, without a row: the sum of factors times elements, and a number.

    `behind`: the operator runs without them, since its log-sum-exp without them leaves the
    attention; the result is divided by 1 + exp(sink - log-sum-exp).
    """

    parts: tuple[tuple[float, Ref], ...] = ()
    number: float = 0.0
    behind: bool = False

    @property
    def labels(self) -> frozenset[Label]:
        """What it differs along."""
        return frozenset().union(*(ref.labels for _, ref in self.parts))


@dataclass(frozen=True)
class Statistic:
    """What the graph returns of its softmax besides: `kind`, times `factor`.

    `kind`: "maximum", "log-sum-exp", or "sum" of exp(score - maximum);
    `lonely`: what it holds in rows without keys.
    """

    ref: Ref
    kind: str
    factor: float = 1.0
    lonely: float = -math.inf


@dataclass(frozen=True)
class Query:
    """The query columns that meet some key columns: `ref` over `label`."""

    ref: Ref
    label: Label


@dataclass
class Site:
    """An attention in normal form.

    Attributes:
        attention: where it lies.
        out: the value the weighted sum makes, by labels.
        key: label that runs over the keys (tokens, or slots of a gathered row).
        column: label of the value columns.
        nope, rope: key columns and the query columns that meet them; the value is nope.
        scale, rope_factor: constant factors of the scores of each part, those of the operands
            (`State.factor`) left out.
        selected: what selects tokens, in dense forms.
        kept: the mask to read selected tokens off, where `selected` only say how many there are.
        visible: other masks.
        rows: labels that distinguish one row of keys from another (batch first, then query tokens).
        heads: labels that share them.
        products: values that hold query times key, where the inside of the attention begins.
        score_axes: every score tensor, with what its axes run over.
        sinks: one more score per head, which takes part in the sum without a row.
        statistics: what leaves the attention besides its result.
        finished: indices and masks are taken as the graph has computed them (`bind/finished.py`).
    """

    tracer: Tracer
    attention: AttentionRegion
    out: Ref
    key: Label
    column: Label
    nope: Columns
    nope_query: Query
    rope: Columns | None
    rope_query: Query | None
    value: Columns
    scale: float
    rope_factor: float
    selected: list[Selected] = field(default_factory=list)
    kept: Kept | None = None
    visible: list[Visible] = field(default_factory=list)
    rows: list[Label] = field(default_factory=list)
    heads: list[Label] = field(default_factory=list)
    products: list[str] = field(default_factory=list)
    score_axes: dict[str, tuple[Expr, ...]] = field(default_factory=dict)
    bound: list[str] = field(default_factory=list)
    sinks: Sinks | None = None
    statistics: list[Statistic] = field(default_factory=list)
    finished: bool = False

    @property
    def queries(self) -> list[tuple[Query, list[State]]]:
        """The query's nope and rope, and what each is on its way from the products."""
        parts = (q for q in (self.nope_query, self.rope_query) if q is not None)
        return [(query, deepen(self.tracer, query.ref)) for query in parts]
