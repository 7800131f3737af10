"""Family: known things combined in ways that no other family of the zoo has.

Loops over tiles of int8 rows, rows rounded to the type the query came from, another factor for the
rope part, per-head keys gathered chunk by chunk, masks in blocks, functional updates of masks.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from tests.zoo.base import Case, Feeds
from tests.zoo.forms import Form, case_of
from tests.zoo.kernels import INF, S1, S2, SCALE, B, C, D, K, N, R, rows_of, take

TILE = 8
HEAD, VALUE = 16, 12  # columns of a head's key and value


def tiles(rng: np.random.Generator) -> Feeds:
    return {
        "q": rng.standard_normal((B, N, S1, D)).astype(np.float32),
        "codes": rng.integers(-127, 128, (B, S2, C)).astype(np.int8),
        "scales": rng.uniform(0.005, 0.02, (B, S2, C // TILE)).astype(np.float32),
        "rope": rng.standard_normal((B, S2, R)).astype(np.float32),
        "indices": rows_of(rng, (B, S1), S2, holes=False),
    }


def divisors(rng: np.random.Generator) -> Feeds:
    """Rows are divided by what is stored."""
    found = tiles(rng)
    return {**found, "scales": (1 / found["scales"]).astype(np.float32)}


def tiled(divide: bool = False, wrong: str = ""):
    """int8 rows, dequantised tile by tile in a loop; key and value come from the same loop."""

    def forward(q, codes, scales, rope, indices):
        ints, by, tail = take(codes, indices), take(scales, indices), take(rope, indices)
        parts = []
        for t in range(C // TILE):
            part = ints[..., t * TILE : (t + 1) * TILE].float()
            scale = by[..., (t if wrong != "next" else (t + 1) % (C // TILE))]
            scale = scale.unsqueeze(-1)
            parts.append(part / scale if divide else part * scale)
        nope = torch.cat(parts, -1)
        rows = torch.cat([nope, tail], -1)
        x = torch.einsum("bnsd,bskd->bnsk", q, rows) * SCALE
        return torch.einsum("bnsk,bskd->bnsd", torch.softmax(x, -1), nope)

    return forward


def halved(rng: np.random.Generator) -> Feeds:
    """Query and rows in bfloat16, as they come."""
    import ml_dtypes

    return {
        "q": rng.standard_normal((B, N, S1, D)).astype(ml_dtypes.bfloat16),
        "kv": rng.standard_normal((B, S2, D)).astype(ml_dtypes.bfloat16),
        "indices": rows_of(rng, (B, S1), S2, holes=False),
    }


def cast_up(q, kv, indices):
    """Everything is cast to float32 first, and stays there."""
    rows = take(kv, indices).float()
    x = torch.einsum("bnsd,bskd->bnsk", q.float(), rows) * SCALE
    return torch.einsum("bnsk,bskd->bnsd", torch.softmax(x, -1), rows[..., :C])


def batches(rng: np.random.Generator) -> Feeds:
    return {
        "q": rng.standard_normal((B, N, S1, D)).astype(np.float32),
        "kv": rng.standard_normal((B, S2, D)).astype(np.float32),
        "indices": rows_of(rng, (B, S1), S2, holes=False),
    }


def two_factors(q, kv, indices):
    """Rope scores have a factor of their own."""
    rows = take(kv, indices)
    nope = torch.einsum("bnsd,bskd->bnsk", q[..., :C], rows[..., :C]) * C**-0.5
    rope = torch.einsum("bnsd,bskd->bnsk", q[..., C:], rows[..., C:]) * R**-0.5
    return torch.einsum("bnsk,bskd->bnsd", torch.softmax(nope + rope, -1), rows[..., :C])


def scattered(update):
    """Dense scores with a selection mask that `update` makes."""

    def forward(q, kv, indices):
        x = q @ kv.unsqueeze(1).transpose(-1, -2) * SCALE
        keep = torch.zeros(B, q.shape[2], kv.shape[1], dtype=torch.bool)
        keep = keep.scatter(-1, indices, torch.ones_like(indices, dtype=torch.bool))
        return torch.softmax(update(x, keep), -1) @ kv[..., :C].unsqueeze(1)

    return forward


def in_blocks(x, keep):
    """A mask per block of keys, on a 5-D view of the scores."""
    b, n, s, t = x.shape
    blocks = torch.arange(t // 8).view(1, 1, 1, -1, 1) <= torch.arange(s).view(1, 1, -1, 1, 1) + 2
    x = x.masked_fill(~keep.unsqueeze(1), -INF).view(b, n, s, t // 8, 8)
    return x.masked_fill(~blocks, -INF).view(b, n, s, t)


def functional(q, kv, indices):
    """A mask set at [batch, token, index], negative indices wrapped first."""
    x = q @ kv.unsqueeze(1).transpose(-1, -2) * SCALE
    b, s, t = q.shape[0], q.shape[2], kv.shape[1]
    at = torch.where(indices < 0, indices + t, indices)
    batch, token = torch.arange(b).view(-1, 1, 1), torch.arange(s).view(1, -1, 1)
    keep = torch.zeros(b, s, t, dtype=torch.bool)
    keep = keep.index_put((batch, token, at), torch.tensor(True))
    return torch.softmax(torch.where(keep.unsqueeze(1), x, -INF), -1) @ kv[..., :C].unsqueeze(1)


# -- per-head keys and values, expanded, gathered and folded chunk by chunk ------------------------


def heads(rng: np.random.Generator) -> Feeds:
    return {
        "q": rng.standard_normal((S1, B, N, HEAD + R)).astype(np.float32),
        "latent": rng.standard_normal((S2, B, C)).astype(np.float32),
        "rope": rng.standard_normal((S2, B, 1, R)).astype(np.float32),
        "indices": rows_of(rng, (B, S1), S2),
    }


class Expanded(torch.nn.Module):
    """Sequences first; every batch and every few heads by themselves, chunk by chunk."""

    def __init__(self, chunk: int, heads_at_once: int, bias: bool) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(3)
        self.up = torch.nn.Parameter(torch.randn(C, N * (HEAD + VALUE), generator=rng) / C**0.5)
        self.chunk, self.some, self.bias = chunk, heads_at_once, bias

    def forward(self, q, latent, rope, indices):
        up = (latent @ self.up).view(S2, B, N, HEAD + VALUE)
        key = torch.cat([up[..., :HEAD], rope.expand(-1, -1, N, -1)], -1).permute(1, 2, 0, 3)
        value = up[..., HEAD:].permute(1, 2, 0, 3)
        q = q.permute(1, 2, 0, 3)
        s = q.shape[2]
        causal = torch.triu(torch.full((s, S2), -INF), diagonal=S2 - s + 1)
        out = torch.empty(s, B, N * VALUE)
        for b in range(B):
            for h in range(0, N, self.some):
                keys = key[b, h : h + self.some].reshape(self.some * S2, -1)
                values = value[b, h : h + self.some].reshape(self.some * S2, -1)
                offset = torch.arange(self.some).view(-1, 1, 1) * S2
                chosen, valid = indices[b].clamp(min=0, max=S2 - 1), indices[b] >= 0
                m = torch.full((self.some, s), -INF)
                total = torch.zeros(self.some, s)
                acc = torch.zeros(self.some, s, VALUE)
                for t in range(0, K, self.chunk):
                    idx = chosen[:, t : t + self.chunk]
                    flat = (idx.unsqueeze(0) + offset).reshape(-1)
                    k = keys.index_select(0, flat).view(self.some, s, -1, HEAD + R)
                    v = values.index_select(0, flat).view(self.some, s, -1, VALUE)
                    x = (q[b, h : h + self.some].unsqueeze(2) * k).sum(-1) * SCALE
                    bias = causal.gather(-1, idx)
                    seen = valid[:, t : t + self.chunk] & torch.isfinite(bias)
                    x = x + (bias if not self.bias else bias + 0.1 * idx).unsqueeze(0)
                    x = x.masked_fill(~seen.unsqueeze(0).expand(self.some, -1, -1), -INF)
                    new = torch.maximum(m, x.max(-1).values)
                    alpha = torch.nan_to_num(torch.exp(m - new), 0.0, 0.0, 0.0)
                    p = torch.nan_to_num(torch.exp(x - new.unsqueeze(-1)), 0.0, 0.0, 0.0)
                    acc = acc * alpha.unsqueeze(-1) + torch.einsum("hst,hstd->hsd", p, v)
                    total = total * alpha + p.sum(-1)
                    m = new
                part = acc / total.clamp_min(1e-10).unsqueeze(-1)
                low, high = h * VALUE, (h + self.some) * VALUE
                out[:, b, low:high] = part.permute(1, 0, 2).reshape(s, self.some * VALUE)
        return out


def _forms() -> Iterator[Form]:
    many = {"q": {0: "b", 2: "s"}, "kv": {0: "b", 1: "keys"}, "indices": {0: "b", 1: "s"}}
    wide = {
        "codes": {0: "b", 1: "keys"},
        "scales": {0: "b", 1: "keys"},
        "rope": {0: "b", 1: "keys"},
    }
    dynamic = {**many, **wide}
    int8 = "NPUSparseFlashAttentionAntiquant"
    yield Form("tiles", tiled(), tiles, dynamic, op=int8)
    yield Form("tiles-divided", tiled(divide=True), divisors, dynamic, op=int8)
    yield Form("tiles-next-scale", tiled(wrong="next"), tiles, refuse=".")
    yield Form("cast-up", cast_up, halved, many, dtype="bf16")
    yield Form("two-factors", two_factors, batches, many)
    yield Form("blocks", scattered(in_blocks), batches)
    yield Form("functional", functional, batches, many, exporters=("dynamo",))
    for chunk, some in ((K, N), (5, N), (4, 2)):
        sites = B * N // some
        name = f"expanded-{chunk}-{some}"
        yield Form(name, Expanded(chunk, some, bias=False), heads, sites=sites)
    yield Form("expanded-bias", Expanded(4, N, bias=True), heads, refuse=".")


def cases() -> Iterator[Case]:
    for form in _forms():
        for exporter in form.exporters:
            yield case_of("foreign", form, exporter, dynamic=False)
            if form.dynamic:
                yield case_of("foreign", form, exporter, dynamic=True)
