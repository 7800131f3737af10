"""Family: float rows gathered by indices, log-sum-exp style softmax, lonely rows, paging, TND.

The way CUDA kernels' own references are written: invalid indices are pointed at row 0 and masked
with -inf, exp(P - logsumexp), rows without any key become zero.
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
    S1: int = 3
    N: int = 4
    S2: int = 48
    K: int = 12
    C: int = 64
    R: int = 16
    block: int = 16
    layout: str = "TND"  # one sequence: q [T, N, D], kv [S2, D]; "BSND"; "PAGED"; "CU" ragged
    softmax: str = "lse"  # "lse", "lse2", "exp2", "softmax", "manual"
    lonely: str = "none"  # "none", "where", "nan": what rows without keys become
    invalid: str = "where"  # "where", "assign" (boolean assignment), "clamp"
    order: str = "scale_mask"  # "mask_scale"
    kv_axis: bool = True  # kv is [.., 1, D]
    compute: str = "f32"
    extra_lse: bool = False  # the log-sum-exp is an output too
    dtype: str = "f32"
    exporter: str = "dynamo"
    opset: int = 18
    dynamic: bool = False


class Flash(nn.Module):
    """Reference-style sparse prefill and decode."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.s = spec

    def _rows(self, kv, idx, table):
        s = self.s
        if s.layout == "TND":
            return kv.index_select(0, idx.flatten()).view(*idx.shape, -1)
        if s.layout == "PAGED":
            page = torch.gather(table.long(), 1, (idx // s.block).flatten(1)).view(idx.shape)
            flat = page * s.block + idx % s.block
            return kv.flatten(0, 1).index_select(0, flat.flatten()).view(*idx.shape, -1)
        B, S2 = kv.shape[:2]
        base = torch.arange(B).view(B, 1, 1) * S2
        return kv.reshape(B * S2, -1).index_select(0, (idx + base).flatten()).view(*idx.shape, -1)

    def _probabilities(self, x):
        kind = self.s.softmax
        if kind == "softmax":
            return torch.softmax(x, -1), None
        if kind == "manual":
            e = torch.exp(x - x.amax(-1, keepdim=True))
            return e / e.sum(-1, keepdim=True), None
        if kind in ("lse2", "exp2"):
            x = x * 1.4426950408889634
            if kind == "exp2":
                e = torch.exp2(x - x.amax(-1, keepdim=True))
                return e / e.sum(-1, keepdim=True), None
            lse = torch.logsumexp(x * 0.6931471805599453, -1) * 1.4426950408889634
            return torch.exp2(x - lse.unsqueeze(-1)), lse
        lse = torch.logsumexp(x, -1)
        safe = lse
        if self.s.lonely != "none":
            safe = torch.where(lse == float("-inf"), torch.full_like(lse, float("inf")), lse)
        return torch.exp(x - safe.unsqueeze(-1)), lse

    def forward(self, q, kv, indices, block_table=None, lengths=None):
        s = self.s
        if s.kv_axis:
            kv, indices = kv.squeeze(-2), indices.squeeze(-2)
        idx = indices.long()
        bad = idx < 0
        if s.layout in ("BSND", "PAGED") and lengths is not None:
            bad = bad | (idx >= lengths.long().view(-1, 1, 1))
        if s.invalid == "assign":
            idx = idx.clone()
            idx[bad] = 0
        elif s.invalid == "clamp":
            idx = idx.clamp(min=0)
        else:
            idx = torch.where(bad, torch.zeros_like(idx), idx)
        wide = torch.float32 if s.compute == "f32" else q.dtype
        rows = self._rows(kv, idx, block_table).to(wide)
        x = torch.matmul(q.to(wide), rows.transpose(-1, -2))
        scale = (s.C + s.R) ** -0.5
        if s.order == "scale_mask":
            x = x * scale
        if s.invalid == "assign":
            x = x.clone()
            x[bad.unsqueeze(-2).expand(x.shape)] = float("-inf")
        else:
            x = x.masked_fill(bad.unsqueeze(-2), float("-inf"))
        if s.order == "mask_scale":
            x = x * scale
        p, lse = self._probabilities(x)
        out = torch.matmul(p, rows[..., : s.C])
        if s.lonely == "where":
            out = torch.where(bad.all(-1)[..., None, None], torch.zeros_like(out), out)
        if s.lonely == "nan":
            out = torch.nan_to_num(out, nan=0.0)
        out = out.to(torch_dtype(s.dtype))
        return (out, lse) if s.extra_lse else out


def feeds(s: Spec, seed: int, lonely: bool = False, holes: bool = False) -> Feeds:
    rng = np.random.default_rng(seed)
    ft = NP_TYPES[s.dtype]
    lead = (s.S1,) if s.layout == "TND" else (s.B, s.S1)
    idx = rng.permuted(np.broadcast_to(np.arange(s.S2), (*lead, s.S2)), axis=-1)[..., : s.K]
    lengths = None
    if s.layout != "TND":
        lengths = rng.integers(s.S2 // 2, s.S2 + 1, s.B).astype(np.int32)
        idx = np.where(idx >= lengths[:, None, None], -1, idx)
    idx = np.take_along_axis(idx, np.argsort(idx < 0, axis=-1, kind="stable"), -1)  # valid first
    idx[..., 0, s.K // 2 :] = -1
    if holes:
        idx[..., 1, 2] = -1
        idx[..., 1, 3] = idx[..., 1, 1]
    if lonely:
        idx[..., -1, :] = -1
    pages = -(-s.S2 // s.block)
    kv_lead = {"TND": (s.S2,), "BSND": (s.B, s.S2), "PAGED": (s.B * pages + 2, s.block)}[s.layout]
    axis = (1,) if s.kv_axis else ()
    out: Feeds = {
        "q": rng.standard_normal((*lead, s.N, s.C + s.R)).astype(ft),
        "kv": rng.standard_normal((*kv_lead, *axis, s.C + s.R)).astype(ft),
        "indices": (idx[..., None, :] if s.kv_axis else idx).astype(np.int32),
    }
    if s.layout == "PAGED":
        table = rng.permutation(kv_lead[0])[: s.B * pages].reshape(s.B, pages)
        out["block_table"] = table.astype(np.int32)
    if lengths is not None:
        out["lengths"] = lengths
    return out


def build(s: Spec) -> onnx.ModelProto:
    inputs = to_torch(feeds(s, 0))
    tnd = s.layout == "TND"
    lead = {0: "tokens"} if tnd else {0: "batch", 1: "rows"}
    kv = {"TND": {0: "keys"}, "BSND": {0: "batch", 1: "keys"}, "PAGED": {0: "blocks"}}[s.layout]
    axes = {
        "q": lead,
        "kv": kv,
        "indices": lead,
        "block_table": {0: "batch"},
        "lengths": {0: "batch"},
    }
    args: tuple = ()
    if s.exporter == "ts":
        args = tuple(inputs.get(n) for n in ("q", "kv", "indices", "block_table", "lengths"))
        while args[-1] is None:
            args = args[:-1]
    return export(
        Flash(s),
        inputs,
        ("out", "lse") if s.extra_lse else ("out",),
        exporter=s.exporter,
        opset=s.opset,
        dynamic={n: axes[n] for n in inputs} if s.dynamic else None,
        args=args,
    )


def case(name: str, s: Spec, **more) -> Case:
    def make_feeds(seed: int) -> Feeds:
        if s.dynamic and seed % 2:
            grown = replace(s, B=s.B + 1, S1=s.S1 + 2, S2=s.S2 + (0 if s.layout == "PAGED" else 5))
            return feeds(grown, seed, s.lonely != "none")
        return feeds(s, seed, s.lonely != "none")

    tags = {"exporter": s.exporter, "opset": s.opset, "dtype": s.dtype, "dynamic": s.dynamic}
    more.setdefault("op", FLOAT_KV)
    return Case(
        f"flash-{name}",
        "flash",
        lambda: build(s),
        make_feeds,
        stress=lambda seed: feeds(s, seed, s.lonely != "none", holes=True),
        tags=tags,
        **more,
    )


def _spellings() -> Iterator[tuple[str, Spec]]:
    base = Spec()
    for layout in ("TND", "BSND", "PAGED"):
        s = replace(base, layout=layout)
        yield f"{layout.lower()}-lse", s
        yield f"{layout.lower()}-lonely", replace(s, lonely="where")
        yield f"{layout.lower()}-softmax-nan", replace(s, softmax="softmax", lonely="nan")
    yield "lse2", replace(base, softmax="lse2")
    yield "exp2", replace(base, softmax="exp2")
    yield "manual", replace(base, softmax="manual", layout="BSND")
    yield "assign", replace(base, invalid="assign", lonely="where")
    yield "clamp", replace(base, invalid="clamp", kv_axis=False)
    yield "mask-scale", replace(base, order="mask_scale", layout="BSND")
    yield "squeezed", replace(base, kv_axis=False, layout="BSND", softmax="softmax")


def cases() -> Iterator[Case]:
    for name, s in _spellings():
        yield case(f"{name}-dynamo", s)
        yield case(f"{name}-dynamo-dyn", replace(s, dynamic=True))
        if s.softmax not in ("lse2", "exp2"):
            yield case(f"{name}-ts", replace(s, exporter="ts", opset=17))
            yield case(f"{name}-ts-dyn", replace(s, exporter="ts", opset=17, dynamic=True))
    for dtype in ("f16", "bf16"):
        for compute in ("f32", "same"):
            yield case(f"{dtype}-{compute}", replace(Spec(), dtype=dtype, compute=compute))
    yield case("lse-output", replace(Spec(), extra_lse=True))
