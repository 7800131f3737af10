"""Where a selection may be a lightning indexer: from products of two computed tensors to a TopK.

As with attention, nothing is asked about spellings. What depends on a product is followed through
pointwise operators, views and sums; a TopK over it selects by those scores.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from sfa_onnx.files.onnx_attrs import attributes
from sfa_onnx.passes.find.products import is_product, operands
from sfa_onnx.passes.find.regions import FOLLOWED
from sfa_onnx.passes.graph.index import GraphIndex
from sfa_onnx.passes.graph.kinds import PRODUCTS, VIEWS, is_foreign
from sfa_onnx.passes.graph.walk import back
from sfa_onnx.passes.graph.weights import is_weight

__all__ = ["SelectionRegion", "selection_regions"]

_MOST: Final = 2048  # nodes between products and one TopK
_ACTIVATIONS: Final = (
    {"Abs", "Celu", "Clip", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu"}
    | {"Max", "Mish", "PRelu", "Pow", "Relu", "Selu", "Sigmoid", "Softmax", "Softplus", "Sqrt"}
    | {"Swish", "Tanh", "ThresholdedRelu"}
)
_SUMS: Final = frozenset(("ReduceSum", "ReduceMean", "ReduceMax")) | PRODUCTS


@dataclass(frozen=True)
class SelectionRegion:
    """Values between products of queries and keys and one TopK.

    Attributes:
        node: the TopK.
        scores: what it selects by.
        inner: the values that depend on products, `scores` included.
        axis: of the keys, as the TopK says it.
        sign: -1 where the smallest are kept: the scores are the opposite of what it is given.
    """

    node: int
    scores: str
    inner: frozenset[str]
    axis: int = -1
    sign: int = 1


def selection_regions(index: GraphIndex) -> list[SelectionRegion]:
    """Every TopK whose scores are products that something was made of, in graph order.

    Routers (a product with a weight) and a TopK over the bare product are none.
    """
    tops = [i for i in index.of_kinds(("TopK",)) if _gives_indices(index, i)]
    if not tops:
        return []
    depends = _dependent(index)
    found = (_region(index, i, depends) for i in tops)
    return [region for region in found if region is not None]


def _gives_indices(index: GraphIndex, i: int) -> bool:
    node = index.nodes[i]
    return node.domain in ("", "ai.onnx") and len(node.output) > 1 and bool(node.output[1])


def _dependent(index: GraphIndex) -> dict[str, bool]:
    """Values that depend on a product; True: it is the product itself."""
    found: dict[str, bool] = {}
    for i in range(len(index.nodes)):
        node = index.nodes[i]
        sums = node.op_type in PRODUCTS or node.op_type == "ReduceSum"
        read = any(n in found for n in node.input)
        if sums and not read and is_product(index, node):
            made = operands(index, node)
            if node.op_type == "ReduceSum" and any(n in found for n in made):
                continue
            found[node.output[0]] = True
        elif read and _follows(index, i):
            found.update((o, False) for o in node.output if o)
    return found


def _follows(index: GraphIndex, i: int) -> bool:
    node = index.nodes[i]
    if is_foreign(node):
        return False
    if node.op_type in PRODUCTS:
        return not any(is_weight(index, n) and not _is_vector(index, n) for n in node.input[:2])
    return node.op_type in FOLLOWED or node.op_type in _ACTIVATIONS | _SUMS


def _is_vector(index: GraphIndex, value: str) -> bool:
    """Whether a weight has one axis: it weighs heads, and makes nothing new of them."""
    *_, source = back(index, value, VIEWS)
    tensor = index.initializers.get(source)
    array = index.constant(source) if tensor is None else None
    dims = tensor.dims if tensor is not None else () if array is None else array.shape
    return bool(dims) and sum(d != 1 for d in dims) <= 1


def _region(index: GraphIndex, top: int, depends: dict[str, bool]) -> SelectionRegion | None:
    scores = index.nodes[top].input[0]
    if scores not in depends:
        return None
    inner, stack = set[str](), [scores]
    while stack:
        value = stack.pop()
        if value in inner:
            continue
        inner.add(value)
        if len(inner) > _MOST:
            return None
        if not depends[value]:
            stack += [n for n in index.nodes[index.producer[value]].input if n in depends]
    made = [index.nodes[index.producer[v]] for v in inner]
    worked = any(
        n.op_type in _ACTIVATIONS or (n.op_type in _SUMS and not depends[n.output[0]]) for n in made
    )
    if not worked:
        return None
    a = attributes(index.nodes[top])
    sign = 1 if a.get("largest", 1) else -1
    return SelectionRegion(top, scores, frozenset(inner), int(a.get("axis", -1)), sign)
