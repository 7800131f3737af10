"""What a bound site covers in the graph: its nodes, the values that enter, and their roles."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import numpy as np
import onnx

from sfa_onnx.passes.axes.expr import Expr, Label, Quot, Read, Rem
from sfa_onnx.passes.axes.places import axis_labels, is_view
from sfa_onnx.passes.axes.trace import Ref, Tracer
from sfa_onnx.passes.bind.domains import (
    chosen_domain,
    finished_domain,
    mask_domain,
    table_domain,
    unread_table,
)
from sfa_onnx.passes.bind.literals import Selected, Visible
from sfa_onnx.passes.bind.packed import PackedSite
from sfa_onnx.passes.bind.site import Site
from sfa_onnx.passes.bind.sources import all_reads, index_sources, nested, outside_reads
from sfa_onnx.passes.bind.usage import counts_batches, follows_itself, measured, prefix_sums
from sfa_onnx.passes.candidate import Domain, Operand, Role
from sfa_onnx.passes.graph.index import GraphIndex
from sfa_onnx.passes.graph.kinds import BODIES, is_foreign
from sfa_onnx.passes.shapes.kept import counts_kept
from sfa_onnx.passes.shapes.size import is_open

__all__ = ["Region", "cover"]

_T = onnx.TensorProto
_NEAR = 6  # how far apart two sizes may be


@dataclass
class Region:
    """Node indices and entering values of a site."""

    nodes: tuple[int, ...] = ()
    support: tuple[int, ...] = ()
    operands: tuple[Operand, ...] = ()
    sizes: dict[str, int | str] = field(default_factory=dict)


def cover(
    site: Site, outputs: tuple[str, ...], queries: Iterable[str], used: Iterable[str]
) -> Region:
    """The region that computes `outputs`.

    Args:
        site: the bound site.
        outputs: the values that are replaced.
        queries: where the replacement takes the query from.
        used: values of the graph that the replacement reads.
    """
    names = _Names(site)
    known = _known_operands(site, _query_refs(site, list(queries)), names)
    index = site.tracer.index
    inner, entering = _upstream(site.tracer, [*outputs, *used], known)
    for value in entering:
        if value not in known:
            known[value] = _other_operand(site, value, inner, names)
    live = [known[v] for v in known if v in entering]
    needed = _upstream(site.tracer, list(used), known)[0]
    sized = measured(index, inner, set(used))
    removed = _dead(index, inner | sized, outputs, needed)
    kept = tuple(sorted(inner - set(removed)))
    return Region(tuple(removed), kept, tuple(live), dict(names.sizes))


def _query_refs(site: Site, values: list[str]) -> list[Ref]:
    """The query elements at the given values."""
    found = [[s.ref for s in path if s.ref.value in values] for _, path in site.queries]
    return [refs[0] for refs in found if refs]


def _upstream(
    tracer: Tracer, values: Iterable[str], known: dict[str, Operand]
) -> tuple[set[int], dict[str, None]]:
    """Nodes between `values` and what enters, and the entering values (constants left out)."""
    index = tracer.index
    nodes: set[int] = set()
    entering: dict[str, None] = {}
    stack, seen = list(values), set(values)
    while stack:
        value = stack.pop()
        if not value:
            continue
        if value in known:
            entering[value] = None
            continue
        i = index.producer.get(value)
        if i is None or tracer.holds_nothing(value):
            if value not in index.initializers:
                entering[value] = None
            continue
        node = index.nodes[i]
        if node.op_type in _GIVEN or is_foreign(node):
            entering[value] = None
            continue
        nodes.add(i)
        tracer.spend(value)
        if node.op_type in ("Shape", "Size"):
            name = node.input[0]
            if not any(map(counts_kept, tracer.sizes.shape(name) or ())):
                if name not in index.initializers and tracer.index.constant(name) is None:
                    entering[name] = None
                continue
        new = [n for n in node.input if n not in seen]
        seen.update(new)
        stack += new
    made = {o for i in nodes for o in index.nodes[i].output}
    return nodes, dict.fromkeys(v for v in entering if v in known or v not in made)


_GIVEN = BODIES | {"ArgMax", "TopK"}


def _dead(
    index: GraphIndex, inner: set[int], outputs: tuple[str, ...], needed: set[int]
) -> list[int]:
    """Nodes that nobody reads once `outputs` are made by somebody else."""
    alive: dict[int, bool] = {}
    removed = {index.producer[value] for value in outputs}
    for i in sorted(inner - removed, reverse=True):
        node = index.nodes[i]
        readers = [u for o in node.output if o for u, _ in index.uses(o)]
        keeps = i in needed or any(index.is_graph_output(o) for o in node.output)
        alive[i] = keeps or any(u not in removed for u in readers)
        if not alive[i]:
            removed.add(i)
    return sorted(removed)


class _Names:
    """Label -> axis name of the operator's language."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.names: dict[Label, str] = {}
        self.sizes: dict[str, int | str] = {}
        cached = {x for c in (site.nope, site.rope) if c for x in outside_reads(c)}
        self._name([x for x in site.rows if x in cached], "B")
        self._name([x for x in site.rows if x not in cached], "S1")
        self._name(site.heads, "N1")
        self.names[site.key] = "S2" if site.selected else "K"
        for s in site.selected:
            self.names[s.slot] = "K"
        if site.nope.inner is not None:
            self.names[site.nope.inner] = "C"
            self.names[site.nope.label] = "D"
            self.names[site.column] = "V"
        else:
            self.names[site.nope.label] = self.names[site.column] = "C"
        if site.rope is not None:
            self.names[site.rope.label] = "R"
        if isinstance(site, PackedSite):
            self.names[site.packed.label] = "D"

    def _name(self, labels: list[Label], name: str) -> None:
        for i, label in enumerate(labels):
            self.names[label] = name if not i else f"{name}_{i}"

    def axes(self, ref: Ref) -> tuple[str, ...]:
        """Axis names of the tensor of `ref`."""
        shape = self.site.tracer.shape(ref.value)
        names = [
            self._axis(ref.value, i, c, d)
            for i, (c, d) in enumerate(zip(ref.coords, shape, strict=True))
        ]
        if "P" in names and "S2" in names:  # two-level: [pages, page size]
            at = names.index("S2")
            names[at] = "BS"
            self._size("BS", ref.value, at, shape[at])
        return tuple(names)

    def _axis(self, value: str, axis: int, coordinate: Expr, size: int) -> str:
        if size == 1:
            return "1"
        labels = axis_labels(coordinate)
        tracer = self.site.tracer
        if labels is not None and not labels:
            return ""
        if labels is not None:
            names = [self.names.get(x, x.name) for x in labels]
            covered = int(np.prod([x.size for x in labels]))
            if covered == size and not coordinate.const:
                for label, name in zip(labels, names, strict=True):
                    if len(labels) == 1:
                        self._size(name, value, axis, label.size)
                return "*".join(names)
            name = "D" if names == ["C"] or names == ["R"] else f"{names[-1]}_of_{value}"
        else:
            name = self._read_axis(coordinate)
        if name and "*" not in name:
            self._size(name, value, axis, tracer.shape(value)[axis])
        return name

    def _read_axis(self, coordinate: Expr) -> str:
        """An axis addressed by an index tensor, or by a quotient of a column."""
        if not coordinate.reads:
            return "G"  # scales: one per tile
        if len(coordinate.terms) == 1:
            atom = coordinate.terms[0][0]
            if isinstance(atom, Quot) or (isinstance(atom, Read) and nested(atom)):
                return "P"
            if isinstance(atom, Rem):
                return "BS"
            return "S2"
        batch = [self.names.get(a, "") for a, _ in coordinate.terms if isinstance(a, Label)]
        return "*".join([*batch, "S2"])

    def _size(self, name: str, value: str, axis: int, size: int) -> None:
        if name in self.sizes:
            return
        if self.site.tracer.static(value, axis):
            self.sizes[name] = size
            return
        declared = self.site.tracer.index.shape(value)
        symbol = declared[axis] if declared is not None else None
        self.sizes[name] = symbol if isinstance(symbol, str) else name


def _known_operands(site: Site, queries: list[Ref], names: _Names) -> dict[str, Operand]:
    """Operands that binding has named."""
    known: dict[str, Operand] = {}

    def add(ref: Ref, role: Role, domain: Domain | None = None) -> None:
        if ref.value in known or _constant(site, role, ref.value):
            return
        elem = site.tracer.sizes.elem_type(ref.value)
        known[ref.value] = Operand(ref.value, role, names.axes(ref), elem, domain or Domain())

    for ref, role in zip(queries, (Role.QUERY, Role.QUERY_ROPE), strict=False):
        add(ref, role)
    int8 = site.nope.kind == "int8"
    if isinstance(site, PackedSite):
        add(site.packed.deep.ref, Role.PACKED)
    else:
        add(site.nope.deep.ref, Role.LATENT_INT8 if int8 else Role.LATENT)
        if int8:
            add(site.nope.scale[-1].ref, Role.SCALE)
        if site.rope is not None:
            add(site.rope.deep.ref, Role.KEY_ROPE)
    for weights in (site.nope.weight, site.value.weight):
        if weights:
            add(weights[-1].ref, Role.EXPANSION)
    for s in (*site.selected, *(s for v in site.visible for s in v.among)):
        _add_selected(site, s, known, names)
    for columns in (site.nope, site.rope):
        reads = list(all_reads(columns.deep.ref.coords)) if columns is not None else []
        if site.finished:  # those with an index for every key first
            reads.sort(key=lambda r: site.key not in Ref(r.value, r.coords).labels)
        for read in reads:
            ref = Ref(read.value, read.coords)
            if site.finished:  # exporters repeat index arithmetic for every gather
                for same in site.tracer.equals(ref.value):
                    add(Ref(same, ref.coords), Role.INDICES, finished_domain(site, ref))
            else:
                _add_indices(site, ref, known, names)
    for literal in site.visible:
        constant = literal.ref.value in site.tracer.index.initializers
        unread = constant and unread_table(site.tracer.index, literal.ref.value)
        if (constant and not unread) or literal.among:
            continue
        if not site.finished and _from_indices(site, literal, known):
            continue
        domain = mask_domain(literal.is_bool, literal.positive, literal.assumed)
        add(literal.ref, Role.MASK, table_domain(literal.ref.value, domain) if unread else domain)
    return known


def _from_indices(site: Site, literal: Visible, known: dict[str, Operand]) -> bool:
    """Whether a mask is computed from the indices themselves (idx >= 0): it is no free input."""
    sources = index_sources(site.tracer, literal.ref)
    return any(v in known and known[v].role is Role.INDICES for v in sources)


def _constant(site: Site, role: Role, value: str) -> bool:
    """Initializers are no operands, except the weight of an expansion and masks too large."""
    stays = role in (Role.EXPANSION, Role.MASK)
    return not stays and value in site.tracer.index.initializers


def _add_selected(site: Site, selected: Selected, known: dict[str, Operand], names: _Names) -> None:
    """The indices of a selection; those besides the first are drawn by themselves."""
    before = set(known)
    names.names.setdefault(selected.slot, "K")
    if not site.finished:
        _add_indices(site, selected.indices, known, names)
    ref = selected.indices
    found = any(known[v].role is Role.INDICES for v in known.keys() - before)
    if not found and ref.value not in before and is_view(ref):  # arithmetic that is not followed
        elem, domain = site.tracer.sizes.elem_type(ref.value), finished_domain(site, ref)
        known[ref.value] = Operand(ref.value, Role.INDICES, names.axes(ref), elem, domain)
    for value in known.keys() - before:
        operand = known[value]
        if operand.role is Role.INDICES:
            apart = any(known[v].role is Role.INDICES for v in before)
            domain = replace(operand.domain, block=selected.block, apart=apart)
            known[value] = replace(operand, domain=domain)


def _add_indices(site: Site, ref: Ref, known: dict[str, Operand], names: _Names) -> None:
    """Operands an index tensor is computed from: indices, block table, lengths."""
    tracer = site.tracer
    for value, source in index_sources(tracer, ref).items():
        elem = tracer.sizes.elem_type(value)
        if value in known or elem not in (_T.INT32, _T.INT64):
            continue
        axes = names.axes(source)
        if any(c.reads for c in source.coords):
            if len(axes) == 1 and not _by_entry(site, source) and _drawn(site, value, names):
                continue  # one number per sequence, judged by its use: lengths, prefix sums
            axes = tuple("M" if c.reads else a for a, c in zip(axes, source.coords, strict=True))
            known[value] = Operand(value, Role.BLOCK_TABLE, axes, elem)
        elif site.key.size == 1 or any(a.partition("_of_")[0] == "K" for a in axes):
            # a longer row may be cut; that of a single key needs no axis
            known[value] = Operand(value, Role.INDICES, axes, elem, chosen_domain(site, value))


def _drawn(site: Site, value: str, names: _Names) -> bool:
    """Whether verification can draw it: of keys on one axis, where sequences begin must be known.

    What is not drawn stays a table, which is refused for such keys.
    """
    deep = site.packed.deep if isinstance(site, PackedSite) else site.nope.deep
    flat = sum(axis != "1" for axis in names.axes(deep.ref)[:-1]) == 1
    return not flat or prefix_sums(site.tracer.index, value)


def _by_entry(site: Site, ref: Ref) -> bool:
    """Whether the element depends on which entry of the selection is looked at."""
    entries = {site.key, *(s.slot for s in site.selected)}
    return any(entries & c.labels for c in ref.coords)


def _other_operand(site: Site, value: str, inner: set[int], names: _Names) -> Operand:
    """A value that binding has no name for."""
    tracer = site.tracer
    elem, shape = tracer.sizes.elem_type(value), tracer.shape(value)
    uses = [(tracer.index.nodes[i].op_type, k) for i, k in tracer.index.uses(value) if i in inner]
    if 0 in shape or (uses and all(op in ("Shape", "Size") for op, _ in uses)):
        return Operand(value, Role.SHAPE, _guess(site, shape, names), elem)
    integral = elem in (_T.INT32, _T.INT64)
    if integral and len(shape) == 2 and not _has_slots(site, shape):
        names._size("M", value, 1, shape[1])
        return Operand(value, Role.BLOCK_TABLE, ("B", "M"), elem)
    if integral and _has_slots(site, shape):
        domain = Domain(low=0, high="S2", negative_allowed=True, assumption="indices are in range")
        return Operand(value, Role.INDICES, _guess(site, shape, names), elem, domain)
    if integral and len(shape) == 1 and counts_batches(tracer.index, value):
        assumed = Domain(
            cumulative=True, assumption="prefix sums end at the number of query tokens"
        )
        return Operand(value, Role.LENGTHS_QUERY, ("B",), elem, assumed)
    if integral and len(shape) == 1 and follows_itself(tracer.index, value):
        assumed = Domain(cumulative=True, assumption="prefix sums of keys, one per sequence")
        return Operand(value, Role.LENGTHS_KV, ("B",), elem, assumed)
    if integral and len([d for d in shape if d > 1]) <= 1:
        return Operand(value, Role.LENGTHS_KV, tuple("1" if d == 1 else "B" for d in shape), elem)
    return Operand(value, Role.SHAPE, _guess(site, shape, names), elem)


def _has_slots(site: Site, shape: tuple[int, ...]) -> bool:
    slots = {site.key.size, *(s.slot.size for s in site.selected)}
    return bool(shape) and shape[-1] in slots


def _guess(site: Site, shape: tuple[int, ...], names: _Names) -> tuple[str, ...]:
    """Axis names by size, in the operator's order, for tensors that no trace reached."""
    left = [*site.rows, site.key, *(s.slot for s in site.selected), *site.heads]
    left += [site.nope.label, *([site.rope.label] if site.rope is not None else [])]
    out = []
    for size in shape:
        if size == 1:
            out.append("1")
            continue
        match = next((x for x in left if x.size == size), None)
        if match is None:
            out.append(_nearly(size, left, names))
            continue
        left.remove(match)
        out.append(names.names.get(match, ""))
    return tuple(out)


def _nearly(size: int, labels: list[Label], names: _Names) -> str:
    """Such as "S2-1" for the cache before a token is appended."""
    for label in labels:
        if is_open(label.size) and 0 < abs(size - label.size) < _NEAR:
            return f"{names.names.get(label, '')}{size - label.size:+d}"
    return ""
