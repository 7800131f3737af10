"""Family: float latent cache, absorbed decode, dense scores under a scattered mask.

`Core` is the attention alone, with the mask's spellings; `Layer` is a whole small decode layer
around it: low-rank query, rotary parts, latent cache, indexer with top-k, output projection.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import onnx
import torch
from torch import nn

from tests.zoo.base import FLOAT_KV, NP_TYPES, Case, Feeds, export, to_torch, torch_dtype


@dataclass(frozen=True)
class Spec:
    """Sizes and spellings of one case."""

    B: int = 2
    S1: int = 1
    N: int = 4
    S2: int = 48
    K: int = 16
    C: int = 64
    R: int = 16
    nope: int = 32  # per head, before absorption
    v: int = 32
    hidden: int = 96
    q_lora: int = 48
    index_heads: int = 4
    index_dim: int = 32
    dtype: str = "f32"
    float_mm: bool = False  # every einsum in float32 (q.float(), k.float())
    mask: str = "full_inf"
    select: str = "input"  # indices are a graph input, or "topk" of given scores
    scale_at: str = "after"  # "after", "query", "before_mask_no": see Core
    product: str = "einsum"
    softmax: str = "softmax"
    squeeze: bool = True  # caches without a head axis
    cache: str = "concat"  # Layer: "concat" or "slots" (written at a baked position)
    exporter: str = "dynamo"
    opset: int = 18
    dynamic: bool = False

    @property
    def scale_value(self) -> float:
        return (self.nope + self.R) ** -0.5


def sparse_mask(scores, idx, kind):
    """`scores` [B, S1, N, S2] masked outside `idx` [B, S1, K]; the spellings people use."""
    B, S1, _, S2 = scores.shape
    if kind == "full_inf":
        m = torch.full((B, S1, S2), float("-inf"), dtype=scores.dtype).scatter_(-1, idx, 0)
        return scores + m.unsqueeze(2)
    if kind == "full_big":
        m = torch.full((B, S1, S2), -1e9, dtype=scores.dtype)
        return scores + m.scatter(-1, idx, 0.0).unsqueeze(2)
    if kind == "finfo":
        m = torch.full((B, S1, S2), torch.finfo(scores.dtype).min, dtype=scores.dtype)
        return scores + m.scatter(-1, idx, torch.zeros(idx.shape, dtype=scores.dtype)).unsqueeze(2)
    if kind == "bool_keep":
        keep = torch.zeros(B, S1, S2, dtype=torch.bool)
        keep = keep.scatter(-1, idx, torch.ones_like(idx, dtype=torch.bool))
        return scores.masked_fill(~keep.unsqueeze(2), float("-inf"))
    if kind == "bool_drop":
        drop = torch.ones(B, S1, S2, dtype=torch.bool)
        drop = drop.scatter(-1, idx, torch.zeros_like(idx, dtype=torch.bool))
        return scores.masked_fill(drop.unsqueeze(2), float("-inf"))
    if kind == "where":
        keep = torch.zeros(B, S1, S2).scatter(-1, idx, torch.ones(idx.shape))
        return torch.where(keep.unsqueeze(2) > 0.5, scores, torch.full_like(scores, -torch.inf))
    if kind == "trash":  # one column more; invalid entries point at it
        safe = torch.where(idx >= 0, idx, torch.full_like(idx, S2))
        keep = torch.zeros(B, S1, S2 + 1, dtype=torch.bool)
        keep = keep.scatter(-1, safe, torch.ones_like(safe, dtype=torch.bool))[..., :S2]
        return scores.masked_fill(~keep.unsqueeze(2), float("-inf"))
    if kind == "trash_float":
        safe = torch.where(idx < 0, torch.full_like(idx, S2), idx)
        m = torch.full((B, S1, S2 + 1), float("-inf"), dtype=scores.dtype)
        m = m.scatter(-1, safe, torch.zeros(idx.shape, dtype=scores.dtype))[..., :-1]
        return scores + m.unsqueeze(2)
    if kind == "one_hot":  # mask by reduction
        hit = (idx.unsqueeze(-1) == torch.arange(S2)).any(dim=2)
        return scores.masked_fill(~hit.unsqueeze(2), float("-inf"))
    if kind == "count":
        hits = torch.zeros(B, S1, S2).scatter_add(-1, idx, torch.ones(idx.shape))
        return torch.where((hits != 0).unsqueeze(2), scores, torch.tensor(float("-inf")))
    raise ValueError(kind)


def softmax(x, kind):
    if kind == "softmax":
        return torch.softmax(x, dim=-1)
    if kind == "manual":
        e = torch.exp(x - x.max(dim=-1, keepdim=True).values)
        return e / e.sum(-1, keepdim=True)
    if kind == "exp2":
        x = x * 1.4426950408889634
        e = torch.exp2(x - x.amax(-1, keepdim=True))
        return e / e.sum(-1, keepdim=True)
    if kind == "lse":
        return torch.exp(x - torch.logsumexp(x, -1, keepdim=True))
    raise ValueError(kind)


def absorbed(q_nope, q_rope, latent, rope, idx, s, causal=None):
    """[B, S1, N, C] from absorbed queries and the two caches."""
    kind = q_nope.dtype
    up = (lambda t: t.float()) if s.float_mm else (lambda t: t)
    if s.scale_at == "query":
        q_nope, q_rope = q_nope * s.scale_value, q_rope * s.scale_value
    if s.product == "einsum":
        x = torch.einsum("bshc,btc->bsht", up(q_nope), up(latent))
        x = x + torch.einsum("bshr,btr->bsht", up(q_rope), up(rope))
    elif s.product == "wide":  # 576 wide query and key, kept together
        q = torch.cat([up(q_nope), up(q_rope)], -1)
        k = torch.cat([up(latent), up(rope)], -1)
        x = torch.matmul(q, k.unsqueeze(1).transpose(-1, -2))
    elif s.product == "matmul":
        x = torch.matmul(up(q_nope), up(latent).unsqueeze(1).transpose(-1, -2))
        x = x + torch.matmul(up(q_rope), up(rope).unsqueeze(1).transpose(-1, -2))
    elif s.product == "kv_axis":  # the key's head axis is kept: groups of heads per kv head
        q = torch.cat([up(q_nope), up(q_rope)], -1).unsqueeze(2)
        k = torch.cat([up(latent), up(rope)], -1).unsqueeze(2)
        x = torch.einsum("bmghd,bngd->bghmn", q, k)[:, 0].transpose(1, 2)
    else:
        raise ValueError(s.product)
    if s.scale_at == "after":
        x = x * s.scale_value
    if s.scale_at == "div":
        x = x / (s.scale_value**-1)
    x = sparse_mask(x, idx, s.mask)
    if causal is not None:
        x = x + causal
    if s.scale_at == "after_mask":
        x = x * s.scale_value
    p = softmax(x.float(), s.softmax).to(kind)
    if s.product == "einsum":
        return torch.einsum("bsht,btc->bshc", up(p), up(latent)).to(kind)
    return torch.matmul(up(p), up(latent).unsqueeze(1)).to(kind)


class Core(nn.Module):
    """Absorbed attention under a scattered mask; everything but the mask is an input."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.s = spec

    def forward(self, q_nope, q_rope, kv_cache, pe_cache, selection):
        s = self.s
        if not s.squeeze:
            kv_cache, pe_cache = kv_cache.squeeze(2), pe_cache.squeeze(2)
        idx = selection.long() if s.select == "input" else selection.topk(s.K, dim=-1)[1]
        return absorbed(q_nope, q_rope, kv_cache, pe_cache, idx, s)


def core_feeds(s: Spec, seed: int) -> Feeds:
    rng = np.random.default_rng(seed)
    ft = NP_TYPES[s.dtype]
    lead = (s.B, s.S2) if s.squeeze else (s.B, s.S2, 1)
    if s.select == "topk":
        selection = rng.permuted(
            np.broadcast_to(np.arange(s.S2, dtype=np.float32), (s.B, s.S1, s.S2)), axis=-1
        )
    else:
        order = np.broadcast_to(np.arange(s.S2), (s.B, s.S1, s.S2))
        selection = rng.permuted(order, axis=-1)[..., : s.K].astype(np.int64)
        if s.mask.startswith("trash"):
            selection[..., -3:] = -1
    return {
        "q_nope": rng.standard_normal((s.B, s.S1, s.N, s.C)).astype(ft),
        "q_rope": rng.standard_normal((s.B, s.S1, s.N, s.R)).astype(ft),
        "kv_cache": rng.standard_normal((*lead, s.C)).astype(ft),
        "pe_cache": rng.standard_normal((*lead, s.R)).astype(ft),
        "selection": selection,
    }


def core_stress(s: Spec, seed: int) -> Feeds:
    """Duplicates (a scattered mask counts them once) and, where masked, -1 anywhere."""
    f = core_feeds(s, seed)
    f["selection"][..., 1] = f["selection"][..., 0]
    if s.mask.startswith("trash"):
        f["selection"][..., 3] = -1
    return f


class Norm(nn.Module):
    """Root-mean-square normalisation, as models write it by hand."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(1 + 0.1 * torch.randn(width))

    def forward(self, x):
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-6)
        return (self.weight * y).type_as(x)


def rotate(x, cos, sin):
    """Rotary embedding, half-split pairs; cos and sin [S1, R/2] broadcast over heads."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1).type_as(x)


class Layer(nn.Module):
    """One small decode layer in the absorbed form: past caches in, new caches out."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        s = self.s = spec
        torch.manual_seed(0)
        self.norm, self.q_norm, self.kv_norm = Norm(s.hidden), Norm(s.q_lora), Norm(s.C)
        self.k_norm = nn.LayerNorm(s.index_dim)
        linear = lambda i, o: nn.Linear(i, o, bias=False)  # noqa: E731
        self.wq_a, self.wq_b = linear(s.hidden, s.q_lora), linear(s.q_lora, s.N * (s.nope + s.R))
        self.wkv_a = linear(s.hidden, s.C + s.R)
        self.wkv_b = linear(s.C, s.N * (s.nope + s.v))
        self.wo = linear(s.N * s.v, s.hidden)
        self.index_q = linear(s.q_lora, s.index_heads * s.index_dim)
        self.index_k = linear(s.hidden, s.index_dim)
        self.index_w = linear(s.hidden, s.index_heads)
        self.to(torch_dtype(s.dtype))

    def _rope_table(self, position, length):
        half = self.s.R // 2
        freq = 10000.0 ** (-torch.arange(half).float() / half)
        angle = (position + torch.arange(length)).float()[:, None] * freq
        return angle.cos(), angle.sin()

    def _cached(self, past, new):
        if self.s.cache == "concat":
            return torch.cat([past, new], 1)
        past = past.clone()
        past[:, self.s.S2 - self.s.S1 :] = new
        return past

    def _indexer(self, x, qr, past_index):
        s = self.s
        B, S1, _ = x.shape
        q = self.index_q(qr).view(B, S1, s.index_heads, s.index_dim)
        keys = self._cached(past_index, self.k_norm(self.index_k(x)))
        w = self.index_w(x) * s.index_heads**-0.5
        score = torch.relu(torch.einsum("bshd,btd->bsht", q, keys) * s.index_dim**-0.5)
        score = (score * w.unsqueeze(-1)).sum(2)
        return score.topk(s.K, dim=-1)[1], keys

    def forward(self, hidden, past_kv, past_pe, past_index, position):
        s = self.s
        B, S1, _ = hidden.shape
        x = self.norm(hidden)
        cos, sin = self._rope_table(position, S1)
        qr = self.q_norm(self.wq_a(x))
        q_nope, q_pe = self.wq_b(qr).view(B, S1, s.N, -1).split([s.nope, s.R], -1)
        q_pe = rotate(q_pe, cos[:, None], sin[:, None])
        latent, k_pe = self.wkv_a(x).split([s.C, s.R], -1)
        kv = self._cached(past_kv, self.kv_norm(latent))
        pe = self._cached(past_pe, rotate(k_pe, cos, sin))
        idx, keys = self._indexer(x, qr, past_index)
        w = self.wkv_b.weight.view(s.N, -1, s.C)
        q_nope = torch.einsum("bshd,hdc->bshc", q_nope, w[:, : s.nope])
        out = absorbed(q_nope, q_pe, kv, pe, idx, s)
        out = torch.einsum("bshc,hdc->bshd", out, w[:, -s.v :])
        return hidden + self.wo(out.flatten(2)), kv, pe, keys


LAYER_OUTPUTS = ("hidden_out", "new_kv", "new_pe", "new_index")


def layer_feeds(s: Spec, seed: int) -> Feeds:
    rng = np.random.default_rng(seed)
    ft = NP_TYPES[s.dtype]
    past = s.S2 - s.S1 if s.cache == "concat" else s.S2
    draw = lambda *shape: rng.standard_normal(shape).astype(ft)  # noqa: E731
    return {
        "hidden": draw(s.B, s.S1, s.hidden),
        "past_kv": draw(s.B, past, s.C),
        "past_pe": draw(s.B, past, s.R),
        "past_index": draw(s.B, past, s.index_dim),
        "position": np.array(s.S2 - s.S1, np.int64),
    }


def _axes(names: Iterator[str], s: Spec) -> dict[str, dict[int, str]]:
    out: dict[str, dict[int, str]] = {}
    for n in names:
        out[n] = {0: "batch"}
        if n in ("kv_cache", "pe_cache") or n.startswith("past_"):
            out[n][1] = "cache_len"
        if n == "selection":
            out[n][2] = "topk" if s.select == "input" else "cache_len"
        if n == "position":
            out[n] = {}
    return out


def build(s: Spec, layer: bool) -> onnx.ModelProto:
    inputs = to_torch(layer_feeds(s, 0) if layer else core_feeds(s, 0))
    return export(
        (Layer if layer else Core)(s),
        inputs,
        LAYER_OUTPUTS if layer else ("out",),
        exporter=s.exporter,
        opset=s.opset,
        dynamic=_axes(iter(inputs), s) if s.dynamic else None,
    )


def case(name: str, s: Spec, layer: bool = False, **more) -> Case:
    make = layer_feeds if layer else core_feeds

    def make_feeds(seed: int) -> Feeds:
        if s.dynamic and seed % 2:
            return make(replace(s, B=s.B + 1, S2=s.S2 + 9), seed)
        return make(s, seed)

    stress = None
    if not layer and s.select == "input":
        stress = lambda seed: core_stress(s, seed)  # noqa: E731
    tags = {
        "exporter": s.exporter,
        "opset": s.opset,
        "dtype": s.dtype,
        "dynamic": s.dynamic,
    }
    more.setdefault("op", FLOAT_KV)
    return Case(
        name,
        "official",
        lambda: build(s, layer),
        make_feeds,
        stress=stress,
        tags=tags,
        **more,
    )


def _spellings() -> Iterator[tuple[str, Spec, bool]]:
    base = Spec()
    topk = replace(base, select="topk")
    for m in ("full_inf", "finfo", "bool_keep", "bool_drop", "where", "one_hot", "count"):
        yield f"mask-{m}", replace(topk, mask=m), False
    for m in ("full_inf", "bool_keep", "trash", "trash_float"):
        yield f"input-{m}", replace(base, mask=m), False
    for p in ("wide", "matmul", "kv_axis"):
        yield f"product-{p}", replace(topk, product=p), False
    for m in ("manual", "exp2", "lse"):
        yield f"softmax-{m}", replace(topk, softmax=m), False
    for at in ("query", "div", "after_mask"):
        yield f"scale-{at}", replace(topk, scale_at=at), False
    yield "s1-3", replace(topk, S1=3), False
    yield "layer", topk, True
    yield "layer-slots", replace(topk, cache="slots"), True
    yield "layer-bool", replace(topk, mask="bool_drop", product="matmul"), True


def cases() -> Iterator[Case]:
    for name, s, layer in _spellings():
        for ex in ("dynamo", "ts"):
            if ex == "ts" and s.softmax == "exp2":  # no lowering
                continue
            t = replace(s, exporter=ex, opset=18 if ex == "dynamo" else 17)
            yield case(f"official-{name}-{ex}", t, layer)
            if not (layer and s.cache == "slots"):
                yield case(f"official-{name}-{ex}-dyn", replace(t, dynamic=True), layer)
    base = Spec(select="topk")
    for dt in ("f16", "bf16"):
        for ex in ("dynamo", "ts"):
            for mm in (False, True):
                s = replace(base, dtype=dt, float_mm=mm, exporter=ex)
                tail = f"{dt}-{'f32mm' if mm else 'same'}-{ex}"
                yield case(f"official-core-{tail}", s)
                yield case(f"official-layer-{tail}", s, layer=True)
                yield case(f"official-layer-{tail}-dyn", replace(s, dynamic=True), layer=True)
