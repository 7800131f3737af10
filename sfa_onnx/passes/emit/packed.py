"""Packed rows decoded in the graph: the int8 operator over the very tensor that holds them."""

from __future__ import annotations

from dataclasses import replace

import onnx

from sfa_onnx.operator.op import SPARSE_FLASH_ATTENTION_ANTIQUANT as ANTIQUANT
from sfa_onnx.passes.axes.trace import is_float
from sfa_onnx.passes.bind.packed import PackedSite
from sfa_onnx.passes.emit.emitter import Emitter, Group
from sfa_onnx.passes.emit.float import dense_keys, direct_keys, gathered_keys
from sfa_onnx.passes.emit.int8 import antiquant, joined_query
from sfa_onnx.passes.emit.paged import paged_keys
from sfa_onnx.passes.emit.plan import Built, Plan, deliver, queries, query_rows

__all__ = ["build_packed"]

_T = onnx.TensorProto


def build_packed(site: PackedSite, e: Emitter) -> Built | None:
    """The int8 operator over the cache itself (contiguous or paged), or over gathered rows.

    None: the rows have to be gathered by the graph's own index tensors; bind the anchor again with
    `Tracer.opaque` set.

    Raises:
        Stop: the form is understood but has no replacement.
    """
    own, output = _output(site)
    plan = Plan(e, site, [], list(site.rows), site.row_type, output)
    nope, rope = queries(plan)
    keyed = replace(plan, site=_over_rows(site), elem_type=_T.INT8)
    paging: list[str] = []
    if site.selected:
        keys, entries, family = dense_keys(keyed)
    elif (paged := None if site.tracer.opaque else paged_keys(keyed)) is not None:
        keys, entries, paging, family = (paged.key, ""), paged.entries, paged.inputs, "paged"
    elif (direct := direct_keys(keyed)) is not None:
        keys, entries, family = (*direct, "gather")
    elif not site.tracer.opaque:
        return None
    else:
        keys, entries, family = gathered_keys(keyed)
    plan.batch, plan.tokens = keyed.batch, keyed.tokens
    groups: list[Group] = [plan.batch, plan.tokens, site.heads]
    query = query_rows(plan, nope, [*groups, [site.nope.label]])
    if rope is not None:
        query = joined_query(plan, nope, rope, query, groups)
    entries = e.emit("Unsqueeze", [entries, e.ints([2])], "indices", _T.INT32)
    inputs = [query, keys[0], keys[0], entries, *paging]
    layout_kv = "PA_BSND" if paging else "BSND"
    out = antiquant(plan, inputs, site.row.tile, site.row.rope, layout_kv)
    deliver(plan, e.cast(out, own), [*groups, [site.column]])
    notes = []
    if own != site.row_type:
        kind = _T.DataType.Name(site.row_type).lower()
        notes.append(f"the result is rounded to {kind}, the type of the rows' rope and the query")
    family = f"packed-{family.removeprefix('float-')}"
    roped = rope.ref if rope is not None else None
    return Built(e, ANTIQUANT, family, plan.output, nope.ref, roped, plan.scale, notes)


def _over_rows(site: PackedSite) -> PackedSite:
    """The site with whole rows in place of their parts."""
    return replace(site, nope=site.packed, rope=None, value=site.packed)


def _output(site: PackedSite) -> tuple[int, str]:
    """(type, name) of the value that is replaced: behind the cast to the rows' type, if any."""
    index, sizes = site.tracer.index, site.tracer.sizes
    value = site.out.value
    uses = index.uses(value)
    if len(uses) == 1 and not index.is_graph_output(value):
        node = index.nodes[uses[0][0]]
        if node.op_type == "Cast" and is_float(sizes.elem_type(node.output[0])):
            value = node.output[0]
    return sizes.elem_type(value), value
