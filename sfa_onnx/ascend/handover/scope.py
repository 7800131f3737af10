"""Cut the layers of one device out of a model: `layer:N` or `stage:A-B`.

An .om lives on one device. Which layer a node belongs to is said by the exporter's module names
where it has one, and by what reaches it where it has none: nodes between two of a layer's nodes are
the layer's. What masks, positions and sizes are made of costs nothing and is computed in every
stage that needs it. The interface of a stage is what is left: the hidden state, the caches of its
layers, masks and positions among the inputs, and a selection that an earlier layer made for it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import ModelProto, NodeProto

from sfa_onnx.ascend.flavour.scope import Facts
from sfa_onnx.ascend.handover.owners import BEFORE, SIZES, Owners, owners_of
from sfa_onnx.errors import ModelError, UsageError
from sfa_onnx.files.onnx_attrs import attribute
from sfa_onnx.guard.guarded import infer_shapes
from sfa_onnx.passes.graph.index import GraphIndex
from sfa_onnx.passes.graph.order import reads

__all__ = ["Scope", "cut", "parse_scope"]

_MADE_UP = "unk__"  # names that onnx's inference gives to sizes it does not know
_SCOPE = re.compile(r"(?:layer:(\d+)|stage:(\d+)-(\d+))$")
_LAYER = re.compile(r"(?:^|[./])(?:layers?|blocks?|h)[._/](\d+)(?:[./]|$)")


@dataclass(frozen=True)
class Scope:
    """Layers `first` to `last`, both included."""

    first: int
    last: int


def parse_scope(text: str) -> Scope:
    """Read "layer:N" or "stage:A-B".

    Raises:
        UsageError: it is neither.
    """
    found = _SCOPE.match(text)
    if not found:
        raise UsageError(f"--scope {text}: expected layer:N or stage:A-B, e.g. layer:3, stage:0-7")
    first = int(found[1] or found[2])
    last = int(found[1] or found[3])
    if last < first:
        raise UsageError(f"--scope {text}: the stage ends before it starts")
    return Scope(first, last)


def cut(model: ModelProto, scope: Scope) -> ModelProto:
    """The part of `model` that computes the layers of `scope`; weights are referred to, not copied.

    Raises:
        ModelError: the exporter left no layer names, the layers are not there, or a value on the
            border has no known type.
    """
    layers = _layers(model)
    present = {layer for layer in layers if layer is not None}
    wanted = set(range(scope.first, scope.last + 1))
    if not wanted <= present:
        known = f"layers {min(present)}-{max(present)}" if present else "no layer names"
        raise ModelError(
            f"--scope: layers {sorted(wanted - present)} are not in the graph ({known})"
        )
    owners = owners_of(model, layers)
    if scope.first == min(present):
        wanted.add(BEFORE)
    return _extract(model, owners, wanted, last=scope.last == max(present))


def _layers(model: ModelProto) -> list[int | None]:
    """The layer number of every node, from the exporter's metadata or the node's name."""
    index = GraphIndex(model.graph)
    found: list[int | None] = []
    for i, node in enumerate(model.graph.node):
        match = _LAYER.search(index.layer(i)) or _LAYER.search(node.name)
        found.append(int(match[1]) if match else None)
    return found


def _extract(model: ModelProto, owners: Owners, wanted: set[int], *, last: bool) -> ModelProto:
    """The sub-model of the nodes that `wanted` own, and of the common ones that they need."""
    graph, nodes = model.graph, list(model.graph.node)
    constants = {t.name for t in graph.initializer}
    ends = {v.name for v in graph.output}
    chosen = {i for i, owner in enumerate(owners.owner) if owner in wanted}
    for i, node in enumerate(nodes):
        layer = owners.named[i]
        if owners.owner[i] is None and ends & {*node.output}:
            chosen |= {i} if layer in wanted or (last and layer is None) else set()
    told = _told_outputs(model, owners, chosen)
    facts = Facts.of(model)
    known = _declared(model)
    copies, read, made = _with_own_shapes(model, owners, chosen, facts, known)
    inputs = [v.name for v in graph.input if v.name in read]
    inputs += sorted(read - made - constants - set(inputs) - {""})

    part = ModelProto(ir_version=model.ir_version, producer_name=model.producer_name)
    part.opset_import.extend(model.opset_import)
    part.functions.extend(model.functions)
    part.metadata_props.extend(model.metadata_props)
    part.graph.name = graph.name or "part"
    part.graph.node.extend(copies)
    part.graph.initializer.extend(t for t in graph.initializer if t.name in read)
    part.graph.input.extend(_value(name, known, facts) for name in inputs)
    part.graph.output.extend(_value(name, known, facts) for name in told)
    kept = made - set(told)
    part.graph.value_info.extend(v for v in graph.value_info if v.name in kept)
    return part


def _declared(model: ModelProto) -> dict[str, onnx.ValueInfoProto]:
    """What the file says of its values, and where it is silent what follows from that.

    A value on the border then has the symbols of the inputs, and no dims of its own to ask for.
    """
    graph, (inferred, _) = model.graph, infer_shapes(model, data_prop=True)
    known = {v.name: v for v in (*graph.input, *graph.output, *graph.value_info)}
    for value in inferred.graph.value_info if inferred is not None else ():
        if value.name not in known or not _has_rank(known[value.name]):
            known[value.name] = value
            for dim in value.type.tensor_type.shape.dim:
                if dim.dim_param.startswith(_MADE_UP):
                    dim.Clear()
    return known


def _has_rank(value: onnx.ValueInfoProto) -> bool:
    """Whether a declaration says the rank."""
    return bool(value.type.tensor_type.HasField("shape"))


def _told_outputs(model: ModelProto, owners: Owners, chosen: set[int]) -> list[str]:
    """What a stage hands on: values that other stages read, then outputs of the model."""
    nodes, ends = model.graph.node, [v.name for v in model.graph.output]
    others = (i for i, owner in enumerate(owners.owner) if i not in chosen and owner is not None)
    read = {name for i in others for name in reads(nodes[i])}
    mine = [i for i in sorted(chosen) if owners.owner[i] is not None]
    handed = [n for i in mine for n in nodes[i].output if n in read and n not in ends]
    made = {n for i in chosen for n in nodes[i].output}
    return handed + [n for n in ends if n in made]


def _with_common(nodes: list[NodeProto], owners: Owners, chosen: set[int]) -> set[int]:
    """`chosen` and every common node above it."""
    producer = {out: i for i, n in enumerate(nodes) for out in n.output if out}
    found, stack = set(chosen), list(chosen)
    while stack:
        node = nodes[stack.pop()]
        if node.op_type in SIZES:
            continue
        for name in reads(node):
            i = producer.get(name)
            if i is not None and i not in found and owners.owner[i] is None:
                found.add(i)
                stack.append(i)
    return found


def _with_own_shapes(
    model: ModelProto,
    owners: Owners,
    chosen: set[int],
    facts: Facts,
    known: dict[str, onnx.ValueInfoProto],
) -> tuple[list[NodeProto], set[str], set[str]]:
    """Copies of a stage's nodes, what they read and what they make.

    Sizes are asked of the stage's own values: another layer's cache that was asked for its length
    alone stays out where the length is a number, or a value that has it is there anyway.
    """
    nodes, graph = list(model.graph.node), model.graph
    producer = {out: i for i, n in enumerate(nodes) for out in n.output if out}
    constants = {t.name for t in graph.initializer}
    while True:
        chosen = _with_common(nodes, owners, chosen)
        made = {out for i in chosen for out in nodes[i].output if out}
        sized = [i for i in sorted(chosen) if nodes[i].op_type in SIZES]
        read = {n for i in chosen - set(sized) for n in reads(nodes[i])}
        there = [v.name for v in graph.input if v.name in read]
        there += sorted(read - made - constants)
        asked = [i for i in sized if nodes[i].input[0] not in made]
        answers = {i: _answer(nodes[i], there, known, facts) for i in asked}
        sources = [n for answer in answers.values() for n in answer.input]
        more = {producer[n] for n in sources if n not in made and n in producer}
        more = {i for i in more if owners.owner[i] is None}
        if not more:
            break
        chosen |= more
    copies = [answers.get(i) or _copy(nodes[i]) for i in sorted(chosen)]
    return copies, {n for node in copies for n in reads(node)}, made


def _copy(node: NodeProto) -> NodeProto:
    new = NodeProto()
    new.CopyFrom(node)
    return new


def _answer(
    node: NodeProto, there: list[str], known: dict[str, onnx.ValueInfoProto], facts: Facts
) -> NodeProto:
    """A `Shape` or `Size`, asked of a value that is there, or answered where dims are numbers."""
    new, dims = _copy(node), _dims(node.input[0], known, facts)
    if node.input[0] in there or dims is None:
        return new
    bounds = [attribute(node, "start", 0), attribute(node, "end")]
    wanted = dims[slice(*bounds)] if node.op_type == "Shape" else dims
    if all(isinstance(d, int) for d in wanted):
        sizes = np.asarray(wanted, np.int64)
        value = onnx.numpy_helper.from_array(sizes if node.op_type == "Shape" else sizes.prod())
        new = onnx.helper.make_node("Constant", [], [*node.output], name=node.name, value=value)
        new.metadata_props.extend(node.metadata_props)
        return new
    for name in there:
        given = _dims(name, known, facts)
        if given == dims:
            new.input[0] = name
            return new
        place = _window(given or (), wanted) if bounds != [0, None] else None
        if place is not None:  # the same sizes at other places
            del new.attribute[:]
            new.input[0] = name
            ends = {"start": place, "end": place + len(wanted)}
            new.attribute.extend(onnx.helper.make_attribute(k, v) for k, v in ends.items())
            return new
    return new


def _window(dims: tuple[int | str, ...], wanted: tuple[int | str, ...]) -> int | None:
    """Where `wanted` begins among `dims`."""
    starts = range(len(dims) - len(wanted) + 1)
    return next((i for i in starts if dims[i : i + len(wanted)] == wanted), None)


def _dims(
    name: str, known: dict[str, onnx.ValueInfoProto], facts: Facts
) -> tuple[int | str, ...] | None:
    """The declared shape of a value, where every dim has a number or a name."""
    if name in known:
        shape = known[name].type.tensor_type.shape.dim
        dims: list[int | str] = [d.dim_param or d.dim_value for d in shape]
    else:
        dims = [d for d in facts.dims.get(name) or () if d is not None]
        if len(dims) != len(facts.dims.get(name) or ()):
            return None
    return tuple(int(d) if str(d).isdigit() else d for d in dims) if dims and all(dims) else None


def _value(name: str, known: dict[str, onnx.ValueInfoProto], facts: Facts) -> onnx.ValueInfoProto:
    if name in known:
        return known[name]
    if not facts.types.get(name):
        raise ModelError(
            f"--scope: the value {name!r} on the border of the cut has no known type; export with"
            " shape information (torch.onnx.export writes it), or cut elsewhere"
        )
    return onnx.helper.make_tensor_value_info(name, facts.types[name], facts.dims.get(name))
