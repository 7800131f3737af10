"""All graphs of a model together: how many nodes, what bodies capture, and splicing in order."""

from __future__ import annotations

from collections.abc import Sequence

import onnx

from sfa_onnx.passes.candidate import Candidate
from sfa_onnx.passes.graph.index import GraphIndex
from sfa_onnx.passes.graph.sub_graphs import bodies, owners
from sfa_onnx.passes.scopes.index import ScopeIndex
from sfa_onnx.passes.splice import splice, taken_names
from sfa_onnx.report import SiteReport

__all__ = ["count_nodes", "note_captures", "splice_scopes"]


def count_nodes(graph: onnx.GraphProto) -> int:
    """Nodes of a graph and of all bodies in it."""
    inner = (body for node in owners(graph) for body in bodies(node).values())
    return len(graph.node) + sum(count_nodes(body) for body in inner)


def note_captures(index: GraphIndex, candidate: Candidate) -> None:
    """Note for the scopes around a body which of their values its replacement is going to read."""
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
    edited: dict[int, set[int]] = {}  # view -> its nodes whose bodies were edited
    for index, ready in reversed(work):
        owners_here = edited.get(id(index), set())
        if not ready and not owners_here:
            continue
        lost = {value for owner in sorted(owners_here) for value in index.recapture(owner)}
        results = splice(model, index, [item for item, _ in ready], taken, lost)
        for (_, site), result in zip(ready, results, strict=True):
            site.removed += result.removed  # a site may have products beside it
            site.added += result.added
        if isinstance(index, ScopeIndex):
            edited.setdefault(id(index.parent), set()).add(index.owner)
