"""Products of two computed tensors: where attention and indexers begin and end."""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

import onnx

from sfa_onnx.files.onnx_attrs import attributes
from sfa_onnx.passes.find.selections import picks_rows
from sfa_onnx.passes.graph.index import GraphIndex
from sfa_onnx.passes.graph.kinds import GATHERS, PRODUCTS, is_foreign
from sfa_onnx.passes.graph.weights import is_weight

__all__ = ["NEAR", "is_product", "operands", "products", "products_above"]

NEAR: Final = 48  # nodes between two products
_ENDS: Final = GATHERS | {"Attention", "Constant", "Shape", "Size", "Softmax", "TopK"}


def products(index: GraphIndex) -> list[int]:
    """Every product of the graph, in order."""
    free = index.initializers.keys().isdisjoint  # most products of a model have a weight
    found = [i for i in index.of_kinds(PRODUCTS) if free(index.nodes[i].input[:2])]
    found += index.of_kinds(("ReduceSum",))
    return sorted(i for i in found if is_product(index, index.nodes[i]))


def is_product(index: GraphIndex, node: onnx.NodeProto) -> bool:
    """A contraction of two tensors neither of which is a weight."""
    if node.op_type == "Einsum" and not _contracts(node):
        return False
    factors = operands(index, node)
    return bool(factors) and not any(is_weight(index, n) for n in reversed(factors))


def _contracts(node: onnx.NodeProto) -> bool:
    """Whether an Einsum sums over a label; rows times scales are written without."""
    terms, _, out = str(attributes(node)["equation"]).partition("->")
    return not out or any(c.isalpha() and c not in out for c in terms)


def operands(index: GraphIndex, node: onnx.NodeProto) -> list[str]:
    """The two factors of a product, also of one that is written as Mul and ReduceSum."""
    if node.op_type in PRODUCTS:
        return list(node.input[:2])
    made = index.real_maker(node.input[0]) if node.op_type == "ReduceSum" else None
    if made is not None and made.op_type == "Cast":  # half precision is summed in float32
        made = index.real_maker(made.input[0])
    return list(made.input) if made is not None and made.op_type == "Mul" else []


def products_above(
    index: GraphIndex, value: str, taken: Collection[int] = ()
) -> tuple[set[int], set[int]] | None:
    """(products, nodes passed) upstream of a value; None where an anchor is among them."""
    products: set[int] = set()
    nodes: set[int] = set()
    stack = [value]
    while stack and len(nodes) < NEAR:
        i = index.producer.get(stack.pop())
        if i is None or i in nodes:
            continue
        node = index.nodes[i]
        if i in taken or node.op_type == "Softmax":
            return None
        if node.op_type in PRODUCTS or node.op_type == "ReduceSum":
            if is_product(index, node) and not picks_rows(index, node):
                products.add(i)
                continue
            if node.op_type in PRODUCTS:
                continue
        if node.op_type in _ENDS or is_foreign(node):
            continue
        nodes.add(i)
        stack += [n for n in node.input if n]
    return products, nodes
