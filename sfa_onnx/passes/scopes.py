"""Attention that is not in the main graph: local functions are inlined, sub-graphs are reported."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import onnx
from onnx import inliner

from sfa_onnx.op import find_op
from sfa_onnx.passes.find import find_candidates
from sfa_onnx.passes.index import GraphIndex
from sfa_onnx.report import SiteReport

__all__ = ["bodies_with_attention", "inline_functions"]

# A function or body without any of these holds no part of a site.
_TELLING = frozenset(
    [
        "Softmax",
        "Attention",
        "Exp",
        "Pow",
        "ReduceLogSumExp",
        "TopK",
        "GatherElements",
        "GatherND",
        "ScatterElements",
        "ScatterND",
        "Einsum",
        "MatMul",
    ]
)


def inline_functions(model: onnx.ModelProto) -> tuple[onnx.ModelProto, list[str]]:
    """Inline local functions that may hold attention; bodies of our own operators stay.

    Returns:
        The model (the same object when nothing was inlined) and a note per inlined function.
    """
    chosen = [
        (f.domain, f.name)
        for f in model.functions
        if find_op(f.domain, f.name) is None and any(n.op_type in _TELLING for n in f.node)
    ]
    if not chosen:
        return model, []
    callers = _callers(model, chosen)
    inlined = inliner.inline_selected_functions(model, sorted(callers))
    names = ", ".join(f"{domain}::{name}" for domain, name in sorted(callers))
    return inlined, [f"local functions inlined: {names}"]


def _callers(model: onnx.ModelProto, chosen: list[tuple[str, str]]) -> set[tuple[str, str]]:
    """`chosen` and every local function that calls one of them."""
    found = set(chosen)
    while True:
        more = {
            (f.domain, f.name)
            for f in model.functions
            if any((n.domain, n.op_type) in found for n in f.node)
        } - found
        if not more:
            return found
        found |= more


def bodies_with_attention(model: onnx.ModelProto) -> list[SiteReport]:
    """Candidates inside If, Loop and Scan bodies: reported, never fused."""
    opsets = {o.domain: o.version for o in model.opset_import}
    found = []
    for owner, body in _bodies(model.graph.node):
        if not any(n.op_type in _TELLING for n in body.node):
            continue
        index = GraphIndex(body, opsets)
        for item in find_candidates(index):
            label = index.label(item.anchor)
            found.append(
                SiteReport(
                    site_id=f"{owner.name or owner.output[0]}/{label}",
                    anchor=label,
                    status="refused",
                    layer=item.layer,
                    family=item.family,
                    reason=f"the site lies in a body of the {owner.op_type} node"
                    f" {owner.name or owner.output[0]!r}; only the main graph is rewritten",
                    hint="export the model without control flow around attention",
                )
            )
    return found


def _bodies(nodes: Iterable[onnx.NodeProto]) -> Iterator[tuple[onnx.NodeProto, onnx.GraphProto]]:
    """(owner, body) of all control-flow nodes, at any depth."""
    for node in nodes:
        if node.op_type not in ("If", "Loop", "Scan"):
            continue
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield node, attribute.g
                yield from _bodies(attribute.g.node)
