"""The quantised indexer over 8-bit floats, float8_e4m3fn and hifloat8, as Ascend 950 has it.

Its kernel differs from the int8 one: products and weights keep float32, and the scores are rounded
to bfloat16 before they are sorted, ties by the lower index. (CANN's quant_lightning_indexer, its
kernel and pytest for that chip.) Computed by torch in whole sequences: for checking, not for speed.
No ONNX node holds such keys.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch

from sfa_onnx.operator.contract import OpContract
from sfa_onnx.torch.checks import check_attributes, check_ints, refuse, sizes
from sfa_onnx.torch.float8 import HIFLOAT8, float8_table
from sfa_onnx.torch.index_golden import best_by_sums

__all__ = ["select_float8"]

_SIDES: Final = ("query", "key")
# Types of weights, query_dequant_scale and key_dequant_scale that the chip has together.
_WIDE: Final = (torch.bfloat16, torch.float32, torch.float32)
_HALF: Final = (torch.float16,) * 3
_FACTORS: Final = ("weights", "query_dequant_scale", "key_dequant_scale")


def select_float8(
    op: OpContract,
    tensors: Mapping[str, torch.Tensor],
    attributes: Mapping[str, Any],
    types: Sequence[int | None],
    rounding: str,
) -> torch.Tensor:
    """sparse_indices int32 [B, S1, 1, K] or [T, 1, K], tail -1.

    Args:
        op: the quantised indexer.
        tensors: its inputs, on CPU and contiguous; query and key in 8-bit items.
        attributes: its attributes.
        types: query_dtype and key_dtype as the caller gave them.
        rounding: "exact" computes in float64 and rounds nothing.

    Raises:
        ContractError: types that do not go together, or shapes, lengths and tables that do not fit.
    """
    check_attributes(op, attributes)
    given, hifloat8 = dict(tensors), HIFLOAT8 in types
    for name, number in zip(_SIDES, types, strict=True):
        given[name] = _decoded(name, tensors[name], number, hifloat8)
    if given["key"].shape[-1] != given["query"].shape[-1]:
        raise refuse("key width", f"the query's {given['query'].shape[-1]}", given["key"].shape[-1])
    _check_factors(tensors, hifloat8)
    check_ints(tensors)
    layouts = attributes["layout_query"], attributes["layout_key"]
    sizes(given, *layouts, "actual_seq_lengths_key")
    exact = rounding == "exact"
    kind = torch.float64 if exact else torch.float32
    weights, scale_q, scale_k = (tensors[n].to(kind) for n in _FACTORS)
    given["weights"] = weights * scale_q
    sorted_as = None if exact else torch.bfloat16
    return best_by_sums(given, attributes, kind, scale_k, sorted_as)[0]


def _decoded(name: str, tensor: torch.Tensor, number: int | None, hifloat8: bool) -> torch.Tensor:
    """Float32 of the same shape."""
    if number not in (None, HIFLOAT8) or (number == HIFLOAT8) != hifloat8:
        expected = f"{HIFLOAT8} (hifloat8) like the other" if hifloat8 else f"None or {HIFLOAT8}"
        raise refuse(f"{name}_dtype", expected, number)
    kinds = (torch.uint8, torch.int8) if hifloat8 else (torch.float8_e4m3fn,)
    if tensor.dtype not in kinds:
        why = f" ({name}_dtype hifloat8)" if hifloat8 else " like the other"
        raise refuse(name, f"{kinds[0]}{why}", tensor.dtype)
    return float8_table(hifloat8)[tensor.view(torch.uint8).long()]


def _check_factors(tensors: Mapping[str, torch.Tensor], hifloat8: bool) -> None:
    wide = hifloat8 or tensors["weights"].dtype == torch.bfloat16
    kinds, query, key = _WIDE if wide else _HALF, tensors["query"], tensors["key"]
    shapes = (query.shape[:-1], query.shape[:-1], key.shape[:-1])
    for name, kind, shape in zip(_FACTORS, kinds, shapes, strict=True):
        tensor = tensors[name]
        if tensor.dtype != kind:
            why = " (weights bfloat16)" if wide else " (or weights bfloat16 and float32 scales)"
            raise refuse(name, f"{kind}{why}" if not hifloat8 else str(kind), tensor.dtype)
        if tensor.shape != shape:
            raise refuse(name, f"shape {list(shape)}", list(tensor.shape))
