"""Attention that is not in the main graph: in local functions, which are inlined, or in bodies."""

from __future__ import annotations

from collections.abc import Sequence

import onnx
from onnx import inliner

from sfa_onnx.op import find_op
from sfa_onnx.passes.candidate import Candidate
from sfa_onnx.passes.index import GraphIndex, bodies
from sfa_onnx.passes.scope_index import ScopeIndex
from sfa_onnx.passes.splice import splice, taken_names
from sfa_onnx.report import SiteReport

__all__ = ["count_nodes", "inline_functions", "note_captures", "splice_scopes"]

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


def count_nodes(graph: onnx.GraphProto) -> int:
    """Nodes of a graph and of all bodies in it."""
    total = len(graph.node)
    for node in graph.node:
        total += sum(count_nodes(body) for body in bodies(node).values())
    return total


def note_captures(index: GraphIndex, candidate: Candidate) -> None:
    """Tell the scopes around a body which of their values its replacement is going to read."""
    made = {o for n in candidate.replacement for o in n.output}
    made.update(t.name for t in candidate.replacement_initializers)
    entering = {i for n in candidate.replacement for i in n.input if i} - made
    while isinstance(index, ScopeIndex):
        entering = {value for value in entering if not index.binds(value)}
        for value in entering:
            index.parent.capture(value, index.owner)
        index = index.parent


def splice_scopes(
    model: onnx.ModelProto,
    work: Sequence[tuple[GraphIndex, Sequence[tuple[Candidate, SiteReport]]]],
) -> None:
    """Splice the sites of every graph, inner graphs first, and note in the reports what was done.

    What only replaced nodes of a body captured goes too, in the graphs around it.

    Args:
        model: edited in place.
        work: (view, verified sites) of every graph, the main graph first, each before its bodies.
    """
    taken = taken_names(work[0][0])
    freed: dict[int, set[str]] = {}
    for index, ready in reversed(work):
        lost = freed.get(id(index), set())
        if not ready and not lost:
            continue
        results = splice(model, index, [item for item, _ in ready], taken, lost)
        for (_, site), result in zip(ready, results, strict=True):
            site.removed, site.added = result.removed, result.added
        if isinstance(index, ScopeIndex):
            unread = index.parent.recapture(index.owner)
            freed.setdefault(id(index.parent), set()).update(unread)
