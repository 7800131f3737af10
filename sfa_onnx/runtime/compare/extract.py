"""Fused sites as small models: the region that was replaced and what replaced it.

A site is found by name alone: an operator of ours in the second model, followed to the first value
that both models make. From there both models are walked upwards through what differs; where they
meet again lies the site's border. Nothing heavy is touched: initializers stay external references.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import onnx
from onnx import GraphProto, ModelProto, TensorProto

from sfa_onnx.operator.op import (
    ALL_OPS,
    EXPANDED,
    LIGHTNING_INDEXER,
    QUANT_LIGHTNING_INDEXER,
    find_op,
)
from sfa_onnx.passes.graph.order import reads
from sfa_onnx.passes.graph.provenance import layer_of, site_of
from sfa_onnx.passes.graph.sub_graphs import bodies

__all__ = [
    "AFTER",
    "Site",
    "attending",
    "find_sites",
    "joined_model",
    "region_above",
    "region_model",
    "sites_in_bodies",
]

AFTER: Final = "__after"  # suffix of the second model's values in a joined model
_INDEXERS: Final = (LIGHTNING_INDEXER.name, QUANT_LIGHTNING_INDEXER.name)
_STRUCTURAL: Final = 1 << 16  # bytes; a larger initializer is a weight, and so is an external one


class _Maker:
    """Who makes which value of a graph, and who reads it."""

    def __init__(self, graph: GraphProto) -> None:
        self.nodes = list(graph.node)
        self.producer = {o: i for i, n in enumerate(self.nodes) for o in n.output if o}
        self.readers: dict[str, list[int]] = {}
        for i, node in enumerate(self.nodes):
            for name in reads(node):
                self.readers.setdefault(name, []).append(i)
        self.given = {v.name for v in graph.input} | {t.name for t in graph.initializer}

    def makes(self, value: str) -> bool:
        return value in self.producer or value in self.given


@dataclass(frozen=True)
class Site:
    """One fused site: what both models make, and where their regions begin."""

    name: str  # as `fuse` and `inspect` call it
    op_type: str
    layer: str
    outputs: tuple[str, ...]  # values that both models make
    border: tuple[str, ...]  # values entering either region, made alike in both models
    before: tuple[int, ...]  # nodes of the region in the first model
    after: tuple[int, ...]
    own: int  # the operator's position in the second model


def find_sites(before: ModelProto, after: ModelProto) -> list[Site]:
    """The fused sites of `after` with respect to `before`, in graph order."""
    first, second = _Maker(before.graph), _Maker(after.graph)
    same = _Sameness(first, second)
    sites = []
    for position, node in enumerate(second.nodes):
        op = find_op(node.domain, node.op_type) if node.domain else None
        if op is None or op in EXPANDED or same.node(position):
            continue
        outputs = _meeting_values(first, second, position)
        region_a, border_a = _walk(second, outputs, same.value)
        region_b, border_b = _walk(first, outputs, same.value) if outputs else ((), set())
        border = tuple(sorted(border_a | border_b))
        name = site_of(node.name or node.output[0])
        sites.append(
            Site(name, node.op_type, layer_of(node), outputs, border, region_b,
                 region_a, position)
        )  # fmt: skip
    return sites


def attending(after: ModelProto, site: Site) -> int:
    """Position of the operator that makes the values of a site which are no selection.

    Where the file keeps no value of a selection, an indexer and the attention that reads it meet
    the original in the same values.
    """
    nodes = after.graph.node
    found = [i for i in site.after if nodes[i].domain and nodes[i].op_type not in _INDEXERS]
    ours = [i for i in found if find_op(nodes[i].domain, nodes[i].op_type) not in (None, *EXPANDED)]
    return max(ours, default=site.own)


def sites_in_bodies(graph: GraphProto) -> int:
    """How many operators of ours lie in bodies of If, Loop and Scan."""
    inner = [body for node in graph.node for body in bodies(node).values()]
    own = (n for body in inner for n in body.node if n.domain and find_op(n.domain, n.op_type))
    return sum(1 for _ in own) + sum(sites_in_bodies(body) for body in inner)


class _Sameness:
    """Which values both models make in the same way."""

    def __init__(self, first: _Maker, second: _Maker) -> None:
        self.first, self.second = first, second
        self._same: dict[int, bool] = {}

    def node(self, position: int) -> bool:
        """Whether this node of the second model stands unchanged in the first."""
        if position not in self._same:
            node = self.second.nodes[position]
            twin = self.first.producer.get(next((o for o in node.output if o), ""))
            alike = twin is not None and (
                self.first.nodes[twin].SerializeToString(deterministic=True)
                == node.SerializeToString(deterministic=True)
            )
            self._same[position] = alike
        return self._same[position]

    def value(self, name: str) -> bool:
        """Whether both models have this value, made by an unchanged node or given."""
        if name in self.second.producer:
            node = self.second.producer[name]
            return self.node(node) or self._selection(node, name)
        return name in self.second.given and self.first.makes(name)

    def _selection(self, position: int, name: str) -> bool:
        """Whether both models select by an indexer here: what follows is judged on its own.

        Index keys in pages or int8 may select other keys where scores are close.
        """
        twin = self.first.producer.get(name)
        nodes = [self.second.nodes[position]] + ([] if twin is None else [self.first.nodes[twin]])
        return twin is not None and all(n.op_type in _INDEXERS and n.domain for n in nodes)


def _meeting_values(first: _Maker, second: _Maker, position: int) -> tuple[str, ...]:
    """The first values downstream of a node that the first model makes too."""
    found: dict[str, None] = {}
    queue, seen = list(second.nodes[position].output), set()
    while queue:
        value = queue.pop(0)
        if not value or value in seen:
            continue
        seen.add(value)
        if value in first.producer:
            found[value] = None
            continue
        for reader in second.readers.get(value, ()):
            queue += second.nodes[reader].output
    return tuple(found)


def _walk(
    maker: _Maker, outputs: Iterable[str], stop: Callable[[str], bool]
) -> tuple[tuple[int, ...], set[str]]:
    """Nodes above `outputs` down to the values where `stop` holds, and those values."""
    nodes: set[int] = set()
    border: set[str] = set()
    queue = list(outputs)
    first = set(queue)
    while queue:
        value = queue.pop()
        if value not in first and stop(value):
            border.add(value)
        elif value in maker.producer:
            position = maker.producer[value]
            if position not in nodes:
                nodes.add(position)
                queue += reads(maker.nodes[position])
        else:
            border.add(value)
    return tuple(sorted(nodes)), border


def region_above(model: ModelProto, outputs: Iterable[str], border: set[str]) -> tuple[int, ...]:
    """Positions of the nodes that make `outputs` from the values in `border`."""
    return _walk(_Maker(model.graph), outputs, border.__contains__)[0]


def region_model(
    model: ModelProto, nodes: Iterable[int], inputs: dict[str, int], outputs: Iterable[str]
) -> ModelProto:
    """Some nodes of a model as a model of their own.

    Args:
        model: where they come from; its initializers stay references to the same files.
        nodes: positions of the nodes.
        inputs: name -> element type of what enters.
        outputs: what leaves.
    """
    chosen = [model.graph.node[i] for i in nodes]
    made = {o for n in chosen for o in n.output}
    read = {name for n in chosen for name in reads(n)}
    out = ModelProto(ir_version=max(model.ir_version, 8))
    out.opset_import.extend(model.opset_import)
    missing = {op.domain: op.version for op in ALL_OPS}
    for entry in out.opset_import:
        missing.pop(entry.domain, None)
    out.opset_import.extend(onnx.helper.make_opsetid(d, v) for d, v in missing.items())
    out.functions.extend(model.functions)
    out.graph.name = "region"
    out.graph.node.extend(chosen)
    wanted = read - made - inputs.keys()
    out.graph.initializer.extend(t for t in model.graph.initializer if t.name in wanted)
    for name, elem_type in inputs.items():
        if name in read and name not in made:
            value = out.graph.input.add(name=name)
            value.type.tensor_type.elem_type = elem_type
    out.graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)
    return out


def joined_model(
    before: ModelProto, after: ModelProto, site: Site, folder: Path | None = None
) -> tuple[ModelProto, set[str]]:
    """Both regions in one model, with the cheap part of the graph above them.

    Expanded upwards through nodes that need no weights, so that masks, positions and selections
    derive from the same random activations on both sides. The second region's own values carry the
    suffix `AFTER`.

    External data is used where its file lies in `folder`; missing weights become inputs.

    Returns:
        The model without inputs declared, and the names of the values that enter it.
    """
    maker = _Maker(before.graph)
    heavy = {t.name for t in before.graph.initializer if _is_weight(t)}

    def stop(value: str) -> bool:
        position = maker.producer.get(value)
        return position is not None and bool(heavy & set(reads(maker.nodes[position])))

    positions: set[int] = set()
    entering = {value for value in site.border if stop(value)}
    above, found = _walk(maker, [v for v in site.border if v not in entering], stop)
    positions |= set(above)
    entering |= found
    model = region_model(before, sorted(positions | set(site.before)), {}, site.outputs)
    second = region_model(after, site.after, {}, ())
    names = {o: o + AFTER for n in second.graph.node for o in n.output if o}
    for node in second.graph.node:
        node.name = node.name and node.name + AFTER
        for field in (node.input, node.output):
            for i, name in enumerate(field):
                field[i] = names.get(name, name)
    model.graph.node.extend(second.graph.node)
    present = {t.name for t in model.graph.initializer}
    model.graph.initializer.extend(t for t in second.graph.initializer if t.name not in present)
    model.graph.output.extend(onnx.ValueInfoProto(name=names[n]) for n in site.outputs)
    kept = [t for t in model.graph.initializer if _is_there(t, folder)]
    entering |= {t.name for t in model.graph.initializer} - {t.name for t in kept}
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    return model, entering - {t.name for t in kept}


def _is_there(tensor: TensorProto, folder: Path | None) -> bool:
    """Whether a tensor's bytes can be had: in the model, or in a file that exists."""
    if tensor.data_location != TensorProto.EXTERNAL:
        return True
    location = next((e.value for e in tensor.external_data if e.key == "location"), "")
    return folder is not None and bool(location) and (folder / location).is_file()


def _is_weight(tensor: TensorProto) -> bool:
    itemsize = max(1, onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)
    large = math.prod(tensor.dims) * itemsize > _STRUCTURAL
    return large or tensor.data_location == TensorProto.EXTERNAL
