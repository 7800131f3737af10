"""What a bound selection covers in the graph: nodes, entering values and their roles."""

from __future__ import annotations

import math
from collections.abc import Iterable

import onnx

from sfa_onnx.passes.assume import SCALES
from sfa_onnx.passes.axes.expr import Label
from sfa_onnx.passes.axes.places import axis_labels
from sfa_onnx.passes.axes.trace import Ref
from sfa_onnx.passes.bind.domains import mask_domain
from sfa_onnx.passes.bind.region import Region
from sfa_onnx.passes.candidate import Domain, Operand, Role
from sfa_onnx.passes.graph.index import GraphIndex
from sfa_onnx.passes.indexer.build import Replacement
from sfa_onnx.passes.indexer.formula import Factor
from sfa_onnx.passes.indexer.site import Selection

__all__ = ["cover"]

_BOUND = Domain(low=-1, high="S2", assumption="a row's last visible key is one of those stored")


def cover(site: Selection, made: Replacement, outputs: Iterable[str]) -> Region:
    """The region that computes `outputs`, from the operands on."""
    names = _Names(site)
    known = _operands(site, made, names)
    index = site.tracer.index
    wanted = list(outputs)
    inner, shaped = _upstream(index, [*wanted, *made.e.used], set(known))
    for value in (*shaped, *_sized_by(index, made, inner)):
        known.setdefault(value, _shape_of(site, value))
    needed, _ = _upstream(index, list(made.e.used), set(known))
    removed = _dead(index, inner, wanted, needed)
    read = {n for i in inner for n in index.nodes[i].input} | set(made.e.used)
    live = [o for v, o in known.items() if v in read]
    return Region(
        tuple(sorted(removed)), tuple(sorted(inner - removed)), tuple(live), names.filled()
    )


def _sized_by(index: GraphIndex, made: Replacement, inner: set[int]) -> list[str]:
    """Tensors in front of the operands whose sizes the replacement reads, and nothing else does."""
    nodes = [*made.e.nodes, *(index.nodes[i] for i in inner)]
    told = {x.output[0] for x in nodes if x.op_type in ("Shape", "Size")}
    read = {n for x in nodes if x.output[0] not in told for n in x.input}
    own = {o for x in nodes for o in x.output} | set(index.initializers)
    sized = dict.fromkeys(x.input[0] for x in nodes if x.output[0] in told)
    return [n for n in sized if n not in read and n not in own]


class _Names:
    """Label -> axis name of the operator's language, and sizes as the file declares them."""

    def __init__(self, site: Selection) -> None:
        self.site = site
        self.names: dict[Label, str] = {}
        self.sizes: dict[str, int | str] = {"K": site.count}
        f = site.formula
        for group, name in ((site.batch, "B"), (site.tokens, "S1"), (f.heads, "Hi")):
            for i, label in enumerate(group):
                self.names[label] = name if not i else f"{name}_{i}"
        self.names[f.keys] = "S2"
        for i, part in enumerate(f.parts):
            self.names.setdefault(part.column, "Di" if not i else f"Di_{i}")

    def axes(self, ref: Ref) -> tuple[str, ...]:
        """Axis names of the tensor of `ref`."""
        out: list[str] = []
        shape = self.site.tracer.shape(ref.value)
        for axis, coordinate in enumerate(ref.coords):
            labels = axis_labels(coordinate) or []
            own = (self.names.get(x, f"part_of_{ref.value}") for x in labels)
            out.append("*".join(own) or "1")
            if labels and math.prod(x.size for x in labels) != shape[axis]:
                out[-1] += f"_of_{ref.value}"  # the first of its columns only
                continue
            if len(labels) == 1 and out[-1] not in self.sizes:
                self.sizes[out[-1]] = self._size(ref.value, axis, labels[0])
        return tuple(out)

    def filled(self) -> dict[str, int | str]:
        """Sizes of all axes: also of those that no tensor of the graph has whole."""
        opened = self.site.tracer.open
        for label, name in self.names.items():
            self.sizes.setdefault(name, name if opened(label.size) else label.size)
        return dict(self.sizes)

    def _size(self, value: str, axis: int, label: Label) -> int | str:
        if self.site.tracer.static(value, axis):
            return label.size
        declared = self.site.tracer.index.shape(value)
        symbol = declared[axis] if declared is not None else None
        return symbol if isinstance(symbol, str) else self.names.get(label, label.name)


def _operands(site: Selection, made: Replacement, names: _Names) -> dict[str, Operand]:
    known: dict[str, Operand] = {}
    index = site.tracer.index

    def add(ref: Ref, role: Role, domain: Domain | None = None) -> None:
        if ref.value in site.tracer.joined:
            for part, _ in site.tracer.joined[ref.value].parts:
                add(part, role, domain)
            return
        if ref.value in known or (ref.value in index.initializers and role is Role.MASK):
            return
        kind = site.tracer.sizes.elem_type(ref.value)
        known[ref.value] = Operand(ref.value, role, names.axes(ref), kind, domain or Domain())

    for refs, role in ((made.query, Role.QUERY), (made.key, Role.INDEX_KEY)):
        for ref in refs:
            add(ref, role)
    for part in site.formula.parts:  # a scale on both sides of the relu is not negative
        for scale in sorted(part.key_by, key=lambda by: not by.outside):
            add(
                scale.ref,
                Role.SCALE if scale.outside else Role.INDEX_WEIGHTS,
                _factor_domain(scale),
            )
    by_query = (factor for part in site.formula.parts for factor in part.query_by)
    for factor in (*site.formula.weights, *by_query):
        add(factor.ref, Role.INDEX_WEIGHTS, _factor_domain(factor))
    for literal in (*site.masks.padding, *site.masks.rows):
        if literal in site.masks.rows and _made_of(index, literal.ref.value, set(known)):
            continue  # of padding that is an operand: they are no masks of their own
        domain = mask_domain(literal.is_bool, literal.positive, literal.assumed)
        add(literal.ref, Role.MASK, domain)
    for prefix in site.masks.prefixes:
        if prefix.ref is not None and prefix in site.lengths and prefix.bound.reads:
            add(prefix.ref, Role.LENGTHS_KV, _BOUND)
    return known


def _factor_domain(factor: Factor) -> Domain:
    """What is taken for granted of a factor, and who says so."""
    texts = []
    if factor.said:
        caller = f"the caller (assume {' '.join(f'{SCALES}:{n}' for n in factor.said)})"
        said = f"{', '.join(map(repr, factor.said))}: no negative numbers"
        if not factor.assumed and factor.power > 0:
            return Domain(assumption=said, discharged_by=caller)
        texts.append(f"{said}, says {caller}")
    if factor.assumed:
        texts.append(f"{', '.join(factor.assumed)}: scales of keys are not negative")
    if factor.power < 0:
        texts.append(f"{factor.ref.value}, which scores are divided by, is not 0")
    return Domain(low=1 if factor.power < 0 else None, assumption="; ".join(texts))


def _made_of(index: GraphIndex, value: str, known: set[str]) -> bool:
    """Whether any of the known values enters the computation of another one, not only its sizes."""
    nodes, _ = _upstream(index, [value], known)
    made = (index.nodes[i] for i in nodes)
    return any(n in known for x in made if x.op_type not in ("Shape", "Size") for n in x.input)


def _upstream(
    index: GraphIndex, values: list[str], known: set[str]
) -> tuple[set[int], dict[str, None]]:
    """Nodes behind `values` up to what is known, and values of which only the shape is read."""
    nodes: set[int] = set()
    shaped: dict[str, None] = {}
    stack, seen = list(values), set(values)
    while stack:
        value = stack.pop()
        i = index.producer.get(value)
        if not value or value in known or i is None:
            continue
        nodes.add(i)
        node = index.nodes[i]
        if node.op_type in ("Shape", "Size"):
            if node.input[0] not in index.initializers and index.constant(node.input[0]) is None:
                shaped[node.input[0]] = None
            continue
        new = [n for n in node.input if n and n not in seen]
        seen.update(new)
        stack += new
    made = {o for i in nodes for o in index.nodes[i].output}
    return nodes, dict.fromkeys(v for v in shaped if v not in known and v not in made)


def _shape_of(site: Selection, value: str) -> Operand:
    shape = site.tracer.shape(value)
    kind = site.tracer.sizes.elem_type(value)
    return Operand(value, Role.SHAPE, ("",) * len(shape), kind or onnx.TensorProto.FLOAT)


def _dead(index: GraphIndex, inner: set[int], outputs: list[str], needed: set[int]) -> set[int]:
    """Nodes that nobody reads once `outputs` are made by somebody else."""
    own = {v for v in outputs if index.producer.get(v) in inner}
    removed: set[int] = set()
    for i in sorted(inner, reverse=True):
        if i in needed or i < index.first:
            continue
        made = [o for o in index.nodes[i].output if o and o not in own]
        readers = [u for o in made for u, _ in index.uses(o)]
        if any(index.is_graph_output(o) for o in made) or any(u not in removed for u in readers):
            continue
        if made != [o for o in index.nodes[i].output if o] or readers:
            removed.add(i)
    return removed
