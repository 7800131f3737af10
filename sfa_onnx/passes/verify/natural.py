"""Masks as the graph itself makes them: a mask that hides every valid index is not a mask.

Verification feeds masks as free inputs, which is more than the graph can produce. One thing that
hides is their relation to the indices: a graph that masks the *valid* entries agrees with the
operator for every mask, and yet all its rows are empty in use.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper

from sfa_onnx.passes.candidate import Candidate, Operand, Refusal, Role
from sfa_onnx.passes.graph.index import GraphIndex
from sfa_onnx.passes.verify.execute import Executable
from sfa_onnx.passes.verify.extract import UnverifiableError, embedded_constant
from sfa_onnx.passes.verify.sizes.dims import Dims

__all__ = ["hidden_by_mask", "mask_models"]

_NODES_MAX = 64


def mask_models(index: GraphIndex, candidate: Candidate) -> dict[str, onnx.ModelProto]:
    """For each mask that the indices alone decide: the little model that makes it."""
    indices = {o.value: o for o in candidate.operands if o.role is Role.INDICES}
    masks = [o for o in candidate.operands if o.role is Role.MASK]
    models = {o.value: _producers(index, o, indices) for o in masks}
    return {value: model for value, model in models.items() if model is not None}


def hidden_by_mask(
    candidate: Candidate,
    models: dict[str, onnx.ModelProto],
    shapes: dict[str, tuple[int, ...]],
    dims: Dims,
) -> Refusal | None:
    """Whether a mask that depends on the indices alone hides all of them.

    Args:
        candidate: the site.
        models: what `mask_models` found.
        shapes: concrete shapes of the operands.
        dims: what they say.
    """
    operands = {o.value: o for o in candidate.operands}
    indices = {o.value: o for o in candidate.operands if o.role is Role.INDICES}
    for value, model in models.items():
        operand = operands[value]
        feeds = {
            v.name: _valid(indices[v.name], shapes[v.name], dims.capacity)
            for v in model.graph.input
        }
        try:
            (mask,) = Executable(model).run(feeds)
        except RuntimeError:
            continue
        if _all_hidden(operand, mask):
            return Refusal(
                f"the mask {operand.value!r} hides every index that is in range, so it is not the"
                " usual rule that hides invalid ones (is it inverted?)",
                operand.value,
                final=True,
            )
    return None


def _producers(
    index: GraphIndex, operand: Operand, indices: dict[str, Operand]
) -> onnx.ModelProto | None:
    """The nodes that make a mask out of the indices alone; None where more enters."""
    nodes: set[int] = set()
    constants: dict[str, onnx.TensorProto] = {}
    used: dict[str, Operand] = {}
    queue = [operand.value]
    while queue:
        value = queue.pop()
        if not value or value in constants:
            continue
        if value in indices:
            used[value] = indices[value]
            continue
        producer = index.producer.get(value)
        if producer is None:
            try:
                constants[value] = embedded_constant(index, value)
            except UnverifiableError:
                return None
        elif producer not in nodes:
            nodes.add(producer)
            queue.extend(index.nodes[producer].input)
        if len(nodes) > _NODES_MAX:
            return None
    if not nodes or not used:
        return None
    graph = onnx.GraphProto(name="mask")
    graph.node.extend(index.nodes[i] for i in sorted(nodes))
    graph.initializer.extend(constants.values())
    graph.input.extend(
        helper.make_tensor_value_info(name, o.elem_type, [None] * len(o.axes))
        for name, o in used.items()
    )
    graph.output.append(onnx.ValueInfoProto(name=operand.value))
    imports = [helper.make_opsetid(d, v) for d, v in index.opsets.items()]
    return helper.make_model(graph, opset_imports=imports, ir_version=10)


def _valid(operand: Operand, shape: tuple[int, ...], capacity: int) -> np.ndarray:
    """Indices that are all in range."""
    dtype = helper.tensor_dtype_to_np_dtype(operand.elem_type)
    row = np.arange(shape[-1]) % max(capacity, 1)
    return np.array(np.broadcast_to(row, shape), dtype)


def _all_hidden(operand: Operand, mask: np.ndarray) -> bool:
    """Whether no entry of a mask is visible."""
    if operand.domain.values is None:
        return not np.asarray(mask, bool).any()
    return bool((mask != operand.domain.values[0]).all())
