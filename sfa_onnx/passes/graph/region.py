"""A region as a small `onnx_graphsurgeon.Graph`: the form in which replacements are edited.

The model itself is never converted: GraphSurgeon drops metadata and rebuilds everything, which is
fine for thirty nodes and wrong for a customer's model. Only the replacement of one site goes
through it (ordering, renaming), and its nodes come back as protos.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.logger.logger import G_LOGGER

__all__ = ["edit_region", "free_name", "ordered_nodes", "rename_region"]

G_LOGGER.severity = G_LOGGER.CRITICAL  # it prints; a library must not


def edit_region(nodes: Iterable[onnx.NodeProto], outputs: Iterable[str]) -> gs.Graph:
    """The nodes as a GraphSurgeon graph; values from outside become its inputs.

    Args:
        nodes: a few nodes in any order; empty optional inputs are kept.
        outputs: the values that the region must deliver.
    """
    graph = onnx.GraphProto(name="region")
    graph.node.extend(nodes)
    made = {o for n in graph.node for o in n.output}
    entering = dict.fromkeys(i for n in graph.node for i in n.input if i and i not in made)
    graph.input.extend(onnx.ValueInfoProto(name=name) for name in entering)
    graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)
    return gs.import_onnx(onnx.helper.make_model(graph))


def rename_region(region: gs.Graph, taken: set[str], keep: Iterable[str], stem: str) -> None:
    """Give inner values and nodes names that are not `taken` yet; `taken` learns the new ones.

    Args:
        region: edited in place.
        taken: every node and value name of the model.
        keep: values with a fixed name: what enters and leaves.
        stem: name for nodes that have none.
    """
    fixed = set(keep)
    for name, tensor in list(region.tensors().items()):
        if name and name not in fixed:
            tensor.name = free_name(name, taken)
    for node in region.nodes:
        node.name = free_name(node.name or f"{stem}/{node.op}", taken)


def free_name(name: str, taken: set[str]) -> str:
    """`name`, or `name_1`, `name_2` ...: the first that is free; it is taken afterwards."""
    for suffix in itertools.chain([""], (f"_{i}" for i in itertools.count(1))):
        if name + suffix not in taken:
            taken.add(name + suffix)
            return name + suffix
    raise AssertionError  # pragma: no cover - count() never ends


def ordered_nodes(region: gs.Graph) -> list[onnx.NodeProto]:
    """The region's nodes as protos, each after what it reads."""
    region.toposort()
    return list(gs.export_onnx(region, do_type_check=False).graph.node)
