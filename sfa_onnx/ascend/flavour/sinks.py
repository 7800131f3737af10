"""Sinks for CANN lines whose operators have no such input: one factor behind the float operator.

A sink is one more score without a value, so it only takes its share of the softmax:

    out = out without the sink * sigmoid(log-sum-exp - sink)

CANN's SparseFlashAttention gives the log-sum-exp (softmax_max + log(softmax_sum)) over contiguous
keys; elsewhere there is no exact form.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import NodeProto, TensorProto, helper

from sfa_onnx.ascend.flavour.scope import Scope
from sfa_onnx.errors import ContractError
from sfa_onnx.files.onnx_attrs import attribute
from sfa_onnx.operator.op import (
    SPARSE_FLASH_ATTENTION,
    SPARSE_FLASH_ATTENTION_ANTIQUANT,
    find_op,
)

__all__ = ["sinks_behind"]

_LEAST = 1e-38  # in place of the sum of a row without a key: its output is zero whatever the factor


def sinks_behind(scope: Scope, node: NodeProto) -> list[NodeProto] | None:
    """Rule: a float-cache node with sinks -> the node without, and their factor.

    Raises:
        ContractError: the cache is int8 or paged, or the node's softmax is used itself.
    """
    op = find_op(node.domain, node.op_type)
    if op not in (SPARSE_FLASH_ATTENTION, SPARSE_FLASH_ATTENTION_ANTIQUANT):
        return None
    index = op.input_index("sinks")
    if len(node.input) <= index or not node.input[index]:
        return None
    _refuse(node, op is SPARSE_FLASH_ATTENTION)
    plain, base = NodeProto(), node.name
    plain.CopyFrom(node)
    del plain.input[index:]
    while plain.input and not plain.input[-1]:
        del plain.input[-1]
    kept = [a for a in plain.attribute if a.name != "return_softmax_lse"]
    del plain.attribute[:]
    plain.attribute.extend([*kept, helper.make_attribute("return_softmax_lse", 1)])
    kind = scope.dtype(node.input[0])
    raw = scope.value(f"{base}/out", kind)
    top, total = (scope.value(f"{base}/softmax_{n}", TensorProto.FLOAT) for n in ("max", "sum"))
    plain.output[:] = [raw, top, total]
    return [plain, *_factor(scope, node, node.input[index], (raw, top, total))]


def _refuse(node: NodeProto, floats: bool) -> None:
    where = f"node {node.name or node.output[0]!r}: sinks"
    why = "; no released CANN has the input, and only a contiguous float cache gives the"
    why += " log-sum-exp that stands for it"
    if not floats:
        raise ContractError(f"{where} over an int8 cache{why}")
    if attribute(node, "layout_kv", "BSND") == "PA_BSND":
        raise ContractError(f"{where} over a paged cache{why}")
    if any(node.output[1:]):
        raise ContractError(f"{where}: its softmax_max and softmax_sum would lack the sink")


def _factor(
    scope: Scope, node: NodeProto, sinks: str, values: tuple[str, str, str]
) -> list[NodeProto]:
    """From the raw output, its softmax_max and its softmax_sum to the node's own output."""
    raw, top, total = values
    base, kind = node.name, scope.dtype(node.input[0])
    nodes: list[NodeProto] = []

    def add(op_type: str, *inputs: str, **attributes: Any) -> str:
        made = scope.node(op_type, list(inputs), f"{base}/{op_type.lower()}", **attributes)
        nodes.append(made)
        return str(made.output[0])

    least = scope.constant(_LEAST, f"{base}/least", np.float32)
    lse = add("Add", top, add("Log", add("Max", total, least)))
    share = add("Sigmoid", add("Sub", lse, sinks))
    tnd = attribute(node, "layout_query", "BSND") == "TND"
    share = add("Transpose", share, perm=[1, 2, 0] if tnd else [0, 2, 3, 1])
    out = raw if kind == TensorProto.FLOAT else add("Cast", raw, to=TensorProto.FLOAT)
    last = add("Mul", out, share)
    if kind != TensorProto.FLOAT:
        if not kind:
            raise ContractError(f"node {base!r}: sinks: the type of its query is not in the model")
        last = add("Cast", last, to=kind)
    nodes[-1].output[0] = node.output[0]
    return nodes
