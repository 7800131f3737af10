"""Family: int8 latent + float32 tile scales + rope, selected by indices, absorbed attention.

One module whose knobs are the spellings people use for the gather, the dequantisation, the paging,
the attention and its softmax. Indices, lengths and block tables are graph inputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import onnx
import torch
from torch import nn
from torch.nn import functional

from tests.zoo.base import ANTIQUANT, Case, Feeds, export, to_torch, torch_dtype
from tests.zoo.int8_inputs import Spec, dynamic_axes, feeds


class Int8Attention(nn.Module):
    """Sparse attention over an int8 latent cache, spelled as `spec` says."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.s = spec

    # ---- addressing --------------------------------------------------------------------------
    def _physical(self, idx, table):
        s = self.s
        if s.paged == "bits":
            shift = int(math.log2(s.block))
            page, slot = idx >> shift, idx & (s.block - 1)
        elif s.paged == "div":
            page, slot = torch.div(idx, s.block, rounding_mode="floor"), idx % s.block
        else:
            page, slot = idx // s.block, idx % s.block
        B, S1, K = idx.shape
        entry = torch.gather(table.long(), 1, page.reshape(B, S1 * K)).reshape(B, S1, K)
        return entry, slot

    def _select(self, cache, idx, table):
        """cache [B, S2, W] or pages [NB, block, W]; idx [B, S1, K] -> [B, S1, K, W]."""
        s = self.s
        B, S1, K = idx.shape
        W = cache.shape[-1]
        if s.paged in ("flat", "div", "bits"):
            entry, slot = self._physical(idx, table)
            flat = entry * s.block + slot
            rows = cache.reshape(-1, W)
            if s.gather == "index_select":
                return rows.index_select(0, flat.reshape(-1)).reshape(B, S1, K, W)
            return rows[flat]
        if s.paged == "two_level":
            entry, slot = self._physical(idx, table)
            return cache[entry, slot]
        if s.paged == "materialised":
            cache = cache[table.long()].reshape(B, -1, W)
        S2 = cache.shape[1]
        if s.gather == "gather":
            wide = idx.unsqueeze(-1).expand(B, S1, K, W)
            return torch.gather(cache.unsqueeze(1).expand(B, S1, S2, W), 2, wide)
        if s.gather == "flat_gather":
            wide = idx.reshape(B, S1 * K, 1).expand(-1, -1, W)
            return torch.gather(cache, 1, wide).reshape(B, S1, K, W)
        if s.gather == "advanced":
            return cache[torch.arange(B)[:, None, None], idx]
        if s.gather == "index_select":
            base = torch.arange(B).reshape(B, 1, 1) * S2
            flat = (idx + base).reshape(-1)
            return cache.reshape(B * S2, W).index_select(0, flat).reshape(B, S1, K, W)
        if s.gather == "take_along":
            return torch.take_along_dim(cache.unsqueeze(1), idx.unsqueeze(-1), dim=2)
        if s.gather == "embedding":
            base = torch.arange(B).reshape(B, 1, 1) * S2
            return functional.embedding(idx + base, cache.reshape(B * S2, W))
        raise ValueError(s.gather)

    # ---- dequantisation ----------------------------------------------------------------------
    def _dequant(self, nope, scale, dtype):
        s = self.s
        tiles = s.C // s.tile
        if s.dequant == "view":
            x = nope.float().reshape(*nope.shape[:-1], tiles, s.tile) * scale.unsqueeze(-1)
            return x.reshape(*nope.shape).to(dtype)
        if s.dequant == "unflatten":
            x = nope.float().unflatten(-1, (tiles, s.tile)) * scale[..., None]
            return x.flatten(-2).to(dtype)
        if s.dequant == "repeat":
            return (nope.float() * scale.repeat_interleave(s.tile, dim=-1)).to(dtype)
        if s.dequant == "expand":
            wide = scale.unsqueeze(-1).expand(*scale.shape, s.tile).reshape(*nope.shape)
            return (wide * nope.to(torch.float32)).to(dtype)
        if s.dequant == "tiles":
            parts = [
                nope[..., t * s.tile : (t + 1) * s.tile].float() * scale[..., t : t + 1]
                for t in range(tiles)
            ]
            return torch.cat(parts, -1).to(dtype)
        if s.dequant == "low":  # dequantised straight in the compute dtype
            x = nope.to(dtype).reshape(*nope.shape[:-1], tiles, s.tile)
            return (x * scale.to(dtype).unsqueeze(-1)).reshape(*nope.shape)
        raise ValueError(s.dequant)

    # ---- attention ---------------------------------------------------------------------------
    def _softmax(self, scores):
        kind = self.s.softmax
        if kind == "softmax":
            return torch.softmax(scores, dim=-1)
        if kind == "manual":
            e = torch.exp(scores - scores.amax(dim=-1, keepdim=True))
            return e / e.sum(dim=-1, keepdim=True)
        if kind == "lse":
            return torch.exp(scores - torch.logsumexp(scores, dim=-1, keepdim=True))
        if kind == "guard":
            p = torch.softmax(scores, dim=-1)
            return torch.where(torch.isnan(p), torch.zeros_like(p), p)
        raise ValueError(kind)

    def _scores(self, q, k):
        """q [B, S1, N, D], k [B, S1, K, D] -> [B, S1, N, K]."""
        s = self.s
        if s.scale == "query":
            q = q * s.scale_value
        if s.scale == "sqrt":
            q, k = q * s.scale_value**0.5, k * s.scale_value**0.5
        if s.attn == "einsum":
            x = torch.einsum("bsnd,bskd->bsnk", q, k)
        elif s.attn == "split":
            x = torch.matmul(q[..., : s.C], k[..., : s.C].transpose(-1, -2))
            x = x + torch.matmul(q[..., s.C :], k[..., s.C :].transpose(-1, -2))
        elif s.attn == "bmm":
            B, S1, N, D = q.shape
            x = torch.bmm(q.reshape(B * S1, N, D), k.reshape(B * S1, -1, D).transpose(1, 2))
            x = x.reshape(B, S1, N, -1)
        else:
            x = torch.matmul(q, k.transpose(-1, -2))
        if s.scale == "after":
            x = x * s.scale_value
        if s.scale == "div":
            x = x / s.scale_value**-1
        return x

    def _attend(self, q, k, v, visible):
        s = self.s
        if s.attn == "sdpa":
            B, S1, N, D = q.shape
            mask = None if visible is None else visible.reshape(B * S1, 1, 1, -1)
            out = functional.scaled_dot_product_attention(
                q.reshape(B * S1, 1, N, D),
                k.reshape(B * S1, 1, -1, D),
                v.reshape(B * S1, 1, -1, s.C),
                attn_mask=mask,
                scale=s.scale_value,
            )
            return out.reshape(B, S1, N, s.C)
        x = self._scores(q, k)
        if visible is not None:
            x = x.masked_fill(~visible.unsqueeze(2), float("-inf"))
        if s.compute == "f32_softmax":
            p = self._softmax(x.float()).to(v.dtype)
        else:
            p = self._softmax(x).to(v.dtype)
        if s.attn == "einsum":
            return torch.einsum("bsnk,bskc->bsnc", p, v)
        return torch.matmul(p, v)

    def _visible(self, idx, kv_len):
        s = self.s
        if s.rule == "all":
            return None
        if s.rule == "negative":
            return idx >= 0
        limit = kv_len.long().reshape(-1, 1, 1)
        if s.rule == "causal":
            row = torch.arange(idx.shape[1]).reshape(1, -1, 1)
            limit = limit - idx.shape[1] + row + 1
        return (idx >= 0) & (idx < limit)

    def forward(self, query, nope, rope, scale, indices, kv_len=None, block_table=None):
        s = self.s
        if s.split_q:
            query, query_rope = query
            query = torch.cat([query, query_rope], -1)
        if s.query == "BNSD":
            query = query.transpose(1, 2)
        if s.query == "SBHD":
            query = query.transpose(0, 1)
        if s.kv_axis:
            nope, rope, scale = nope.squeeze(-2), rope.squeeze(-2), scale.squeeze(-2)
            indices = indices.squeeze(2)
        idx = indices.long()
        visible = self._visible(idx, kv_len)
        if visible is not None:
            idx = idx.clamp(min=0)
        dtype = torch.float32 if s.compute == "f32" else torch_dtype(s.dtype)
        if s.order == "gather_first":
            k_nope = self._dequant(
                self._select(nope, idx, block_table), self._select(scale, idx, block_table), dtype
            )
            k_rope = self._select(rope, idx, block_table).to(dtype)
        else:
            k_nope = self._select(self._dequant(nope, scale, dtype), idx, block_table)
            k_rope = self._select(rope.to(dtype), idx, block_table)
        key = torch.cat([k_nope, k_rope], -1)
        value = key[..., : s.C] if s.value == "slice" else k_nope
        out = self._attend(query.to(dtype), key, value, visible).to(torch_dtype(s.dtype))
        if s.query == "BNSD":
            out = out.transpose(1, 2)
        if s.query == "SBHD":
            out = out.transpose(0, 1)
        return out


def build(s: Spec) -> onnx.ModelProto:
    inputs = to_torch(feeds(s, 0))
    args: tuple = ()
    if s.exporter == "ts":
        order = ("query", "nope", "rope", "scale", "indices", "kv_len", "block_table")
        args = tuple(inputs.get(n) for n in order)
        while args[-1] is None:
            args = args[:-1]
    return export(
        Int8Attention(s),
        inputs,
        exporter=s.exporter,
        opset=s.opset,
        dynamic=dynamic_axes(s) if s.dynamic else None,
        args=args,
    )


def case(name: str, s: Spec, **more) -> Case:
    """A case of this family; dynamic models are also fed with other sizes."""

    def make_feeds(seed: int) -> Feeds:
        if s.dynamic and seed % 2:
            s2 = replace(s, B=s.B + 1, S1=s.S1 + 1, S2=s.S2 + s.block, K=s.K - 3)
            return feeds(s2, seed)
        return feeds(s, seed)

    stress = None
    if s.rule in ("length", "causal", "negative"):
        stress = lambda seed: feeds(s, seed, "holes")  # noqa: E731
    elif not s.paged:
        stress = lambda seed: feeds(s, seed, "wrap")  # noqa: E731
    tags = {
        "exporter": s.exporter,
        "opset": s.opset,
        "dtype": s.dtype,
        "dynamic": s.dynamic,
    }
    tags.update(more.pop("tags", {}))
    more.setdefault("op", ANTIQUANT)
    return Case(
        name,
        more.pop("family", "int8"),
        lambda: build(s),
        make_feeds,
        stress=stress,
        tags=tags,
        **more,
    )


def _spellings() -> Iterator[tuple[str, Spec]]:
    base = Spec()
    for g in ("gather", "flat_gather", "advanced", "index_select", "take_along", "embedding"):
        yield f"gather-{g}", replace(base, gather=g)
    for d in ("unflatten", "repeat", "expand", "tiles"):
        yield f"dequant-{d}", replace(base, dequant=d, gather="advanced")
    for a in ("einsum", "split", "bmm", "sdpa"):
        yield f"attn-{a}", replace(base, attn=a, gather="advanced")
    for m in ("manual", "lse", "guard"):
        yield f"softmax-{m}", replace(base, softmax=m, gather="index_select", rule="length")
    for c in ("query", "sqrt", "div"):
        yield f"scale-{c}", replace(base, scale=c, gather="advanced")
    for r in ("negative", "length", "causal"):
        yield f"rule-{r}", replace(base, rule=r, gather="advanced")
    for p in ("flat", "div", "bits", "two_level", "materialised"):
        g = "index_select" if p == "flat" else "advanced"
        yield f"paged-{p}", replace(base, paged=p, rule="causal", gather=g)
    yield "paged-flat-length", replace(base, paged="flat", rule="length")
    yield "dequant-first", replace(base, order="dequant_first", gather="advanced")
    yield "dequant-first-gather", replace(base, order="dequant_first", value="nope")
    yield "value-nope", replace(base, value="nope", gather="index_select")
    yield "bnsd", replace(base, query="BNSD", gather="advanced")
    yield "sbhd", replace(base, query="SBHD", gather="advanced")
    yield "kv-axis", replace(base, kv_axis=True, rule="causal")
    yield "int64", replace(base, int64=True, gather="advanced", rule="negative")
    yield "decode", replace(base, S1=1, N=16, rule="length", gather="advanced")
    yield "batch1", replace(base, B=1, S1=1, N=8, rule="length", gather="flat_gather")


def cases() -> Iterator[Case]:
    for name, s in _spellings():
        yield case(f"int8-{name}-dynamo", s)
        if s.gather != "take_along":  # torch.export specialises it
            yield case(f"int8-{name}-dynamo-dyn", replace(s, dynamic=True))
        if s.gather == "take_along" or s.paged == "bits":  # no lowering in the tracer
            continue
        yield case(f"int8-{name}-ts", replace(s, exporter="ts", opset=17))
        yield case(f"int8-{name}-ts-dyn", replace(s, exporter="ts", opset=17, dynamic=True))
    for name, s in _spellings():
        if name in ("gather-gather", "attn-einsum", "rule-causal", "paged-flat", "decode"):
            for dt in ("f16", "bf16"):
                for compute in ("f32", "same", "f32_softmax"):
                    for ex in ("dynamo", "ts"):
                        t = replace(s, dtype=dt, compute=compute, exporter=ex)
                        yield case(f"int8-{name}-{dt}-{compute}-{ex}", t)
    true = Spec(B=1, S1=1, N=16, S2=512, K=128, C=512, R=64, tile=128, block=128, rule="causal")
    yield case("int8-true-contiguous", replace(true, gather="advanced", dtype="f16"))
    yield case("int8-true-paged", replace(true, paged="flat", dtype="f16", dynamic=True))
    for opset in (19, 20, 21, 22, 23, 24):
        s = replace(Spec(), opset=opset, gather="advanced", rule="causal")
        yield case(f"int8-opset{opset}", s)
    for opset in (14, 15, 16, 18, 20):
        s = replace(Spec(), opset=opset, gather="index_select", rule="causal", exporter="ts")
        yield case(f"int8-ts-opset{opset}", s)
