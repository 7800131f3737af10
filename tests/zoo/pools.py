"""Family: selections of pools of tokens, of one token, and keys folded one by one.

Block numbers times the pool plus an offset, gathered or as a mask, cut by a causal rule, with an
open tail or without; selections padded with -1; a selection of a single key; loops over chunks of
one key.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch

from tests.zoo.base import Case, Feeds
from tests.zoo.forms import Form, case_of
from tests.zoo.kernels import INF, S1, S2, SCALE, B, C, D, K, N, rows_of, take
from tests.zoo.sides import MANY, mix, scores

POOL, BEST = 4, 3


def _cache(rng: np.random.Generator) -> Feeds:
    return {
        "q": rng.standard_normal((B, N, S1, D)).astype(np.float32),
        "kv": rng.standard_normal((B, S2, D)).astype(np.float32),
    }


def ranked(count: int) -> Callable[[np.random.Generator], Feeds]:
    """Distinct scores of `count` pools."""

    def draw(rng: np.random.Generator) -> Feeds:
        order = np.broadcast_to(np.arange(count, dtype=np.float32), (B, S1, count))
        return {**_cache(rng), "wish": rng.permuted(order, axis=-1)}

    return draw


def chosen(rng: np.random.Generator) -> Feeds:
    return {**_cache(rng), "indices": rows_of(rng, (B, S1), S2, holes=False)}


def one_each(rng: np.random.Generator) -> Feeds:
    indices = rng.integers(0, S2, (B, S1, 1))
    indices[0, 0] = -1
    return {**_cache(rng), "indices": indices}


def attend(q, rows, hide=None):
    x = torch.einsum("bnsd,bskd->bnsk", q, rows) * SCALE
    x = x if hide is None else x.masked_fill(hide.unsqueeze(1), -INF)
    return mix(torch.softmax(x, -1), rows)


def _tokens(best):
    return (best.unsqueeze(-1) * POOL + torch.arange(POOL)).flatten(-2)


def _positions(q, kv):
    return (torch.arange(q.shape[2]) + kv.shape[1] - q.shape[2]).view(1, -1, 1)


def gathered(rule: str) -> Callable:
    """Rows of the best pools, token by token."""

    def forward(q, kv, wish):
        top, best = wish.topk(BEST, -1)
        tokens, hide = _tokens(best), None
        if rule == "causal":
            hide = tokens > _positions(q, kv)
        if rule == "tail":
            last = torch.arange(kv.shape[1] - POOL, kv.shape[1]).view(1, 1, -1)
            tokens = torch.cat([tokens, last.expand(*tokens.shape[:2], -1)], -1)
        if rule == "cleared":
            low = (top < -1).unsqueeze(-1)
            tokens = torch.where(low, -1, best.unsqueeze(-1) * POOL + torch.arange(POOL))
            tokens = tokens.flatten(-2)
            hide, tokens = tokens < 0, tokens.clamp(min=0)
        return attend(q, take(kv, tokens), hide)

    return forward


def masked(rule: str) -> Callable:
    """Dense scores, hidden outside the best pools."""

    def forward(q, kv, wish):
        best, count = wish.topk(BEST, -1)[1], kv.shape[1]
        pools = torch.zeros_like(wish, dtype=torch.bool)
        pools = pools.scatter(-1, best, torch.ones_like(best, dtype=torch.bool))
        keep = pools[..., torch.arange(count) // POOL]
        if rule == "causal":
            keep = keep & (torch.arange(count) <= _positions(q, kv))
        if rule == "tail":
            keep = keep | (torch.arange(count) >= count - POOL)
        x = q @ kv.unsqueeze(1).transpose(-1, -2) * SCALE
        low = -2.0 if rule == "soft" else -INF  # other pools count less, but count
        x = x + torch.where(keep.unsqueeze(1), 0.0, low)
        return torch.softmax(x, -1) @ kv[..., :C].unsqueeze(1)

    return forward


def padded(q, kv, wish):
    """A selection filled up with -1 to a fixed width."""
    best = torch.nn.functional.pad(wish.topk(10, -1)[1], (0, 6), value=-1)
    return attend(q, take(kv, best.clamp(min=0)), best < 0)


# -- a single key ---------------------------------------------------------------------------------


def single(pick: Callable) -> Callable:
    def forward(q, kv, wish):
        return attend(q, take(kv, pick(wish)))

    return forward


def single_hidden(q, kv, indices):
    """One key, which may be none."""
    return torch.nan_to_num(attend(q, take(kv, indices.clamp(min=0)), indices < 0))


def single_doubled(q, kv, wish):
    """A weight of 2 for the only key."""
    rows = take(kv, wish.argmax(-1, keepdim=True))
    x = torch.einsum("bnsd,bskd->bnsk", q, rows) * SCALE
    return mix(2 * torch.softmax(x, -1), rows)


def single_sigmoid(q, kv, wish):
    """The only key competes with nothing but its own sigmoid."""
    rows = take(kv, wish.argmax(-1, keepdim=True))
    x = torch.einsum("bnsd,bskd->bnsk", q, rows) * SCALE
    return mix(torch.sigmoid(x - 1), rows)


def folded(chunk: int, wrong: bool = False) -> Callable:
    """A running maximum over chunks of a selection; rows without a key in the first are NaN."""

    def forward(q, kv, indices):
        shape = (q.shape[0], N, q.shape[2])
        m, total, acc = torch.full(shape, -INF), torch.zeros(shape), torch.zeros(*shape, C)
        for t in range(0, K, chunk):
            x, rows = scores(q, kv, indices[..., t : t + chunk])
            new = torch.maximum(m, x.amax(-1))
            alpha, p = torch.exp(m - new), torch.exp(x - new.unsqueeze(-1))
            total = total + p.sum(-1) if wrong and t else total * alpha + p.sum(-1)
            acc, m = acc * alpha.unsqueeze(-1) + mix(p, rows), new
        return acc / total.unsqueeze(-1)

    return forward


def _forms() -> Iterator[Form]:
    open_ = {"q": {0: "b", 2: "s"}, "kv": {0: "b", 1: "keys"}}
    pools = {**open_, "wish": {0: "b", 1: "s", 2: "pools"}}
    for rule in ("plain", "causal", "tail", "cleared"):
        yield Form(f"rows-{rule}", gathered(rule), ranked(S2 // POOL), pools)
    for rule in ("plain", "causal", "tail"):
        yield Form(f"mask-{rule}", masked(rule), ranked(S2 // POOL), pools)
    yield Form("miss-mask-soft", masked("soft"), ranked(S2 // POOL), refuse=".")
    yield Form("padded", padded, ranked(S2), pools)
    yield Form("one-best", single(lambda wish: wish.topk(1, -1)[1]), ranked(S2), pools)
    yield Form("one-argmax", single(lambda w: w.argmax(-1, keepdim=True)), ranked(S2), pools)
    yield Form("one-hidden", single_hidden, one_each, MANY)
    yield Form("miss-one-doubled", single_doubled, ranked(S2), refuse=".")
    yield Form("miss-one-sigmoid", single_sigmoid, ranked(S2), refuse=".")
    for chunk in (1, 5):
        yield Form(f"folded-{chunk}", folded(chunk), chosen, MANY)
    yield Form("miss-folded", folded(1, wrong=True), chosen, refuse=".")


def cases() -> Iterator[Case]:
    for form in _forms():
        for exporter in form.exporters:
            yield case_of("pools", form, exporter, dynamic=False)
            if form.dynamic:
                yield case_of("pools", form, exporter, dynamic=True)
