"""The changed interface of a converted model, and feeds and results carried across it.

A converted model says in its metadata which float caches became which packed ones, so that
`compare` can hand the same data to both models.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx

from sfa_onnx.errors import ModelError, UsageError
from sfa_onnx.files.json_form import parsed
from sfa_onnx.operator import kv_cache
from sfa_onnx.operator.contract import PackedRow

__all__ = [
    "BLOCK_TABLE",
    "LENGTHS_KV",
    "METADATA_KEY",
    "PAGED_FORMS",
    "SLOT_MAPPING",
    "CacheEntry",
    "Interface",
    "adapt_feeds",
    "float_outputs",
    "read_interface",
    "write_interface",
]

METADATA_KEY = "sfa_onnx.kv_cache"
PAGED_FORMS = ("paged-int8", "paged")
BLOCK_TABLE, LENGTHS_KV, SLOT_MAPPING = "block_table", "actual_seq_lengths_kv", "slot_mapping"
Array = np.ndarray[Any, np.dtype[Any]]
_ROPE_TYPES: dict[int, np.dtype[Any]] = {
    onnx.TensorProto.FLOAT: np.dtype(np.float32),
    onnx.TensorProto.FLOAT16: np.dtype(np.float16),
    onnx.TensorProto.BFLOAT16: np.dtype(ml_dtypes.bfloat16),
}


@dataclass(frozen=True)
class CacheEntry:
    """One layer's cache. Names are graph inputs/outputs, "" where there is none.

    `*_axes` label the float tensors' dims with B, S, C and 1; packed tensors are [B, S, 1, D] or
    pages [block_num, block_size, 1, D]. A joint cache holds latent and rope side by side in one
    tensor: then `rope_*` names equal the latent's.
    """

    latent_in: str
    rope_in: str
    packed_in: str
    latent_out: str
    rope_out: str
    packed_out: str
    latent_axes: tuple[str, ...]
    rope_axes: tuple[str, ...]
    nope: int
    rope: int
    tile: int
    elem_type: int  # of rope and query: onnx.TensorProto.DataType
    in_place: bool = False  # rows are written into a buffer of fixed length, not appended
    position: str = ""  # the input that says where they are written, when it is one
    ragged: bool = False  # it may say so for every sequence
    kind: str = "packed"  # or "float": rows as they are; "int8": index keys with scales apart
    scales_in: str = ""  # float16, one per row of `packed_in`, where they lie apart
    scales_out: str = ""

    @property
    def row(self) -> PackedRow:
        """The packed row of this cache."""
        return PackedRow(self.nope, self.rope, self.tile, _ROPE_TYPES[self.elem_type].itemsize)

    @property
    def bytes_before(self) -> int:
        """Bytes of one token in the float cache."""
        return (self.nope + self.rope) * _ROPE_TYPES[self.elem_type].itemsize

    @property
    def bytes_after(self) -> int:
        """Bytes of one token in the converted cache."""
        if self.kind == "packed":
            return self.row.bytes
        return self.nope + 2 if self.kind == "int8" else self.bytes_before

    @property
    def joint(self) -> bool:
        """Whether latent and rope share one tensor."""
        return bool(self.rope) and self.latent_in == self.rope_in and bool(self.latent_in)


@dataclass(frozen=True)
class Interface:
    """All converted caches of one model, and the form they have now."""

    form: str
    block_size: int
    caches: tuple[CacheEntry, ...]
    tokens: str = ""  # new rows per sequence of one run: a number, or the symbol of that dim

    @property
    def paged(self) -> bool:
        """Whether the caches are pages."""
        return self.form in PAGED_FORMS


def write_interface(model: onnx.ModelProto, interface: Interface) -> None:
    """Store `interface` in the model's metadata."""
    for entry in [e for e in model.metadata_props if e.key == METADATA_KEY]:
        model.metadata_props.remove(entry)
    model.metadata_props.add(
        key=METADATA_KEY, value=json.dumps(dataclasses.asdict(interface), sort_keys=True)
    )


def read_interface(model: onnx.ModelProto) -> Interface | None:
    """The interface of a converted model; None for any other model.

    Raises:
        ModelError: the metadata entry is there but not readable.
    """
    text = next((e.value for e in model.metadata_props if e.key == METADATA_KEY), None)
    if text is None:
        return None
    try:
        raw = parsed(text)
        caches = tuple(_entry(cache) for cache in raw["caches"])
        tokens = str(raw.get("tokens", ""))
        return Interface(raw["form"], int(raw["block_size"]), caches, tokens)
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"model metadata {METADATA_KEY!r} is not readable ({error}); convert the model again"
        ) from error


def _entry(raw: dict[str, Any]) -> CacheEntry:
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in raw.items()}
    return CacheEntry(**fields)


def adapt_feeds(
    interface: Interface,
    feeds: dict[str, Array],
    *,
    new_tokens: int = 0,
    start: int | Array | None = None,
) -> dict[str, Array]:
    """Feeds of the float model -> feeds of the converted one.

    Args:
        interface: of the converted model.
        feeds: arrays of the original model, float caches included.
        new_tokens: rows that one run appends per sequence (paged form only).
        start: where they go: the rows in use before the run, one number or one per sequence [B]
            (paged form only). Default: behind the cache, or where the model's own position input
            says for a cache that is written in place.

    Raises:
        UsageError: a cache is written in place and nothing says where, or two are at places of
            their own.
    """
    adapted = dict(feeds)
    if interface.paged:
        _check_one_place(interface, feeds)
    where: Array | None = None  # [B, new rows]
    for cache in interface.caches:
        parts = _converted_rows(cache, feeds)  # [B, S, 1, D] each
        adapted.pop(cache.latent_in, None)
        adapted.pop(cache.rope_in, None)
        if not parts or not cache.packed_in:
            continue
        if not interface.paged:
            adapted |= parts
            continue
        rows = parts[cache.packed_in]
        where = _places(cache, feeds, rows, new_tokens, start)
        used = _used(cache, rows, where, start)
        room = max(rows.shape[1], int(used.max(initial=0)))
        for name, part in parts.items():
            adapted[name], table = kv_cache.page(_roomy(part, room), interface.block_size)
        adapted |= {BLOCK_TABLE: table, LENGTHS_KV: used}
    if where is not None:
        adapted[SLOT_MAPPING] = _slots(adapted[BLOCK_TABLE], where, interface.block_size)
    return adapted


def _check_one_place(interface: Interface, feeds: dict[str, Array]) -> None:
    """Caches that are written by counters of their own are written at one place."""
    given = {c.position: np.asarray(feeds[c.position]) for c in interface.caches
             if c.in_place and c.position in feeds}  # fmt: skip
    first, *others = given or ("",)
    for name in others:
        if not np.array_equal(given[name], given[first]):
            raise UsageError(
                f"{name} is {given[name].tolist()} and {first} is {given[first].tolist()}, and"
                " pages have one slot_mapping; feed equal positions"
            )


def _places(
    cache: CacheEntry, feeds: dict[str, Array], rows: Array, count: int, start: int | Array | None
) -> Array:
    """The positions of the rows that a run writes [B, new rows]."""
    batch, length = rows.shape[:2]
    if start is None and cache.in_place and cache.position in feeds:
        said = np.asarray(feeds[cache.position]).astype(np.int64)
        if said.size > 1 or (said.ndim and not count):  # every position is said, not the first
            own = cache.ragged and said.ndim > 1 and said.shape[0] == batch
            said = said.reshape(batch if own else 1, -1)
            return np.broadcast_to(said, (batch, said.shape[-1]))
        start = int(said.ravel()[0])
    if start is None and cache.in_place and count:
        raise UsageError(
            f"{cache.packed_in}: its rows are written in place, and nothing says where: pass"
            " start, the number of rows in use before the run"
        )
    first = np.broadcast_to(np.asarray(length if start is None else start, np.int64), (batch,))
    return first[:, None] + np.arange(count)


def _used(cache: CacheEntry, rows: Array, where: Array, start: int | Array | None) -> Array:
    """Rows in use of each sequence after the run [B]: all of a buffer of fixed length."""
    batch, length = rows.shape[:2]
    if cache.in_place:
        if where.size and where.max() >= length:
            raise UsageError(
                f"{cache.packed_in}: row {where.max()} is to be written, and the buffer has"
                f" {length} per sequence"
            )
        return np.full(batch, length, np.int32)
    if where.shape[1]:
        return np.asarray(where.max(-1) + 1, np.int32)
    return np.array(np.broadcast_to(length if start is None else start, batch), np.int32)


def float_outputs(
    interface: Interface,
    outputs: dict[str, Array],
    feeds: dict[str, Array] | None = None,
    *,
    length: int | None = None,
) -> dict[str, Array]:
    """Outputs of the converted model under the original names, caches dequantised to float32.

    Args:
        interface: of the converted model.
        outputs: what it made.
        feeds: of the converted run: block table and lengths are needed to read pages back.
        length: rows per sequence of a cache that is written in place (default: those in use).
    """
    result = dict(outputs)
    for cache in interface.caches:
        names = [n for n in (cache.packed_out, cache.scales_out) if n in result]
        parts = [result.pop(n) for n in names]
        if cache.packed_out not in names:
            continue
        if interface.paged:
            if feeds is None:
                continue
            where = feeds[BLOCK_TABLE], feeds[LENGTHS_KV], length if cache.in_place else None
            parts = [kv_cache.unpage(x, *where) for x in parts]
        latent, rope = _dequantised(cache, *parts)
        if cache.joint:
            latent = np.concatenate([latent, rope], axis=-1)
        if cache.latent_out:
            result[cache.latent_out] = _from_canonical(latent, cache.latent_axes)
        if cache.rope_out and not cache.joint:
            result[cache.rope_out] = _from_canonical(rope, cache.rope_axes)
    return result


def _dequantised(
    cache: CacheEntry, packed: Array, scales: Array | None = None
) -> tuple[Array, Array]:
    dtype = _ROPE_TYPES[cache.elem_type]
    if cache.kind != "packed":
        rows = packed.astype(np.float32)
        rows = rows if scales is None else rows * scales.astype(np.float32)
        return rows, rows[..., :0]
    nope, rope, scale = kv_cache.unpack(packed, cache.row, dtype)
    return kv_cache.dequantise(nope, scale), rope.astype(np.float32)


def _converted_rows(cache: CacheEntry, feeds: dict[str, Array]) -> dict[str, Array]:
    """What a fed float cache becomes: converted input -> rows; {} for one that is not fed."""
    if cache.latent_in not in feeds:
        return {}
    latent = _to_canonical(feeds[cache.latent_in], cache.latent_axes)
    if cache.kind == "int8":
        rows, scales = kv_cache.quantise_keys(latent)
        return {cache.packed_in: rows, cache.scales_in: scales}
    if cache.kind == "float":
        return {cache.packed_in: latent.astype(_ROPE_TYPES[cache.elem_type])}
    rope: Array | None = None
    if cache.joint:
        latent, rope = latent[..., : cache.nope], latent[..., cache.nope :]
    elif cache.rope_in:
        rope = _to_canonical(feeds[cache.rope_in], cache.rope_axes)
    dtype = _ROPE_TYPES[cache.elem_type]
    rope = None if rope is None else rope.astype(dtype)
    return {cache.packed_in: kv_cache.pack(latent, rope, tile_size=cache.tile)}


def _to_canonical(array: Array, axes: tuple[str, ...]) -> Array:
    """Any labelled float cache -> [B, S, 1, C]."""
    kept = [i for i, label in enumerate(axes) if label != "1"]
    squeezed = array.reshape([array.shape[i] for i in kept])
    labels = [axes[i] for i in kept]
    if "B" not in labels:
        squeezed, labels = squeezed[None], ["B", *labels]
    ordered = squeezed.transpose([labels.index(label) for label in "BSC"])
    return np.ascontiguousarray(ordered[:, :, None, :])


def _from_canonical(array: Array, axes: tuple[str, ...]) -> Array:
    """[B, S, 1, C] -> the labelled layout of a float cache."""
    labels = [label for label in axes if label != "1"]
    bsc = array[:, :, 0, :]
    if "B" not in labels:
        bsc, source = bsc[0], ["S", "C"]
    else:
        source = ["B", "S", "C"]
    ordered = bsc.transpose([source.index(label) for label in labels])
    sizes = iter(ordered.shape)
    return ordered.reshape([1 if label == "1" else next(sizes) for label in axes])


def _roomy(rows: Array, tokens: int) -> Array:
    """Rows [B, S, 1, D] with zero rows appended up to `tokens` per sequence."""
    missing = max(0, tokens - rows.shape[1])
    return np.pad(rows, ((0, 0), (0, missing), (0, 0), (0, 0)))


def _slots(table: Array, where: Array, block_size: int) -> Array:
    """Physical slots [B * new rows] of positions [B, new rows]."""
    pages = np.take_along_axis(table.astype(np.int64), where // block_size, axis=1)
    return np.asarray(pages * block_size + where % block_size, np.int32).ravel()
