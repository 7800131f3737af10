"""What may come in at an operand: indices that were chosen, finished ones, masks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx

from sfa_onnx.passes.assume import FLAGS
from sfa_onnx.passes.axes.expr import label_of
from sfa_onnx.passes.axes.trace import Ref
from sfa_onnx.passes.bind.site import Site
from sfa_onnx.passes.bind.sources import all_selected, from_topk, key_limit
from sfa_onnx.passes.candidate import Domain
from sfa_onnx.passes.graph.index import GraphIndex

__all__ = ["chosen_domain", "finished_domain", "mask_domain", "table_domain", "unread_table"]

_MASKED = float(np.finfo(np.float32).min)
_ASSERTED = -1e4  # the largest number that a mask may hide by where its caller vouches for it


def chosen_domain(site: Site, value: str, topk: str = "") -> Domain:
    """Of indices that a selection made, or that enter the graph."""
    index = site.tracer.index
    node = index.maker(value)
    if node is not None and node.op_type == "TopK":
        topk = index.label(index.producer[value])
    joined = node is not None and not topk and all_selected(index, node)
    return Domain(
        distinct=bool(topk),
        low=0,
        high=key_limit(site),
        negative_allowed=not topk and not joined,
        assumption="indices are distinct and in range" if topk else "indices are in range",
        discharged_by=f"TopK {topk}" if topk else index.giver(value),
    )


def finished_domain(site: Site, ref: Ref) -> Domain:
    """Any index in range, as the gather itself takes it; TopK's are distinct."""
    if topk := from_topk(site.tracer, ref):
        return chosen_domain(site, ref.value, topk)
    coords = site.nope.deep.ref.coords
    axes = [i for i, c in enumerate(coords) if c.reads]
    own = [i for i in axes if coords[i].reads[0].value == ref.value]
    alone = len(axes) <= 1 and label_of(ref.coords[-1]) is not None
    return Domain(
        low=0,
        high="S2",
        negative_allowed=alone,
        along=None if alone or not own else own[0],
        assumption="indices are in range",
        discharged_by="the index arithmetic of the graph, which stays as it is",
    )


def mask_domain(is_bool: bool, positive: bool, assumed: str = "") -> Domain:
    """Of a mask: True (or 1, or 0.0) is visible; `positive` False: what is True is hidden.

    `assumed`: what the caller says of the input that the mask is, "two-valued:mask".
    """
    if assumed:
        kind, _, name = assumed.partition(":")
        values, what = (0.0, _ASSERTED), "numbers of -1e4 or less only"
        if kind == FLAGS:
            values, what = (1.0, 0.0) if positive else (0.0, 1.0), "1 only"
        return Domain(
            values=values,
            assumption=f"the mask {name!r} holds 0 and {what}",
            discharged_by=f"the caller (assume {assumed})",
        )
    if is_bool:
        return Domain() if positive else Domain(values=(0.0, 1.0))
    return Domain(values=(0.0, _MASKED))


def unread_table(index: GraphIndex, value: str) -> bool:
    """Whether `value` is a bool table of the file that is too large to be read."""
    tensor = index.initializers.get(value)
    bools = tensor is not None and tensor.data_type == onnx.TensorProto.BOOL
    return bools and index.mask_table(value) is None


def table_domain(value: str, domain: Domain) -> Domain:
    """Of a mask that is such a table: verified whatever it holds, as a mask that is fed."""
    assumed = f"the table {value!r} shows every row one of its keys"
    return replace(domain, assumption=assumed, discharged_by="the file (too large to be read)")
