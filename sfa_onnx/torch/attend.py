"""The attention operators of torch, computed by the C++ core on torch's own memory.

A call's shapes, types and attributes are checked once and kept as a filled parameter block; a
further call of the same form only puts in the addresses. What a shape cannot show (lengths, tables,
indices) is checked by the core before it reads.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch

from sfa_onnx.operator.contract import PackedRow
from sfa_onnx.operator.op import SPARSE_FLASH_ATTENTION, OpContract
from sfa_onnx.runtime.core import LAYOUTS, ROUNDINGS, Error, Params, core, refuse_if
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

__all__ = ["attend", "softmax_shape"]

_KEPT: Final = 512  # forms of calls
_UNREAD: Final = ("value",)


@dataclass(frozen=True)
class _Form:
    """Everything of a call but its addresses."""

    block: bytes
    out_shape: tuple[int, ...]
    addresses: tuple[str, ...]


_forms: dict[Any, _Form] = {}


def attend(
    op: OpContract,
    tensors: Mapping[str, torch.Tensor],
    attributes: Mapping[str, Any],
    rounding: str,
) -> tuple[torch.Tensor, ...]:
    """One call of an attention operator, on as many threads as torch uses.

    Args:
        op: which of the two.
        tensors: the given inputs by name, on CPU and contiguous.
        attributes: all attributes of the contract; return_softmax_lse may be among them for packed
            rows too, whose node has no such attribute.
        rounding: "exact" or "npu" (of packed latents; float caches are what they are).

    Returns:
        attention_out, [B, S1, N1, C] or [T, N1, C] in the query's type; with return_softmax_lse
        also softmax_max and softmax_sum, float32 [B, 1, S1, N1] or [1, T, N1].

    Raises:
        ContractError: a shape, type, attribute or value breaks the contract.
        MissingError: the library was not built.
    """
    form = _form_of(op, tensors, attributes)
    query = tensors["query"]
    out = query.new_empty(form.out_shape)
    params = Params.from_buffer_copy(form.block)
    params.holes, params.rounding = holes(), ROUNDINGS[rounding]
    for name in form.addresses:
        setattr(params, name, tensors[name].data_ptr())
    params.out = out.data_ptr()
    results = [out]
    if attributes.get("return_softmax_lse"):
        top, total = (query.new_zeros(softmax_shape(query), dtype=torch.float32) for _ in "01")
        params.softmax_max, params.softmax_sum = top.data_ptr(), total.data_ptr()
        results += [top, total]
    if out.numel() == 0:
        return tuple(results)
    error = Error()
    status = core().sfa_core_run_threads(
        ctypes.byref(params), torch.get_num_threads(), ctypes.byref(error)
    )
    refuse_if(status, error)
    return tuple(results)


def softmax_shape(query: torch.Tensor) -> tuple[int, ...]:
    """CANN's [B, N2, S1, N1/N2] or [N2, T, N1/N2], of one key head."""
    return (*query.shape[:-3], 1, *query.shape[-3:-1])


def _form_of(
    op: OpContract, tensors: Mapping[str, torch.Tensor], attributes: Mapping[str, Any]
) -> _Form:
    key = (
        op.name,
        *((name, t.dtype, t.shape) for name, t in tensors.items()),
        *attributes.values(),
    )
    form = _forms.get(key)
    if form is None:
        form = _checked(op, tensors, attributes)
        if len(_forms) >= _KEPT:
            _forms.clear()
        _forms[key] = form
    return form


def _checked(
    op: OpContract, tensors: Mapping[str, torch.Tensor], attributes: Mapping[str, Any]
) -> _Form:
    check_attributes(op, attributes)
    _check_types(op, tensors)
    query, indices = tensors["query"], tensors["sparse_indices"]
    layouts = attributes["layout_query"], attributes["layout_kv"]
    common = sizes(tensors, *layouts, "actual_seq_lengths_kv")
    lead = [*query.shape[:-2], 1]
    if list(indices.shape[:-1]) != lead:
        raise refuse("sparse_indices", f"shape {[*lead, 'K']}", list(indices.shape))
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
        **common,
    )
    read = tuple(name for name in tensors if name not in _UNREAD)
    return _Form(bytes(params), (*query.shape[:-1], nope), read)


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
