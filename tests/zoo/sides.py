"""Family: what leaves an attention besides its result, sinks of every spelling, and merges.

Log-sum-exps with another sign, base or shift, of some heads, with and without the sink; largest
scores and sums as running maxima keep them; softmax1; constant sinks; partial softmaxes that are
interpolated by sigmoids of their log-sum-exps' difference; a factor of its own for the rope.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch

from tests.zoo.base import ANTIQUANT, Case, Feeds
from tests.zoo.forms import Form, case_of
from tests.zoo.kernels import INF, S1, S2, SCALE, B, C, D, K, N, rows_of, take

TILE = 8
MANY = {"q": {0: "b", 2: "s"}, "kv": {0: "b", 1: "keys"}, "indices": {0: "b", 1: "s"}}


def rows(rng: np.random.Generator) -> Feeds:
    return {
        "q": rng.standard_normal((B, N, S1, D)).astype(np.float32),
        "kv": rng.standard_normal((B, S2, D)).astype(np.float32),
        "indices": rows_of(rng, (B, S1), S2, holes=False),
    }


def with_sink(rng: np.random.Generator) -> Feeds:
    return {**rows(rng), "sink": rng.standard_normal(N).astype(np.float32)}


def scores(q, kv, indices):
    """Masked scores [B, N, S1, K] and rows [B, S1, K, D]."""
    found = take(kv, indices.clamp_min(0))
    x = torch.einsum("bnsd,bskd->bnsk", q, found) * SCALE
    return x.masked_fill((indices < 0).unsqueeze(1), -INF), found


def mix(p, found):
    return torch.einsum("bnsk,bskd->bnsd", p, found[..., :C])


def _shifted(x):
    m = x.amax(-1, keepdim=True)
    e = torch.exp(x - m)
    return m, e, e.sum(-1, keepdim=True)


SIDES: dict[str, Callable] = {
    "negative": lambda x, lse: (-lse,),
    "base-2": lambda x, lse: (lse * math.log2(math.e),),
    "moved": lambda x, lse: (lse + 3.5,),
    "exponential": lambda x, lse: (torch.exp(lse),),
    "half-the-heads": lambda x, lse: (lse[:, : N // 2],),
    "split": lambda x, lse: lse.split(N // 2, 1),
    "flat": lambda x, lse: (lse.reshape(lse.shape[0], -1),),
    "float16": lambda x, lse: (lse.half(),),
}
SIDE_MISSES: dict[str, Callable] = {
    "second-score": lambda x, lse: (x[..., 1],),
    "smallest": lambda x, lse: (x.amin(-1),),
    "squares": lambda x, lse: (torch.exp(2 * x).sum(-1),),
    "first-half": lambda x, lse: (torch.logsumexp(x[..., : K // 2], -1),),
}


def side(make: Callable) -> Callable:
    def forward(q, kv, indices):
        x, found = scores(q, kv, indices)
        return mix(torch.softmax(x, -1), found), *make(x, torch.logsumexp(x, -1))

    return forward


def top_and_total(guarded: bool) -> Callable:
    """The running maximum and sum of a loop that has ended."""

    def forward(q, kv, indices):
        x, found = scores(q, kv, indices)
        m, e, total = _shifted(x)
        if guarded:
            total = torch.where(total == 0, torch.ones_like(total), total)
        return mix(e, found) / total, m, total

    return forward


def binary(q, kv, indices):
    """Powers of 2, and a log-sum-exp in that base."""
    x, found = scores(q, kv, indices)
    x = x * math.log2(math.e)
    m = x.amax(-1, keepdim=True)
    e = torch.exp2(x - m)
    total = e.sum(-1, keepdim=True)
    return mix(e / total, found), (m + torch.log2(total)).squeeze(-1)


def sunk(told: str) -> Callable:
    """A sink takes part in the sum; the log-sum-exp that leaves is without it, or with it."""

    def forward(q, kv, indices, sink):
        x, found = scores(q, kv, indices)
        lse = torch.logsumexp(x, -1)
        whole = torch.logsumexp(torch.stack([lse, sink.view(1, -1, 1).expand(lse.shape)]), 0)
        out = mix(torch.exp(x - whole.unsqueeze(-1)), found)
        return out, {"own": lse, "whole": whole, "both": lse + sink.view(1, -1, 1)}[told]

    return forward


def int8_rows(rng: np.random.Generator) -> Feeds:
    return {
        "q": rng.standard_normal((B, N, S1, D)).astype(np.float32),
        "codes": rng.integers(-127, 128, (B, S2, C)).astype(np.int8),
        "scales": rng.uniform(0.005, 0.02, (B, S2, C // TILE)).astype(np.float32),
        "rope": rng.standard_normal((B, S2, D - C)).astype(np.float32),
        "indices": rows_of(rng, (B, S1), S2, holes=False),
    }


def int8_lse(q, codes, scales, rope, indices):
    """The log-sum-exp over int8 rows, which the int8 operator does not return."""
    tiles = take(codes, indices).float().unflatten(-1, (-1, TILE))
    nope = (tiles * take(scales, indices).unsqueeze(-1)).flatten(-2)
    found = torch.cat([nope, take(rope, indices)], -1)
    x = torch.einsum("bnsd,bskd->bnsk", q, found) * SCALE
    return torch.einsum("bnsk,bskd->bnsd", torch.softmax(x, -1), nope), torch.logsumexp(x, -1)


def behind(step: int = 0, twice: bool = False) -> Callable:
    """Scores tile by tile, the tile's scale behind its product; `step`: another tile's."""

    def forward(q, codes, scales, rope, indices):
        ints, by = take(codes, indices).float(), take(scales, indices)
        nope = (ints.unflatten(-1, (-1, TILE)) * by.unsqueeze(-1)).flatten(-2)
        x = torch.einsum("bnsd,bskd->bnsk", q[..., C:], take(rope, indices))
        for t in range(C // TILE):
            cut = slice(t * TILE, (t + 1) * TILE)
            scale = by[..., (t + step) % (C // TILE)].unsqueeze(1)
            part = torch.einsum("bnsd,bskd->bnsk", q[..., cut], ints[..., cut]) * scale
            x = x + (part * scale if twice else part)
        return torch.einsum("bnsk,bskd->bnsd", torch.softmax(x * SCALE, -1), nope)

    return forward


def values_behind(step: int = 0, turned: bool = False) -> Callable:
    """Rows are weighted tile by tile, the tile's scale on the weights; `step`: another tile's."""

    def forward(q, codes, scales, rope, indices):
        ints, by = take(codes, indices).float(), take(scales, indices)
        nope = (ints.unflatten(-1, (-1, TILE)) * by.unsqueeze(-1)).flatten(-2)
        found, parts = torch.cat([nope, take(rope, indices)], -1), []
        p = torch.softmax(torch.einsum("bnsd,bskd->bnsk", q, found) * SCALE, -1)
        for t in range(C // TILE):
            scale = by[..., (t + step) % (C // TILE)].unsqueeze(1)
            rows = ints[..., t * TILE : (t + 1) * TILE]
            parts.append(torch.einsum("bnsk,bskd->bnsd", p * scale, rows))
        return torch.cat(parts[::-1] if turned else parts, -1)

    return forward


def behind_at_once(q, codes, scales, rope, indices):
    """Tiles on an axis of their own, summed behind their scales."""
    tiles, by = take(codes, indices).float().unflatten(-1, (-1, TILE)), take(scales, indices)
    parts = torch.einsum("bnstd,bsktd->bnskt", q[..., :C].unflatten(-1, (-1, TILE)), tiles)
    x = (parts * by.unsqueeze(1)).sum(-1)
    x = x + torch.einsum("bnsd,bskd->bnsk", q[..., C:], take(rope, indices))
    nope = (tiles * by.unsqueeze(-1)).flatten(-2)
    return torch.einsum("bnsk,bskd->bnsd", torch.softmax(x * SCALE, -1), nope)


# -- softmax1, constant sinks ---------------------------------------------------------------------


def _near(x):
    m = x.amax(-1, keepdim=True).clamp(min=0)
    e = torch.exp(x - m)
    return e / (torch.exp(-m) + e.sum(-1, keepdim=True))


def _near_wrong(x):
    """The one is added to shifted exponentials."""
    m = x.amax(-1, keepdim=True).clamp(min=0)
    e = torch.exp(x - m)
    return e / (1 + e.sum(-1, keepdim=True))


def _two_columns(x):
    """A sink of 0 and one of the first score: rows differ."""
    wide = torch.cat([x, torch.zeros_like(x[..., :1]), x[..., :1]], -1)
    return torch.softmax(wide, -1)[..., :-2]


SINK = torch.tensor([0.3, -0.2, 1.0, 0.7])


def _column(x):
    return SINK.view(1, N, 1, 1).expand(x.shape[0], N, x.shape[2], 1)


ONES: dict[str, Callable] = {
    "shifted": _near,
    "padded": lambda x: torch.softmax(torch.nn.functional.pad(x, (1, 0)), -1)[..., 1:],
    "joined": lambda x: torch.softmax(torch.cat([x, torch.zeros_like(x[..., :1])], -1), -1)[
        ..., :-1
    ],
    "plain": lambda x: torch.exp(x) / (1 + torch.exp(x).sum(-1, keepdim=True)),
    "constant": lambda x: torch.softmax(torch.cat([_column(x), x], -1), -1)[..., 1:],
    "share": lambda x: (
        torch.softmax(x, -1)
        * torch.sigmoid(torch.logsumexp(x, -1, keepdim=True) - SINK.view(1, N, 1, 1))
    ),
}
ONE_MISSES: dict[str, tuple[Callable, str]] = {
    "shifted-one": (_near_wrong, "."),
    "two-columns": (_two_columns, "."),
    "epsilon": (lambda x: torch.exp(x) / (1e-6 + torch.exp(x).sum(-1, keepdim=True)), "epsilon"),
    "pad-low": (
        lambda x: torch.softmax(torch.nn.functional.pad(x, (1, 0), value=1.0), -1)[..., :-1],
        ".",
    ),
}


def weighted(soft: Callable) -> Callable:
    def forward(q, kv, indices):
        x, found = scores(q, kv, indices)
        return mix(soft(x), found)

    return forward


# -- two partial softmaxes ------------------------------------------------------------------------


def _lerp(a, b, x, y):
    w = torch.sigmoid(y - x)
    return a + w * (b - a)


def _by_softplus(threshold: float) -> Callable:
    def merge(a, b, x, y):
        whole = x + torch.nn.functional.softplus(y - x, threshold=threshold)
        return a * torch.exp(x - whole) + b * torch.exp(y - whole)

    return merge


def _floored(least: float) -> Callable:
    """As loops over ranks do: shares of the larger logarithm, and no division by zero."""

    def merge(a, b, x, y):
        most = torch.maximum(x, y)
        most = torch.where(torch.isinf(most), torch.zeros_like(most), most)
        u, v = torch.exp(x - most), torch.exp(y - most)
        return (torch.nan_to_num(a) * u + torch.nan_to_num(b) * v) / (u + v).clamp(min=least)

    return merge


def _stacked(a, b, x, y):
    return (torch.stack([a, b]) * torch.softmax(torch.stack([x, y]), 0)).sum(0)


MERGES: dict[str, Callable] = {
    "sigmoid": lambda a, b, x, y: a * torch.sigmoid(x - y) + b * (1 - torch.sigmoid(x - y)),
    "sigmoids": lambda a, b, x, y: a * torch.sigmoid(x - y) + b * torch.sigmoid(y - x),
    "lerp": _lerp,
    "softplus": _by_softplus(20.0),
    "stacked": _stacked,
    "floored": _floored(1e-20),
}
MERGE_MISSES: dict[str, Callable] = {
    "swapped": lambda a, b, x, y: a * torch.sigmoid(y - x) + b * torch.sigmoid(x - y),
    "half": lambda a, b, x, y: a + torch.sigmoid((y - x) / 2) * (b - a),
    "softplus-early": _by_softplus(0.5),
    "mean": lambda a, b, x, y: (a + b) / 2,
    "floored-high": _floored(1.5),  # a row whose chunks weigh 1 and 0.2 is divided by 1.5
}


def merged(merge: Callable) -> Callable:
    def forward(q, kv, indices):
        x, found = scores(q, kv, indices)
        parts = []
        for low, high in ((0, K // 2), (K // 2, K)):
            own = x[..., low:high]
            out = mix(torch.softmax(own, -1), found[:, :, low:high])
            parts.append((out, torch.logsumexp(own, -1, keepdim=True)))
        (a, top), (b, low) = parts
        return merge(a, b, top, low)

    return forward


def two_scales(nope: float, rope: float) -> Callable:
    """A ratio of the two that is no float32."""

    def forward(q, kv, indices):
        found = take(kv, indices)
        x = torch.einsum("bnsd,bskd->bnsk", q[..., :C], found[..., :C]) * nope
        x = x + torch.einsum("bnsd,bskd->bnsk", q[..., C:], found[..., C:]) * rope
        return mix(torch.softmax(x, -1), found)

    return forward


def _forms() -> Iterator[Form]:
    both = ("out", "side")
    for name, make in SIDES.items():
        outputs = ("out", "side", "rest") if name == "split" else both
        yield Form(f"{name}", side(make), rows, MANY, outputs=outputs)
    for name, make in SIDE_MISSES.items():
        yield Form(f"miss-{name}", side(make), rows, outputs=both, refuse=".")
    for name, guarded in (("plain", False), ("guarded", True)):
        yield Form(
            f"top-{name}", top_and_total(guarded), rows, MANY, outputs=("out", "top", "total")
        )
    yield Form("powers-of-2", binary, rows, MANY, outputs=both, exporters=("dynamo",))
    for told in ("own", "whole", "both"):
        yield Form(f"sink-{told}", sunk(told), with_sink, MANY, outputs=both)
    yield Form("int8", int8_lse, int8_rows, outputs=both)
    yield Form("behind", behind(), int8_rows, op=ANTIQUANT)
    yield Form("behind-at-once", behind_at_once, int8_rows, op=ANTIQUANT)
    yield Form("values", values_behind(), int8_rows, op=ANTIQUANT)
    yield Form("miss-values-next", values_behind(step=1), int8_rows, refuse=".")
    yield Form("miss-values-turned", values_behind(turned=True), int8_rows, refuse=".")
    yield Form("miss-behind-next", behind(step=1), int8_rows, refuse=".")
    yield Form("miss-behind-twice", behind(twice=True), int8_rows, refuse=".")
    for name, soft in ONES.items():
        yield Form(f"one-{name}", weighted(soft), rows, MANY)
    for name, (soft, reason) in ONE_MISSES.items():
        yield Form(f"miss-one-{name}", weighted(soft), rows, refuse=reason)
    for name, merge in MERGES.items():
        yield Form(f"merge-{name}", merged(merge), rows, MANY)
    for name, merge in MERGE_MISSES.items():
        told = ("dynamo",) if "softplus" in name else ("dynamo", "ts")  # ts drops the threshold
        yield Form(f"miss-merge-{name}", merged(merge), rows, refuse=".", exporters=told)
    yield Form("two-scales", two_scales(1 / 3, 0.2345678), rows, MANY)


def cases() -> Iterator[Case]:
    for form in _forms():
        for exporter in form.exporters:
            yield case_of("sides", form, exporter, dynamic=False)
            if form.dynamic:
                yield case_of("sides", form, exporter, dynamic=True)
