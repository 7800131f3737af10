"""The packed int8 cache in torch: what `sfa_onnx.kv_cache` does in NumPy, bit for bit.

CPU tensors of any strides; results share no memory with inputs. FlashMLA's rows have the same size
as ours (656 bytes) and another order and type: float8_e4m3fn latents, scales, then rope.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch

from sfa_onnx.errors import ContractError
from sfa_onnx.operator import kv_cache
from sfa_onnx.operator.contract import PackedRow
from sfa_onnx.torch.tensors import as_numpy, as_torch

__all__ = [
    "Converted",
    "dequantise",
    "from_flashmla",
    "pack",
    "page",
    "quantise",
    "to_flashmla",
    "unpack",
    "unpage",
    "write_slots",
]

_NOPE, _ROPE, _TILE = 512, 64, 128
_ROW: Final = PackedRow(_NOPE, _ROPE, _TILE, 2)
_FLOAT8_MAX: Final = 448.0
_TYPES: Final[dict[torch.dtype, np.dtype[Any]]] = {
    torch.float32: np.dtype(np.float32),
    torch.float16: np.dtype(np.float16),
    torch.bfloat16: as_numpy(torch.zeros(1, dtype=torch.bfloat16)).dtype,
    torch.float64: np.dtype(np.float64),
}


def _plain(tensor: torch.Tensor | None) -> Any:
    return None if tensor is None else as_numpy(tensor)


def quantise(
    nope: torch.Tensor,
    tile_size: int = 128,
    clip: float | None = None,
    order: kv_cache.Order = "reciprocal",
) -> tuple[torch.Tensor, torch.Tensor]:
    """`sfa_onnx.kv_cache.quantise`: latents [..., C] -> int8 [..., C], scales [..., C / tile]."""
    q, scale = kv_cache.quantise(as_numpy(nope), tile_size, clip, order)
    return as_torch(q), as_torch(scale)


def dequantise(
    q: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """`sfa_onnx.kv_cache.dequantise`: int8 [..., C] and scales [..., tiles] -> [..., C]."""
    return as_torch(kv_cache.dequantise(as_numpy(q), as_numpy(scale), _TYPES[dtype]))


def pack(
    nope: torch.Tensor,
    rope: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    clip: float | None = None,
    tile_size: int = 128,
) -> torch.Tensor:
    """`sfa_onnx.kv_cache.pack`: latents and ropes -> packed rows int8 [..., D]."""
    rows = kv_cache.pack(as_numpy(nope), _plain(rope), _plain(scale), clip, tile_size)
    return as_torch(rows)


def unpack(
    rows: torch.Tensor,
    nope: int = _NOPE,
    rope: int = _ROPE,
    tile_size: int = _TILE,
    rope_dtype: torch.dtype = torch.bfloat16,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`sfa_onnx.kv_cache.unpack`: rows [..., D] -> int8 latents, ropes, scales."""
    kind = _TYPES[rope_dtype]
    row = PackedRow(nope, rope, tile_size, kind.itemsize)
    parts = kv_cache.unpack(as_numpy(rows), row, kind)
    return as_torch(parts[0]), as_torch(parts[1]), as_torch(parts[2])


def page(
    rows: torch.Tensor,
    block_size: int,
    lengths: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`sfa_onnx.kv_cache.page`: [B, S, 1, D] -> pages and block table."""
    pages, table = kv_cache.page(as_numpy(rows), block_size, _plain(lengths), _plain(block_table))
    return as_torch(pages), as_torch(table)


def unpage(
    pages: torch.Tensor, block_table: torch.Tensor, lengths: torch.Tensor, length: int | None = None
) -> torch.Tensor:
    """`sfa_onnx.kv_cache.unpage`: pages -> [B, S, 1, D]."""
    return as_torch(
        kv_cache.unpage(as_numpy(pages), as_numpy(block_table), as_numpy(lengths), length)
    )


def write_slots(
    pages: torch.Tensor, rows: torch.Tensor, slot_mapping: torch.Tensor
) -> torch.Tensor:
    """`sfa_onnx.kv_cache.write_slots`: a copy of the pages with rows at flat slots."""
    return as_torch(kv_cache.write_slots(*map(as_numpy, (pages, rows, slot_mapping))))


@dataclass(frozen=True)
class Converted:
    """Rows of the other format, and what they lost.

    `worst` is the largest distance of a dequantised latent, as a share of its tile's largest;
    `mean` is the norm of all distances as a share of the norm of all latents.
    """

    rows: torch.Tensor
    worst: float
    mean: float


def from_flashmla(rows: torch.Tensor) -> Converted:
    """FlashMLA's rows to ours: float8 latents are dequantised and quantised to int8.

    Args:
        rows: [..., 656] of one byte per item: 512 float8_e4m3fn, 4 float32 scales, 64 bfloat16.

    Raises:
        ContractError: the rows are not that wide, or items are not bytes.
    """
    raw = _bytes(rows)
    latent = raw[..., :_NOPE].contiguous().view(torch.float8_e4m3fn).float()
    scale = raw[..., _NOPE : _NOPE + 16].contiguous().view(torch.float32)
    rope = raw[..., _NOPE + 16 :].contiguous().view(torch.bfloat16)
    values = (latent.unflatten(-1, (-1, _TILE)) * scale[..., None]).flatten(-2)
    q, new_scale = quantise(values, _TILE)
    return _stated(pack(q, rope, new_scale), values, dequantise(q, new_scale))


def to_flashmla(rows: torch.Tensor) -> Converted:
    """Our rows [..., 656] to FlashMLA's: latents become float8_e4m3fn, scale amax / 448.

    Raises:
        ContractError: the rows are not that wide, or items are not bytes.
    """
    q, rope, scale = unpack(_bytes(rows))
    values = dequantise(q, scale)
    tiles = values.unflatten(-1, (-1, _TILE))
    new_scale = tiles.abs().amax(-1) / _FLOAT8_MAX
    divisor = torch.where(new_scale > 0, new_scale, 1.0)[..., None]
    latent = (tiles / divisor).to(torch.float8_e4m3fn)
    back = (latent.float() * new_scale[..., None]).flatten(-2)
    parts = (latent.flatten(-2).view(torch.int8), new_scale.view(torch.int8), rope.view(torch.int8))
    return _stated(torch.cat(parts, -1), values, back)


def _bytes(rows: torch.Tensor) -> torch.Tensor:
    if rows.shape[-1] != _ROW.bytes or rows.element_size() != 1:
        raise ContractError(
            f"rows: expected [..., {_ROW.bytes}] of one-byte items, got {list(rows.shape)}"
            f" {rows.dtype}"
        )
    return rows.contiguous().view(torch.int8)


def _stated(rows: torch.Tensor, before: torch.Tensor, after: torch.Tensor) -> Converted:
    tiles, distance = (x.unflatten(-1, (-1, _TILE)) for x in (before, (after - before).abs()))
    peaks = tiles.abs().amax(-1).clamp_min(torch.finfo(torch.float32).tiny)
    worst = (distance.amax(-1) / peaks).max().item() if rows.numel() else 0.0
    norm = before.norm().item()
    return Converted(rows, worst, distance.norm().item() / norm if norm else 0.0)
