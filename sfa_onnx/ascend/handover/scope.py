"""Cut the layers of one device out of a model: `layer:N` or `stage:A-B`.

An .om lives on one device. The cut takes the nodes of the layers (by the exporter's module names),
and what belongs to no layer but feeds them (rotary tables, masks, the embedding for layer 0). Its
inputs are graph inputs (the caches of these layers among them) and the hidden state from the layer
before; its outputs are what later layers read, and the graph outputs of these layers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import onnx
from onnx import ModelProto, NodeProto

from sfa_onnx.ascend.flavour.scope import Facts, inner_graphs
from sfa_onnx.errors import ModelError, UsageError
from sfa_onnx.passes.graph.index import GraphIndex

__all__ = ["Scope", "cut", "parse_scope"]

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
    nodes = list(model.graph.node)
    chosen = {i for i, layer in enumerate(layers) if layer in wanted}
    _add_shared(nodes, layers, chosen)
    if scope.last == max(present):
        _add_tail(nodes, layers, chosen)
    return _extract(model, nodes, chosen, {i for i in chosen if layers[i] is not None})


def _layers(model: ModelProto) -> list[int | None]:
    """The layer number of every node, from the exporter's metadata or the node's name."""
    index = GraphIndex(model.graph)
    found: list[int | None] = []
    for i, node in enumerate(model.graph.node):
        match = _LAYER.search(index.layer(i)) or _LAYER.search(node.name)
        found.append(int(match[1]) if match else None)
    return found


def _reads(node: NodeProto) -> set[str]:
    names = {name for name in node.input if name}
    for graph in inner_graphs(node):
        inside = {out for n in graph.node for out in n.output} | {v.name for v in graph.input}
        inside |= {t.name for t in graph.initializer}
        for inner in graph.node:
            names |= _reads(inner) - inside
        names |= {o.name for o in graph.output} - inside
    return names


def _add_shared(nodes: list[NodeProto], layers: list[int | None], chosen: set[int]) -> None:
    """Ancestors that belong to no layer and hang on no other layer."""
    producer = {out: i for i, n in enumerate(nodes) for out in n.output if out}
    clean: dict[int, bool] = {}

    def is_clean(start: int) -> bool:
        stack = [start]
        while stack:
            i = stack[-1]
            if i in clean:
                stack.pop()
                continue
            parents = [producer[name] for name in _reads(nodes[i]) if name in producer]
            open_ones = [p for p in parents if p not in clean]
            if layers[i] is not None:
                clean[i] = False
            elif open_ones:
                stack += open_ones
            else:
                clean[i] = all(clean[p] for p in parents)
        return clean[start]

    queue = list(chosen)
    while queue:
        for name in _reads(nodes[queue.pop()]):
            i = producer.get(name)
            if i is not None and i not in chosen and layers[i] is None and is_clean(i):
                chosen.add(i)
                queue.append(i)


def _add_tail(nodes: list[NodeProto], layers: list[int | None], chosen: set[int]) -> None:
    """After the last layer: what reads it and belongs to no layer (final norm, head)."""
    made = {out for i in chosen for out in nodes[i].output}
    outside = {out for i, n in enumerate(nodes) if i not in chosen for out in n.output}
    grown = True
    while grown:
        grown = False
        for i, node in enumerate(nodes):
            if i in chosen or layers[i] is not None or not _reads(node) & made:
                continue
            if not _reads(node) & (outside - made):
                chosen.add(i)
                made.update(node.output)
                grown = True


def _extract(
    model: ModelProto, nodes: list[NodeProto], chosen: set[int], owned: set[int]
) -> ModelProto:
    """The sub-model of `chosen`; what no layer owns, other stages compute themselves."""
    graph = model.graph
    facts = Facts.of(model)
    read = {name for i in chosen for name in _reads(nodes[i])}
    made = {out for i in chosen for out in nodes[i].output}
    later = {name for i, n in enumerate(nodes) if i not in chosen for name in _reads(n)}
    constants = {t.name for t in graph.initializer}
    known = {v.name: v for v in (*graph.input, *graph.output, *graph.value_info)}
    inputs = [v.name for v in graph.input if v.name in read]
    inputs += sorted(read - made - constants - set(inputs) - {""})
    outputs = [v.name for v in graph.output if v.name in made]
    rest = (made & later) - set(outputs)
    outputs = [n for i in sorted(owned) for n in nodes[i].output if n in rest] + outputs

    part = ModelProto(ir_version=model.ir_version, producer_name=model.producer_name)
    part.opset_import.extend(model.opset_import)
    part.functions.extend(model.functions)
    part.metadata_props.extend(model.metadata_props)
    part.graph.name = graph.name or "part"
    part.graph.node.extend(nodes[i] for i in sorted(chosen))
    part.graph.initializer.extend(t for t in graph.initializer if t.name in read)
    part.graph.input.extend(_value(name, known, facts) for name in inputs)
    part.graph.output.extend(_value(name, known, facts) for name in outputs)
    kept = made - set(outputs)
    part.graph.value_info.extend(v for v in graph.value_info if v.name in kept)
    return part


def _value(name: str, known: dict[str, onnx.ValueInfoProto], facts: Facts) -> onnx.ValueInfoProto:
    if name in known:
        return known[name]
    if not facts.types.get(name):
        raise ModelError(
            f"--scope: the value {name!r} on the border of the cut has no known type; export with"
            " shape information (torch.onnx.export writes it), or cut elsewhere"
        )
    return onnx.helper.make_tensor_value_info(name, facts.types[name], facts.dims.get(name))
