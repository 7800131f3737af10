"""Families that stand alone: a whole int8 decode layer, ragged batches, grouped key heads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from tests.zoo.base import (
    ANTIQUANT,
    FLOAT_KV,
    NP_TYPES,
    Case,
    Feeds,
    export,
    to_torch,
    torch_dtype,
)
from tests.zoo.official import Norm, rotate


@dataclass(frozen=True)
class Spec:
    """Sizes and spellings."""

    B: int = 2
    S1: int = 1
    N: int = 4
    S2: int = 48
    K: int = 16
    C: int = 64
    R: int = 16
    tile: int = 32
    hidden: int = 96
    index: int = 32
    write: str = "concat"  # "concat", "slots" (index_put at a position input)
    dtype: str = "f32"
    layout: str = "packed"  # ragged: keys "packed" [T2, D] or "paged"
    block: int = 8
    causal: bool = True
    exporter: str = "dynamo"
    opset: int = 18
    dynamic: bool = False
    optimize: bool = True


class Int8Layer(nn.Module):
    """Decode with an int8 cache: new rows are quantised and stored, then the best are attended."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        s = self.s = spec
        torch.manual_seed(0)
        linear = lambda i, o: nn.Linear(i, o, bias=False)  # noqa: E731
        self.norm, self.kv_norm = Norm(s.hidden), Norm(s.C)
        self.wq, self.wkv = linear(s.hidden, s.N * (s.C + s.R)), linear(s.hidden, s.C + s.R)
        self.index_q, self.index_k = linear(s.hidden, s.index), linear(s.hidden, s.index)
        self.wo = linear(s.N * s.C, s.hidden)
        self.to(torch_dtype(s.dtype))

    def _quantise(self, x):
        s = self.s
        tiles = x.float().unflatten(-1, (s.C // s.tile, s.tile))
        scale = tiles.abs().amax(-1).clamp(min=1e-8) / 127.0
        rows = torch.round(tiles / scale.unsqueeze(-1)).clamp(-127, 127).to(torch.int8)
        return rows.flatten(-2), scale

    def _store(self, past, new, position):
        if self.s.write == "concat":
            return torch.cat([past, new], 1)
        past = past.clone()
        past[torch.arange(past.shape[0]), position] = new[:, 0]
        return past

    def forward(self, hidden, nope, scale, rope, index_keys, position):
        s = self.s
        B = hidden.shape[0]
        x = self.norm(hidden)
        half = s.R // 2
        angle = position.float().view(-1, 1, 1) * 10.0 ** (-torch.arange(half).float() / half)
        cos, sin = angle.cos(), angle.sin()
        q, q_pe = self.wq(x).view(B, 1, s.N, -1).split([s.C, s.R], -1)
        q = torch.cat([q, rotate(q_pe, cos.unsqueeze(2), sin.unsqueeze(2))], -1)
        new, k_pe = self.wkv(x).split([s.C, s.R], -1)
        rows, scales = self._quantise(self.kv_norm(new))
        nope = self._store(nope, rows, position)
        scale = self._store(scale, scales, position)
        rope = self._store(rope, rotate(k_pe, cos, sin), position)
        keys = self._store(index_keys, self.index_k(x), position)
        score = torch.matmul(self.index_q(x).float(), keys.float().transpose(1, 2))
        if s.write == "slots":
            seen = torch.arange(s.S2) <= position.view(-1, 1, 1)
            score = score.masked_fill(~seen, float("-inf"))
        idx = score.topk(s.K, dim=-1)[1]
        pick = lambda t: t[torch.arange(B).view(-1, 1, 1), idx]  # noqa: E731
        tiles = pick(nope).float().unflatten(-1, (s.C // s.tile, s.tile))
        latent = (tiles * pick(scale).unsqueeze(-1)).flatten(-2)
        key = torch.cat([latent, pick(rope).float()], -1)
        x = torch.matmul(q.float(), key.transpose(-1, -2)) * (s.C + s.R) ** -0.5
        out = torch.matmul(torch.softmax(x, -1), latent).to(hidden.dtype)
        return hidden + self.wo(out.flatten(2)), nope, scale, rope, keys


def layer_feeds(s: Spec, seed: int) -> Feeds:
    rng = np.random.default_rng(seed)
    ft = NP_TYPES[s.dtype]
    past = s.S2 - 1 if s.write == "concat" else s.S2
    draw = lambda *shape: rng.standard_normal(shape).astype(ft)  # noqa: E731
    tiles = s.C // s.tile
    return {
        "hidden": draw(s.B, 1, s.hidden),
        "nope": rng.integers(-127, 128, (s.B, past, s.C)).astype(np.int8),
        "scale": rng.uniform(0.005, 0.03, (s.B, past, tiles)).astype(np.float32),
        "rope": draw(s.B, past, s.R),
        "index_keys": draw(s.B, past, s.index),
        "position": rng.integers(s.K + 1, past, s.B),
    }


class Ragged(nn.Module):
    """Several sequences packed along one token axis (TND), told apart by prefix sums."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.s = spec

    def forward(self, q, kv, indices, cu_q, cu_kv, block_table=None):
        s = self.s
        token = torch.arange(q.shape[0])
        batch = (token.unsqueeze(-1) >= cu_q).sum(-1)  # cu_q holds the ends
        zero = torch.zeros_like(cu_kv[:1])
        start = torch.cat([zero, cu_kv[:-1]])[batch]
        length = cu_kv[batch] - start
        idx = indices.long()
        limit = length
        if s.causal:
            limit = length - (cu_q[batch] - token) + 1
        seen = (idx >= 0) & (idx < limit.unsqueeze(-1))
        safe = torch.where(seen, idx, torch.zeros_like(idx))
        if s.layout == "paged":
            page = torch.gather(block_table.long()[batch], 1, safe // s.block)
            rows = kv.flatten(0, 1)[page * s.block + safe % s.block]
        else:
            rows = kv[safe + start.unsqueeze(-1)]
        x = torch.matmul(q, rows.transpose(-1, -2)) * (s.C + s.R) ** -0.5
        x = x.masked_fill(~seen.unsqueeze(1), float("-inf"))
        return torch.matmul(torch.softmax(x, -1), rows[..., : s.C])


def ragged_feeds(s: Spec, seed: int) -> Feeds:
    rng = np.random.default_rng(seed)
    f32 = np.float32
    q_len = rng.integers(1, 5, s.B + 1)
    kv_len = rng.integers(max(s.K, 8), s.S2 + 1, s.B + 1)
    q_len[-1] += 9 - q_len.sum() if q_len.sum() < 9 else 0  # 9 tokens whatever the seed
    while q_len.sum() > 9:
        q_len[np.argmax(q_len)] -= 1
    total = (s.B + 1) * s.S2
    rows = []
    for b, n in enumerate(q_len):
        for t in range(n):
            limit = kv_len[b] - n + t + 1 if s.causal else kv_len[b]
            row = rng.permutation(limit)[: s.K]
            rows.append(np.pad(row, (0, s.K - len(row)), constant_values=-1))
    out: Feeds = {
        "q": rng.standard_normal((9, s.N, s.C + s.R), f32),
        "kv": rng.standard_normal((total, s.C + s.R), f32),
        "indices": np.array(rows, np.int32),
        "cu_q": np.cumsum(q_len),
        "cu_kv": np.cumsum(kv_len),
    }
    if s.layout == "paged":
        pages = -(-s.S2 // s.block)
        blocks = (s.B + 1) * pages + 2
        out["kv"] = rng.standard_normal((blocks, s.block, s.C + s.R), f32)
        table = rng.permutation(blocks)[: (s.B + 1) * pages]
        out["block_table"] = table.reshape(s.B + 1, pages).astype(np.int32)
    return out


class Grouped(nn.Module):
    """Near miss: two key heads, each serving half of the query heads; or a scale as input."""

    def __init__(self, spec: Spec, kind: str) -> None:
        super().__init__()
        self.s, self.kind = spec, kind

    def forward(self, q, kv, indices, factor):
        s = self.s
        B, S1, N, D = q.shape
        rows = kv[torch.arange(B).view(-1, 1, 1), indices.long()]  # [B, S1, K, 2, D]
        if self.kind == "groups":
            k = rows.permute(0, 1, 3, 2, 4)  # [B, S1, 2, K, D]
            x = torch.matmul(q.view(B, S1, 2, N // 2, D), k.transpose(-1, -2)) * 0.1
            out = torch.matmul(torch.softmax(x, -1), k[..., : s.C])
            return out.reshape(B, S1, N, s.C)
        k = rows[..., 0, :]
        if self.kind == "other_head_value":
            v = rows[..., 1, : s.C]
        else:
            v = k[..., : s.C]
        x = torch.matmul(q, k.transpose(-1, -2))
        x = x * factor if self.kind == "runtime_scale" else x * 0.1
        return torch.matmul(torch.softmax(x, -1), v)


def grouped_feeds(s: Spec, seed: int) -> Feeds:
    rng = np.random.default_rng(seed)
    order = np.broadcast_to(np.arange(s.S2), (s.B, 3, s.S2))
    return {
        "q": rng.standard_normal((s.B, 3, s.N, s.C + s.R), np.float32),
        "kv": rng.standard_normal((s.B, s.S2, 2, s.C + s.R), np.float32),
        "indices": rng.permuted(order, axis=-1)[..., : s.K].astype(np.int32),
        "factor": np.array(0.07, np.float32),
    }


def _tags(s: Spec, **more) -> dict:
    tags = {"exporter": s.exporter, "opset": s.opset, "dtype": s.dtype, "dynamic": s.dynamic}
    return tags | more


def _layer_case(name: str, s: Spec) -> Case:
    axes = {n: {0: "batch"} for n in ("hidden", "position")}
    for n in ("nope", "scale", "rope", "index_keys"):
        axes[n] = {0: "batch", 1: "past_len"} if s.write == "concat" else {0: "batch"}

    def make():
        return export(
            Int8Layer(s),
            to_torch(layer_feeds(s, 0)),
            ("out", "new_nope", "new_scale", "new_rope", "new_index"),
            exporter=s.exporter,
            opset=s.opset,
            dynamic=axes if s.dynamic else None,
            optimize=s.optimize,
        )

    def make_feeds(seed: int) -> Feeds:
        if s.dynamic and seed % 2:
            more = 5 if s.write == "concat" else 0
            return layer_feeds(replace(s, B=s.B + 1, S2=s.S2 + more), seed)
        return layer_feeds(s, seed)

    return Case(f"layer8-{name}", "layer8", make, make_feeds, op=ANTIQUANT, tags=_tags(s))


def _ragged_case(name: str, s: Spec) -> Case:
    axes = {
        "q": {0: "tokens"},
        "kv": {0: "rows"},
        "indices": {0: "tokens"},
        "cu_q": {0: "batch"},
        "cu_kv": {0: "batch"},
        "block_table": {0: "batch"},
    }

    def make():
        feeds = ragged_feeds(s, 0)
        return export(
            Ragged(s),
            to_torch(feeds),
            exporter=s.exporter,
            opset=s.opset,
            dynamic={n: axes[n] for n in feeds} if s.dynamic else None,
        )

    make_feeds = lambda seed: ragged_feeds(s, seed)  # noqa: E731
    return Case(f"ragged-{name}", "ragged", make, make_feeds, op=FLOAT_KV, tags=_tags(s))


def cases() -> Iterator[Case]:
    base = Spec()
    for ex, opset in (("dynamo", 18), ("ts", 17)):
        s = replace(base, exporter=ex, opset=opset)
        for write in ("concat", "slots"):
            yield _layer_case(f"{write}-{ex}", replace(s, write=write))
            yield _layer_case(f"{write}-{ex}-dyn", replace(s, write=write, dynamic=True))
        for dtype in ("f16", "bf16"):
            yield _layer_case(f"{dtype}-{ex}", replace(s, dtype=dtype))
        for layout in ("packed", "paged"):
            r = replace(s, K=12, layout=layout)
            yield _ragged_case(f"{layout}-{ex}", r)
            yield _ragged_case(f"{layout}-{ex}-dyn", replace(r, dynamic=True))
            yield _ragged_case(f"{layout}-full-{ex}", replace(r, causal=False))
        for kind in ("groups", "other_head_value", "runtime_scale"):
            yield Case(
                f"extra-miss-{kind}-{ex}",
                "nearmiss",
                lambda s=s, kind=kind: export(
                    Grouped(s, kind),
                    to_torch(grouped_feeds(s, 0)),
                    exporter=s.exporter,
                    opset=s.opset,
                ),
                lambda seed, s=s: grouped_feeds(s, seed),
                expect="refuse",
                tags=_tags(s, or_right=True),
            )
    yield _layer_case("unoptimised", replace(base, optimize=False))
