"""Whether a whole model may run here: it fits this machine's memory, and comes to an end."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from typing import Final

from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from sfa_onnx.errors import ModelError
from sfa_onnx.files.onnx_attrs import constants, control_flow, find_attribute, subgraphs

__all__ = ["check_end", "check_room", "weight_bytes"]

_MEMORY_SHARE: Final = 0.6  # of this machine's memory for a model's weights
_ENDLESS: Final = 1 << 40  # turns that nobody waits for: exporters write 2^63 - 1 for "while"


def weight_bytes(model: ModelProto) -> int:
    """Size of all weights as they are stored."""
    sizes = (
        math.prod(t.dims) * helper.tensor_dtype_to_np_dtype(t.data_type).itemsize
        for t in model.graph.initializer
    )
    return sum(sizes)


def check_room(model: ModelProto) -> None:
    """Refuse to run a whole model that would not fit: a killed process reports nothing."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    need = weight_bytes(model)
    if need > _MEMORY_SHARE * memory:
        raise ModelError(
            f"its weights take {need / 1e9:.0f} GB and this machine has {memory / 1e9:.0f} GB"
        )


def check_end(model: ModelProto) -> None:
    """Refuse to run a loop that goes on for ever: no number of turns, and nothing that stops it."""
    for graph, known in _scopes(model.graph, {}):
        for node in graph.node:
            if control_flow(node) == "Loop" and _endless(node, known):
                raise ModelError(
                    f"{node.name or node.output[0]} (Loop) never ends: it has no number of turns,"
                    " and the condition of its body is always true"
                )


def _scopes(
    graph: GraphProto, outer: Mapping[str, TensorProto]
) -> Iterator[tuple[GraphProto, dict[str, TensorProto]]]:
    """Every graph with the constants that it can read: bodies may use each other's names."""
    known = constants(graph, outer)
    yield graph, known
    for node in graph.node:
        for body in subgraphs(node):
            yield from _scopes(body, known)


def _endless(node: NodeProto, known: Mapping[str, TensorProto]) -> bool:
    turns, start = (*node.input, "", "")[:2]
    body = find_attribute(node, "body")
    if body is None or not body.g.output or (turns and not _at_least(known.get(turns), _ENDLESS)):
        return False
    begins = not start or _at_least(known.get(start), 1)
    return begins and _goes_on(body.g, constants(body.g, known))


def _goes_on(body: GraphProto, known: Mapping[str, TensorProto]) -> bool:
    """Whether the condition that a body returns is true, or the one that it was given."""
    name, makers = body.output[0].name, {n.output[0]: n for n in body.node if n.output}
    while name in makers and makers[name].op_type == "Identity":
        name = makers.pop(name).input[0]
    given = len(body.input) > 1 and name == body.input[1].name
    return given or _at_least(known.get(name), 1)


def _at_least(tensor: TensorProto | None, least: int) -> bool:
    """Whether a constant is one number of at least this size; True counts as 1."""
    whole = (TensorProto.BOOL, TensorProto.INT64)
    if tensor is None or tensor.data_type not in whole or math.prod(tensor.dims) != 1:
        return False
    if tensor.data_location == TensorProto.EXTERNAL:
        return False
    return bool(numpy_helper.to_array(tensor).reshape(-1)[0] >= least)
