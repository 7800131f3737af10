"""Random, legal calls of the attention ops in every layout, for tests of all implementations."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np

from sfa_onnx.operator import kv_cache, reference
from sfa_onnx.operator.op import (
    SPARSE_FLASH_ATTENTION,
    SPARSE_FLASH_ATTENTION_ANTIQUANT,
    OpContract,
)

BF16 = np.dtype(ml_dtypes.bfloat16)
LAYOUTS = (("BSND", "BSND"), ("BSND", "PA_BSND"), ("TND", "TND"), ("TND", "PA_BSND"))


@dataclass
class Case:
    """One call: inputs by name (absent ones left out) and every attribute."""

    op: OpContract
    inputs: dict[str, np.ndarray]
    attributes: dict[str, Any]
    details: dict[str, Any] = field(default_factory=dict)

    def reference(self, **kw: Any) -> np.ndarray:
        run = {
            SPARSE_FLASH_ATTENTION_ANTIQUANT.name: reference.sparse_flash_attention_antiquant,
            SPARSE_FLASH_ATTENTION.name: reference.sparse_flash_attention,
        }[self.op.name]
        return run(*(self.inputs.get(t.name) for t in self.op.inputs), **(self.attributes | kw))


def softmax_reference(case: Case, **kw: Any) -> tuple[np.ndarray, np.ndarray]:
    """softmax_max and softmax_sum of a float-cache case."""
    inputs = (case.inputs.get(t.name) for t in case.op.inputs)
    return reference.sparse_flash_attention_lse(*inputs, **(case.attributes | kw))[1:]


def make_case(
    op: OpContract = SPARSE_FLASH_ATTENTION_ANTIQUANT,
    layouts: tuple[str, str] = ("BSND", "PA_BSND"),
    *,
    dtype: Any = BF16,
    batch: int = 3,
    s1: int = 3,
    heads: int = 4,
    s2: int = 40,
    count: int = 12,
    sparse_mode: int = 3,
    sparse_block_size: int = 1,
    block_size: int = 16,
    nope: int = 32,
    rope: int = 8,
    tile: int = 16,
    lengths: bool = True,
    sinks: bool = False,
    lse: bool = False,
    peak: float = 1.0,
    seed: int = 0,
) -> Case:
    """A legal call: ragged lengths, shuffled pages, valid-first indices with -1 tails."""
    r = np.random.default_rng(seed)
    layout_query, layout_kv = layouts
    packed = op is SPARSE_FLASH_ATTENTION_ANTIQUANT
    ragged = lengths or layout_query == "TND" or layout_kv == "PA_BSND"
    act_q = r.integers(0, s1 + 1, batch) if lengths or layout_query == "TND" else np.full(batch, s1)
    act_kv = r.integers(0, s2 + 1, batch) if ragged else np.full(batch, s2)
    act_q[0], act_kv[0] = s1, s2
    indices = _indices(r, act_q, act_kv, s1, count, sparse_mode, sparse_block_size)
    query = (peak * r.standard_normal((batch, s1, heads, nope + rope))).astype(dtype)
    latent = r.standard_normal((batch, s2, 1, nope)).astype(np.float32)
    key_rope = r.standard_normal((batch, s2, 1, rope)).astype(dtype)
    key = kv_cache.pack(latent, key_rope, tile_size=tile) if packed else latent.astype(dtype)
    if packed and rope == 0:
        key = kv_cache.pack(latent, None, tile_size=tile)
    inputs: dict[str, np.ndarray] = {}
    stream = [key] if packed or not rope else [key, key_rope]
    if layout_kv == "PA_BSND":
        columns = -(-s2 // block_size) + 1
        table = r.permutation(batch * columns + 2)[: batch * columns].reshape(batch, columns)
        stream = [kv_cache.page(x, block_size, act_kv, table)[0] for x in stream]
        used = np.arange(columns) < -(-act_kv // block_size)[:, None]
        inputs["block_table"] = np.where(used, table, -1).astype(np.int32)
    elif layout_kv == "TND":
        stream = [_ragged(x, act_kv) for x in stream]
    if layout_query == "TND":
        query, indices = _ragged(query, act_q, 2), _ragged(indices, act_q, 2)
        inputs["actual_seq_lengths_query"] = np.cumsum(act_q).astype(np.int32)
    elif lengths:
        inputs["actual_seq_lengths_query"] = act_q.astype(np.int32)
    if ragged:
        kv = np.cumsum(act_kv) if layout_kv == "TND" else act_kv
        inputs["actual_seq_lengths_kv"] = kv.astype(np.int32)
    inputs |= {"key": stream[0], "value": stream[0], "sparse_indices": indices}
    if packed or not rope:
        inputs["query"] = query if packed else np.ascontiguousarray(query[..., :nope])
    else:
        inputs["query"] = np.ascontiguousarray(query[..., :nope])
        inputs["query_rope"] = np.ascontiguousarray(query[..., nope:])
        inputs["key_rope"] = stream[1]
    if sinks:
        inputs["sinks"] = (2 * r.standard_normal(heads)).astype(np.float32)
    given = {
        "scale_value": float(np.float32((nope + rope) ** -0.5)),
        "sparse_block_size": sparse_block_size,
        "layout_query": layout_query,
        "layout_kv": layout_kv,
        "sparse_mode": sparse_mode,
    }
    given |= {"tile_size": tile, "rope_head_dim": rope} if packed else {}
    given |= {"return_softmax_lse": 1} if lse else {}
    details = {"act_q": act_q, "act_kv": act_kv, "nope": nope, "rope": rope, "tile": tile}
    return Case(op, inputs, op.complete(given), details)


def _indices(r, act_q, act_kv, s1, count, sparse_mode, size):
    batch = len(act_q)
    indices = np.full((batch, s1, 1, count), -1, np.int32)
    for b in range(batch):
        for s in range(s1):
            visible = act_kv[b] if sparse_mode == 0 else act_kv[b] - act_q[b] + s + 1
            blocks = -(-max(visible, 0) // size)
            chosen = r.permutation(blocks)[:count]
            indices[b, s, 0, : len(chosen)] = chosen
    return indices


def _ragged(x, lengths, tail=0):
    """[B, S, ...] -> [sum(lengths) + tail, ...]."""
    rows = [x[b, :n] for b, n in enumerate(lengths)]
    return np.concatenate([*rows, np.ones((tail, *x.shape[2:]), x.dtype)]).astype(x.dtype)
