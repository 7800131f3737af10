"""The packed int8 KV cache: quantise, pack, unpack, dequantise, page and un-page rows.

One packed row is `nope int8 | rope | float32 scale per tile` (`sfa_onnx.op.PackedRow`), native
little-endian. This module is the definition of `sfa_onnx::KvCachePack`: the C++ kernel produces the
same bits. The arithmetic of `quantise`, every step one IEEE float32 operation (round to nearest
even, no fused multiply-add, no fast-math), per tile of `tile_size` latent columns:

    1. x     = float32(nope)                    float16 and bfloat16 widen exactly
    2. amax  = max |x|                          NaN when any x is NaN
    3. limit = amax * alpha                     alpha = clip, 1.0 when absent
    4. limit is NaN or infinite:                q = 0 for the whole tile, scale = NaN (0x7fc00000)
    5. scale = limit * float32(1 / 127)         the constant is 0x3c010204
    6. r     = 1 / scale
    7. r is infinite (scale is 0 or so small that 1/scale overflows): q = 0, scale = 0
    8. x     = min(max(x, -limit), limit)
    9. q     = int8(round_half_to_even(x * r))  in [-127, 127] without a clamp

So an all-zero tile is exactly zero, a tile with NaN or Inf poisons itself and nothing else, and the
dequantised value is `float32(q) * scale`. Source: CANN's `npu_mla_prolog_v3` kernel (multiply by
the reciprocal, no epsilon); steps 4 and 7 define what the vendor's kernel leaves undefined.
"""

from __future__ import annotations

from typing import Any, Final, Literal

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from sfa_onnx.errors import ContractError
from sfa_onnx.operator.op import PackedRow

__all__ = [
    "dequantise",
    "pack",
    "page",
    "quantise",
    "quantise_keys",
    "unpack",
    "unpage",
    "write_slots",
]

Array = NDArray[Any]
Order = Literal["reciprocal", "division"]
_F32: Final = np.float32
_INV_127: Final = _F32(1) / _F32(127)
_FLOATS: Final = (np.dtype(_F32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))


def _refuse(what: str, expected: str, got: object) -> ContractError:
    return ContractError(f"{what}: expected {expected}, got {got}")


def _tiles(width: int, tile_size: int, what: str) -> int:
    if tile_size <= 0 or width <= 0 or width % tile_size:
        raise _refuse(
            f"{what} of width {width}", f"a positive multiple of tile_size {tile_size}", width
        )
    return width // tile_size


def quantise(
    nope: Array, tile_size: int = 128, clip: float | None = None, order: Order = "reciprocal"
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Quantise latents per tile, symmetrically, as the module's docstring spells out.

    Args:
        nope: [..., C] float32, float16 or bfloat16.
        tile_size: latent columns that share a scale; divides C.
        clip: alpha, finite and > 0: each tile is clipped to +-(amax * alpha) first.
        order: "reciprocal", the kernel's (steps 5, 6 and 9); "division" is what the vendor's CPU
            checks of that kernel do, limit / 127 and x / scale: another int8 where x / scale lies
            within a rounding of a half, which bfloat16 latents often do.

    Returns:
        int8 [..., C] and float32 scales [..., C / tile_size].

    Raises:
        ContractError: dtype, width or clip is not as above.
    """
    if nope.dtype not in _FLOATS:
        raise _refuse("nope", "float32, float16 or bfloat16", nope.dtype)
    if order not in ("reciprocal", "division"):
        raise _refuse("order", "reciprocal or division", order)
    alpha = _F32(1 if clip is None else clip)
    if not (np.isfinite(alpha) and alpha > 0):
        raise _refuse("clip", "a finite number > 0", clip)
    tiles = _tiles(nope.shape[-1], tile_size, "nope")
    x = nope.astype(_F32).reshape(*nope.shape[:-1], tiles, tile_size)
    with np.errstate(all="ignore"):
        limit = np.abs(x).max(-1, keepdims=True) * alpha
        scale = limit * _INV_127 if order == "reciprocal" else limit / _F32(127)
        reciprocal = _F32(1) / scale
        clipped = np.minimum(np.maximum(x, -limit), limit)
        y = np.rint(clipped * reciprocal if order == "reciprocal" else clipped / scale)
    finite = np.isfinite(limit)
    usable = finite & np.isfinite(reciprocal)
    q = np.where(usable, y, 0).astype(np.int8).reshape(nope.shape)
    scale = np.where(usable, scale, np.where(finite, _F32(0), _F32(np.nan)))
    return q, scale[..., 0].astype(_F32)


def quantise_keys(keys: Array) -> tuple[NDArray[np.int8], NDArray[np.float16]]:
    """Rows of index keys (or queries) for `NPUQuantLightningIndexer`: one scale each.

    Every step is one float32 operation: scale = float16(max|x| / 127), q = round half even of
    x / scale, clamped to +-127; where the scale is 0, of x itself, which is then 0. A row with NaN
    has scale NaN, one past float16's range an infinite one.

    Args:
        keys: [..., D] of any float type.

    Returns:
        int8 [..., D] and float16 [..., 1].
    """
    x = keys.astype(_F32)
    with np.errstate(all="ignore"):
        scale = (np.abs(x).max(-1, keepdims=True) / _F32(127)).astype(np.float16)
        wide = scale.astype(_F32)
        q = np.rint(x / np.where(wide > 0, wide, _F32(1)))
        q = np.nan_to_num(np.clip(q, -127, 127))
    return q.astype(np.int8), scale


def dequantise(q: Array, scale: Array, dtype: Any = _F32) -> Array:
    """`q * scale` per tile: [..., C] int8 and [..., tiles] float32 -> [..., C].

    The product is formed in float32 and rounded once to `dtype`; for float64 it is formed exactly.
    """
    tiles = scale.shape[-1]
    work = np.float64 if np.dtype(dtype) == np.float64 else _F32
    x = q.reshape(*q.shape[:-1], tiles, q.shape[-1] // tiles).astype(work)
    return np.asarray((x * scale[..., None].astype(work)).reshape(q.shape).astype(dtype))


def pack(
    nope: Array,
    rope: Array | None = None,
    scale: Array | None = None,
    clip: float | None = None,
    tile_size: int = 128,
) -> NDArray[np.int8]:
    """Rows of `sfa_onnx::KvCachePack`: nope | rope | scales, as bytes.

    Float nope is quantised (`quantise`); int8 nope and its scales are copied exactly.

    Args:
        nope: [..., C] float32, float16, bfloat16, or int8.
        rope: [..., R] float32, float16 or bfloat16, copied bit by bit; None when R is 0.
        scale: [..., C / tile_size] float32, given exactly when nope is int8.
        clip: see `quantise`; only with float nope.
        tile_size: latent columns that share a scale.

    Returns:
        int8 [..., D] with D = C + R * itemsize(rope) + 4 * C / tile_size.

    Raises:
        ContractError: a dtype or shape differs, or scale is missing or superfluous.
    """
    tiles = _tiles(nope.shape[-1], tile_size, "nope")
    if nope.dtype == np.int8:
        if scale is None or scale.dtype != _F32 or scale.shape != (*nope.shape[:-1], tiles):
            got = "nothing" if scale is None else f"{scale.dtype} {scale.shape}"
            raise _refuse("scale of int8 nope", f"float32 {(*nope.shape[:-1], tiles)}", got)
        q = nope
    elif scale is not None:
        raise _refuse("scale", "none, because nope is float and gets its own", scale.shape)
    else:
        q, scale = quantise(nope, tile_size, clip)
    parts = [q.astype(np.int8, copy=False)]
    if rope is not None and rope.shape[-1]:
        if rope.dtype not in _FLOATS or rope.shape[:-1] != nope.shape[:-1]:
            raise _refuse(
                "rope", f"a float tensor {(*nope.shape[:-1], 'R')}", f"{rope.dtype} {rope.shape}"
            )
        parts.append(_bytes(rope))
    parts.append(_bytes(scale))
    return np.concatenate(parts, axis=-1)


def _bytes(x: Array) -> NDArray[np.int8]:
    """The last axis as bytes; bit patterns (NaN payloads too) survive."""
    x = np.ascontiguousarray(x)
    if x.dtype == ml_dtypes.bfloat16:
        x = x.view(np.uint16)
    return x.astype(x.dtype.newbyteorder("<"), copy=False).view(np.int8)


def unpack(
    rows: Array, row: PackedRow, rope_dtype: Any = ml_dtypes.bfloat16
) -> tuple[NDArray[np.int8], Array, NDArray[np.float32]]:
    """Split packed rows: int8 [..., D] -> nope int8 [..., C], rope [..., R], scale [..., tiles].

    Raises:
        ContractError: rows are not int8 of `row.bytes`, or rope_dtype has another item size.
    """
    if rows.dtype != np.int8 or rows.shape[-1] != row.bytes:
        raise _refuse("packed rows", f"int8 [..., {row.bytes}]", f"{rows.dtype} {rows.shape}")
    dtype = np.dtype(rope_dtype)
    if row.rope and (dtype not in _FLOATS or dtype.itemsize != row.itemsize):
        raise _refuse("rope_dtype", f"a float type of {row.itemsize} bytes", dtype)
    nope, rope, scale = np.split(rows, [row.rope_offset, row.scale_offset], axis=-1)
    empty = np.zeros((*rows.shape[:-1], 0), dtype)
    rope = np.ascontiguousarray(rope).view(dtype) if row.rope else empty
    return nope, rope, np.ascontiguousarray(scale).view("<f4").astype(_F32, copy=False)


def page(
    rows: Array,
    block_size: int,
    lengths: Array | None = None,
    block_table: Array | None = None,
) -> tuple[Array, NDArray[np.int32]]:
    """Cut a contiguous cache [B, S, 1, D] into pages [block_num, block_size, 1, D].

    Works for any row type. Unused room is zero.

    Args:
        rows: [B, S, 1, D].
        block_size: rows per page.
        lengths: [B] rows in use (default S): only pages they need are filled.
        block_table: [B, M] int32: where each page goes; default: in order, no page shared.

    Returns:
        The pages and the block table; table entries that no row needs are -1.

    Raises:
        ContractError: the table is too short, or names one page twice or a negative page.
    """
    batch, length = rows.shape[:2]
    used = np.full(batch, length) if lengths is None else np.asarray(lengths, np.int64)
    if (used < 0).any() or (used > length).any():
        raise _refuse("lengths", f"values in [0, {length}]", used.tolist())
    needed = -(-used // block_size)
    if block_table is None:
        columns = np.arange(max(-(-length // block_size), 1))
        starts = np.cumsum(needed) - needed
        table = np.where(columns < needed[:, None], starts[:, None] + columns, -1)
    else:
        table = np.array(block_table, np.int64)
    if table.shape[0] != batch or table.shape[1] < needed.max(initial=0):
        raise _refuse("block_table", f"[{batch}, >= {needed.max(initial=0)}]", table.shape)
    mask = np.arange(table.shape[1]) < needed[:, None]
    blocks = table[mask]
    if (blocks < 0).any() or len(np.unique(blocks)) != len(blocks):
        raise _refuse("block_table", "distinct pages >= 0 for rows in use", blocks.tolist())
    count = max(int(table.max(initial=0)) + 1, 1)
    pages = np.zeros((count, block_size, *rows.shape[2:]), rows.dtype)
    for b in range(batch):
        tokens = np.arange(used[b])
        pages[table[b, tokens // block_size], tokens % block_size] = rows[b, : used[b]]
    return pages, table.astype(np.int32)


def unpage(pages: Array, block_table: Array, lengths: Array, length: int | None = None) -> Array:
    """Collect pages [block_num, block_size, 1, D] into [B, S, 1, D]; unused rows are zero.

    Args:
        pages: the paged cache.
        block_table: [B, M] int32.
        lengths: [B] rows in use.
        length: S (default: the longest sequence).

    Raises:
        ContractError: a row in use lies outside the table or the cache.
    """
    used = np.asarray(lengths, np.int64)
    size = pages.shape[1]
    top = int(used.max(initial=0))
    if (used < 0).any() or top > block_table.shape[1] * size:
        raise _refuse("lengths", f"values in [0, {block_table.shape[1] * size}]", used.tolist())
    rows = np.zeros((len(used), top if length is None else length, *pages.shape[2:]), pages.dtype)
    for b, n in enumerate(used):
        tokens = np.arange(n)
        blocks = np.asarray(block_table)[b, tokens // size]
        if ((blocks < 0) | (blocks >= len(pages))).any():
            raise _refuse(f"block_table[{b}]", f"pages in [0, {len(pages)})", blocks.tolist())
        rows[b, :n] = pages[blocks, tokens % size]
    return rows


def write_slots(pages: Array, rows: Array, slot_mapping: Array) -> Array:
    """A copy of `pages` [block_num, block_size, 1, D] with `rows` [n, ..., D] at flat slots [n].

    The definition of `sfa_onnx::KvCacheWrite`. Slot = block * block_size + offset; a negative slot
    drops its row (padding), and of rows for one slot the last stays.

    Raises:
        ContractError: a slot lies past the cache.
    """
    slots = np.asarray(slot_mapping).ravel()
    room = pages.shape[0] * pages.shape[1]
    if (slots >= room).any():
        raise _refuse("slot_mapping", f"slots < {room}", int(slots.max()))
    out = pages.copy().reshape(room, -1)
    keep = slots >= 0
    out[slots[keep]] = rows.reshape(len(slots), out.shape[1])[keep]
    return out.reshape(pages.shape)
