"""The operator in place of a selection, and what its readers were used to get."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import onnx

from sfa_onnx.operator.op import LIGHTNING_INDEXER
from sfa_onnx.passes.axes.expr import Expr, Label
from sfa_onnx.passes.axes.places import axis_labels
from sfa_onnx.passes.axes.trace import Ref, Stop
from sfa_onnx.passes.bind.paths import State
from sfa_onnx.passes.emit.emitter import Emitter, Group
from sfa_onnx.passes.emit.select import visible_at_rows
from sfa_onnx.passes.emit.sized import sized
from sfa_onnx.passes.indexer.formula import Factor
from sfa_onnx.passes.indexer.masks import Prefix
from sfa_onnx.passes.indexer.site import Selection
from sfa_onnx.passes.shapes.size import form_of, is_open

__all__ = ["HIDDEN_WEIGHT", "Replacement", "build"]

_T = onnx.TensorProto
HIDDEN_WEIGHT: Final = -1e30  # absorbs every score it is added to, in float32 and float64


class Replacement:
    """The nodes that stand for one selection.

    Attributes:
        emitter: holds them.
        rows: the operator's indices [B, S1, 1, K], int32: visible keys first, then -1.
        query, key: the graph's elements that were taken, one per part.
    """

    def __init__(self, site: Selection, stem: str) -> None:
        self.site, self.e = site, Emitter(site.tracer, stem)
        self.query: list[Ref] = []
        self.key: list[Ref] = []
        self._named: set[str] = set()
        self.rows = ""
        self.listed = ""  # as `rows`; with padding, its keys are listed behind those visible
        learnt = [states[0].ref for states in (*site.query, *site.key)]
        learnt += [by.ref for p in site.formula.parts for by in (*p.query_by, *p.key_by)]
        for ref in learnt:
            if ref.value not in site.tracer.joined:  # those are made first
                self.e.learn(ref)
        self._operator()

    # -- operands -------------------------------------------------------------------------------

    def _operator(self) -> None:
        site, e, f = self.site, self.e, self.site.formula
        lead: list[Group] = [site.batch, site.tokens]
        q = self._sides(site.query, [*lead, f.heads], "query")
        k = self._sides(site.key, [site.batch, [f.keys], []], "key")
        w = self._weights([*lead, f.heads])
        if site.masks.padding:
            q, k, w = self._with_padding(q, k, w)
        inputs = [q, k, w]
        if site.lengths:
            inputs += ["", self._lengths()]
        if site.by_row:
            inputs = self._apart(inputs)
        outputs: dict[str, int] = {"rows": _T.INT32}
        if site.masks.padding:
            outputs["scores"] = site.elem_type
        attrs: dict[str, Any] = LIGHTNING_INDEXER.complete(
            {
                "layout_query": "BSND",
                "layout_key": "PA_BSND" if site.by_row else "BSND",
                "sparse_count": site.count,
                "sparse_mode": site.mode,
                "return_values": int(bool(site.masks.padding)),
            }
        )
        made = e.several(
            LIGHTNING_INDEXER.name, inputs, outputs, domain=LIGHTNING_INDEXER.domain, **attrs
        )
        made = [self._together(m) for m in made] if site.by_row else made
        self.listed = self.rows = made[0]
        if site.masks.padding:
            self.rows = self._without_padding(made[0], made[1])
        if site.masks.rows:
            self._without_rows()

    def _sides(self, paths: Sequence[Sequence[State]], groups: Sequence[Group], hint: str) -> str:
        """Queries or keys of all parts, side by side: one product instead of their sum."""
        e, kind = self.e, self.site.elem_type
        found = []
        for part, states in zip(self.site.formula.parts, paths, strict=True):
            ref, value = self._side(states, [*groups, [part.column]], hint)
            for factor in part.query_by if hint == "query" else part.key_by:
                by = self._power(factor, e.arrange(factor.ref, [*groups, []], "scale"), kind)
                value = e.emit("Mul", [value, by], hint, kind)
            if hint == "query" and part.factor != 1:
                by = e.cast(e.constant(np.asarray(part.factor, np.float32)), kind)
                value = e.emit("Mul", [value, by], hint, kind)
            (self.query if hint == "query" else self.key).append(ref)
            found.append(value)
        return found[0] if len(found) == 1 else e.emit("Concat", found, hint, kind, axis=-1)

    def _side(self, states: Sequence[State], groups: Sequence[Group], hint: str) -> tuple[Ref, str]:
        """The first tensor that needs no transpose, or else the first that is a view."""
        order = [x for g in groups for x in g if x.size > 1]
        straight = [s for s in states if _in_order(s.ref, order)]
        last: Stop | None = None
        for state in (*straight, *states):
            try:
                value = self.e.arrange(state.ref, groups, hint)
                value = self.e.broadcast(value, groups, state.ref.labels)
                return state.ref, self.e.cast(value, self.site.elem_type)
            except Stop as stop:
                last = stop
        assert last is not None
        raise last

    def _weights(self, groups: Sequence[Group]) -> str:
        """The product of all factors of a head's weight: [B, S1, Hi]."""
        e, factors = self.e, self.site.formula.weights
        padded = bool(self.site.masks.padding)
        total = "" if factors else e.constant(np.ones((1, 1, 1), np.float32))
        have: set[Label] = set()
        for factor in factors:
            own = e.arrange(factor.ref, groups, "weights")
            alone = len(factors) == 1 and factor.power == 1 and not padded
            if not alone or e.elem_type(own) == _T.DOUBLE:
                own = self._power(factor, own, _T.FLOAT)
            total = own if not total else e.emit("Mul", [total, own], "weights", _T.FLOAT)
            have |= factor.ref.labels
        return e.broadcast(total, groups, have)

    def _power(self, factor: Factor, value: str, kind: int) -> str:
        """What a factor is, of its tensor."""
        e, own = self.e, self.e.cast(value, kind)
        if factor.power == 1:
            return own
        if factor.power == -1:
            return e.emit("Reciprocal", [own], "factor", kind)
        by = e.cast(e.constant(np.asarray(factor.power, np.float32)), kind)
        return e.emit("Pow", [own, by], "factor", kind)

    def _lengths(self) -> str:
        """Visible keys: of every sequence, for its last row, or of every row; int32 [B]."""
        site, e = self.site, self.e
        total = ""
        have: set[Label] = set()
        for prefix in site.lengths:
            length, labels = self._length(prefix)
            total = length if not total else e.emit("Min", [total, length], "length", _T.INT64)
            have |= labels
        tokens = site.tokens if site.by_row else []
        total = e.broadcast(total, [site.batch, tokens], have & {*site.batch, *tokens})
        flat = e.emit("Reshape", [total, e.ints([-1])], "lengths", _T.INT64)
        return e.cast(flat, _T.INT32)

    def _length(self, prefix: Prefix) -> tuple[str, frozenset[Label]]:
        """The keys that one bound leaves, [B, S1] or fewer; what it runs over."""
        site, e = self.site, self.e
        groups: list[Group] = [site.batch, site.tokens if site.by_row or site.mode else []]
        more: int = prefix.more
        if prefix.ref is None:
            labels, more = prefix.bound.labels, prefix.bound.const
            bound = e.index(prefix.bound - Expr(more), groups)
        else:
            labels = prefix.ref.labels
            bound = e.cast(e.arrange(prefix.ref, groups, "bound"), _T.INT64)
        if site.mode == 3:  # the last row's
            last = [e.ints([-1]), e.ints([np.iinfo(np.int64).max]), e.ints([1])]
            bound = e.emit("Slice", [bound, *last], "last", _T.INT64)
        by = e.ints([more + 1])
        if is_open(more):
            size = sized(e, e.tracer.sizes, form_of(more))
            by = e.emit("Add", [size, e.ints([1])], "offset", _T.INT64)
        length = e.emit("Add", [bound, by], "length", _T.INT64)
        length = e.emit("Max", [length, e.ints([0])], "length", _T.INT64)
        return e.emit("Min", [length, e.size([site.formula.keys])], "length", _T.INT64), labels

    # -- a sequence per row -----------------------------------------------------------------------

    def _apart(self, inputs: Sequence[str]) -> list[str]:
        """Every query row a sequence of one row; the keys of a batch are one page."""
        site, e = self.site, self.e
        more = int(bool(site.masks.padding))
        heads = math.prod(x.size for x in site.formula.heads) + more
        width = site.formula.width + more
        if not all(
            e.static(x) for x in (*site.formula.heads, *(p.column for p in site.formula.parts))
        ):
            raise Stop("how many heads there are, or their width, is open", site.region.scores)
        shapes = (e.ints([-1, 1, heads, width]), e.ints([-1, 1, heads]))
        q = e.emit("Reshape", [inputs[0], shapes[0]], "query", e.elem_type(inputs[0]))
        w = e.emit("Reshape", [inputs[2], shapes[1]], "weights", e.elem_type(inputs[2]))
        page = e.iota_of(site.batch, 2) if site.batch else e.ints([0])
        page = e.emit("Expand", [page, e.dims([site.batch, site.tokens])], "pages", _T.INT64)
        page = e.emit("Reshape", [page, e.ints([-1, 1])], "pages", _T.INT64)
        return [q, inputs[1], w, *inputs[3:], e.cast(page, _T.INT32)]

    def _together(self, value: str) -> str:
        """[B * S1, 1, 1, K] as [B, S1, 1, K]."""
        site, e = self.site, self.e
        sizes = [e.size(site.batch), e.size(site.tokens), e.ints([1, site.count])]
        shape = e.emit("Concat", sizes, "dims", _T.INT64, axis=0)
        return e.emit("Reshape", [value, shape], "rows", e.elem_type(value))

    # -- padding --------------------------------------------------------------------------------

    def _with_padding(self, q: str, k: str, w: str) -> tuple[str, str, str]:
        """One more column that is 1 at hidden keys, and one more head that reads only it.

        Its weight puts hidden keys behind every visible one, in the order of their numbers.
        """
        site, e, f = self.site, self.e, self.site.formula
        keys: list[Group] = [site.batch, [f.keys], [], []]
        seen = visible_at_rows(e, site.masks.padding, keys)
        kind = site.elem_type
        hidden = e.cast(e.emit("Not", [seen], "hidden", _T.BOOL), kind)
        k = e.emit("Concat", [k, hidden], "key", kind, axis=-1)
        rows: list[Group] = [site.batch, site.tokens]
        zero = e.cast(e.constant(np.zeros((1, 1, 1, 1), np.float32)), kind)
        column = e.emit("Expand", [zero, e.dims([*rows, f.heads, []])], "zeros", kind)
        q = e.emit("Concat", [q, column], "query", kind, axis=-1)
        corner = np.zeros((1, 1, 1, f.width + 1), np.float32)
        corner[..., -1] = 1
        one = e.cast(e.constant(corner), kind)
        target = e.emit("Concat", [*(e.size(g) for g in rows), e.ints([1, corner.shape[-1]])],
                        "dims", _T.INT64, axis=0)  # fmt: skip
        q = e.emit("Concat", [q, e.emit("Expand", [one, target], "head", kind)], "query", kind,
                   axis=2)  # fmt: skip
        low = e.constant(np.full((1, 1, 1), HIDDEN_WEIGHT, np.float32))
        extra = e.emit("Expand", [low, e.dims([*rows, []])], "hide", _T.FLOAT)
        return q, k, e.emit("Concat", [w, extra], "weights", _T.FLOAT, axis=-1)

    def _without_padding(self, rows: str, scores: str) -> str:
        """Hidden keys, which come last, become -1."""
        e = self.e
        low = e.constant(np.asarray(HIDDEN_WEIGHT / 2, np.float32))
        seen = e.emit("Greater", [e.cast(scores, _T.FLOAT), low], "seen", _T.BOOL)
        none = e.constant(np.asarray(-1, np.int32))
        return e.emit("Where", [seen, rows, none], "rows", _T.INT32)

    def _without_rows(self) -> None:
        """Rows that see no key select none: -1 in every place."""
        site, e = self.site, self.e
        seen = visible_at_rows(e, site.masks.rows, [site.batch, site.tokens, [], []])
        none = e.constant(np.asarray(-1, np.int32))
        same = self.listed == self.rows
        self.rows = e.emit("Where", [seen, self.rows, none], "rows", _T.INT32)
        listed = [seen, self.listed, none]
        self.listed = self.rows if same else e.emit("Where", listed, "listed", _T.INT32)

    # -- what readers get -----------------------------------------------------------------------

    def deliver_indices(self, name: str) -> None:
        """The TopK's indices under their name: hidden keys are listed by number, as TopK does."""
        site, e = self.site, self.e
        found = self.listed
        if site.mode or site.lengths or site.masks.rows or not site.constant_k:
            line = e.constant(np.arange(site.count, dtype=np.int32))
            zero = e.constant(np.asarray(0, np.int32))
            negative = e.emit("Less", [found, zero], "beyond", _T.BOOL)
            found = e.emit("Where", [negative, line, found], "listed", _T.INT32)
        if not site.constant_k:
            end = e.size([site.formula.keys]) if site.cut else site.node.input[1]
            bounds = [e.ints([0]), end, e.ints([-1])]
            found = e.emit("Slice", [found, *bounds], "listed", _T.INT32)
        kind = e.elem_type(name)
        found = e.cast(found, kind)
        axes: list[Group] = [[x] if x.size > 1 else [] for x in site.formula.rows]
        found = self._in_place(found, axes)
        if site.axis != len(axes):
            perm = list(range(len(axes)))
            perm.insert(site.axis, len(axes))
            found = e.emit("Transpose", [found], "rows", kind, perm=perm)
        e.finish(found, name)

    def deliver_rows(self, name: str, axes: Sequence[Group]) -> None:
        """Rows for an attention, under the name that it reads: one axis per group, and slots."""
        site, e = self.site, self.e
        own: list[Group] = [site.batch, site.tokens, []]
        found = self.rows
        if [list(a) for a in axes] != [list(o) for o in own]:
            found = self._in_place(found, axes)
        if found in self._named:  # by another attention
            e.emit("Identity", [found], "rows", _T.INT32, out=name)
            return
        e.finish(found, name)
        self._named.add(name)
        if found == self.rows:  # it is called so from now on
            self.rows = name

    def _in_place(self, found: str, axes: Sequence[Group]) -> str:
        """[B, S1, 1, K] brought to other axes; the last one may have any size."""
        site, e = self.site, self.e
        order = [*site.batch, *site.tokens]
        wanted = [x for a in axes for x in a]
        kind = e.elem_type(found)
        if len(site.batch) <= 1 and len(site.tokens) <= 1:
            ones = [i for i, g in enumerate((site.batch, site.tokens, ())) if not g]
            found = e.emit("Squeeze", [found, e.ints(ones)], "rows", kind)
        else:
            dims = [e.size([x]) for x in order]
            flat = e.emit("Concat", [*dims, e.ints([-1])], "dims", _T.INT64, axis=0)
            found = e.emit("Reshape", [found, flat], "rows", kind)
        if order != wanted:
            perm = [*(order.index(x) for x in wanted), len(order)]
            found = e.emit("Transpose", [found], "rows", kind, perm=perm)
        missing = [i for i, a in enumerate(axes) if not a]
        if missing:
            found = e.emit("Unsqueeze", [found, e.ints(missing)], "rows", kind)
        return found


def build(site: Selection, stem: str) -> Replacement:
    """The operator and its operands, as nodes; readers are delivered to afterwards.

    Raises:
        Stop: an operand cannot be brought into the operator's order.
    """
    return Replacement(site, stem)


def _in_order(ref: Ref, order: Sequence[Label]) -> bool:
    """Whether the tensor's axes are those labels, whole and in this order."""
    found = []
    for coordinate in ref.coords:
        labels = axis_labels(coordinate)
        if labels is None or coordinate.const:
            return False
        found += labels
    return found == [x for x in order if x in ref.labels]
