"""Shapes, types and presence of an operator's tensors: what the C++ core leaves to its caller."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Final

import torch

from sfa_onnx.errors import ContractError
from sfa_onnx.operator.contract import OpContract
from sfa_onnx.runtime.core import DTYPES, HOLES

__all__ = [
    "FLOATS",
    "HOLES_VARIABLE",
    "check_attributes",
    "check_ints",
    "check_lengths",
    "check_ranks",
    "check_reserved",
    "check_traced",
    "dtype_number",
    "holes",
    "refuse",
    "sizes",
]

FLOATS: Final = (torch.float32, torch.float16, torch.bfloat16)
HOLES_VARIABLE: Final = "SFA_ONNX_HOLES"
_RANKS: Final = {"BSND": 4, "TND": 3, "PA_BSND": 4}


def refuse(what: str, expected: str, got: object) -> ContractError:
    """The error for `what` that is not as `expected`."""
    return ContractError(f"{what}: expected {expected}, got {got}")


def dtype_number(tensor: torch.Tensor) -> int:
    """The core's number of a tensor's type."""
    return DTYPES[str(tensor.dtype).removeprefix("torch.")]


def holes() -> int:
    """The core's number of what SFA_ONNX_HOLES says.

    Raises:
        ContractError: it says something else.
    """
    value = os.environ.get(HOLES_VARIABLE) or "error"
    if value not in HOLES:
        raise refuse(f"environment variable {HOLES_VARIABLE}", "error, skip or stop", value)
    return HOLES[value]


def check_attributes(op: OpContract, attributes: Mapping[str, Any]) -> None:
    """The contract's own check, of what is the contract's.

    Raises:
        ContractError: an attribute is missing or illegal.
    """
    known = {a.name for a in op.attributes}
    op.check_attributes({n: v for n, v in attributes.items() if n in known})


def check_traced(
    op: OpContract, tensors: Mapping[str, torch.Tensor], attributes: Mapping[str, Any]
) -> None:
    """Attributes, as far as a trace knows their values; no tensor on "meta" beside others.

    Raises:
        ContractError: one of these is not as it should be.
    """
    for spec in op.attributes:
        value = attributes.get(spec.name, spec.default)
        problem = spec.problem(value) if isinstance(value, (int, float, str, type(None))) else None
        if problem:
            raise ContractError(f"{op.name}: attribute {spec.name}: {problem}")
    first, *others = tensors.items()
    for name, tensor in others:
        if (tensor.device.type == "meta") != (first[1].device.type == "meta"):
            raise refuse(name, f"a tensor on {first[1].device} like {first[0]}", tensor.device)


def check_reserved(tensors: Mapping[str, torch.Tensor]) -> None:
    """Nothing is given for what the contract reserves."""
    for name in ("key_dequant_scale", "value_dequant_scale"):
        if name in tensors:
            why = "nothing (reserved: the scales are inside the rows)"
            raise refuse(name, why, f"a tensor {list(tensors[name].shape)}")


def check_ints(tensors: Mapping[str, torch.Tensor]) -> None:
    """Indices, tables and lengths are int32."""
    for name, tensor in tensors.items():
        ints = name in ("sparse_indices", "block_table") or name.startswith("actual_seq")
        if ints and tensor.dtype != torch.int32:
            raise refuse(name, "torch.int32", f"{tensor.dtype}; call {name}.int()")


def check_ranks(
    query: torch.Tensor, key: torch.Tensor, layout_query: str, layout_kv: str, kv: str
) -> None:
    """Ranks by layout, one key head, one batch; `kv` names the lengths of the keys."""
    if layout_kv not in ("PA_BSND", layout_query):
        expected = f"PA_BSND or the query's layout {layout_query}"
        raise refuse(f"layout_{kv.rsplit('_', 1)[-1]}", expected, layout_kv)
    if query.dim() != _RANKS[layout_query]:
        what = f"query (layout_query {layout_query})"
        raise refuse(what, f"{_RANKS[layout_query]} dimensions", list(query.shape))
    if key.dim() != _RANKS[layout_kv] or key.shape[-2] != 1:
        what = f"key (layout {layout_kv})"
        raise refuse(what, f"{_RANKS[layout_kv]} dimensions, one head", list(key.shape))
    if layout_kv == "BSND" and key.shape[0] != query.shape[0]:
        raise refuse("key batch", f"the query's {query.shape[0]}", key.shape[0])
    if query.shape[-2] < 1 or query.shape[-1] < 1:
        raise refuse("query", "at least one head and one column", list(query.shape))
    if layout_kv == "PA_BSND" and key.shape[1] < 1:
        raise refuse("key (layout PA_BSND)", "pages of at least one row", list(key.shape))


def check_lengths(
    tensors: Mapping[str, torch.Tensor], layout_query: str, layout_kv: str, kv: str
) -> int:
    """B, once lengths (`kv` names those of the keys) and table are found to fit the layouts."""
    lengths_q = tensors.get("actual_seq_lengths_query")
    lengths_kv, table = tensors.get(kv), tensors.get("block_table")
    end = kv.rsplit("_", 1)[-1]  # of the names around the keys
    if layout_query == "TND" and (lengths_q is None or not lengths_q.numel()):
        raise refuse("actual_seq_lengths_query", "prefix sums [B] (layout_query TND)", "nothing")
    if layout_kv != "BSND" and lengths_kv is None:
        raise refuse(kv, f"[B] (layout_{end} {layout_kv})", "nothing")
    batch = tensors["query"].shape[0]
    if layout_query == "TND" and lengths_q is not None:
        batch = lengths_q.numel()
    for name, lengths in (
        ("actual_seq_lengths_query", lengths_q),
        (kv, lengths_kv),
    ):
        if lengths is not None and list(lengths.shape) != [batch]:
            raise refuse(name, f"shape [{batch}]", list(lengths.shape))
    if layout_kv != "PA_BSND" and table is not None:
        raise refuse("block_table", f"nothing with layout_{end} {layout_kv}", list(table.shape))
    if layout_kv == "PA_BSND":
        got = "nothing" if table is None else list(table.shape)
        if table is None or table.dim() != 2 or table.shape[0] != batch or not table.shape[1]:
            raise refuse("block_table", f"shape [{batch}, M >= 1] (layout_{end} PA_BSND)", got)
    return int(batch)


def sizes(
    tensors: Mapping[str, torch.Tensor], layout_query: str, layout_kv: str, kv: str
) -> dict[str, int]:
    """Fields that attention and indexer have in common (`kv_s` is the rows of a contiguous key)."""
    query, key, table = tensors["query"], tensors["key"], tensors.get("block_table")
    check_ranks(query, key, layout_query, layout_kv, kv)
    paged = layout_kv == "PA_BSND"
    return {
        "batch": check_lengths(tensors, layout_query, layout_kv, kv),
        "num_heads": query.shape[-2],
        "query_s": query.shape[1] if layout_query == "BSND" else 0,
        "query_t": query.shape[:-2].numel(),
        "kv_s": 0 if paged else key.shape[-3],
        "block_num": key.shape[0] if paged else 0,
        "block_size": key.shape[1] if paged else 0,
        "block_table_cols": 0 if table is None else table.shape[1],
    }
