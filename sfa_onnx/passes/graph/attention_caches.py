"""The cache that an Attention operator keeps: past and new keys joined in front of it.

`Attention(q, k, v, mask, past_k, past_v)` is `Attention(q, K, V, mask)` with K and V the past and
the new ones joined along the keys, and those are its second and third output. Recognition reads
keys from one tensor, so the join is written out where the operator attends to a selection.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

import onnx
from onnx import GraphProto, ModelProto, NodeProto, helper

from sfa_onnx.files.onnx_attrs import attributes
from sfa_onnx.passes.candidate import Candidate
from sfa_onnx.passes.graph.functions import Finding
from sfa_onnx.passes.graph.index import GraphIndex
from sfa_onnx.passes.graph.sub_graphs import bodies
from sfa_onnx.passes.shapes.concrete import Concrete

__all__ = ["caches_joined", "join_caches"]

_T = onnx.TensorProto
_PAST = slice(4, 6)


def caches_joined(
    model: ModelProto, find: Callable[[ModelProto], Iterable[Finding]]
) -> tuple[ModelProto, tuple[str, ...]]:
    """A model in which operators that attend to a selection have their caches joined.

    Args:
        model: not changed.
        find: every candidate of a model, with the view of the graph it lies in.

    Returns:
        The model (the one given where nothing is to do), and the first outputs of the operators.
    """
    names = [node.output[0] for _, node in _with_past(model.graph)]
    if not names:
        return model, ()
    whole = join_caches(model, names)
    found = [(index, item) for index, item in find(whole) if isinstance(item, Candidate)]
    bound = {index.nodes[item.anchor].output[0] for index, item in found}
    chosen = tuple(name for name in names if name in bound)
    return (join_caches(model, chosen), chosen) if chosen else (model, ())


def join_caches(model: ModelProto, names: Collection[str]) -> ModelProto:
    """A copy in which the operators with these first outputs have their caches joined."""
    if not names:
        return model
    result = ModelProto()
    result.CopyFrom(model)
    index = GraphIndex.of(model)
    types = Concrete(index)
    for graph, node in list(_with_past(result.graph)):
        kind = types.elem_type(node.input[3]) if node.input[3] else _T.BOOL
        unclear = not kind and attributes(node).get("is_causal")  # how would it hide keys?
        if node.output[0] in names and not unclear:
            _join(graph, node, kind == _T.BOOL, _columns(index, node))
    return result


def _columns(index: GraphIndex, node: NodeProto) -> list[str]:
    """Inputs of a Slice that makes past and new values of past and new keys; [] if none does."""
    made = [index.maker(node.input[i]) for i in (5, 2)]
    if None in made or any(n.op_type != "Slice" or len(n.input) < 4 for n in made if n):
        return []
    (past, new), keys = (m for m in made if m is not None), (node.input[4], node.input[1])
    first, second = (
        [x.tolist() for x in map(index.constant, m.input[1:]) if x is not None] for m in (past, new)
    )
    known = len(first) == len(past.input) - 1 and first == second
    own = (past.input[0], new.input[0]) == keys
    return list(past.input[1:]) if known and own and first[2] in ([3], [-1]) else []


def _with_past(graph: GraphProto) -> Iterator[tuple[GraphProto, NodeProto]]:
    """Operators with heads on an axis of their own and a cache, with the graph they lie in."""
    for node in graph.node:
        standard = node.op_type == "Attention" and node.domain in ("", "ai.onnx")
        heads = attributes(node).get("q_num_heads") if standard else 0
        if standard and not heads and all(node.input[_PAST]) and len(node.input[_PAST]) == 2:
            yield graph, node
        for body in bodies(node).values():
            yield from _with_past(body)


def _join(graph: GraphProto, node: NodeProto, is_bool: bool, cut: list[str]) -> None:
    """Write the join in front of a node; `cut`: values are these columns of the keys."""
    stem = node.output[0]
    made: list[NodeProto] = []

    def emit(op: str, inputs: Iterable[str], name: str, **more: Any) -> str:
        out = f"{stem}/{name}"
        made.append(helper.make_node(op, list(inputs), [out], f"{out}_node", **more))
        return out

    given, present = list(node.input), [*node.output[1:3], "", ""][:2]
    for position, kept in enumerate(present):
        parts = [given[4 + position], given[1 + position]]
        if position and cut:
            whole = emit("Slice", [given[1], *cut], "values")
        else:
            whole = emit("Concat", parts, ("keys", "values")[position], axis=2)
        if kept:  # read under its own name
            made[-1].output[0] = kept
        given[1 + position] = kept or whole
    if attributes(node).get("is_causal"):
        given[3] = _causal(emit, node.input, is_bool)
    del given[4:6]
    del node.input[:]
    node.input.extend([*given[:4], *(["", "", *given[4:]] if any(given[4:]) else [])])
    kept_outputs = [node.output[0], *(["", "", node.output[3]] if len(node.output) > 3 else [])]
    del node.output[:]
    node.output.extend(kept_outputs)
    attribute = [a for a in node.attribute if a.name != "is_causal"]
    del node.attribute[:]
    node.attribute.extend(attribute)
    nodes = list(graph.node)
    at = next(i for i, n in enumerate(nodes) if n.output and n.output[0] == stem)
    del graph.node[:]
    graph.node.extend([*nodes[:at], *made, *nodes[at:]])


def _causal(emit: Callable[..., str], inputs: Sequence[str], is_bool: bool) -> str:
    """The mask given, under the one that the operator makes itself: keys up to past + row."""
    query, mask, past = inputs[0], inputs[3], inputs[4]
    numbers = {"nought": (0, 0), "step": (0, 1), "front": (1, 0), "last": (1, -1)}
    ints = {
        name: emit("Constant", [], name, value=helper.make_tensor(name, _T.INT64, [1] * rank, [n]))
        for name, (rank, n) in numbers.items()
    }
    rows, before = (
        emit("Squeeze", [emit("Shape", [v], f"{n}_dim", start=2, end=3), ints["front"]], n)
        for n, v in (("rows", query), ("before", past))
    )
    keys = emit("Add", [before, rows], "total")
    own = emit("Range", [before, keys, ints["step"]], "own")
    column = emit("Unsqueeze", [own, ints["last"]], "column")
    places = emit("Range", [ints["nought"], keys, ints["step"]], "places")
    causal = emit("LessOrEqual", [places, column], "causal")
    if not mask:
        return causal
    if is_bool:
        return emit("And", [causal, mask], "mask")
    low = helper.make_tensor("low", _T.FLOAT, [], [-math.inf])
    hidden = emit("CastLike", [emit("Constant", [], "low", value=low), mask], "hidden")
    return emit("Where", [causal, mask, hidden], "mask")
