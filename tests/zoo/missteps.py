"""The steps that near misses take instead: name -> (overridden methods, refusal's pattern)."""

from __future__ import annotations

import torch

from tests.zoo.honest import S1, S2, SCALE, TILE, B, C, Gathered, K, N, R


# ---- steps on scores: (name, method overrides, reason) -------------------------------------------
def _sink(self, x):
    """A sink that grows from token to token: one number per head is what the operator takes."""
    grown = self.sink.reshape(1, 1, N, 1) * torch.arange(1.0, S1 + 1).reshape(1, S1, 1, 1)
    column = grown.expand(B, S1, N, 1)
    return torch.softmax(torch.cat([x, column], -1), -1)[..., :-1]


def _sink_input(self, x):
    column = self.extra[:, :1, :1].unsqueeze(1).expand(B, S1, N, 1)
    return torch.softmax(torch.cat([x, column], -1), -1)[..., :-1]


def _plus_one(self, x):
    e = torch.exp(x - x.amax(-1, keepdim=True).detach())
    return e / (e.sum(-1, keepdim=True) + 1.0)


def _epsilon(self, x):
    e = torch.exp(x)
    return e / (e.sum(-1, keepdim=True) + 1e-6)


def _no_norm(self, x):
    return torch.exp(x - x.amax(-1, keepdim=True))


HEAD = torch.tensor([1.0, 1.0, 1.0, 1.001]).reshape(1, 1, N, 1)
SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625]).reshape(1, 1, N, 1)


def _ramp(x):
    return torch.arange(x.shape[-1], dtype=torch.float32)


STEPS = {
    "softcap": ({"temper": lambda s, x: 30.0 * torch.tanh(x * SCALE / 30.0)}, "tanh"),
    "softcap-huge": ({"temper": lambda s, x: 1e4 * torch.tanh(x * SCALE / 1e4)}, "tanh"),
    "clip": ({"temper": lambda s, x: (x * SCALE).clamp(-50.0, 50.0)}, "clip|min|max"),
    "clip-huge": ({"temper": lambda s, x: (x * SCALE).clamp(max=1e30)}, "clip|min|max"),
    "relu": ({"temper": lambda s, x: torch.relu(x * SCALE)}, "relu"),
    "round": ({"temper": lambda s, x: torch.round(x * SCALE * 64) / 64}, "round"),
    "bias": ({"temper": lambda s, x: x * SCALE + s.bias * _ramp(x)}, ""),
    "bias-tiny": ({"temper": lambda s, x: x * SCALE + 1e-7 * _ramp(x)}, ""),
    "bias-input": (
        {"temper": lambda s, x: x * SCALE + s.extra[:, None, None, : x.shape[-1], 0]},
        "",
    ),
    "alibi": ({"temper": lambda s, x: x * SCALE - SLOPES * _ramp(x)}, ""),
    "per-head-scale": ({"temper": lambda s, x: x * SCALE * HEAD}, ""),
    "row-temperature": (
        {"temper": lambda s, x: x * SCALE * (2 + torch.tanh(s.extra[:, :S1, 0]))[:, :, None, None]},
        "",
    ),
    "key-temperature": ({"temper": lambda s, x: x * (SCALE + 0.001 * _ramp(x))}, ""),
    "square": ({"temper": lambda s, x: x * SCALE * (x * SCALE)}, ""),
    "abs": ({"temper": lambda s, x: torch.abs(x) * SCALE}, "abs"),
    "sink": ({"normalise": _sink}, "concat|sink"),
    "sink-input": ({"normalise": _sink_input}, "concat|sink"),
    "plus-one": ({"normalise": _plus_one}, ""),
    "epsilon": ({"normalise": _epsilon}, ""),
    "no-norm": ({"normalise": _no_norm}, ""),
    "wrong-axis-heads": ({"normalise": lambda s, x: torch.softmax(x, dim=2)}, "axis"),
    "wrong-axis-rows": ({"normalise": lambda s, x: torch.softmax(x, dim=1)}, "axis"),
    "log-softmax": ({"normalise": lambda s, x: torch.log_softmax(x, -1).clamp(min=-99)}, ""),
    "sigmoid": ({"normalise": lambda s, x: torch.sigmoid(x)}, ""),
    "weighted-probs": ({"weigh": lambda s, p: p * torch.exp(-0.01 * _ramp(p))}, ""),
    "halved-probs": ({"weigh": lambda s, p: p * 0.5}, ""),
    "squared-probs": ({"weigh": lambda s, p: p * p}, ""),
    "thresholded-probs": ({"weigh": lambda s, p: torch.where(p > 1e-6, p, torch.zeros(()))}, ""),
    "dropout": ({"weigh": lambda s, p: torch.dropout(p, 0.5, True)}, ""),
    "head-mix": ({"weigh": lambda s, p: torch.einsum("bshk,hg->bsgk", p, s.mix)}, ""),
    "probs-output": ({"result": lambda s, o, p, x: (o, p)}, "output|outside|used by"),
    "probs-read": (
        {"result": lambda s, o, p, x: (o, p.amax(-1))},
        "output|outside|used by|read",
    ),
    "scores-output": ({"result": lambda s, o, p, x: (o, x)}, "output|outside|used by"),
    "lse-output": (
        {"result": lambda s, o, p, x: (o, torch.logsumexp(x / 2, -1))},  # not the softmax's own
        "output|outside|used by|log-sum-exp",
    ),
    "entropy-read": (
        {"result": lambda s, o, p, x: (o, -(p * torch.log(p + 1e-9)).sum(-1))},
        "output|outside|used by|read",
    ),
}


# ---- steps on keys, values and masks of the gathered form ---------------------------------------
def _repeat_tiles(self, nope, scale):  # tile t serves columns t, t+T, t+2T ... instead of a block
    return nope.float() * scale.repeat(1, 1, 1, TILE)


def _zero_point(self, nope, scale):
    x = (nope.float() - 3.0).reshape(B, S1, K, C // TILE, TILE) * scale.unsqueeze(-1)
    return x.reshape(B, S1, K, C)


def _reversed_scales(self, nope, scale):
    return Gathered.dequant(self, nope, scale.flip(-1))


def _nonlinear(self, nope, scale):
    x = nope.float()
    x = (x + 1e-3 * x.abs()).reshape(B, S1, K, C // TILE, TILE) * scale.unsqueeze(-1)
    return x.reshape(B, S1, K, C)


def _uneven(self, nope, scale):
    x = nope.float()
    return torch.cat([x[..., :24] * scale[..., :1], x[..., 24:] * scale[..., 1:]], -1)


def _swapped_key(self, nope, rope, scale, idx):
    k = self.dequant(self.rows(nope, idx), self.rows(scale, idx))
    return torch.cat([self.rows(rope, idx), k], -1)


def _rope_other_rows(self, nope, rope, scale, idx):
    k = self.dequant(self.rows(nope, idx), self.rows(scale, idx))
    return torch.cat([k, self.rows(rope, (idx + 1) % S2)], -1)


def _scale_other_rows(self, nope, rope, scale, idx):
    k = self.dequant(self.rows(nope, idx), self.rows(scale, (idx + 1) % S2))
    return torch.cat([k, self.rows(rope, idx)], -1)


def _rope_rotated(self, nope, rope, scale, idx):
    k = self.dequant(self.rows(nope, idx), self.rows(scale, idx))
    r = self.rows(rope, idx)
    angle = idx.unsqueeze(-1).float() * 0.01
    return torch.cat([k, r * torch.cos(angle)], -1)


def _other_batch(self, cache, idx):
    base = torch.arange(B).flip(0).reshape(B, 1, 1) * S2
    return cache.reshape(B * S2, -1)[idx + base]


def _first_batch(self, cache, idx):
    return cache[0][idx]


def _stride(self, cache, idx):  # rows of a cache laid out [S2, B]
    return cache.reshape(B * S2, -1)[idx * B + torch.arange(B).reshape(B, 1, 1)]


def _rows_value(change):
    def pick(self, key, nope, scale, idx, extra):
        other = change(idx)
        return self.dequant(self.rows(nope, other), self.rows(scale, other))

    return pick


def _value_scales(self, key, nope, scale, idx, extra):
    return self.dequant(self.rows(nope, idx), self.rows(scale, idx) * 1.5)


def _other_cache(self, key, nope, scale, idx, extra):
    return self.rows(extra, idx)


def _head_hide(self, x, idx):
    head = torch.arange(N).reshape(1, 1, N, 1)
    return x.masked_fill((idx.unsqueeze(2) < 0) | (idx.unsqueeze(2) % N == head), float("-inf"))


def _inverted(self, x, idx):
    return x.masked_fill((idx >= 0).unsqueeze(2), float("-inf"))


GATHERED = {
    "tile-repeat": ({"dequant": _repeat_tiles}, ""),
    "zero-point": ({"dequant": _zero_point}, "rows are changed by Sub "),
    "reversed-scales": ({"dequant": _reversed_scales}, ""),
    "nonlinear-dequant": ({"dequant": _nonlinear}, "rows are changed by Abs "),
    "uneven-tiles": ({"dequant": _uneven}, ""),
    "rope-first-value": ({"key": _swapped_key}, ""),
    "rope-other-rows": ({"key": _rope_other_rows}, ""),
    "scale-other-rows": ({"key": _scale_other_rows}, ""),
    "rope-rotated-after": ({"key": _rope_rotated}, ""),
    "other-batch": ({"rows": _other_batch}, ""),
    "first-batch": ({"rows": _first_batch}, ""),
    "interleaved-batch": ({"rows": _stride}, ""),
    "value-shifted": ({"values": lambda s, k: k[..., 1 : C + 1]}, "value"),
    "value-tail": ({"values": lambda s, k: k[..., R:]}, "value"),
    "value-half": ({"values": lambda s, k: k[..., : C // 2]}, ""),
    "value-whole-key": ({"values": lambda s, k: k}, ""),
    "value-flipped": ({"values": lambda s, k: k[..., :C].flip(-1)}, ""),
    "value-plus": ({"values": lambda s, k: k[..., :C] + 1e-3}, ""),
    "value-doubled": ({"values": lambda s, k: k[..., :C] * 2.0}, ""),
    "value-rolled-keys": ({"values": lambda s, k: k[..., :C].flip(2)}, ""),
    "value-next-row": ({"pick": _rows_value(lambda i: (i + 1) % S2)}, ""),
    "value-sorted-rows": ({"pick": _rows_value(lambda i: torch.sort(i, -1)[0])}, ""),
    "value-other-scales": ({"pick": _value_scales}, ""),
    "value-other-cache": ({"pick": _other_cache}, ""),
    "mask-per-head": ({"hide": _head_hide}, ""),
    "mask-inverted": ({"hide": _inverted}, ""),
    "mask-soft": ({"hide": lambda s, x, i: torch.where((i < 0).unsqueeze(2), x - 10.0, x)}, ""),
    "mask-zero": ({"hide": lambda s, x, i: x * (i >= 0).unsqueeze(2)}, ""),
    "mask-small": ({"hide": lambda s, x, i: x.masked_fill((i < 0).unsqueeze(2), -20.0)}, ""),
}


# ---- steps of the dense form ----
def _or_window(self, x, idx):
    keep = torch.zeros(B, S1, S2).scatter(-1, idx, torch.ones(idx.shape)) > 0
    keep = keep | (torch.arange(S2) >= S2 - 5)
    return x.masked_fill(~keep.unsqueeze(2), float("-inf"))


def _inverted_dense(self, x, idx):
    keep = torch.ones(B, S1, S2).scatter(-1, idx, torch.zeros(idx.shape)) > 0
    return x.masked_fill(~keep.unsqueeze(2), float("-inf"))


def _soft_dense(self, x, idx):
    m = torch.full((B, S1, S2), -8.0).scatter(-1, idx, torch.zeros(idx.shape))
    return x + m.unsqueeze(2)


def _bonus(self, x, idx):
    m = torch.full((B, S1, S2), float("-inf")).scatter(-1, idx, torch.full(idx.shape, 0.0))
    bonus = torch.zeros(B, S1, S2).scatter(-1, idx[..., :1], torch.ones(B, S1, 1))
    return x + (m + bonus).unsqueeze(2)


def _score_bias(self, x, idx):
    values = torch.linspace(0, -1, K).expand(B, S1, K)
    m = torch.full((B, S1, S2), float("-inf")).scatter(-1, idx, values)
    return x + m.unsqueeze(2)


def _per_head_dense(self, x, idx):
    m = torch.full((B, N, S2), float("-inf")).scatter(-1, idx[:, :1].expand(B, N, K), 0.0)
    m = m + torch.where(torch.arange(S2) == 7, self.bias.reshape(-1)[0], torch.zeros(()))
    return x + m.unsqueeze(1)


def _log_count(self, x, idx):
    count = torch.zeros(B, S1, S2).scatter_add(-1, idx // 2, torch.ones(idx.shape))
    return x + torch.log(count).unsqueeze(2)


DENSE = {
    "or-window": ({"hide": _or_window}, ""),
    "mask-inverted": ({"hide": _inverted_dense}, ""),
    "mask-soft": ({"hide": _soft_dense}, "adds -8 to scores"),
    "mask-bonus": ({"hide": _bonus}, "adds 1 to scores"),
    "mask-graded": ({"hide": _score_bias}, ""),
    "mask-log-count": ({"hide": _log_count}, ""),
    "mask-bias": ({"hide": _per_head_dense}, ""),
    "value-other-cache": ({"pick": lambda s, c, r, e: e}, "value"),
    "value-shifted": ({"pick": lambda s, c, r, e: c.roll(1, -1)}, ""),
    "value-next-row": ({"pick": lambda s, c, r, e: c.roll(1, 1)}, ""),
    "value-scaled": ({"pick": lambda s, c, r, e: c * 1.0001}, ""),
}
