"""The lightning indexers as formulas in NumPy: which keys each query row should attend to.

    score = sum_h weight_h * relu(q_h . k)

and the best `sparse_count` visible keys in descending order, ties by lower index, tail -1.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sfa_onnx.operator.op import LIGHTNING_INDEXER, QUANT_LIGHTNING_INDEXER
from sfa_onnx.operator.sequences import Sequences, refuse

__all__ = ["lightning_indexer", "quant_lightning_indexer"]

Array = NDArray[Any]


def lightning_indexer(
    query: Array,
    key: Array,
    weights: Array,
    actual_seq_lengths_query: ArrayLike | None = None,
    actual_seq_lengths_key: ArrayLike | None = None,
    block_table: ArrayLike | None = None,
    **attributes: Any,
) -> tuple[NDArray[np.int32], Array]:
    """`NPULightningIndexer` in float64: inputs in node order, attributes by name.

    Args:
        query: [B, S1, Hi, Di] or [T, Hi, Di], any float type.
        key: [B, S2, 1, Di], [T2, 1, Di] or [blocks, size, 1, Di].
        weights: [B, S1, Hi] or [T, Hi].
        actual_seq_lengths_query: [B]; TND: prefix sums.
        actual_seq_lengths_key: [B]; TND keys: prefix sums.
        block_table: [B, M] (PA_BSND).
        attributes: the node's attributes.

    Returns:
        sparse_indices int32 [B, S1, 1, K] or [T, 1, K], tail -1, and their scores in the query's
        type, tail -inf (a node has them as its second output when return_values is 1).

    Raises:
        ContractError: a shape, attribute, length or table entry is illegal.
    """
    attrs = LIGHTNING_INDEXER.complete(attributes)
    lengths = (actual_seq_lengths_query, actual_seq_lengths_key, block_table)
    _check(query, key, {"weights": weights})
    scale = np.ones(key.shape[:-1])
    indices, values = _select(query, key, weights.astype(np.float64), scale, lengths, attrs)
    return indices, values.astype(query.dtype)


def quant_lightning_indexer(
    query: Array,
    key: Array,
    weights: Array,
    query_dequant_scale: Array,
    key_dequant_scale: Array,
    actual_seq_lengths_query: ArrayLike | None = None,
    actual_seq_lengths_key: ArrayLike | None = None,
    block_table: ArrayLike | None = None,
    *,
    mode: Literal["exact", "npu"] = "exact",
    **attributes: Any,
) -> NDArray[np.int32]:
    """`NPUQuantLightningIndexer`: score = k_scale * sum_h w_h * q_scale_h * relu(q_h . k).

    Args:
        query: int8 [B, S1, Hi, Di] or [T, Hi, Di].
        key: int8 [B, S2, 1, Di], [T2, 1, Di] or [blocks, size, 1, Di].
        weights: [B, S1, Hi] or [T, Hi].
        query_dequant_scale: as weights.
        key_dequant_scale: key's shape without the last axis.
        actual_seq_lengths_query: [B]; TND: prefix sums.
        actual_seq_lengths_key: [B]; TND keys: prefix sums.
        block_table: [B, M] (PA_BSND).
        mode: "exact" in float64; "npu" rounds w*q_scale and relu/1024 to float16 first.
        attributes: the node's attributes.

    Returns:
        sparse_indices int32 [B, S1, 1, K] or [T, 1, K], tail -1.

    Raises:
        ContractError: a dtype, shape, attribute, length or table entry is illegal.
    """
    attrs = QUANT_LIGHTNING_INDEXER.complete(attributes)
    if query.dtype != np.int8 or key.dtype != np.int8:
        raise refuse("query and key", "int8", f"{query.dtype} and {key.dtype}")
    _check(query, key, {"weights": weights, "query_dequant_scale": query_dequant_scale})
    if key_dequant_scale.shape != key.shape[:-1]:
        raise refuse("key_dequant_scale", f"{key.shape[:-1]}", key_dequant_scale.shape)
    w = weights.astype(np.float64) * query_dequant_scale.astype(np.float64)
    w = w.astype(np.float16).astype(np.float64) if mode == "npu" else w
    scale = key_dequant_scale.astype(np.float64)
    lengths = (actual_seq_lengths_query, actual_seq_lengths_key, block_table)
    return _select(query, key, w, scale, lengths, attrs, half_products=mode == "npu")[0]


def _check(query: Array, key: Array, per_head: dict[str, Array]) -> None:
    if key.shape[-1] != query.shape[-1]:
        raise refuse("key width", f"the query's {query.shape[-1]}", key.shape[-1])
    for name, tensor in per_head.items():
        if tensor.shape != query.shape[:-1]:
            raise refuse(name, f"{query.shape[:-1]}", tensor.shape)


def _select(
    query: Array,
    key: Array,
    weights: Array,
    key_scale: Array,
    lengths: tuple[ArrayLike | None, ArrayLike | None, ArrayLike | None],
    attrs: dict[str, Any],
    half_products: bool = False,
) -> tuple[NDArray[np.int32], Array]:
    layouts = attrs["layout_query"], attrs["layout_key"]
    seqs = Sequences.of(query, key, *layouts, attrs["sparse_mode"], *lengths, "key")
    rows, count = len(seqs.batch), attrs["sparse_count"]
    indices, values = np.full((rows, count), -1, np.int32), np.full((rows, count), -np.inf)
    flat_query = query.reshape(rows, *query.shape[-2:]).astype(np.float64)
    flat_weights = weights.reshape(rows, -1)
    flat_key, flat_scale = key.reshape(-1, key.shape[-1]), key_scale.reshape(-1)
    for row in np.flatnonzero(seqs.threshold):
        at = seqs.addresses(int(seqs.batch[row]), np.arange(seqs.threshold[row]))
        products = np.maximum(flat_query[row] @ flat_key[at].astype(np.float64).T, 0)
        if half_products:
            products = (products / 1024).astype(np.float16).astype(np.float64)
        scores = flat_scale[at] * (flat_weights[row] @ products)
        best = np.argsort(-scores, kind="stable")[:count]
        indices[row, : len(best)], values[row, : len(best)] = best, scores[best]
    lead = (*query.shape[:-2], 1, count)
    return indices.reshape(lead), values.reshape(lead)
