"""The attention operators of torch, computed by the C++ core on torch's own memory.

A call's shapes, types and attributes are checked once and kept as a filled parameter block; a
further call of the same form only puts in the addresses. What a shape cannot tell (lengths, tables,
indices) is checked by the core before it reads.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch

from sfa_onnx.errors import ContractError
from sfa_onnx.operator.contract import PackedRow
from sfa_onnx.operator.op import SPARSE_FLASH_ATTENTION, OpContract
from sfa_onnx.runtime.core import DTYPES, HOLES, LAYOUTS, ROUNDINGS, Error, Params, core, refuse_if

__all__ = ["attend", "softmax_shape"]

_KEPT: Final = 512  # forms of calls
_FLOATS: Final = (torch.float32, torch.float16, torch.bfloat16)
_RANKS: Final = {"BSND": 4, "TND": 3, "PA_BSND": 4}
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
        attributes: all attributes of the contract.
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
    params.holes, params.rounding = _holes(), ROUNDINGS[rounding]
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


def _holes() -> int:
    value = os.environ.get("SFA_ONNX_HOLES", "error") or "error"
    if value not in HOLES:
        raise _refuse("environment variable SFA_ONNX_HOLES", "error, skip or stop", value)
    return HOLES[value]


def _refuse(what: str, expected: str, got: object) -> ContractError:
    return ContractError(f"{what}: expected {expected}, got {got}")


def _checked(
    op: OpContract, tensors: Mapping[str, torch.Tensor], attributes: Mapping[str, Any]
) -> _Form:
    op.check_attributes(attributes)
    _check_types(op, tensors)
    query, key, indices = (tensors[n] for n in ("query", "key", "sparse_indices"))
    layout_query, layout_kv = attributes["layout_query"], attributes["layout_kv"]
    _check_ranks(query, key, layout_query, layout_kv)
    paged, lead = layout_kv == "PA_BSND", tuple(query.shape[:-2])
    if tuple(indices.shape[:-1]) != (*lead, 1):
        raise _refuse("sparse_indices", f"shape {[*lead, 1, 'K']}", list(indices.shape))
    nope, rope, tile = _widths(op, tensors, attributes)
    batch = _check_lengths(tensors, layout_query, layout_kv)
    table = tensors.get("block_table")
    params = Params(
        struct_size=ctypes.sizeof(Params),
        query_dtype=_number(query),
        cache_dtype=_number(key),
        layout_query=LAYOUTS[layout_query],
        layout_kv=LAYOUTS[layout_kv],
        sparse_mode=attributes["sparse_mode"],
        scale_value=attributes["scale_value"],
        num_heads=query.shape[-2],
        nope_dim=nope,
        rope_dim=rope,
        tile_size=tile,
        sparse_block_size=attributes["sparse_block_size"],
        sparse_count=indices.shape[-1],
        batch=batch,
        query_s=lead[1] if layout_query == "BSND" else 0,
        query_t=query.shape[:-2].numel(),
        kv_s=0 if paged else key.shape[-3],
        block_num=key.shape[0] if paged else 0,
        block_size=key.shape[1] if paged else 0,
        block_table_cols=0 if table is None else table.shape[1],
    )
    read = tuple(name for name in tensors if name not in _UNREAD)
    return _Form(bytes(params), (*query.shape[:-1], nope), read)


def _number(tensor: torch.Tensor) -> int:
    return DTYPES[str(tensor.dtype).removeprefix("torch.")]


def _check_types(op: OpContract, tensors: Mapping[str, torch.Tensor]) -> None:
    query = tensors["query"]
    if query.dtype not in _FLOATS:
        raise _refuse("query", "float32, float16 or bfloat16", query.dtype)
    for name in ("key_dequant_scale", "value_dequant_scale"):
        if name in tensors:
            why = "nothing (reserved: the scales are inside the rows)"
            raise _refuse(name, why, f"a tensor {list(tensors[name].shape)}")
    cache = query.dtype if op is SPARSE_FLASH_ATTENTION else torch.int8
    for name in ("key", "value", "query_rope", "key_rope"):
        if name in tensors and tensors[name].dtype != cache:
            why = " (the query's type)" if cache is query.dtype else ""
            raise _refuse(name, f"{cache}{why}", tensors[name].dtype)
    if "sinks" in tensors:
        sinks, expected = tensors["sinks"], [query.shape[-2]]
        if sinks.dtype != torch.float32 or list(sinks.shape) != expected:
            got = f"{sinks.dtype} {list(sinks.shape)}"
            raise _refuse("sinks", f"torch.float32 {expected} (one per query head)", got)
    for name, tensor in tensors.items():
        ints = name in ("sparse_indices", "block_table") or name.startswith("actual_seq")
        if ints and tensor.dtype != torch.int32:
            raise _refuse(name, "torch.int32", f"{tensor.dtype}; call {name}.int()")


def _check_ranks(query: torch.Tensor, key: torch.Tensor, layout_query: str, layout_kv: str) -> None:
    if layout_kv not in ("PA_BSND", layout_query):
        raise _refuse("layout_kv", f"PA_BSND or the query's layout {layout_query}", layout_kv)
    if query.dim() != _RANKS[layout_query]:
        what = f"query (layout_query {layout_query})"
        raise _refuse(what, f"{_RANKS[layout_query]} dimensions", list(query.shape))
    if key.dim() != _RANKS[layout_kv] or key.shape[-2] != 1:
        what = f"key (layout_kv {layout_kv})"
        raise _refuse(what, f"{_RANKS[layout_kv]} dimensions, one head", list(key.shape))
    if layout_kv == "BSND" and key.shape[0] != query.shape[0]:
        raise _refuse("key batch", f"the query's {query.shape[0]}", key.shape[0])
    if query.shape[-2] < 1 and query.numel():
        raise _refuse("query", "at least one head", list(query.shape))


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
            raise _refuse("rope of the packed rows", why, f"{row.itemsize}-byte items")
        return row.nope, row.rope, tile
    if key.shape[-1] != query.shape[-1]:
        raise _refuse("key width", f"the query's {query.shape[-1]}", key.shape[-1])
    ropes = tensors.get("query_rope"), tensors.get("key_rope")
    if ropes[0] is None and ropes[1] is None:
        return query.shape[-1], 0, 0
    if ropes[0] is None or ropes[1] is None:
        raise _refuse("query_rope and key_rope", "both or neither", "one")
    width = ropes[0].shape[-1]
    for name, part, rope_part in (("query", query, ropes[0]), ("key", key, ropes[1])):
        expected = [*part.shape[:-1], width]
        if list(rope_part.shape) != expected:
            raise _refuse(f"{name}_rope", f"shape {expected}", list(rope_part.shape))
    return query.shape[-1], width, 0


def _check_lengths(tensors: Mapping[str, torch.Tensor], layout_query: str, layout_kv: str) -> int:
    """B; lengths and table present where the layouts need them, and of its size."""
    lengths_q = tensors.get("actual_seq_lengths_query")
    lengths_kv, table = tensors.get("actual_seq_lengths_kv"), tensors.get("block_table")
    if layout_query == "TND" and (lengths_q is None or not lengths_q.numel()):
        raise _refuse("actual_seq_lengths_query", "prefix sums [B] (layout_query TND)", "nothing")
    if layout_kv != "BSND" and lengths_kv is None:
        raise _refuse("actual_seq_lengths_kv", f"[B] (layout_kv {layout_kv})", "nothing")
    batch = tensors["query"].shape[0]
    if layout_query == "TND" and lengths_q is not None:
        batch = lengths_q.numel()
    for name, lengths in (
        ("actual_seq_lengths_query", lengths_q),
        ("actual_seq_lengths_kv", lengths_kv),
    ):
        if lengths is not None and list(lengths.shape) != [batch]:
            raise _refuse(name, f"shape [{batch}]", list(lengths.shape))
    if layout_kv != "PA_BSND" and table is not None:
        raise _refuse("block_table", f"nothing with layout_kv {layout_kv}", list(table.shape))
    if layout_kv == "PA_BSND":
        got = "nothing" if table is None else list(table.shape)
        if table is None or table.dim() != 2 or table.shape[0] != batch or not table.shape[1]:
            raise _refuse("block_table", f"shape [{batch}, M >= 1] (layout_kv PA_BSND)", got)
    return int(batch)
