"""An If whose condition is a constant: the branch that is taken stands in its place.

Tracers leave such nodes where the rank of a tensor decides (`scatter_reduce`, `squeeze`). What
lies in a branch is another graph to recognition, so the branch is written out where that shows a
site which nothing else shows.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

from onnx import GraphProto, ModelProto, NodeProto, helper

from sfa_onnx.files.onnx_attrs import control_flow
from sfa_onnx.passes.candidate import Candidate
from sfa_onnx.passes.graph.functions import Finding
from sfa_onnx.passes.graph.index import GraphIndex
from sfa_onnx.passes.graph.sub_graphs import bodies

__all__ = ["branches_taken", "take_branches"]


def branches_taken(
    model: ModelProto, find: Callable[[ModelProto], Iterable[Finding]]
) -> tuple[ModelProto, tuple[str, ...]]:
    """A model in which the branches that constants choose are written out, where that helps.

    Args:
        model: not changed.
        find: every candidate of a model, with the view of the graph it lies in.

    Returns:
        The model (the one given where nothing is to do), and the first outputs of the Ifs.
    """
    names = tuple(node.output[0] for node, _ in _decided(model))
    if not names:
        return model, ()
    taken = take_branches(model, names)
    before, after = (
        sum(isinstance(item, Candidate) for _, item in find(m)) for m in (model, taken)
    )
    return (taken, names) if after > before else (model, ())


def take_branches(model: ModelProto, names: Collection[str]) -> ModelProto:
    """A copy in which the Ifs with these first outputs are the branches that they take."""
    if not names:
        return model
    result = ModelProto()
    result.CopyFrom(model)
    chosen = {node.output[0]: branch for node, branch in _decided(model)}
    nodes: list[NodeProto] = []
    for node in result.graph.node:
        branch = chosen.get(node.output[0] if node.output else "")
        if branch is None or node.output[0] not in names:
            nodes.append(node)
        else:
            nodes += _written_out(result.graph, node, branch)
    kept = [NodeProto.FromString(n.SerializeToString()) for n in nodes]
    del result.graph.node[:]
    result.graph.node.extend(kept)
    return result


def _decided(model: ModelProto) -> Iterator[tuple[NodeProto, GraphProto]]:
    """Ifs of the main graph with a constant condition, and the branch that each takes."""
    if not any(control_flow(node) == "If" for node in model.graph.node):
        return
    index = GraphIndex.of(model)
    defaults = {v.name for v in model.graph.input}  # a caller may give another value
    for node in model.graph.node:
        known = index.constant(node.input[0]) if control_flow(node) == "If" else None
        if known is not None and known.size == 1 and index.unaliased(node.input[0]) not in defaults:
            yield node, bodies(node)["then_branch" if bool(known.reshape(-1)[0]) else "else_branch"]


def _written_out(graph: GraphProto, node: NodeProto, branch: GraphProto) -> list[NodeProto]:
    """The nodes of a branch under names of their own, and its results under the If's."""
    own = {t.name for t in branch.initializer}
    own |= {name for inner in branch.node for name in inner.output if name}
    names = {name: f"{node.output[0]}/{name}" for name in own}
    for tensor in branch.initializer:
        made = graph.initializer.add()
        made.CopyFrom(tensor)
        made.name = names[tensor.name]
    nodes = []
    for inner in branch.node:
        copy = NodeProto()
        copy.CopyFrom(inner)
        _rename(copy, names)
        copy.name = f"{node.name or node.output[0]}/{inner.name or inner.output[0]}"
        nodes.append(copy)
    for name, result in zip(node.output, branch.output, strict=True):
        source = names.get(result.name, result.name)
        nodes.append(helper.make_node("Identity", [source], [name], f"{name}/taken"))
    return nodes


def _rename(node: NodeProto, names: Mapping[str, str]) -> None:
    """Give the values of a node, and what its bodies read from outside, their new names."""
    node.input[:] = [names.get(n, n) for n in node.input]
    node.output[:] = [names.get(n, n) for n in node.output]
    for body in bodies(node).values():
        hidden = {v.name for v in body.input} | {t.name for t in body.initializer}
        hidden |= {n for inner in body.node for n in inner.output}
        outer = {a: b for a, b in names.items() if a not in hidden}
        for inner in body.node:
            _rename(inner, outer)
        for result in body.output:
            result.name = outer.get(result.name, result.name)
