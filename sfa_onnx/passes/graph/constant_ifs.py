"""An If whose condition is a constant: the branch that is taken stands in its place.

Tracers leave such nodes where the rank of a tensor decides (`scatter_reduce`), or whether an axis
has size 1 (`squeeze`): sizes that no call changes are constants as well. What lies in a branch is
another graph to recognition, so the branch is written out where that shows a site which nothing
else shows.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Final

from onnx import GraphProto, ModelProto, NodeProto, helper

from sfa_onnx.files.onnx_attrs import control_flow
from sfa_onnx.passes.candidate import Candidate
from sfa_onnx.passes.graph.functions import Finding
from sfa_onnx.passes.graph.index import GraphIndex
from sfa_onnx.passes.graph.sub_graphs import bodies
from sfa_onnx.passes.shapes.concrete import Concrete
from sfa_onnx.passes.shapes.size import is_open

__all__ = ["branches_taken", "take_branches"]

_LOGIC: Final = frozenset(
    ("And", "Cast", "Equal", "Greater", "GreaterOrEqual", "Identity", "Less", "LessOrEqual")
) | {"Not", "Or", "Reshape", "Squeeze", "Unsqueeze", "Xor"}
_MOST: Final = 64  # nodes of a condition


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
    taken, names = _all_taken(model, None)
    if not names:
        return model, ()
    before, after = (
        sum(isinstance(item, Candidate) for _, item in find(m)) for m in (model, taken)
    )
    return (taken, names) if after > before else (model, ())


def take_branches(model: ModelProto, names: Collection[str]) -> ModelProto:
    """A copy in which the Ifs with these first outputs are the branches that they take."""
    return _all_taken(model, names)[0] if names else model


def _all_taken(
    model: ModelProto, names: Collection[str] | None
) -> tuple[ModelProto, tuple[str, ...]]:
    """The model and the first outputs of the Ifs that are gone, those of `names` or all of them.

    What one of them returns may decide the next one.
    """
    done: list[str] = []
    while True:
        decided = {node.output[0]: branch for node, branch in _decided(model)}
        chosen = {n: b for n, b in decided.items() if names is None or n in names}
        if not chosen:
            return model, tuple(done)
        model = _without(model, chosen)
        done += chosen


def _without(model: ModelProto, chosen: Mapping[str, GraphProto]) -> ModelProto:
    """A copy in which the Ifs with these first outputs are these branches."""
    result = ModelProto()
    result.CopyFrom(model)
    nodes: list[NodeProto] = []
    for node in result.graph.node:
        branch = chosen.get(node.output[0] if node.output else "")
        nodes += [node] if branch is None else _written_out(result.graph, node, branch)
    kept = [NodeProto.FromString(n.SerializeToString()) for n in nodes]
    del result.graph.node[:]
    result.graph.node.extend(kept)
    return result


def _decided(model: ModelProto) -> Iterator[tuple[NodeProto, GraphProto]]:
    """Ifs of the main graph with a constant condition, and the branch that each takes."""
    if not any(control_flow(node) == "If" for node in model.graph.node):
        return
    index = GraphIndex.of(model)
    sizes = Concrete(index)
    for node in model.graph.node:
        if control_flow(node) == "If" and _is_fixed(sizes, node.input[0]):
            known = sizes.value(node.input[0])
            if known is not None and known.size == 1:
                holds = bool(known.reshape(-1)[0])
                yield node, bodies(node)["then_branch" if holds else "else_branch"]


def _is_fixed(sizes: Concrete, value: str) -> bool:
    """Whether constants and sizes that no call changes decide a value."""
    stack, seen = [value], set[str]()
    while stack:
        name = stack.pop()
        entries = sizes.entries(name)
        if name in seen or sizes.index.constant(name) is not None:
            continue
        if entries is not None and not any(map(is_open, entries)) and not sizes.moves(name):
            continue
        seen.add(name)
        node = sizes.index.maker(name)
        if node is None or node.domain or node.op_type not in _LOGIC or len(seen) > _MOST:
            return False
        stack += node.input
    return True


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
