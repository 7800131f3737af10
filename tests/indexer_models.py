"""Lightning indexers as people write them, exported with their spellings, and look-alikes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn

from tests.zoo.base import export, quiet

HEADS, WIDTH, K = 3, 8, 5


@dataclass(frozen=True)
class Spelling:
    """How one indexer is written.

    Attributes:
        product: "matmul", "einsum", "sum", or "parts" (of two column ranges, added up).
        weigh: "matmul", "einsum", "mul" (times and sum), "mean" over heads.
        relu: "relu", "clamp", "where", "not below", "max".
        scale: "products", "relu", "weights", "scores" or "query"; "norms" (of queries and keys,
            divided by behind the relu and the sum); of keys in int8: "keys" (behind
            the sum), "keys inside" (the relu), "stored" (given, as the keys are).
        mask: "" or how keys are hidden: see `_masked`.
        top: "min" (min(K, keys)), "all" (K), "unsorted".
        rows: query rows, or open.
    """

    product: str = "matmul"
    weigh: str = "matmul"
    relu: str = "relu"
    scale: str = "products"
    mask: str = ""
    low: float = float("-inf")
    top: str = "min"
    rows: int = 4
    dtype: torch.dtype = torch.float32
    exporter: str = "ts"
    keys: int = 12
    wrong: str = ""


class Indexer(nn.Module):
    """Indices [B, S1, k] int64 of queries [B, S1, H, D], keys [B, S2, D], weights [B, S1, H]."""

    def __init__(self, s: Spelling) -> None:
        super().__init__()
        self.s = s

    def forward(self, q: Any, k: Any, w: Any, *more: Any) -> Any:
        s, by = self.s, WIDTH**-0.5
        if s.scale == "query":
            q = q * by
        if s.scale == "weights":
            w = w * by
        by_key: Any = None
        if s.scale == "stored":
            k, by_key = k.float(), more[-1].unsqueeze(1)
        if s.scale.startswith("keys"):
            by_key = (k.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-9)
            k, by_key = torch.round(k / by_key).to(torch.int8).float(), by_key.transpose(1, 2)
        if s.wrong == "signed scale":
            by_key = by_key - 0.5
        if s.wrong == "pooled":
            k = k.reshape(k.shape[0], k.shape[1] // 2, 2, k.shape[2]).mean(2)
        x = _products(s, q, k)
        if s.wrong == "negative":
            x = x * -0.5
        x = x * by if s.scale == "products" else x
        x = x * by_key.unsqueeze(1) if s.scale == "keys inside" else x
        x = _relu(s, x)
        x = x * by if s.scale == "relu" else x
        x = x / q.norm(dim=-1, keepdim=True) if s.scale == "norms" else x
        x = _weighed(s, x, w)
        if s.scale == "scores":
            x = x * by
        if s.scale in ("keys", "stored"):
            x = x * by_key
        if s.scale == "norms":
            x = x / k.norm(dim=-1).clamp(min=1e-6).unsqueeze(1)
        if s.wrong == "signed divisor":
            x = x / k.mean(-1).unsqueeze(1)
        if s.wrong == "key weights":
            x = x * more[-1].unsqueeze(1)
        if s.wrong == "routing":
            x = _routed(x)
        x = _masked(s, x, (*more, k))
        count = min(K, x.shape[-1]) if s.top == "min" else K
        best, idx = x.topk(count, dim=-1, sorted=s.top != "unsorted")
        if s.wrong == "top-p":
            return torch.where(torch.softmax(best, -1).cumsum(-1) < 0.8, idx, torch.tensor(-1))
        return idx


def _routed(x: Any) -> Any:
    """Only the two best of the groups of four keys stay."""
    groups = x.reshape(*x.shape[:2], x.shape[-1] // 4, 4)
    best = groups.amax(-1)
    kept = torch.zeros_like(best).scatter(-1, best.topk(2, -1)[1], 1.0)
    kept = kept.unsqueeze(-1).expand(groups.shape).reshape(x.shape)
    return x.masked_fill(kept == 0, -torch.inf)


def _products(s: Spelling, q: Any, k: Any) -> Any:
    """[B, S1, H, S2]."""
    if s.dtype != torch.float32:
        q, k = q.float(), k.float()
    if s.product == "einsum":
        return torch.einsum("bshd,btd->bsht", q, k)
    if s.product == "parts":
        parts = (slice(0, 5), slice(5, None))
        return sum(q[..., p] @ k[..., p].transpose(1, 2).unsqueeze(1) for p in parts)
    if s.product == "sum":
        return (q.unsqueeze(3) * k[:, None, None]).sum(-1)
    return torch.matmul(q, k.transpose(1, 2).unsqueeze(1))


def _relu(s: Spelling, x: Any) -> Any:
    other = {
        "none": lambda: x,
        "sigmoid": lambda: torch.sigmoid(x),
        "gelu": lambda: torch.nn.functional.gelu(x),
        "silu": lambda: torch.nn.functional.silu(x),
        "leaky": lambda: torch.nn.functional.leaky_relu(x, 0.1),
        "softmax": lambda: torch.softmax(x, -1),
        "square": lambda: torch.relu(x) ** 2,
        "outside": lambda: x,
        "floor": lambda: torch.clamp(x, min=0.5),
    }
    if s.wrong in other:
        return other[s.wrong]()
    if s.relu == "clamp":
        return torch.clamp(x, min=0)
    if s.relu == "max":
        return torch.maximum(x, torch.zeros_like(x))
    if s.relu == "where":
        return torch.where(x > 0, x, torch.zeros_like(x))
    if s.relu == "not below":
        return torch.where(x * 0.5 < 0, torch.zeros_like(x), x)
    return torch.relu(x)


def _weighed(s: Spelling, x: Any, w: Any) -> Any:
    """[B, S1, S2]; per head [B, S1, H, S2] where that is what is wrong."""
    w = w.float()
    if s.wrong == "per head":
        return x * w.unsqueeze(-1)
    if s.weigh == "einsum":
        x = torch.einsum("bsht,bsh->bst", x, w)
    elif s.weigh in ("mul", "mean"):
        x = x * w.unsqueeze(-1)
        x = x.sum(2) if s.weigh == "mul" else x.mean(2)
    else:
        x = torch.matmul(w.unsqueeze(-2), x).squeeze(-2)
    return torch.relu(x) if s.wrong == "outside" else x


def _masked(s: Spelling, x: Any, more: tuple[Any, ...]) -> Any:
    keys = torch.arange(x.shape[-1])
    rows = torch.arange(x.shape[1]) + (x.shape[-1] - x.shape[1])
    seen = keys[None, :] <= rows[:, None]
    if s.mask == "causal add":
        return x + torch.where(seen, 0.0, s.low)
    if s.mask == "causal fill":
        return x.masked_fill(~seen, s.low)
    if s.mask == "causal where":
        return torch.where(seen, x, torch.tensor(s.low))
    if s.mask == "tril":
        return x.masked_fill(torch.ones(x.shape[1:]).tril(x.shape[-1] - x.shape[1]) == 0, s.low)
    if s.mask == "table":  # a constant, once per sequence
        table = torch.ones(2, 4, 12, dtype=torch.bool).tril(8)
        return x.masked_fill(~table, s.low)
    if s.mask == "triu":
        return x + torch.full(x.shape[1:], s.low).triu(1 + x.shape[-1] - x.shape[1])
    if s.mask == "padding first":  # of a longer mask
        return x.masked_fill(more[0][:, : x.shape[-1]].unsqueeze(1) == 0, s.low)
    if s.mask == "padding last":
        return x.masked_fill(more[0][:, -x.shape[-1] :].unsqueeze(1) == 0, s.low)
    if s.mask == "padding":
        return x.masked_fill(more[0].unsqueeze(1) == 0, s.low)
    if s.mask == "both":
        return torch.where(seen & (more[0].unsqueeze(1) != 0), x, torch.tensor(s.low))
    if s.mask == "rows":
        return x.masked_fill(~_rows_seen(x, more[0]), s.low)
    if s.mask == "rows by keys":  # flags of rows lie behind what the keys' number says
        own = more[0][:, more[-1].shape[1] - x.shape[1] :] != 0
        return x.masked_fill(~(seen & (more[0] != 0).unsqueeze(1) & own.unsqueeze(2)), s.low)
    if s.mask == "lengths":
        return x.masked_fill(keys >= more[0][:, None, None], s.low)
    if s.mask == "positions":
        return x.masked_fill(keys > more[0][:, :, None], s.low)
    if s.mask == "start":
        return x.masked_fill(keys > (more[0][:, None] + torch.arange(x.shape[1]))[..., None], s.low)
    if s.mask == "window":
        return x.masked_fill(~seen | (keys[None, :] < rows[:, None] - 2), s.low)
    if s.mask == "handed in":
        return x.masked_fill(~more[0], s.low)
    if s.mask == "assigned":
        x = x.clone()
        x[~seen.expand(x.shape)] = s.low
        return x
    return x


def _rows_seen(x: Any, kept: Any) -> Any:
    """[B, S1, S2] of padding in front: causal, and rows of padding see no key."""
    keys = torch.arange(x.shape[-1])
    rows = torch.arange(x.shape[1]) + (x.shape[-1] - x.shape[1])
    kept = kept != 0
    seen = (keys[None, :] <= rows[:, None]) & kept.unsqueeze(1)
    return seen & kept[:, -x.shape[1] :].unsqueeze(2)


def inputs(s: Spelling, batch: int = 2, rows: int = 0, keys: int = 0, seed: int = 0) -> Any:
    """A call's tensors by name."""
    rows, keys = rows or s.rows, keys or s.keys
    make = torch.Generator().manual_seed(seed)
    given = {
        "q": torch.randn(batch, rows, HEADS, WIDTH, generator=make).to(s.dtype),
        "k": torch.randn(batch, keys, WIDTH, generator=make).to(s.dtype),
        "w": torch.randn(batch, rows, HEADS, generator=make),
    }
    kept = (torch.rand(batch, keys, generator=make) < 0.7).to(torch.int64)
    kept[:, 0] = 1
    start = torch.randint(0, max(keys - rows, 0) + 1, (batch,), generator=make)
    if s.mask in ("padding", "both", "rows", "rows by keys"):
        given["kept"] = kept
    if s.mask in ("padding first", "padding last"):
        longer = (torch.rand(batch, keys + 3, generator=make) < 0.7).to(torch.int64)
        longer[:, [0, 3]] = 1
        given["longer"] = longer
    if s.mask == "lengths":
        given["lengths"] = start + 1
    if s.mask == "start":
        given["start"] = start
    if s.mask == "positions":
        given["positions"] = torch.randint(0, keys, (batch, rows), generator=make)
    if s.mask == "handed in":
        given["seen"] = torch.rand(batch, rows, keys, generator=make) < 0.7
    if s.scale == "stored":
        given["k"] = torch.randint(-127, 128, given["k"].shape, generator=make).to(torch.int8)
        given["by_key"] = torch.rand(batch, keys, generator=make)
    if s.wrong == "key weights":
        given["scale"] = torch.randn(batch, keys, generator=make)
    return given


_AXES = {
    "q": {0: "batch", 1: "rows"}, "k": {0: "batch", 1: "keys"}, "w": {0: "batch", 1: "rows"},
    "kept": {0: "batch", 1: "keys"}, "longer": {0: "batch", 1: "total"},
    "lengths": {0: "batch"}, "start": {0: "batch"},
    "positions": {0: "batch", 1: "rows"}, "seen": {0: "batch", 1: "rows", 2: "keys"},
    "scale": {0: "batch", 1: "keys"}, "by_key": {0: "batch", 1: "keys"},
}  # fmt: skip


def spelt(s: Spelling, *, fixed: bool = False) -> onnx.ModelProto:
    """The exported indexer; batch, rows and keys are open unless `fixed`."""
    given = inputs(s)
    axes = {name: dict(_AXES[name]) for name in given}
    if s.rows == 1:
        axes["q"].pop(1)
        axes["w"].pop(1)
        axes.get("positions", {}).pop(1, None)
    args = (Indexer(s), given, ("indices",))
    if s.exporter == "ts":
        module = args[0].eval()
        with quiet():
            return export(
                module, given, ("indices",), exporter="ts", opset=17,
                dynamic=None if fixed else axes,
            )  # fmt: skip
    return export(
        _named(args[0], list(given)), given, ("indices",), dynamic=None if fixed else axes
    )


def _named(inner: Indexer, names: list[str]) -> nn.Module:
    """An indexer whose inputs have names, as the exporter wants them."""
    space: dict[str, Any] = {}
    listed = ", ".join(names)
    exec(f"def forward(self, {listed}): return self.inner({listed})", space)
    made: nn.Module = type("Named", (nn.Module,), {"forward": space["forward"]})()
    made.inner = inner
    return made


def arrays(given: Any) -> dict[str, np.ndarray]:
    """Tensors as arrays."""
    return {
        n: t.float().numpy() if t.dtype == torch.bfloat16 else t.numpy() for n, t in given.items()
    }


class Layer(nn.Module):
    """An indexer and attention [B, S1, N, C] over what it selects.

    `form`: "mask" (dense scores under a scattered mask), "gather" (rows are gathered, masked by
    the keys' numbers), "scores" (masked where the selected score is -inf), "open" (as "mask", but
    what the indexer hides is attended to); `also`: "indices" are returned as well, or "again": a
    second attention shares the selection.
    """

    def __init__(self, s: Spelling, form: str, also: str = "") -> None:
        super().__init__()
        self.indexer, self.form, self.also, self.s = Indexer(s), form, also, s

    def forward(self, q: Any, k: Any, w: Any, *more: Any) -> Any:
        *kept, query, latent = more
        x = _products(self.s, q, k)
        x = _masked(self.s, _weighed(self.s, torch.relu(x), w), tuple(kept))
        best, idx = x.topk(K, dim=-1)
        rows = torch.arange(x.shape[1]) + (x.shape[-1] - x.shape[1])
        if kept:
            return self._gathered(query, latent, idx, torch.gather(_rows_seen(x, *kept), -1, idx))
        out = self._attend(query, latent, best, idx, rows)
        if self.also == "again":
            return out, self._attend(query * 0.5, latent + 1, best, idx, rows)
        return (out, idx) if self.also == "indices" else out

    def _attend(self, query: Any, latent: Any, best: Any, idx: Any, rows: Any) -> Any:
        keys = latent.shape[1]
        if self.form in ("mask", "open"):
            scores = torch.einsum("bsnc,btc->bsnt", query, latent) * 0.3
            kept = torch.full((*idx.shape[:2], keys), -torch.inf).scatter(-1, idx, 0.0)
            scores = scores + kept.unsqueeze(2)
            if self.form == "mask":
                seen = torch.arange(keys)[None, :] <= rows[:, None]
                scores = scores.masked_fill(~seen[None, :, None], -torch.inf)
            return torch.einsum("bsnt,btc->bsnc", torch.softmax(scores, -1), latent)
        seen = best > -torch.inf if self.form == "scores" else idx <= rows[None, :, None]
        return self._gathered(query, latent, idx, seen)

    def _gathered(self, query: Any, latent: Any, idx: Any, seen: Any) -> Any:
        at = idx.reshape(idx.shape[0], -1, 1).expand(-1, -1, latent.shape[-1])
        found = torch.gather(latent, 1, at).reshape(*idx.shape, latent.shape[-1])
        scores = torch.einsum("bsnc,bskc->bsnk", query, found) * 0.3
        scores = scores.masked_fill(~seen.unsqueeze(2), -torch.inf)
        return torch.einsum("bsnk,bskc->bsnc", torch.softmax(scores, -1), found)


def layer_inputs(s: Spelling, batch: int = 2, keys: int = 0, seed: int = 0) -> Any:
    """A call's tensors by name."""
    given = inputs(s, batch, keys=keys, seed=seed)
    make = torch.Generator().manual_seed(seed + 1)
    return given | {
        "query": torch.randn(batch, s.rows, 2, 16, generator=make),
        "latent": torch.randn(batch, keys or s.keys, 16, generator=make),
    }


def layer(s: Spelling, form: str, also: str = "") -> onnx.ModelProto:
    """The exported layer; batch and keys are open."""
    given = layer_inputs(s)
    keyed = ("k", "kept", "latent")
    axes = {n: {0: "batch", 1: "keys"} if n in keyed else {0: "batch"} for n in given}
    names = ("out", also) if also else ("out",)
    with quiet():
        return export(
            Layer(s, form, also).eval(), given, names, exporter="ts", opset=17, dynamic=axes
        )
