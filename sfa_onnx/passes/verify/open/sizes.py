"""Open the sizes that a file fixes: the same site as a graph that takes any size.

A static export bakes its sizes into constants: targets of Reshape, ends of Slice, tables of
positions, causal triangles. Here every long axis (queries, keys, selection, batch, pages) gets a
symbol, and every constant that spells a size becomes an expression of these symbols. At the sizes
of the file the opened graph *is* the original: each expression is evaluated there and must give
back the constant. So the site is one member of a family of graphs, and the family is verified at
small sizes as a dynamic export is. Sizes that are equal in the file stay equal.

Nothing is guessed past that. Where a number stands for a position (a window, a threshold), the
order in which it lies between the sizes is kept; a number that is no expression of sizes stays as
it is, and sizes on both sides of it are probed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper

from sfa_onnx.passes.candidate import Candidate
from sfa_onnx.passes.graph.index import GraphIndex
from sfa_onnx.passes.verify.open.axes import OpenAxes
from sfa_onnx.passes.verify.open.emit import Maker
from sfa_onnx.passes.verify.open.graph import SiteGraph
from sfa_onnx.passes.verify.open.meaning import Meanings, meanings
from sfa_onnx.passes.verify.sizes.forms import Family

__all__ = ["Opened", "open_sizes"]


@dataclass(frozen=True)
class Opened:
    """A site whose long sizes are open.

    Attributes:
        index: of a graph that holds this site only.
        candidate: the site in that graph.
        family: what sizes may be chosen.
    """

    index: GraphIndex
    candidate: Candidate
    family: Family


def open_sizes(
    index: GraphIndex,
    candidate: Candidate,
    region: onnx.ModelProto,
    replacement: onnx.ModelProto,
    stuck: dict[str, None] | None = None,
) -> Iterator[Opened]:
    """The site with its long axes open; nothing where a constant is unknown at other sizes.

    There are several where a number may mean two things; the site is what it is for any of them.

    Args:
        index: the graph.
        candidate: the site.
        region: the site, as `extract_region` gives it.
        replacement: as `extract_replacement` gives it.
        stuck: takes the names of tables that follow no rule.

    Raises:
        UnverifiableError: an operand's shape is unknown.
    """
    axes = OpenAxes.of(index, candidate)
    both = frozenset(n for n in axes.forms.sizes.values() if n in _fixed(axes))
    for stay in (frozenset(), both) if both else (frozenset(),):
        found = False
        axes = OpenAxes.of(index, candidate, stay)
        graph = SiteGraph.of(region, replacement, candidate)
        inputs = _inputs(candidate, axes)
        sized = GraphIndex.of(graph.model(inputs, index.opsets))
        fixed = _fixed(axes)
        for meaning in meanings(graph, sized, axes.forms, fixed, stuck) if axes.new else ():
            if _faithful(meaning, axes):
                found = True
                yield _build(index, candidate, axes, graph, meaning, inputs)
        if found:
            return


def _fixed(axes: OpenAxes) -> set[int]:
    """Sizes of the operands' axes that stay."""
    return {f.const for forms in axes.axes.values() for f in forms if f.fixed}


def _inputs(candidate: Candidate, axes: OpenAxes) -> list[onnx.ValueInfoProto]:
    """The operands, their dims as forms, and one input that names every symbol."""
    infos = [
        helper.make_tensor_value_info(
            o.value,
            o.elem_type,
            [f.const if f.fixed else f.plain or str(f) for f in axes.axes[o.value]],
        )
        for o in candidate.operands
    ]
    names = helper.make_tensor_value_info("sizes@", onnx.TensorProto.BOOL, list(axes.forms.sizes))
    return [*infos, names]


def _faithful(found: Meanings, axes: OpenAxes) -> bool:
    """Whether every constant is given back at the sizes of the file."""
    for decision in found.decisions.values():
        array = decision.at(axes.forms.sizes)
        same = array.dtype == decision.array.dtype and array.shape == decision.array.shape
        if not (same and np.array_equal(array, decision.array)):
            return False
    return True


def _build(
    index: GraphIndex,
    candidate: Candidate,
    axes: OpenAxes,
    graph: SiteGraph,
    found: Meanings,
    inputs: list[onnx.ValueInfoProto],
) -> Opened:
    """The opened graph and the candidate in it."""
    back = {fused: value for value, fused in graph.replaced.items()}
    parts = []
    for nodes, prefix in ((graph.nodes[: graph.own], "own@"), (graph.nodes[graph.own :], "new@")):
        maker = Maker(axes.axes, prefix)
        kept = [n for n in nodes if n.output[0] not in found.decisions]
        for name in dict.fromkeys(i for n in kept for i in n.input):
            if name in found.decisions:
                maker.make(name, found.decisions[name])
        copies = [_renamed(node, back) for node in kept]
        parts.append(([*maker.nodes, *copies], maker.initializers))
    (own, constants), (new, initializers) = parts
    opened = onnx.GraphProto(name="opened")
    opened.node.extend(own)
    opened.input.extend(inputs)
    opened.initializer.extend(constants)
    opened.output.extend(onnx.ValueInfoProto(name=o) for o in candidate.outputs)
    limits = {o.value: _limit(axes, o.value, o.domain.high) for o in candidate.operands}
    operands = tuple(
        dataclasses.replace(o, domain=dataclasses.replace(o.domain, high=limits[o.value]))
        for o in candidate.operands
    )
    moved = dataclasses.replace(
        candidate,
        graph=opened,
        anchor=next(i for i, n in enumerate(own) if candidate.outputs[0] in n.output),
        nodes=tuple(range(len(own))),
        support=(),
        operands=operands,
        replacement=new,
        replacement_initializers=initializers,
    )
    sizes = {s: axes.forms.sizes[s] for s in axes.new}
    return Opened(
        GraphIndex(opened, index.opsets),
        moved,
        Family(sizes, frozenset(found.values), frozenset(found.rules)),
    )


def _renamed(node: onnx.NodeProto, names: dict[str, str]) -> onnx.NodeProto:
    """A copy whose outputs have other names."""
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    copy.output[:] = [names.get(o, o) for o in node.output]
    return copy


def _limit(axes: OpenAxes, _value: str, high: str | int | None) -> str | int | None:
    """The limit of indices: a number that is a size becomes "S2"."""
    if isinstance(high, int) and axes.forms.known(high) is not None:
        return "S2"
    return high
