"""Family: prefill with keys and values expanded per head, and the wide-query reference forms.

`Prefill` expands the latent by its weight for all tokens (BSND einsums, scattered mask plus causal
mask); `Wide` is absorbed attention over one wide key with the mask applied before the scale.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import onnx
import torch
from torch import nn
from torch.nn import functional

from tests.zoo.base import FLOAT_KV, NP_TYPES, Case, Feeds, export, to_torch, torch_dtype


@dataclass(frozen=True)
class Spec:
    """Sizes and spellings of one case."""

    B: int = 2
    S: int = 32
    past: int = 0
    N: int = 4
    K: int = 12
    C: int = 64
    R: int = 16
    nope: int = 32
    v: int = 24
    kind: str = "prefill"  # or "wide"
    attention: str = "einsum"  # "matmul", "sdpa"
    layout: str = "BSND"  # result order of the per-head tensors inside
    assemble: str = "concat"  # "concat", "inplace", "split" (two products)
    mask: str = "full_inf"  # "full_inf", "bool", "finfo"
    causal: str = "input"  # "input" mask, "triu" built inside, "none"
    groups: bool = False  # wide: keep the kv-head axis
    weight: str = "linear"  # how W_kv_b enters: "linear" or "parameter" (einsum'd)
    norm_value: str = "latent"
    dtype: str = "f32"
    exporter: str = "dynamo"
    opset: int = 18
    dynamic: bool = False


def _mask(s: Spec, idx, rows, keys, causal, dtype):
    """Additive (or bool for sdpa) mask [B, rows, keys] of the selection and the causal rule."""
    B = idx.shape[0]
    if s.mask == "bool":
        keep = torch.zeros(B, rows, keys, dtype=torch.bool)
        keep = keep.scatter(-1, idx, torch.ones_like(idx, dtype=torch.bool))
        return keep if causal is None else keep & causal
    low = float("-inf") if s.mask == "full_inf" else torch.finfo(dtype).min
    m = torch.full((B, rows, keys), low, dtype=dtype)
    m = m.scatter(-1, idx, torch.zeros(idx.shape, dtype=dtype))
    if causal is None:
        return m
    return m.masked_fill(~causal, low) if s.mask == "finfo" else m + torch.where(causal, 0.0, low)


class Prefill(nn.Module):
    """Expanded attention over its own tokens (and a past), selection by given scores."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        s = self.s = spec
        torch.manual_seed(0)
        self.wkv_b = nn.Linear(s.C, s.N * (s.nope + s.v), bias=False)
        self.to(torch_dtype(s.dtype))

    def _expand(self, latent):
        s = self.s
        if s.weight == "linear":
            kv = self.wkv_b(latent)
            return kv.view(*latent.shape[:2], s.N, s.nope + s.v).split([s.nope, s.v], -1)
        w = self.wkv_b.weight.view(s.N, s.nope + s.v, s.C)
        k = torch.einsum("btc,hdc->bthd", latent, w[:, : s.nope])
        return k, torch.einsum("btc,hdc->bthd", latent, w[:, s.nope :])

    def _key(self, k_nope, rope):
        s = self.s
        wide = rope.unsqueeze(2).expand(-1, -1, s.N, -1)
        if s.assemble == "inplace":
            k = k_nope.new_empty(*k_nope.shape[:-1], s.nope + s.R)
            k[..., : s.nope] = k_nope
            k[..., s.nope :] = wide
            return k
        return torch.cat([k_nope, wide], -1)

    def forward(self, q, latent, rope, score, visible):
        s = self.s
        rows, keys = q.shape[1], latent.shape[1]
        scale = (s.nope + s.R) ** -0.5
        causal = None
        if s.causal == "input":
            causal = visible
            score = score.masked_fill(~visible, float("-inf"))
        elif s.causal == "triu":
            offset = keys - rows
            causal = torch.arange(keys) <= torch.arange(rows).unsqueeze(-1) + offset
            score = score.masked_fill(~causal, float("-inf"))
        idx = score.topk(min(s.K, keys), dim=-1)[1]
        k_nope, v = self._expand(latent)
        m = _mask(s, idx, rows, keys, causal, q.dtype)
        if s.attention == "sdpa":
            k = self._key(k_nope, rope)
            out = functional.scaled_dot_product_attention(
                q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), m.unsqueeze(1), scale=scale
            )
            return out.transpose(1, 2).flatten(2)
        if s.attention == "matmul":
            k = self._key(k_nope, rope)
            x = torch.matmul(q.transpose(1, 2), k.permute(0, 2, 3, 1)) * scale
            x = self._hide(x, m.unsqueeze(1))
            p = torch.softmax(x, -1, dtype=torch.float32).to(q.dtype)
            return torch.matmul(p, v.transpose(1, 2)).transpose(1, 2).reshape(*q.shape[:2], -1)
        if s.assemble == "split":
            x = torch.einsum("bshd,bthd->bsht", q[..., : s.nope], k_nope)
            x = x + torch.einsum("bshr,btr->bsht", q[..., s.nope :], rope)
        else:
            x = torch.einsum("bshd,bthd->bsht", q, self._key(k_nope, rope))
        x = self._hide(x * scale, m.unsqueeze(2))
        p = torch.softmax(x.float(), dim=-1).type_as(q)
        return torch.einsum("bsht,bthd->bshd", p, v).flatten(2)

    def _hide(self, x, m):
        if self.s.mask == "bool":
            return x.masked_fill(~m, float("-inf"))
        return x + m


class Wide(nn.Module):
    """Absorbed, wide query and key, bool mask with a trash column, mask then scale."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.s = spec

    def forward(self, q, kv, indices):
        s = self.s
        B, S, N, D = q.shape
        S2 = kv.shape[1]
        safe = torch.where(indices >= 0, indices, torch.full_like(indices, S2)).long()
        keep = torch.zeros(B, S, S2 + 1, dtype=torch.bool)
        keep = keep.scatter(2, safe, torch.ones_like(safe, dtype=torch.bool))[:, :, :S2]
        if s.causal == "triu":
            keep = keep & (torch.arange(S2) <= torch.arange(S).unsqueeze(-1) + (S2 - S))
        q, kv = q.float(), kv.float()
        if s.groups:
            k = kv.unsqueeze(2)
            x = torch.einsum("bmghd,bngd->bghmn", q.view(B, S, 1, N, D), k)
            x = x.masked_fill(~keep[:, None, None], float("-inf")) * (D**-0.5)
            p = x.softmax(-1)
            out = torch.einsum("bghmn,bngd->bmghd", p, k[..., : s.C]).reshape(B, S, N, s.C)
        else:
            x = torch.einsum("bmhd,bnd->bhmn", q, kv)
            x = x.masked_fill(~keep.unsqueeze(1), float("-inf")) * (D**-0.5)
            out = torch.einsum("bhmn,bnd->bmhd", x.softmax(-1), kv[..., : s.C])
        return out.to(torch_dtype(s.dtype))


def feeds(s: Spec, seed: int) -> Feeds:
    rng = np.random.default_rng(seed)
    ft = NP_TYPES[s.dtype]
    keys = s.S + s.past
    draw = lambda *shape: rng.standard_normal(shape).astype(ft)  # noqa: E731
    if s.kind == "wide":
        idx = rng.permuted(np.broadcast_to(np.arange(keys), (s.B, s.S, keys)), axis=-1)[..., : s.K]
        idx[..., 0] = np.arange(s.S) + s.past if s.causal == "triu" else idx[..., 0]
        idx[:, ::2, -4:] = -1
        idx = np.sort(idx, -1)[..., ::-1]
        return {
            "q": draw(s.B, s.S, s.N, s.C + s.R),
            "kv": draw(s.B, keys, s.C + s.R),
            "indices": np.ascontiguousarray(idx).astype(np.int32),
        }
    visible = np.arange(keys) <= np.arange(s.S)[:, None] + s.past
    visible = np.broadcast_to(visible, (s.B, s.S, keys)).copy()
    visible[-1, :, 1 : 1 + keys // 8] = False  # padding in one sequence
    return {
        "q": draw(s.B, s.S, s.N, s.nope + s.R),
        "latent": draw(s.B, keys, s.C),
        "rope": draw(s.B, keys, s.R),
        "score": rng.standard_normal((s.B, s.S, keys)).astype(np.float32),
        "visible": visible,
    }


def build(s: Spec) -> onnx.ModelProto:
    inputs = to_torch(feeds(s, 0))
    rows, keys = ("rows", "keys") if s.past else ("len", "len")
    axes = {
        "q": {0: "batch", 1: rows},
        "latent": {0: "batch", 1: keys},
        "rope": {0: "batch", 1: keys},
        "kv": {0: "batch", 1: keys},
        "score": {0: "batch", 1: rows, 2: keys},
        "visible": {0: "batch", 1: rows, 2: keys},
        "indices": {0: "batch", 1: rows},
    }
    return export(
        (Wide if s.kind == "wide" else Prefill)(s),
        inputs,
        exporter=s.exporter,
        opset=s.opset,
        dynamic={n: axes[n] for n in inputs} if s.dynamic else None,
    )


def case(name: str, s: Spec) -> Case:
    def make_feeds(seed: int) -> Feeds:
        if s.dynamic and seed % 2:
            past = s.past + 3 if s.past else 0
            return feeds(replace(s, B=s.B + 1, S=s.S + 5, past=past), seed)
        return feeds(s, seed)

    tags = {"exporter": s.exporter, "opset": s.opset, "dtype": s.dtype, "dynamic": s.dynamic}
    return Case(f"exp-{name}", "expanded", lambda: build(s), make_feeds, op=FLOAT_KV, tags=tags)


def _spellings() -> Iterator[tuple[str, Spec]]:
    base = Spec()
    yield "official", base
    yield "official-past", replace(base, S=5, past=30)
    yield "split", replace(base, assemble="split")
    yield "parameter", replace(base, weight="parameter")
    yield "parameter-split", replace(base, weight="parameter", assemble="split")
    yield "inplace", replace(base, assemble="inplace", attention="matmul")
    yield "matmul", replace(base, attention="matmul")
    yield "matmul-bool", replace(base, attention="matmul", mask="bool")
    yield "matmul-finfo-triu", replace(base, attention="matmul", mask="finfo", causal="triu")
    yield "sdpa-bool", replace(base, attention="sdpa", mask="bool")
    yield "sdpa-float", replace(base, attention="sdpa")
    yield (
        "sdpa-triu-past",
        replace(base, attention="sdpa", mask="bool", causal="triu", S=3, past=30),
    )
    yield "triu", replace(base, causal="triu")
    yield "no-causal", replace(base, causal="none")
    yield "wide", replace(base, kind="wide", causal="none")
    yield "wide-groups", replace(base, kind="wide", groups=True, causal="triu")


def cases() -> Iterator[Case]:
    for name, s in _spellings():
        yield case(f"{name}-dynamo", s)
        yield case(f"{name}-dynamo-dyn", replace(s, dynamic=True))
        yield case(f"{name}-ts", replace(s, exporter="ts", opset=17))
        yield case(f"{name}-ts-dyn", replace(s, exporter="ts", opset=17, dynamic=True))
        if name in ("official", "sdpa-bool", "wide-groups"):
            for dtype in ("f16", "bf16"):
                yield case(f"{name}-{dtype}", replace(s, dtype=dtype))
        if s.attention == "sdpa":
            for opset in (23, 24):
                yield case(f"{name}-opset{opset}", replace(s, opset=opset))
                yield case(f"{name}-opset{opset}-dyn", replace(s, opset=opset, dynamic=True))
