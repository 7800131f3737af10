"""Rows that a graph finds through a block table: the pages themselves as key (PA_BSND)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx

from sfa_onnx.guard.budgets import CONSTANT_BYTES
from sfa_onnx.passes.axes.expr import ZERO, Expr, Label, Quot, Read
from sfa_onnx.passes.axes.places import axis_labels
from sfa_onnx.passes.axes.trace import Ref, Tracer
from sfa_onnx.passes.bind.sources import from_topk
from sfa_onnx.passes.emit.emitter import Emitter, Group
from sfa_onnx.passes.emit.plan import Plan
from sfa_onnx.passes.emit.select import token_entries

__all__ = ["Paged", "paged_keys"]

_T = onnx.TensorProto
_VIEWS = frozenset(("Cast", "Floor", "Identity"))


@dataclass(frozen=True)
class Paged:
    """Operands of a paged cache.

    Attributes:
        key: [block_num, block_size, 1, D].
        entries: int32 token numbers, -1 last: [B, S1, K].
        inputs: the operator's inputs behind sparse_indices, up to actual_seq_lengths_kv.
    """

    key: str
    entries: str
    inputs: list[str]


@dataclass(frozen=True)
class _Found:
    """A stored tensor of pages, the table that maps them and the token numbers behind both."""

    pool: Ref
    table: Ref
    column: int  # axis of the table that the page number indexes
    tokens: Ref
    batch: list[Label]


def paged_keys(plan: Plan) -> Paged | None:
    """The pages as key, when page = block_table[.., token // block_size]; else None.

    The slot inside the page is not looked at: verification shuffles the pages and judges.
    """
    site, e = plan.site, plan.e
    stored = reversed(site.nope.path)
    found = next((f for s in stored if (f := _found(plan, s.ref)) is not None), None)
    if found is None:
        return None
    tracer = site.tracer
    size, pages = tracer.shape(found.pool.value)[1], tracer.shape(found.table.value)[found.column]
    if not tracer.static(found.pool.value, 1):
        return None
    fixed = tracer.static(found.table.value, found.column)
    if not from_topk(tracer, found.tokens):
        few = fixed and e.static(site.key) and site.key.size <= pages * size
        if not few or not site.visible:  # a bare index may be negative, and would wrap
            return None
    plan.batch = found.batch
    plan.tokens = [x for x in site.rows if x not in found.batch]
    entries = token_entries(e, site, found.tokens, [plan.batch, plan.tokens], None)
    column = Label("page of a sequence", pages)
    coords = list(found.table.coords)
    coords[found.column] = Expr.of(column)
    own = Ref(found.table.value, tuple(coords))
    table = e.cast(e.arrange(own, [plan.batch, [column]], "block_table"), _T.INT32)
    lengths = _lengths(e, plan.batch, table, pages if fixed else 0, size)
    return Paged(_pool(plan, found.pool), entries, ["", "", table, "", lengths])


def _found(plan: Plan, ref: Ref) -> _Found | None:
    tracer = plan.site.tracer
    shape = tracer.shape(ref.value)
    wide = len(shape) in (3, 4) and (len(shape) == 3 or shape[2] == 1)
    page = ref.coords[0]
    if not wide or len(page.terms) != 1 or page.const or not ref.coords[1].reads:
        return None
    table, factor = page.terms[0]
    if not isinstance(table, Read) or factor != 1:
        return None
    nested = [i for i, c in enumerate(table.coords) if c.reads]
    if len(nested) != 1 or nested != [len(table.coords) - 1]:
        return None
    tokens = _dividend(tracer, table.coords[nested[0]], shape[1])
    labels = [axis_labels(c) for c in table.coords[:-1]]
    if tokens is None or any(x is None for x in labels):
        return None
    batch = [x for part in labels for x in part or [] if x in plan.site.rows]
    return _Found(ref, Ref(table.value, table.coords), nested[0], tokens, batch)


def _dividend(tracer: Tracer, page: Expr, size: int) -> Ref | None:
    """What is divided by the block size to find the page, as an integer tensor."""
    if len(page.terms) != 1 or page.const or page.terms[0][1] != 1:
        return None
    read, divided = page.terms[0][0], False
    if isinstance(read, Quot) and read.by == size and len(read.expr.terms) == 1:
        divided = not read.expr.const and read.expr.terms[0][1] == 1
        read = read.expr.terms[0][0]
    if not isinstance(read, Read):
        return None
    ref = Ref(read.value, read.coords)
    for _ in range(16):
        node = tracer.index.maker(ref.value)
        if divided and tracer.sizes.elem_type(ref.value) in (_T.INT32, _T.INT64):
            return ref
        if node is None:
            return None
        if node.op_type == "Div" and not divided and tracer.scalar(node.input[1]) == size:
            divided = True
        elif node.op_type not in _VIEWS:
            return None
        ref = tracer.operand(node.input[0], ref.coords)
    return None


def _pool(plan: Plan, ref: Ref) -> str:
    """The stored tensor as [block_num, block_size, 1, D]."""
    e, shape = plan.e, plan.site.tracer.shape(ref.value)
    pages, slots = Label("page", shape[0]), Label("slot of a page", shape[1])
    column = plan.site.nope.label
    middle = [ZERO] * (len(shape) - 3)
    own = Ref(ref.value, (Expr.of(pages), Expr.of(slots), *middle, Expr.of(column)))
    groups: list[Group] = [[pages], [slots], [], [column]]
    return e.arrange(own, groups, "pages")


def _lengths(e: Emitter, batch: Group, table: str, pages: int, size: int) -> str:
    """actual_seq_lengths_kv [B]: all tokens the table has room for; masks are in the indices."""
    if pages and all(e.static(x) for x in batch):
        batches = int(np.prod([x.size for x in batch], dtype=np.int64))
        CONSTANT_BYTES.check(4 * batches, f"the lengths of {batches} sequences in a constant")
        return e.constant(np.full(batches, pages * size, np.int32))
    shape = e.emit("Shape", [table], "shape", _T.INT64)
    count = e.emit("Gather", [shape, e.ints([0])], "count", _T.INT64, axis=0)
    room = e.emit("Gather", [shape, e.ints([1])], "room", _T.INT64, axis=0)
    room = e.emit("Mul", [room, e.ints([size])], "room", _T.INT64)
    return e.emit("Expand", [e.cast(room, _T.INT32), count], "lengths", _T.INT32)
