"""Packed rows with 8-bit float latents: float8_e4m3fn and hifloat8, the types of Ascend 950.

The bytes of a row lie as with int8: nope | rope | float32 scale per tile. Such a call becomes the
float attention over latents decoded, scaled and rounded to the query's type, which is what the
kernel multiplies; the whole cache is decoded for it, so this is for checking, not for speed. No
ONNX node holds such rows.

A hifloat8 byte is a sign, a prefix that says how long the exponent is, the exponent as sign and
magnitude with its leading one left out, and the rest of the mantissa:

    11 s eee m   2^+-(8..15)        10 s ee mm   2^+-(4..7)       01 s e mmm   2^+-(2..3)
    001 s mmm    2^+-1              0001 mmm     2^0              0000 mmm     2^(mmm - 23)

0x00 is zero, 0x80 not a number, 0x6F and 0xEF the infinities. (ops-transformer, pytest of
kv_quant_sparse_flash_attention.)
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch

from sfa_onnx.errors import ContractError
from sfa_onnx.operator.contract import OpContract, PackedRow
from sfa_onnx.operator.op import SPARSE_FLASH_ATTENTION
from sfa_onnx.torch.checks import FLOATS, check_attributes, check_reserved, refuse

__all__ = [
    "FLOAT8_E4M3FN",
    "HIFLOAT8",
    "as_float_attention",
    "float8_table",
    "hifloat8_values",
    "is_float8",
]

HIFLOAT8: Final = 290  # torch_npu's numbers of types that torch lacks
FLOAT8_E4M3FN: Final = 292
_BYTES: Final = (torch.uint8, torch.int8)


def is_float8(tensors: Mapping[str, torch.Tensor], *dtypes: int | None) -> bool:
    """Whether a call's cache, or an indexer's query, holds 8-bit floats."""
    kinds = {tensors[n].dtype for n in ("query", "key") if n in tensors}
    return dtypes.count(None) < len(dtypes) or torch.float8_e4m3fn in kinds


def as_float_attention(
    op: OpContract,
    tensors: Mapping[str, torch.Tensor],
    attributes: Mapping[str, Any],
    types: Sequence[int | None],
    rounding: str,
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The call as one of `NPUSparseFlashAttention`.

    Args:
        op: the packed attention.
        tensors: its inputs, on CPU and contiguous; key [.., 1, D] in 8-bit items.
        attributes: its attributes.
        types: key_dtype and value_dtype as the caller gave them.
        rounding: "exact" keeps latents in float32 (and with them the query).

    Raises:
        ContractError: types that do not go together, or rows that do not fit.
    """
    check_attributes(op, attributes)
    check_reserved(tensors)
    query, key = tensors["query"], tensors["key"]
    if query.dtype not in FLOATS:
        raise refuse("query", "float32, float16 or bfloat16", query.dtype)
    table = _table(key, *types)
    if "value" in tensors and tensors["value"].dtype != key.dtype:
        raise refuse("value", f"the key's {key.dtype}", tensors["value"].dtype)
    rope, tile = attributes["rope_head_dim"], attributes["tile_size"]
    row = PackedRow.of(key.shape[-1], query.shape[-1], rope, tile)
    if row.rope and row.itemsize != query.element_size():
        why = f"{query.element_size()}-byte items like the query's"
        raise refuse("rope of the packed rows", why, f"{row.itemsize}-byte items")
    raw = key.view(torch.uint8)
    nope, key_rope, scale = raw.split((row.nope, row.rope * row.itemsize, 4 * row.tiles), -1)
    scale = scale.contiguous().view(torch.float32).repeat_interleave(tile, -1)
    wide = torch.float32 if rounding == "exact" else query.dtype
    latent = (table[nope.long()] * scale).to(wide)
    given = {n: t for n, t in tensors.items() if n not in ("query", "key", "value")}
    given |= {"query": query[..., : row.nope].to(wide).contiguous(), "key": latent, "value": latent}
    if row.rope:
        given["query_rope"] = query[..., row.nope :].to(wide).contiguous()
        given["key_rope"] = key_rope.contiguous().view(query.dtype).to(wide)
    names = {a.name for a in SPARSE_FLASH_ATTENTION.attributes}
    return given, SPARSE_FLASH_ATTENTION.complete(
        {n: v for n, v in attributes.items() if n in names}
    )


def _table(key: torch.Tensor, key_dtype: int | None, value_dtype: int | None) -> torch.Tensor:
    """Float32 [256]: what each byte stands for."""
    if value_dtype not in (None, key_dtype):
        raise refuse("value_dtype", f"{key_dtype} like key_dtype", value_dtype)
    if key_dtype == HIFLOAT8:
        if key.dtype not in _BYTES:
            raise refuse("key", "torch.uint8 (key_dtype hifloat8)", key.dtype)
        return float8_table(hifloat8=True)
    if key_dtype not in (None, FLOAT8_E4M3FN):
        raise ContractError(
            f"key_dtype: expected None, {HIFLOAT8} (hifloat8) or {FLOAT8_E4M3FN} (float8_e4m3fn),"
            f" got {key_dtype!r}"
        )
    if key.dtype not in (torch.float8_e4m3fn, *_BYTES):
        raise refuse("key", "torch.float8_e4m3fn", key.dtype)
    return float8_table(hifloat8=False)


def float8_table(hifloat8: bool) -> torch.Tensor:
    """Float32 [256]: the number that each byte of hifloat8 or float8_e4m3fn stands for."""
    if hifloat8:
        return hifloat8_values()
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()


@functools.cache
def hifloat8_values() -> torch.Tensor:
    """Float32 [256]: the number that each byte of hifloat8 stands for."""
    return torch.tensor([_hifloat8(byte) for byte in range(256)])


def _hifloat8(byte: int) -> float:
    sign, rest = -1.0 if byte & 0x80 else 1.0, byte & 0x7F
    if not rest:
        return float("nan") if byte else 0.0
    if rest == 0x6F:
        return sign * float("inf")
    if rest < 8:
        return float(sign * 2.0 ** (rest - 23))
    if rest < 16:
        return sign * (1 + (rest & 7) / 8)
    # Width of the exponent without its leading one, and of the mantissa.
    width, mantissa = next(
        sizes for least, *sizes in ((96, 3, 1), (64, 2, 2), (32, 1, 3), (16, 0, 3)) if rest >= least
    )
    fraction = 1 + (rest & (1 << mantissa) - 1) / (1 << mantissa)
    exponent = (1 << width) + ((rest >> mantissa) & (1 << width) - 1)
    negative = (rest >> (mantissa + width)) & 1
    return float(sign * fraction * 2.0 ** (-exponent if negative else exponent))
