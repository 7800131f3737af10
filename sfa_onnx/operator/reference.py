"""The operators as formulas in NumPy: the judge of every kernel, function body and fusion.

For one query row and the tokens its indices select (`selected_tokens`):

    out = softmax(scale_value * (q_nope . k_nope + q_rope . k_rope)) . k_nope

`mode="exact"` computes in float64 whatever the inputs are and rounds the result to the query's type
once. `mode="npu"` repeats the roundings of CANN's A2/A3 kernel, `mode="golden"` those of the CPU
checks that the vendor publishes (`reference_npu.py`). A float64 query gives a float64 result: that
is how a region promoted to double is verified. Rows without a usable key, and rows past the valid
query length, are zero. A head's sink is one more score without a value: it takes its share of the
softmax.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Literal

import ml_dtypes
import numpy as np
from numpy.typing import ArrayLike, NDArray

from sfa_onnx.operator import kv_cache
from sfa_onnx.operator.op import SPARSE_FLASH_ATTENTION, SPARSE_FLASH_ATTENTION_ANTIQUANT, PackedRow
from sfa_onnx.operator.reference_indexer import lightning_indexer, quant_lightning_indexer
from sfa_onnx.operator.reference_npu import attend_golden, attend_npu, npu_round, sink_weight
from sfa_onnx.operator.sequences import Sequences, refuse

__all__ = [
    "lightning_indexer",
    "quant_lightning_indexer",
    "selected_tokens",
    "sparse_flash_attention",
    "sparse_flash_attention_antiquant",
    "sparse_flash_attention_antiquant_lse",
    "sparse_flash_attention_lse",
]

Array = NDArray[Any]
Mode = Literal["exact", "npu", "golden"]
Attend = Callable[
    [Array, Array, Array, float, Array, Array | None], tuple[Array, Array, Array]
]  # query, keys, values, scale, slots, sinks -> out [N1, C], largest score, sum [N1]
Holes = Literal["error", "skip", "stop"]
Fetch = Callable[[Array], tuple[Array, Array]]  # addresses [n] -> keys [n, C+R], values [n, C]

_FLOATS = tuple(map(np.dtype, (np.float64, np.float32, np.float16, ml_dtypes.bfloat16)))


def selected_tokens(
    indices: Array, threshold: int, sparse_block_size: int, holes: Holes = "error", row: int = 0
) -> tuple[Array, Array]:
    """Tokens that one row of `sparse_indices` [K] selects, in order, and the slot each came from.

    Only the first ceil(threshold / sparse_block_size) entries are looked at. Entry v stands for the
    tokens [v * sparse_block_size, (v + 1) * sparse_block_size) below `threshold`; an entry at or
    past it is skipped, duplicates count each time.

    Raises:
        ContractError: a usable entry follows a negative one and `holes` is "error".
    """
    looked_at = min(len(indices), -(-threshold // sparse_block_size))
    starts = indices[:looked_at].astype(np.int64) * sparse_block_size
    usable = (starts >= 0) & (starts < threshold)
    if holes != "skip" and (starts < 0).any():
        first = int(np.argmax(starts < 0))
        if holes == "error" and usable[first:].any():
            slot = first + int(np.argmax(usable[first:]))
            raise refuse(
                f"sparse_indices row {row}, slot {slot}",
                f"no usable entry after the negative one at slot {first} (valid entries first)",
                indices[slot],
            )
        usable[first:] = False
    offsets = np.arange(sparse_block_size)
    tokens = (starts[usable][:, None] + offsets).ravel()
    slots = (np.flatnonzero(usable)[:, None] * sparse_block_size + offsets).ravel()
    return tokens[tokens < threshold], slots[tokens < threshold]


def sparse_flash_attention_antiquant(
    query: Array,
    key: Array,
    value: Array | None,
    sparse_indices: Array,
    key_dequant_scale: Array | None = None,
    value_dequant_scale: Array | None = None,
    block_table: ArrayLike | None = None,
    actual_seq_lengths_query: ArrayLike | None = None,
    actual_seq_lengths_kv: ArrayLike | None = None,
    sinks: Array | None = None,
    *,
    mode: Mode = "exact",
    holes: Holes = "error",
    rope_dtype: Any = None,
    **attributes: Any,
) -> Array:
    """attention_out of `sparse_flash_attention_antiquant_lse`, same arguments."""
    return sparse_flash_attention_antiquant_lse(
        query, key, value, sparse_indices, key_dequant_scale, value_dequant_scale, block_table,
        actual_seq_lengths_query, actual_seq_lengths_kv, sinks, mode=mode, holes=holes,
        rope_dtype=rope_dtype, **attributes,
    )[0]  # fmt: skip


def sparse_flash_attention_antiquant_lse(
    query: Array,
    key: Array,
    value: Array | None,
    sparse_indices: Array,
    key_dequant_scale: Array | None = None,
    value_dequant_scale: Array | None = None,
    block_table: ArrayLike | None = None,
    actual_seq_lengths_query: ArrayLike | None = None,
    actual_seq_lengths_kv: ArrayLike | None = None,
    sinks: Array | None = None,
    *,
    mode: Mode = "exact",
    holes: Holes = "error",
    rope_dtype: Any = None,
    **attributes: Any,
) -> tuple[Array, Array, Array]:
    """`NPUSparseFlashAttentionAntiquant` and the softmax that vllm-ascend's kernel also returns.

    Inputs are in node order, attributes by name.

    Args:
        query: [B, S1, N1, C+R] or [T, N1, C+R]; float32, float16, bfloat16 or float64.
        key: packed int8 rows (`PackedRow`): [B, S2, 1, D], [T2, 1, D] or [blocks, size, 1, D].
        value: ignored (the op's values are the key's nope part); int8 or None.
        sparse_indices: [B, S1, 1, K] or [T, 1, K] integers.
        key_dequant_scale: reserved, None.
        value_dequant_scale: reserved, None.
        block_table: [B, M] (PA_BSND).
        actual_seq_lengths_query: [B]; TND: prefix sums.
        actual_seq_lengths_kv: [B]; TND keys: prefix sums.
        sinks: float32 [N1], one more score per head.
        mode: "exact", "npu" or "golden".
        holes: what a usable index after a negative one does: "error", "skip" or "stop".
        rope_dtype: type of the rope bytes; default: the query's (float32 for a float64 query).
        attributes: the node's attributes; `scale_value` must be given.

    Returns:
        attention_out, [B, S1, N1, C] or [T, N1, C] in the query's type; softmax_max and softmax_sum
        as `sparse_flash_attention_lse`.

    Raises:
        ContractError: a dtype, shape, attribute, length, table entry or index order is illegal.
    """
    attrs = SPARSE_FLASH_ATTENTION_ANTIQUANT.complete(attributes)
    if key_dequant_scale is not None or value_dequant_scale is not None:
        raise refuse("key_dequant_scale / value_dequant_scale", "nothing (reserved)", "a tensor")
    for name, tensor in (("key", key), ("value", value)):
        if tensor is not None and tensor.dtype != np.int8:
            raise refuse(name, "int8", tensor.dtype)
    row = PackedRow.of(
        key.shape[-1], query.shape[-1], int(attrs["rope_head_dim"]), int(attrs["tile_size"])
    )
    rope = np.dtype(rope_dtype or (np.float32 if query.dtype == np.float64 else query.dtype))
    if row.rope and rope.itemsize != row.itemsize:
        raise refuse("rope of the packed rows", f"{row.itemsize}-byte items like the row's", rope)
    rows = key.reshape(-1, row.bytes)

    def fetch(addresses: Array) -> tuple[Array, Array]:
        nope, key_rope, scale = kv_cache.unpack(rows[addresses], row, rope)
        latent = kv_cache.dequantise(nope, scale, np.float64 if mode == "exact" else np.float32)
        if mode == "npu":
            latent = npu_round(latent, query.dtype)
        elif mode == "golden":
            latent = latent.astype(query.dtype).astype(np.float32)
        return np.concatenate([latent, key_rope.astype(latent.dtype)], -1), latent

    lengths = (actual_seq_lengths_query, actual_seq_lengths_kv, block_table)
    return _attention(
        query, key, sparse_indices, lengths, sinks, attrs, row.nope, fetch, mode, holes
    )


def sparse_flash_attention(
    query: Array,
    key: Array,
    value: Array | None,
    sparse_indices: Array,
    block_table: ArrayLike | None = None,
    actual_seq_lengths_query: ArrayLike | None = None,
    actual_seq_lengths_kv: ArrayLike | None = None,
    query_rope: Array | None = None,
    key_rope: Array | None = None,
    sinks: Array | None = None,
    *,
    mode: Mode = "exact",
    holes: Holes = "error",
    **attributes: Any,
) -> Array:
    """`NPUSparseFlashAttention`: attention_out of `sparse_flash_attention_lse`, same arguments."""
    return sparse_flash_attention_lse(
        query, key, value, sparse_indices, block_table, actual_seq_lengths_query,
        actual_seq_lengths_kv, query_rope, key_rope, sinks, mode=mode, holes=holes, **attributes
    )[0]  # fmt: skip


def sparse_flash_attention_lse(
    query: Array,
    key: Array,
    value: Array | None,
    sparse_indices: Array,
    block_table: ArrayLike | None = None,
    actual_seq_lengths_query: ArrayLike | None = None,
    actual_seq_lengths_kv: ArrayLike | None = None,
    query_rope: Array | None = None,
    key_rope: Array | None = None,
    sinks: Array | None = None,
    *,
    mode: Mode = "exact",
    holes: Holes = "error",
    **attributes: Any,
) -> tuple[Array, Array, Array]:
    """`NPUSparseFlashAttention`: the same attention over a float latent cache.

    Arguments, result and errors as `sparse_flash_attention_antiquant`, except:

    Args:
        query: [B, S1, N1, C] or [T, N1, C]; float32, float16, bfloat16 or float64.
        key: latents [B, S2, 1, C], [T2, 1, C] or [blocks, size, 1, C], the query's type.
        value: ignored (it is the key).
        sparse_indices: [B, S1, 1, K] or [T, 1, K] integers.
        block_table: [B, M] (PA_BSND).
        actual_seq_lengths_query: [B]; TND: prefix sums.
        actual_seq_lengths_kv: [B]; TND keys: prefix sums.
        query_rope: query's shape with R for C; None together with key_rope.
        key_rope: key's shape with R for C.
        sinks: float32 [N1], one more score per head.
        mode: "exact", "npu" or "golden".
        holes: "error", "skip" or "stop".
        attributes: the node's attributes; `scale_value` must be given.

    Returns:
        attention_out; softmax_max and softmax_sum [B, 1, S1, N1] or [1, T, N1] in float32 (float64
        for a float64 query): the largest score of a row, sink included, and the sum of
        exp(score - largest). Rows without a key have zeros; with sinks (sink, 1), but zeros where
        the causal mask leaves no key at all and past the valid query length.
    """
    attrs = SPARSE_FLASH_ATTENTION.complete(attributes)
    parts = {"key": key, "value": value, "query_rope": query_rope, "key_rope": key_rope}
    for name, tensor in parts.items():
        if tensor is not None and tensor.dtype != query.dtype:
            raise refuse(name, f"the query's type {query.dtype}", tensor.dtype)
    width = key.shape[-1]
    if width != query.shape[-1]:
        raise refuse("key width", f"the query's {query.shape[-1]}", width)
    joined = [key]
    if query_rope is not None and key_rope is not None:
        for name, part, rope in (("query", query, query_rope), ("key", key, key_rope)):
            if rope.shape != (*part.shape[:-1], query_rope.shape[-1]):
                expected = (*part.shape[:-1], query_rope.shape[-1])
                raise refuse(f"{name}_rope", f"{expected}", rope.shape)
        query, joined = np.concatenate([query, query_rope], -1), [key, key_rope]
    elif query_rope is not None or key_rope is not None:
        raise refuse("query_rope and key_rope", "both or neither", "one")
    flat = [part.reshape(-1, part.shape[-1]) for part in joined]

    def fetch(addresses: Array) -> tuple[Array, Array]:
        work = np.float64 if mode == "exact" else np.float32
        keys = np.concatenate([part[addresses].astype(work) for part in flat], -1)
        return keys, keys[:, :width]

    lengths = (actual_seq_lengths_query, actual_seq_lengths_kv, block_table)
    return _attention(query, key, sparse_indices, lengths, sinks, attrs, width, fetch, mode, holes)


def _attention(
    query: Array,
    key: Array,
    indices: Array,
    lengths: tuple[ArrayLike | None, ArrayLike | None, ArrayLike | None],
    sinks: Array | None,
    attrs: dict[str, Any],
    width: int,
    fetch: Fetch,
    mode: Mode,
    holes: Holes,
) -> tuple[Array, Array, Array]:
    """Row by row: select tokens, find their addresses, fetch, attend. `width` is C."""
    if query.dtype not in _FLOATS:
        raise refuse("query", "float32, float16, bfloat16 (or float64)", query.dtype)
    if mode not in _ATTEND or holes not in ("error", "skip", "stop"):
        raise refuse("mode / holes", "exact|npu|golden / error|skip|stop", f"{mode} / {holes}")
    heads = query.shape[-2]
    if sinks is not None and (sinks.shape != (heads,) or sinks.dtype.kind != "f"):
        raise refuse("sinks", f"float32 [{heads}]", f"{sinks.dtype} {sinks.shape}")
    layouts = attrs["layout_query"], attrs["layout_kv"]
    seqs = Sequences.of(query, key, *layouts, attrs["sparse_mode"], *lengths)
    lead = (*query.shape[:-2], 1)
    if indices.dtype.kind not in "iu" or indices.shape[:-1] != lead:
        got = f"{indices.dtype} {indices.shape}"
        raise refuse("sparse_indices", f"int32 {(*lead, 'K')}", got)
    attend = _ATTEND[mode]
    out = np.zeros((len(seqs.batch), heads, width), query.dtype)
    wide = np.float64 if query.dtype == np.float64 else np.float32
    top, total = np.zeros((2, len(seqs.batch), heads), wide)
    if sinks is not None:
        alone = (seqs.batch >= 0) & ((attrs["sparse_mode"] == 0) | (seqs.threshold > 0))
        top[alone], total[alone] = sinks, 1
    flat_query = query.reshape(len(seqs.batch), *query.shape[-2:])
    flat_indices = indices.reshape(len(seqs.batch), indices.shape[-1])
    with np.errstate(all="ignore"):  # NaN and Inf follow IEEE rules
        for row in np.flatnonzero(seqs.threshold):
            visible, size = int(seqs.threshold[row]), attrs["sparse_block_size"]
            tokens, slots = selected_tokens(flat_indices[row], visible, size, holes, int(row))
            if len(tokens):
                keys, values = fetch(seqs.addresses(int(seqs.batch[row]), tokens))
                out[row], top[row], total[row] = attend(
                    flat_query[row], keys, values, attrs["scale_value"], slots, sinks
                )
    lead = (*query.shape[:-3], 1, *query.shape[-3:-1])
    return out.reshape(*query.shape[:-1], width), top.reshape(lead), total.reshape(lead)


def _attend(
    query: Array, keys: Array, values: Array, scale: float, _slots: Array, sinks: Array | None
) -> tuple[Array, Array, Array]:
    """[N1, C+R], [n, C+R], [n, C] -> [N1, C] in float64, the largest score and the sum [N1]."""
    scores = scale * (query.astype(np.float64) @ keys.T)
    top = scores.max(-1)
    sink = np.full(len(query), -np.inf) if sinks is None else sinks.astype(np.float64)
    top = np.maximum(top, sink)
    weights = np.exp(scores - top[:, None])
    total = weights.sum(-1) + (0 if sinks is None else sink_weight(sink, top))
    return np.asarray(weights @ values / total[:, None]), top, total


_ATTEND: Final[dict[str, Attend]] = {
    "exact": _attend,
    "npu": attend_npu,
    "golden": attend_golden,
}
