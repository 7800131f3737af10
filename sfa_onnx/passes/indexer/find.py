"""Find every lightning indexer in a graph, and bind it or say why not."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Final

import onnx

from sfa_onnx.operator.op import LIGHTNING_INDEXER
from sfa_onnx.passes.axes.trace import Stop, Tracer
from sfa_onnx.passes.bind.region import Region
from sfa_onnx.passes.candidate import Candidate, Refusal, RefusedSite
from sfa_onnx.passes.find.attempt import FAULTS, plain, refused, unified
from sfa_onnx.passes.find.search import FindOptions
from sfa_onnx.passes.graph.index import GraphIndex
from sfa_onnx.passes.indexer.build import Replacement, build
from sfa_onnx.passes.indexer.cover import cover
from sfa_onnx.passes.indexer.regions import SelectionRegion, selection_regions
from sfa_onnx.passes.indexer.rows import Entries, entries_of, read_by_attention
from sfa_onnx.passes.indexer.site import Selection, bind_selection
from sfa_onnx.passes.shapes.concrete import Concrete

__all__ = ["find_selections"]

_T = onnx.TensorProto
_DEEP: Final = -1e12  # what hides by less may be met by scores


def find_selections(
    index: GraphIndex, options: FindOptions | None = None
) -> list[Candidate | RefusedSite]:
    """All selections of `index.graph` that score keys by products, in graph order."""
    options = options or FindOptions()
    regions = selection_regions(index)
    if not regions:
        return []
    sizes = Concrete(index)
    other = Concrete(index, second=True) if sizes.dynamic else sizes
    read = read_by_attention(index)
    found = []
    for region in regions:
        tracer = Tracer(index, sizes, other, options.max_steps)
        tracer.masks, tracer.flags = options.masks, options.flags
        tracer.scales = options.scales
        tracer.terms = [] if options.trace else None
        tracer.stem = index.label(region.node)
        found.append(_one(tracer, region, read))
    return found


def _one(tracer: Tracer, region: SelectionRegion, read: list[str]) -> Candidate | RefusedSite:
    index = tracer.index
    bound = [f"TopK {index.label(region.node)}"]
    try:
        make = functools.partial(_candidate, tracer, region, bound, read)
        return unified(tracer, region.scores, "selection", make)
    except Stop as stop:
        refusal = Refusal(plain(stop.reason), stop.at, stop.hint)
    except FAULTS as fault:
        refusal = refused(fault, region.scores, bound[0])
    terms = tuple(tracer.terms or ())
    layer = index.layer(region.node)
    return RefusedSite(region.node, layer, refusal, tuple(bound), "indexer", terms)


def _besides(tracer: Tracer, region: SelectionRegion) -> Iterator[str]:
    """In what the operator's scores differ from the original's by design."""
    kinds = {tracer.sizes.elem_type(value) for value in region.inner}
    for kind in sorted(kinds & {_T.FLOAT16, _T.BFLOAT16}):
        name = _T.DataType.Name(kind).lower()
        yield f"the original rounds scores to {name}: keys that this makes equal are told apart"
    low = max((x for x in tracer.lows if x > _DEEP), default=None)
    if low is not None:
        yield f"keys that are seen score more than {low:g}, by which the original hides others"


def _delivered(
    site: Selection, made: Replacement, rows: list[Entries], outputs: tuple[str, ...]
) -> Region:
    """What is covered once attention gets the operator's rows."""
    for entries in rows:
        made.deliver_rows(entries.value, entries.axes)
    made.e.prune(outputs)
    return cover(site, made, outputs)


def _candidate(
    tracer: Tracer, region: SelectionRegion, bound: list[str], read: list[str]
) -> Candidate:
    index, node = tracer.index, tracer.index.nodes[region.node]
    del bound[1:]  # of an attempt before
    site = bind_selection(tracer, region, bound)
    values, indices = node.output[0], site.indices
    stem = f"{tracer.stem}/sfa"
    rows = entries_of(site, read)
    made = build(site, stem)
    outputs = tuple(r.value for r in rows)
    covered = _delivered(site, made, rows, outputs)
    listed = region.node not in covered.nodes  # somebody reads the indices themselves
    if listed:
        outputs = (*outputs, indices)
        made = build(site, stem)
        made.deliver_indices(indices)
        covered = _delivered(site, made, rows, outputs)
    left = [i for i, _ in index.uses(values) if i not in covered.nodes] if values else []
    if left or (values and index.is_graph_output(values)):
        by = f"by {index.label(left[0])}" if left else "as an output of the graph"
        raise Stop(
            f"the scores of the selected keys ({values}) are read {by}",
            values,
            "only the indices of the selection may be used",
        )
    e = made.e
    if rows:
        bound.append(f"attention takes its rows: {len(rows)} x")
    return Candidate(
        graph=index.graph,
        anchor=region.node,
        op=LIGHTNING_INDEXER,
        family="indexer",
        nodes=covered.nodes,
        support=covered.support,
        operands=covered.operands,
        outputs=outputs,
        replacement=e.nodes,
        replacement_initializers=e.initializers,
        sizes=covered.sizes,
        layer=index.layer(region.node),
        notes=list(bound),
        equal=tracer.sizes.equal,
        indices=indices if listed else "",
        said=tuple(_besides(tracer, region)),
        scales=tuple(dict.fromkeys(n for f in site.formula.outside for n in f.assumed)),
        terms=tuple(tracer.terms or ()),
    )
