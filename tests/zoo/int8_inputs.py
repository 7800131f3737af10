"""Sizes, spellings and inputs of the int8 family."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tests.zoo.base import NP_TYPES, Feeds


@dataclass(frozen=True)
class Spec:
    """Sizes and spellings of one int8 case."""

    # sizes
    B: int = 2
    S1: int = 2
    N: int = 4
    S2: int = 64
    K: int = 16
    C: int = 64
    R: int = 16
    tile: int = 32
    block: int = 16
    # spellings
    dtype: str = "f32"
    compute: str = "f32"  # "f32": scores in float32; "same": everything in the model's dtype
    gather: str = "gather"
    paged: str = ""  # "", "flat", "div", "bits", "two_level", "materialised"
    dequant: str = "view"
    order: str = "gather_first"
    attn: str = "matmul"
    softmax: str = "softmax"
    scale: str = "after"
    rule: str = "all"  # "all", "negative", "length", "causal"
    value: str = "slice"  # "slice" of the concatenated key, or the dequantised "nope"
    query: str = "BSND"  # BNSD, SBHD, TND
    split_q: bool = False
    kv_axis: bool = False  # caches are [B, S2, 1, W], indices [B, S1, 1, K]
    int64: bool = False
    exporter: str = "dynamo"
    opset: int = 18
    dynamic: bool = False

    @property
    def scale_value(self) -> float:
        return (self.C + self.R) ** -0.5


def _indices(s: Spec, rng: np.random.Generator, kv_len: np.ndarray, stress: str) -> np.ndarray:
    """Distinct visible keys per row, -1 behind them; `stress` breaks that where it is legal."""
    idx = np.empty((s.B, s.S1, s.K), np.int64)
    for b in range(s.B):
        for t in range(s.S1):
            limit = s.S2
            if s.rule == "length":
                limit = kv_len[b]
            if s.rule == "causal":
                limit = kv_len[b] - s.S1 + t + 1
            row = rng.permutation(limit)[: s.K]
            idx[b, t] = np.pad(row, (0, s.K - len(row)), constant_values=-1)
            if s.rule != "all" and t % 2:
                idx[b, t, rng.integers(1, s.K) :] = -1
            if stress == "holes":
                idx[b, t, rng.integers(0, s.K, 3)] = -1
                idx[b, t, rng.integers(0, s.K, 3)] = idx[b, t, 0] if idx[b, t, 0] >= 0 else 1
            if stress == "wrap":
                idx[b, t, rng.integers(0, s.K, 3)] = -rng.integers(1, limit)
    if stress == "short" or stress == "holes":
        idx[0, 0] = rng.permutation(s.S2)[: s.K]  # some past the limit, anywhere in the row
        kv_len[0] = max(s.S1, s.S2 // 3)
        idx[..., 5] = 0  # rows without any visible key are another matter
    return idx


def feeds(s: Spec, seed: int, stress: str = "") -> Feeds:
    """Inputs for `Int8Attention`.

    stress: "holes" scatters -1 and repeats inside rows (where the rule masks them itself),
    "wrap" uses negative wrapping indices.
    """
    rng = np.random.default_rng(seed)
    ft = NP_TYPES[s.dtype]
    q = rng.standard_normal((s.B, s.S1, s.N, s.C + s.R)).astype(ft)
    if s.query == "BNSD":
        q = q.transpose(0, 2, 1, 3)
    if s.query == "SBHD":
        q = q.transpose(1, 0, 2, 3)
    pages = -(-s.S2 // s.block)
    lead = (s.B, s.S2) if not s.paged else (s.B * pages + 3, s.block)
    lead = (*lead, 1) if s.kv_axis else lead
    nope = rng.integers(-127, 128, (*lead, s.C)).astype(np.int8)
    rope = rng.standard_normal((*lead, s.R)).astype(ft)
    scale = (rng.uniform(0.2, 1.0, (*lead, s.C // s.tile)) * 0.03).astype(np.float32)
    kv_len = rng.integers(max(s.S1, s.S2 // 2), s.S2 + 1, s.B)
    kv_len[0] = s.S2
    idx = _indices(s, rng, kv_len, stress)
    idx = idx[:, :, None] if s.kv_axis else idx
    out: Feeds = {
        "query": np.ascontiguousarray(q),
        "nope": nope,
        "rope": rope,
        "scale": scale,
        "indices": idx.astype(np.int64 if s.int64 else np.int32),
    }
    if s.rule in ("length", "causal"):
        out["kv_len"] = kv_len.astype(np.int32)
    if s.paged:
        table = rng.permutation(lead[0])[: s.B * pages].reshape(s.B, pages)
        out["block_table"] = table.astype(np.int32)
    return out


def dynamic_axes(s: Spec) -> dict[str, dict[int, str]]:
    """Which input axes a dynamic export leaves open."""
    order = {"BSND": ("batch", "q_len"), "SBHD": ("q_len", "batch"), "BNSD": ("batch", None)}
    first, second = order[s.query]
    q = {0: first, 1: second} if second else {0: "batch", 2: "q_len"}
    cache = {0: "batch", 1: "kv_len_max"} if not s.paged else {0: "num_blocks"}
    axes = {
        "query": q,
        "nope": cache,
        "rope": cache,
        "scale": cache,
        "indices": {0: "batch", 1: "q_len", (3 if s.kv_axis else 2): "topk"},
    }
    if s.rule in ("length", "causal"):
        axes["kv_len"] = {0: "batch"}
    if s.paged:
        axes["block_table"] = {0: "batch", 1: "max_blocks"}
    return axes
