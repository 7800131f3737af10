"""Where index arithmetic starts: the given or selected indices, block tables and lengths."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import onnx

from sfa_onnx.passes.axes.expr import Expr, Label, Read, label_of
from sfa_onnx.passes.axes.named import axis_of
from sfa_onnx.passes.axes.trace import Move, Ref, Tracer
from sfa_onnx.passes.axes.writes import assigned_where
from sfa_onnx.passes.bind.rows import Columns
from sfa_onnx.passes.bind.site import Site
from sfa_onnx.passes.graph.index import GraphIndex
from sfa_onnx.passes.graph.kinds import ELEMENTWISE, GATHERS
from sfa_onnx.passes.graph.walk import back

__all__ = [
    "all_reads",
    "all_selected",
    "from_topk",
    "index_sources",
    "key_limit",
    "nested",
    "outside_reads",
]

_T = onnx.TensorProto
_SHORT = (_T.BOOL, _T.INT8, _T.UINT8, _T.INT16, _T.UINT16, _T.FLOAT16, _T.BFLOAT16)


def all_reads(coords: Iterable[Expr]) -> Iterator[Read]:
    """Every index read of an element, those that address other reads included."""
    for coordinate in coords:
        for read in coordinate.reads:
            yield read
            yield from all_reads(read.coords)


def index_sources(tracer: Tracer, ref: Ref) -> dict[str, Ref]:
    """Value -> element, for what an index is computed from: graph inputs and TopK results."""
    found: dict[str, Ref] = {}
    stack, seen = [ref], set[Ref]()
    while stack and len(seen) < 256:
        here = stack.pop()
        if here in seen:
            continue
        seen.add(here)
        if here.value in tracer.joined:
            stack += [part for part, _ in tracer.joined[here.value].parts]
            continue
        node = tracer.index.maker(here.value)
        given = tracer.index.is_given(here.value)
        if node is None or given or node.op_type == "TopK" or _joins(node, here):
            if here.value not in tracer.index.initializers:
                found.setdefault(here.value, here)
            continue
        stack += _behind(tracer, node, here)
    return found


def _joins(node: onnx.NodeProto, ref: Ref) -> bool:
    """Whether rows of entries are joined here, such as selected keys and a window."""
    rank = len(ref.coords)
    if node.op_type != "Concat" or not rank or not ref.coords[-1].labels:
        return False
    return axis_of(node, rank) == rank - 1


def _behind(tracer: Tracer, node: onnx.NodeProto, ref: Ref) -> list[Ref]:
    if (written := assigned_where(tracer, node, ref)) is not None:  # indices[invalid] = 0
        return [Ref(node.input[0], ref.coords), written[0]]
    if node.op_type in ELEMENTWISE:
        rank = len(ref.coords)
        names = [n for n in node.input if n and len(tracer.shape(n)) <= rank]
        return [tracer.operand(n, ref.coords) for n in names]
    step = tracer.step(ref)
    if not isinstance(step, Move):
        return []
    inner = [Ref(r.value, r.coords) for r in all_reads(step.ref.coords)]
    return [step.ref, *inner]


def all_selected(index: GraphIndex, node: onnx.NodeProto) -> bool:
    """Whether joined indices are results of TopK and constants: none is negative."""
    for name in node.input:
        *_, source = back(index, name, ("Cast", "Expand", "Identity", "Slice"))
        constant, maker = index.constant(source), index.maker(source)
        if maker is not None and maker.op_type == "TopK":
            continue
        if constant is None or bool((constant < 0).any()):
            return False
    return True


def from_topk(tracer: Tracer, ref: Ref) -> str:
    """Name of the TopK whose indices `ref` reads unchanged; "" when they come from elsewhere."""
    for own in tracer.moves(ref):
        node = tracer.index.maker(own.value)
        if node is None or node.op_type in GATHERS:
            return ""
        if node.op_type == "TopK":
            is_indices = len(node.output) > 1 and own.value == node.output[1]
            return tracer.index.label(tracer.index.producer[own.value]) if is_indices else ""
        if tracer.sizes.elem_type(own.value) in _SHORT:  # token 300 is 44 in uint8
            return ""
    return ""


def key_limit(site: Site) -> str | int:
    """All keys there are, or their number where the graph reads the front of a longer buffer."""
    tracer, deep = site.tracer, site.nope.deep.ref
    stored = _key_axis(site, deep)
    for ref in (s.ref for s in site.nope.path):
        axis = _key_axis(site, ref)
        if axis is None:
            continue
        size = tracer.shape(ref.value)[axis]
        longer = stored is not None and size < tracer.shape(deep.value)[stored]
        return size if longer and tracer.static(ref.value, axis) else "S2"
    return "S2"


def _key_axis(site: Site, ref: Ref) -> int | None:
    """The axis that runs over keys, or that the selection addresses, from its start."""
    for axis, coordinate in enumerate(ref.coords):
        if site.selected and label_of(coordinate) == site.key:
            return axis
        if coordinate.reads and coordinate == Expr.of(coordinate.reads[0]):
            return axis
    return None


def nested(read: Read) -> bool:
    """Whether an index addresses the read of another."""
    return any(c.reads for c in read.coords)


def outside_reads(columns: Columns) -> set[Label]:
    """Labels that say whose rows are read, whatever the indices say."""
    found: set[Label] = set()
    for coordinate in columns.deep.ref.coords:
        for atom, _ in coordinate.terms:
            if not isinstance(atom, Read):
                found |= Expr.of(atom).labels if not Expr.of(atom).reads else set()
        for read in coordinate.reads:  # block_table[batch, page of an index]
            if nested(read):
                found |= {x for c in read.coords if not c.reads for x in c.labels}
    return found
