"""The indexers of torch: what the C++ core is called with."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Any

import torch

from sfa_onnx.operator.contract import OpContract
from sfa_onnx.operator.op import QUANT_LIGHTNING_INDEXER
from sfa_onnx.runtime.core import LAYOUTS, ROUNDINGS, IndexerParams
from sfa_onnx.torch.checks import FLOATS, check_attributes, check_ints, dtype_number, refuse, sizes
from sfa_onnx.torch.form import Form, Result

__all__ = ["check_indexer", "indexer_form"]


def indexer_form(
    op: OpContract,
    tensors: Mapping[str, torch.Tensor],
    attributes: Mapping[str, Any],
    rounding: str,
) -> Form:
    """One call of an indexer, checked.

    Args:
        op: the float or the quantised one.
        tensors: the given inputs by name, on CPU and contiguous.
        attributes: all attributes of the contract.
        rounding: "exact" or "npu" (two roundings to float16 of the quantised one).

    Returns:
        A form with the result sparse_indices, int32 [B, S1, 1, K] or [T, 1, K], tail -1, and of the
        float indexer their scores in the query's type, tail -inf.

    Raises:
        ContractError: a shape, type or attribute breaks the contract.
    """
    check_attributes(op, attributes)
    quant = op is QUANT_LIGHTNING_INDEXER
    check_indexer(tensors, quant)
    query, count = tensors["query"], attributes["sparse_count"]
    layouts = attributes["layout_query"], attributes["layout_key"]
    shape = (*query.shape[:-2], 1, count)
    params = IndexerParams(
        struct_size=ctypes.sizeof(IndexerParams),
        dtype=dtype_number(query),
        weights_dtype=dtype_number(tensors["weights"]),
        layout_query=LAYOUTS[layouts[0]],
        layout_key=LAYOUTS[layouts[1]],
        sparse_mode=attributes["sparse_mode"],
        rounding=ROUNDINGS[rounding] if quant else 0,
        head_dim=query.shape[-1],
        sparse_count=count,
        **sizes(tensors, *layouts, "actual_seq_lengths_key"),
    )
    results = [Result("sparse_indices", shape, torch.int32)]
    if not quant:
        results.append(Result("sparse_values", shape))
    return Form(IndexerParams, bytes(params), tuple(tensors), tuple(results))


def check_indexer(tensors: Mapping[str, torch.Tensor], quant: bool) -> None:
    """Types and shapes beyond what the sizes of all operators show.

    Raises:
        ContractError: one of these is not as it should be.
    """
    query, key = tensors["query"], tensors["key"]
    if query.dtype not in ((torch.int8,) if quant else FLOATS):
        raise refuse("query", "int8" if quant else "float32, float16 or bfloat16", query.dtype)
    if key.dtype != query.dtype:
        raise refuse("key", f"the query's type {query.dtype}", key.dtype)
    if key.shape[-1] != query.shape[-1]:
        raise refuse("key width", f"the query's {query.shape[-1]}", key.shape[-1])
    halves = (torch.float16,) if quant else FLOATS
    per_head: dict[str, Any] = {"weights": query.shape[:-1]}
    if quant:
        per_head |= {"query_dequant_scale": query.shape[:-1], "key_dequant_scale": key.shape[:-1]}
    for name, expected in per_head.items():
        if tensors[name].dtype not in halves:
            wanted = "float16" if quant else "float32, float16 or bfloat16"
            raise refuse(name, wanted, tensors[name].dtype)
        if tensors[name].shape != expected:
            raise refuse(name, f"shape {list(expected)}", list(tensors[name].shape))
    check_ints(tensors)
