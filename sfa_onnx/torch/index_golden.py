"""The float indexer with the sums of the vendors' own checks on CPU, for `rounding="golden"`.

Those checks compare places, not only sets, so keys whose scores differ by less than a float32 sum's
error have to come out in their order: each sequence is one batched float32 product over all its
rows and keys, the heads are added by one `sum`. The C++ core adds in another order.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from sfa_onnx.operator.contract import OpContract
from sfa_onnx.operator.sequences import Sequences
from sfa_onnx.torch.checks import check_attributes
from sfa_onnx.torch.index import check_indexer
from sfa_onnx.torch.tensors import as_numpy

__all__ = ["best_by_sums", "select_golden"]


def select_golden(
    op: OpContract, tensors: Mapping[str, torch.Tensor], attributes: Mapping[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """sparse_indices [B, S1, 1, K] or [T, 1, K] and their scores, as `select` returns them.

    Raises:
        ContractError: a shape, type, attribute or value breaks the contract.
    """
    check_attributes(op, attributes)
    check_indexer(tensors, quant=False)
    query = tensors["query"]
    indices, values = best_by_sums(tensors, attributes, torch.float32)
    return indices, values.to(query.dtype)


def best_by_sums(
    tensors: Mapping[str, torch.Tensor],
    attributes: Mapping[str, Any],
    kind: torch.dtype,
    scale: torch.Tensor | None = None,
    sorted_as: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best keys of each row by torch's own sums, best first, ties by the lower index.

    Args:
        tensors: query [.., Hi, Di], key [.., 1, Di], weights [.., Hi], lengths and table, checked.
        attributes: of the indexer.
        kind: the type in which everything is computed.
        scale: by which each key's score is multiplied at the end, like key without its last axis.
        sorted_as: the type in which scores are compared; None: `kind`.

    Returns:
        Indices int32 and scores in `kind`, [B, S1, 1, K] or [T, 1, K].
    """
    query, key, weights = (tensors[n] for n in ("query", "key", "weights"))
    count, seqs = attributes["sparse_count"], _sequences(tensors, attributes)
    heads, width = query.shape[-2:]
    flat_query, flat_key = query.reshape(-1, heads, width), key.reshape(-1, width)
    flat_weights, flat_scale = weights.reshape(-1, heads, 1), None
    if scale is not None:
        flat_scale = scale.reshape(-1)
    indices = query.new_full((len(flat_query), count), -1, dtype=torch.int32)
    values = query.new_full((len(flat_query), count), -torch.inf, dtype=kind)
    for batch in range(int(seqs.batch.max(initial=-1)) + 1):
        rows = np.flatnonzero(seqs.batch == batch)
        visible = seqs.threshold[rows]
        keys = int(visible.max(initial=0))
        if not keys:
            continue
        at = torch.from_numpy(seqs.addresses(batch, np.arange(keys)))
        part = slice(int(rows[0]), int(rows[-1]) + 1)
        q, w = (t[part].transpose(0, 1).to(kind) for t in (flat_query, flat_weights))
        products = torch.maximum(q @ flat_key[at].T.to(kind), torch.zeros((), dtype=kind))
        scores = (products * w).sum(0)
        if flat_scale is not None:
            scores = (scores * flat_scale[at]).to(sorted_as or kind).to(kind)
        hidden = torch.arange(keys) >= torch.from_numpy(visible)[:, None]
        best = scores.masked_fill(hidden, -torch.inf).sort(dim=-1, descending=True, stable=True)
        chosen = min(keys, count)
        gone = hidden.gather(-1, best.indices)[:, :chosen]
        indices[part, :chosen] = best.indices[:, :chosen].int().masked_fill(gone, -1)
        values[part, :chosen] = best.values[:, :chosen]
    shape = (*query.shape[:-2], 1, count)
    return indices.view(shape), values.view(shape)


def _sequences(tensors: Mapping[str, torch.Tensor], attributes: Mapping[str, Any]) -> Sequences:
    ints = ("block_table", "actual_seq_lengths_query", "actual_seq_lengths_key")
    arrays = {n: as_numpy(t) for n, t in tensors.items() if n in ("query", "key", *ints)}
    return Sequences.of(
        arrays["query"],
        arrays["key"],
        attributes["layout_query"],
        attributes["layout_key"],
        attributes["sparse_mode"],
        arrays.get("actual_seq_lengths_query"),
        arrays.get("actual_seq_lengths_key"),
        arrays.get("block_table"),
        "key",
    )
