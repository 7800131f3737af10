"""The attention operators of torch: what the C++ core is called with."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Any, Final

import torch

from sfa_onnx.operator.contract import PackedRow
from sfa_onnx.operator.op import SPARSE_FLASH_ATTENTION, OpContract
from sfa_onnx.runtime.core import LAYOUTS, ROUNDINGS, Params
from sfa_onnx.torch.checks import (
    FLOATS,
    check_attributes,
    check_ints,
    check_reserved,
    dtype_number,
    holes,
    refuse,
    sizes,
)
from sfa_onnx.torch.form import Form, Result

__all__ = ["attention_form", "softmax_shape"]

_UNREAD: Final = ("value",)


def _check_indices(query: torch.Tensor, indices: torch.Tensor) -> None:
    lead = [*query.shape[:-2], 1]
    if list(indices.shape[:-1]) != lead:
        expected = ", ".join(map(str, lead))
        raise refuse("sparse_indices", f"shape [{expected}, K]", list(indices.shape))


def softmax_shape(query: torch.Tensor) -> tuple[int, ...]:
    """CANN's [B, N2, S1, N1/N2] or [N2, T, N1/N2], of one key head."""
    return (*query.shape[:-3], 1, *query.shape[-3:-1])


def attention_form(
    op: OpContract,
    tensors: Mapping[str, torch.Tensor],
    attributes: Mapping[str, Any],
    rounding: str,
) -> Form:
    """One call of an attention operator, checked.

    Args:
        op: which of the two.
        tensors: the given inputs by name, on CPU and contiguous.
        attributes: all attributes of the contract; return_softmax_lse may be among them for packed
            rows too, whose node has no such attribute.
        rounding: "exact" or "npu" (of packed latents; float caches are what they are).

    Returns:
        A form with the results attention_out, [B, S1, N1, C] or [T, N1, C] in the query's type, and
        with return_softmax_lse softmax_max and softmax_sum, float32 [B, 1, S1, N1] or [1, T, N1].

    Raises:
        ContractError: a shape, type or attribute breaks the contract.
    """
    check_attributes(op, attributes)
    _check_types(op, tensors)
    query, indices = tensors["query"], tensors["sparse_indices"]
    layouts = attributes["layout_query"], attributes["layout_kv"]
    common = sizes(tensors, *layouts, "actual_seq_lengths_kv")
    _check_indices(query, indices)
    nope, rope, tile = _widths(op, tensors, attributes)
    params = Params(
        struct_size=ctypes.sizeof(Params),
        query_dtype=dtype_number(query),
        cache_dtype=dtype_number(tensors["key"]),
        layout_query=LAYOUTS[layouts[0]],
        layout_kv=LAYOUTS[layouts[1]],
        sparse_mode=attributes["sparse_mode"],
        scale_value=attributes["scale_value"],
        nope_dim=nope,
        rope_dim=rope,
        tile_size=tile,
        sparse_block_size=attributes["sparse_block_size"],
        sparse_count=indices.shape[-1],
        holes=holes(),
        rounding=ROUNDINGS[rounding],
        **common,
    )
    read = tuple(name for name in tensors if name not in _UNREAD)
    lse = attributes.get("return_softmax_lse")
    return Form(Params, bytes(params), read, _results(query, nope, softmax=bool(lse)))


def _results(query: torch.Tensor, nope: int, *, softmax: bool) -> tuple[Result, ...]:
    out = Result("out", (*query.shape[:-1], nope))
    if not softmax:
        return (out,)
    shape = softmax_shape(query)
    return out, *(Result(f"softmax_{n}", shape, torch.float32, zeroed=True) for n in ("max", "sum"))


def _check_types(op: OpContract, tensors: Mapping[str, torch.Tensor]) -> None:
    query = tensors["query"]
    if query.dtype not in FLOATS:
        raise refuse("query", "float32, float16 or bfloat16", query.dtype)
    if op is not SPARSE_FLASH_ATTENTION:
        check_reserved(tensors)
    cache = query.dtype if op is SPARSE_FLASH_ATTENTION else torch.int8
    for name in ("key", "value", "query_rope", "key_rope"):
        if name in tensors and tensors[name].dtype != cache:
            why = " (the query's type)" if cache is query.dtype else ""
            raise refuse(name, f"{cache}{why}", tensors[name].dtype)
    if "sinks" in tensors:
        sinks, expected = tensors["sinks"], [query.shape[-2]]
        if sinks.dtype != torch.float32 or list(sinks.shape) != expected:
            got = f"{sinks.dtype} {list(sinks.shape)}"
            raise refuse("sinks", f"torch.float32 {expected} (one per query head)", got)
    check_ints(tensors)


def _widths(
    op: OpContract, tensors: Mapping[str, torch.Tensor], attributes: Mapping[str, Any]
) -> tuple[int, int, int]:
    """Widths of latent and rope, and the tile."""
    query, key = tensors["query"], tensors["key"]
    if op is not SPARSE_FLASH_ATTENTION:
        rope, tile = attributes["rope_head_dim"], attributes["tile_size"]
        row = PackedRow.of(key.shape[-1], query.shape[-1], rope, tile)
        if row.rope and row.itemsize != query.element_size():
            why = f"{query.element_size()}-byte items like the query's"
            raise refuse("rope of the packed rows", why, f"{row.itemsize}-byte items")
        return row.nope, row.rope, tile
    if key.shape[-1] != query.shape[-1]:
        raise refuse("key width", f"the query's {query.shape[-1]}", key.shape[-1])
    ropes = tensors.get("query_rope"), tensors.get("key_rope")
    if ropes[0] is None and ropes[1] is None:
        return query.shape[-1], 0, 0
    if ropes[0] is None or ropes[1] is None:
        raise refuse("query_rope and key_rope", "both or neither", "one")
    width = ropes[0].shape[-1]
    for name, part, rope_part in (("query", query, ropes[0]), ("key", key, ropes[1])):
        expected = [*part.shape[:-1], width]
        if list(rope_part.shape) != expected:
            raise refuse(f"{name}_rope", f"shape {expected}", list(rope_part.shape))
    return query.shape[-1], width, 0
