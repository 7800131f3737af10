"""Which layer every node of a model belongs to, and what belongs to all of them.

Exporters name modules, but not every node, and share what two layers compute alike under the name
of the first. So names are trusted for work alone: a node that (with everything above it) multiplies
no weight and reads no cache makes masks, positions or sizes, and is common to all layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from onnx import ModelProto, NodeProto, TensorProto

from sfa_onnx.operator.op import find_op
from sfa_onnx.passes.graph.order import reads

__all__ = ["BEFORE", "SIZES", "Owners", "owners_of"]

BEFORE: Final = -1  # owner of what stands before the first layer
SIZES: Final = ("Shape", "Size")  # ask for a shape, not for values
_WORK: Final = frozenset(
    ("MatMul", "Gemm", "Conv", "MatMulInteger", "MatMulNBits", "QLinearMatMul", "Einsum", "TopK",
     "Softmax", "LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization")
)  # fmt: skip
_FLOATS: Final = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)


@dataclass(frozen=True)
class Owners:
    """Per node of the main graph, in its order.

    Attributes:
        owner: its layer; `BEFORE`; None for what is common to all layers.
        named: the layer that the exporter names, if any.
    """

    owner: list[int | None]
    named: list[int | None]


def owners_of(model: ModelProto, named: list[int | None]) -> Owners:
    """The owner of every node.

    Args:
        model: its nodes are in an order that runs.
        named: the exporter's layer of every node.
    """
    graph, nodes = model.graph, list(model.graph.node)
    weights = {t.name for t in graph.initializer if len(t.dims) > 1 and t.data_type in _FLOATS}
    private = _private(model, named)
    given = {v.name for v in graph.input} - {t.name for t in graph.initializer}
    common: dict[str, bool] = {}
    fixed: dict[str, bool] = {}  # made of constants alone
    layer: dict[str, int] = {}
    owner: list[int | None] = []
    for i, node in enumerate(nodes):
        names = [] if node.op_type in SIZES else list(reads(node))
        constant = all(fixed.get(n, n not in given) for n in reads(node))
        works = bool(weights & set(names)) and node.op_type in _WORK
        works |= node.op_type in ("TopK", "Softmax") or (
            bool(node.domain) and find_op(node.domain, node.op_type) is not None
        )
        free = not works and all(common.get(n, n not in private) for n in names)
        found: int | None = None
        if not (free or constant):
            above = max((layer[n] for n in names if n in layer), default=BEFORE)
            found = above if named[i] is None else max(above, named[i] or 0)
        owner.append(found)
        for out in node.output:
            common[out], fixed[out] = found is None, constant
            if found is not None:
                layer[out] = found
    return Owners(owner, named)


def _private(model: ModelProto, named: list[int | None]) -> set[str]:
    """Float inputs of one layer: its cache."""
    readers: dict[str, list[int]] = {}
    nodes: list[NodeProto] = list(model.graph.node)
    for i, node in enumerate(nodes):
        for name in reads(node):
            readers.setdefault(name, []).append(i)
    found = set()
    for value in model.graph.input:
        kind = value.type.tensor_type
        if kind.elem_type not in (*_FLOATS, TensorProto.INT8):
            continue
        layers, stack, seen = set[int](), [value.name], set[str]()
        while stack and len(layers) < 2:
            name = stack.pop()
            if name in seen:
                continue
            seen.add(name)
            for i in readers.get(name, ()):
                here = named[i]
                if here is not None:
                    layers.add(here)
                else:
                    stack += nodes[i].output
        if len(layers) == 1 and len(kind.shape.dim) > 1:
            found.add(value.name)
    return found
