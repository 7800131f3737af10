"""Two honest pipelines that near misses change one step of."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from tests.zoo.base import Feeds

B, S1, N, S2, K, C, R, TILE = 2, 3, 4, 48, 12, 64, 16, 32
SCALE = (C + R) ** -0.5


class Pipeline(nn.Module):
    """The steps that near misses override."""

    def temper(self, x):  # scores before the mask [B, S1, N, keys]
        return x * SCALE

    def normalise(self, x):
        return torch.softmax(x, dim=-1)

    def weigh(self, p):
        return p

    def values(self, key):
        return key[..., :C]

    def result(self, out, p, x):
        return out


class Gathered(Pipeline):
    """int8 rows gathered by indices, dequantised, absorbed attention; honest as it stands."""

    def rows(self, cache, idx):
        base = torch.arange(B).reshape(B, 1, 1) * S2
        return cache.reshape(B * S2, -1)[idx + base]

    def dequant(self, nope, scale):
        x = nope.float().reshape(B, S1, K, C // TILE, TILE) * scale.unsqueeze(-1)
        return x.reshape(B, S1, K, C)

    def hide(self, x, idx):
        return x.masked_fill((idx < 0).unsqueeze(2), float("-inf"))

    def key(self, nope, rope, scale, idx):
        k = self.dequant(self.rows(nope, idx), self.rows(scale, idx))
        return torch.cat([k, self.rows(rope, idx)], -1)

    def pick(self, key, nope, scale, idx, extra):
        return self.values(key)

    def forward(self, query, nope, rope, scale, indices, extra):
        idx = indices.long()
        safe = idx.clamp(min=0)
        key = self.key(nope, rope, scale, safe)
        self.extra = extra
        x = self.hide(self.temper(torch.matmul(query, key.transpose(-1, -2))), idx)
        p = self.weigh(self.normalise(x))
        out = torch.matmul(p, self.pick(key, nope, scale, safe, extra))
        return self.result(out, p, x)


class Dense(Pipeline):
    """Float latents, dense scores under a mask scattered from top-k; honest as it stands."""

    def choose(self, score):
        return score.topk(K, dim=-1)[1]

    def hide(self, x, idx):
        m = torch.full((B, S1, S2), float("-inf")).scatter(-1, idx, 0.0)
        return x + m.unsqueeze(2)

    def pick(self, latent, rope, extra):
        return latent

    def forward(self, q_nope, q_rope, latent, rope, score, extra):
        idx = self.choose(score)
        self.extra = extra
        x = torch.einsum("bshc,btc->bsht", q_nope, latent)
        x = x + torch.einsum("bshr,btr->bsht", q_rope, rope)
        x = self.hide(self.temper(x), idx)
        p = self.weigh(self.normalise(x))
        out = torch.einsum("bsht,btc->bshc", p, self.pick(latent, rope, extra))
        return self.result(out, p, x)


def gathered_feeds(seed: int, extra: np.ndarray | None = None) -> Feeds:
    rng = np.random.default_rng(seed)
    idx = rng.permuted(np.broadcast_to(np.arange(S2), (B, S1, S2)), axis=-1)[..., :K]
    idx[:, :, K - 1] = idx[:, 1, K - 4 :] = -1
    return {
        "query": rng.standard_normal((B, S1, N, C + R), np.float32),
        "nope": rng.integers(-127, 128, (B, S2, C)).astype(np.int8),
        "rope": rng.standard_normal((B, S2, R), np.float32),
        "scale": rng.uniform(0.005, 0.03, (B, S2, C // TILE)).astype(np.float32),
        "indices": idx.astype(np.int32),
        "extra": rng.standard_normal((B, S2, C), np.float32) if extra is None else extra,
    }


def dense_feeds(seed: int) -> Feeds:
    rng = np.random.default_rng(seed)
    return {
        "q_nope": rng.standard_normal((B, S1, N, C), np.float32),
        "q_rope": rng.standard_normal((B, S1, N, R), np.float32),
        "latent": rng.standard_normal((B, S2, C), np.float32),
        "rope": rng.standard_normal((B, S2, R), np.float32),
        "score": rng.standard_normal((B, S1, S2), np.float32),
        "extra": rng.standard_normal((B, S2, C), np.float32),
    }
