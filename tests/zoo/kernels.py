"""Family: what the authors of kernels and training frameworks write as their own reference.

Boolean assignment everywhere, log-sum-exps patched and returned, rows scrubbed of NaN, running
maxima over chunks of gathered keys, masked exponentials over a floored sum, partial softmaxes that
are merged by their log-sum-exps.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from tests.zoo.base import Case, Feeds
from tests.zoo.forms import Form, case_of

B, S1, N, S2, K, C, R = 2, 3, 4, 40, 12, 32, 8
D = C + R
SCALE = D**-0.5
INF = float("inf")


def rows_of(rng: np.random.Generator, lead: tuple[int, ...], high: int, holes: bool = True):
    """Distinct indices, some of them -1 at the end of a row."""
    shape = (*lead, high)
    idx = rng.permuted(np.broadcast_to(np.arange(high), shape), axis=-1)[..., :K]
    if holes:
        idx[..., 0, K - 3 :] = -1
    return idx.astype(np.int64)


# -- a prefill reference: one sequence, rows gathered by index_select ------------------------------


def prefill(rng: np.random.Generator) -> Feeds:
    return {
        "q": rng.standard_normal((S1, N, D)).astype(np.float32),
        "kv": rng.standard_normal((S2, D)).astype(np.float32),
        "indices": rows_of(rng, (S1,), S2),
    }


def with_length(rng: np.random.Generator) -> Feeds:
    return {**prefill(rng), "topk_length": rng.integers(3, K + 1, S1).astype(np.int64)}


def with_sink(rng: np.random.Generator) -> Feeds:
    return {**prefill(rng), "sink": rng.standard_normal(N).astype(np.float32)}


def gathered(q, kv, indices, topk_length=None):
    """(scores with -inf assigned, rows), as kernels' prefill references have them."""
    idx = indices.clone()
    if topk_length is not None:
        late = torch.arange(K).unsqueeze(0).expand(idx.shape[0], K) >= topk_length.unsqueeze(1)
        idx[late] = -1
    invalid = (idx < 0) | (idx >= kv.shape[0])
    idx[invalid] = 0
    rows = kv.index_select(0, idx.flatten()).reshape(idx.shape[0], K, D)
    scores = q @ rows.transpose(1, 2)
    scores = scores * SCALE
    scores[invalid.unsqueeze(1).expand(scores.shape)] = -INF
    return scores, rows


def patched(q, kv, indices, topk_length=None):
    """exp(P - lse), where rows without keys have lse = +inf."""
    scores, rows = gathered(q, kv, indices, topk_length)
    lse = torch.logsumexp(scores, -1)
    safe = lse.clone()
    safe[safe == -INF] = INF
    return torch.exp(scores - safe.unsqueeze(-1)) @ rows[..., :C]


def told(patched: bool):
    """The result, the largest score and the log-sum-exp; rows without keys have -inf, or +inf."""

    def forward(q, kv, indices, topk_length=None):
        scores, rows = gathered(q, kv, indices, topk_length)
        lse, top = torch.logsumexp(scores, -1), scores.max(-1).values
        safe = lse.clone()
        safe[safe == -INF] = INF
        out = torch.exp(scores - safe.unsqueeze(-1)) @ rows[..., :C]
        if patched:
            lonely = lse == -INF
            lse = lse.clone()
            lse[lonely] = INF
        return out, top, lse

    return forward


def half_lse(q, kv, indices):
    """What is returned is a log-sum-exp of half the scores."""
    scores, rows = gathered(q, kv, indices)
    out = torch.softmax(scores, -1) @ rows[..., :C]
    return torch.nan_to_num(out), torch.logsumexp(scores / 2, -1)


def sunk(q, kv, indices, sink):
    """The log-sum-exp takes a sink in; rows without keys are zero."""
    scores, rows = gathered(q, kv, indices)
    lse = torch.logsumexp(scores, -1)
    both = torch.stack([lse, sink.broadcast_to(lse.shape)], 0)
    whole = torch.logsumexp(both, 0).clone()
    whole[whole == -INF] = INF
    return torch.exp(scores - whole.unsqueeze(-1)) @ rows[..., :C]


def sunk_per_row(q, kv, indices, sink):
    """A sink that differs from token to token."""
    scores, rows = gathered(q, kv, indices)
    own = sink * torch.arange(1.0, S1 + 1).view(-1, 1)
    wide = torch.cat([scores, own.unsqueeze(-1)], -1)
    return torch.softmax(wide, -1)[..., :-1] @ rows[..., :C]


def patched_wrong(q, kv, indices):
    """The log-sum-exp is patched where it is negative, too: rows that see keys become zero."""
    scores, rows = gathered(q, kv, indices)
    lse = torch.logsumexp(scores, -1)
    safe = lse.clone()
    safe[safe < 0] = INF
    return torch.exp(scores - safe.unsqueeze(-1)) @ rows[..., :C]


def biased(q, kv, indices):
    """Scores of invalid entries are assigned -5: they keep a weight."""
    scores, rows = gathered(q, kv, indices)
    scores = torch.where(torch.isinf(scores), torch.full_like(scores, -5.0), scores)
    lse = torch.logsumexp(scores, -1, keepdim=True)
    return torch.exp(scores - lse) @ rows[..., :C]


def other_row(q, kv, indices):
    """Invalid entries are cleared after the gather: their scores stay."""
    idx = indices.clone()
    invalid = idx < 0
    idx[invalid] = 0
    rows = kv.index_select(0, idx.flatten()).reshape(idx.shape[0], K, D)
    rows = torch.where(invalid.unsqueeze(-1), rows[:, :1], rows)
    p = torch.softmax(q @ rows.transpose(1, 2) * SCALE, -1)
    return p @ rows[..., :C]


# -- a decode reference: pages, flat indices ------------------------------------------------------

PAGES, PAGE = 6, 16


def pages(rng: np.random.Generator) -> Feeds:
    return {
        "q": rng.standard_normal((B, S1, N, D)).astype(np.float32),
        "blocked": rng.standard_normal((PAGES, PAGE, 1, D)).astype(np.float32),
        "indices": rows_of(rng, (B, S1), PAGES * PAGE),
    }


def page_lengths(rng: np.random.Generator) -> Feeds:
    return {**pages(rng), "topk_length": rng.integers(3, K + 1, B).astype(np.int64)}


def page_sink(rng: np.random.Generator) -> Feeds:
    return {**pages(rng), "sink": rng.standard_normal(N).astype(np.float32)}


def decode(q, blocked, indices, topk_length=None, scrub=True, sink=None):
    """Flat gather, NaN scrubbed, -inf assigned, rows without keys zeroed by assignment."""
    b, s = q.shape[0], q.shape[1]
    rows = blocked.view(-1, D).index_select(0, indices.clamp_min(0).view(-1))
    rows = rows.view(b, s, K, D)
    invalid = indices == -1
    if topk_length is not None:
        late = torch.arange(0, K).view(1, 1, K).expand(b, s, K) >= topk_length.view(b, 1, 1)
        invalid = invalid | late
    rows = rows.view(b * s, -1, D).float()
    if scrub:
        rows[rows != rows] = 0.0
    x = q.float().view(b * s, N, D) @ rows.transpose(-1, -2)
    x *= SCALE
    x[invalid.view(b * s, 1, -1).expand(b * s, N, K)] = -INF
    lse = x.logsumexp(-1)
    out = torch.exp(x - lse.unsqueeze(-1)) @ rows[..., :C]
    out, lse = out.view(b, s, N, C), lse.view(b, s, N)
    if sink is not None:
        out = out * (1.0 / (1.0 + torch.exp(sink.view(1, 1, N) - lse))).unsqueeze(-1)
    lonely = lse == -INF
    out[lonely.unsqueeze(-1).expand(b, s, N, C)] = 0.0
    return out


def decode_lse(q, blocked, indices):
    """As `decode`, with the log-sum-exp, heads first."""
    b, s = q.shape[0], q.shape[1]
    rows = blocked.view(-1, D).index_select(0, indices.clamp_min(0).view(-1)).view(b * s, K, D)
    rows[rows != rows] = 0.0
    x = q.view(b * s, N, D) @ rows.transpose(-1, -2) * SCALE
    x[(indices == -1).view(b * s, 1, -1).expand(b * s, N, K)] = -INF
    lse = x.logsumexp(-1)
    out = torch.exp(x - lse.unsqueeze(-1)) @ rows[..., :C]
    out, lse = out.view(b, s, N, C), lse.view(b, s, N)
    lonely = lse == -INF
    out[lonely.unsqueeze(-1).expand(b, s, N, C)] = 0.0
    lse[lonely] = INF
    return out, lse.transpose(1, 2)


# -- running maxima over chunks -------------------------------------------------------------------


def batches(rng: np.random.Generator) -> Feeds:
    return {
        "q": rng.standard_normal((B, N, S1, D)).astype(np.float32),
        "kv": rng.standard_normal((B, S2, D)).astype(np.float32),
        "indices": rows_of(rng, (B, S1), S2),
    }


def take(kv, idx):
    """Rows of every batch's own keys."""
    flat = idx.clamp(min=0).flatten(1).unsqueeze(-1).expand(-1, -1, kv.shape[-1])
    return kv.gather(1, flat).view(*idx.shape, kv.shape[-1])


def running(chunk: int, floor: float = 1e-10, guard: str = "nan", wrong: str = ""):
    """Online softmax over chunks of the selection."""

    def forward(q, kv, indices):
        b, n, s, _ = q.shape
        m = torch.full((b, n, s), -INF)
        total = torch.zeros(b, n, s)
        acc = torch.zeros(b, n, s, C)
        for t in range(0, K, chunk):
            idx = indices[:, :, t : t + chunk]
            rows = take(kv, idx)
            x = torch.einsum("bnsd,bskd->bnsk", q, rows) * SCALE
            x = x.masked_fill((idx < 0).unsqueeze(1), -INF)
            new = torch.maximum(m, x.amax(-1))
            if guard == "isinf":
                safe = torch.where(torch.isinf(new), torch.zeros_like(new), new)
                alpha = torch.where(torch.isinf(m), torch.zeros_like(m), torch.exp(m - safe))
                p = torch.exp(x - safe.unsqueeze(-1))
            else:
                alpha = torch.nan_to_num(torch.exp(m - new), nan=0.0, posinf=0.0, neginf=0.0)
                p = torch.nan_to_num(
                    torch.exp(x - new.unsqueeze(-1)), nan=0.0, posinf=0.0, neginf=0.0
                )
            part = torch.einsum("bnsk,bskd->bnsd", p, rows[..., :C])
            acc = acc * (alpha if wrong != "alpha" else alpha * alpha).unsqueeze(-1) + part
            total = total * alpha + p.sum(-1) + (1e-3 if wrong == "eps" else 0.0)
            m = new
        return acc / total.clamp_min(floor).unsqueeze(-1)

    return forward


def masked_softmax(tiny: float, shifted: bool = True):
    """Exponentials times the mask, over a floored sum (dense, scattered index mask)."""

    def forward(q, kv, indices):
        x = q @ kv.unsqueeze(1).transpose(-1, -2) * SCALE
        mask = torch.full((q.shape[0], q.shape[2], kv.shape[1]), -INF)
        mask = mask.scatter(-1, indices, 0.0)
        s, t = q.shape[2], kv.shape[1]
        causal = torch.triu(torch.full((s, t), -INF), diagonal=t - s + 1)
        mask = mask + causal
        valid = torch.isfinite(mask).unsqueeze(1).expand(-1, N, -1, -1)
        x = x + mask.unsqueeze(1)
        x = x.masked_fill(~valid, -INF)
        most = x.amax(-1, keepdim=True)
        most = torch.where(torch.isfinite(most), most, torch.zeros_like(most))
        e = torch.exp(x - most if shifted else x) * valid.to(x.dtype)
        p = e / e.sum(-1, keepdim=True).clamp_min(tiny)
        return p @ kv[..., :C].unsqueeze(1)

    return forward


def chosen(rng: np.random.Generator) -> Feeds:
    found = batches(rng)
    return {**found, "indices": rows_of(rng, (B, S1), S2, holes=False)}


# -- partial softmaxes ----------------------------------------------------------------------------


def halves(wrong: str = ""):
    """Two partial attentions over halves of the selection, merged by their log-sum-exps."""

    def forward(q, kv, indices):
        parts = []
        for idx in indices.chunk(2, dim=-1):
            rows = take(kv, idx)
            x = torch.einsum("bnsd,bskd->bnsk", q, rows) * SCALE
            lse = torch.logsumexp(x, -1, keepdim=True)
            out = torch.einsum("bnsk,bskd->bnsd", torch.softmax(x, -1), rows[..., :C])
            parts.append((out, lse))
        (o1, l1), (o2, l2) = parts
        whole = torch.logaddexp(l1, l2) if wrong != "mean" else (l1 + l2) / 2
        if wrong == "swap":
            l1, l2 = l2, l1
        return o1 * torch.exp(l1 - whole) + o2 * torch.exp(l2 - whole)

    return forward


def _forms() -> Iterator[Form]:
    tokens = {"q": {0: "s"}, "kv": {0: "keys"}, "indices": {0: "s"}, "topk_length": {0: "s"}}
    yield Form("prefill", patched, prefill, tokens)
    yield Form("prefill-length", patched, with_length, tokens)
    three, two = ("out", "top", "lse"), ("out", "lse")
    yield Form("prefill-all", told(patched=True), prefill, tokens, outputs=three)
    yield Form("prefill-all-plain", told(patched=False), prefill, tokens, outputs=three)
    yield Form("prefill-all-length", told(patched=True), with_length, tokens, outputs=three)
    yield Form("decode-lse", decode_lse, pages, {"q": {0: "b"}, "indices": {0: "b"}}, outputs=two)
    yield Form("prefill-half-lse", half_lse, prefill, outputs=two, refuse="outside|output")
    yield Form("prefill-patched-wrong", patched_wrong, prefill, refuse=".")
    yield Form("prefill-biased", biased, prefill, refuse=".")
    yield Form("prefill-other-row", other_row, prefill, refuse=".")
    paged = {"q": {0: "b"}, "blocked": {0: "pages"}, "indices": {0: "b"}, "topk_length": {0: "b"}}
    yield Form("decode", decode, pages, paged)
    yield Form("decode-length", decode, page_lengths, paged)
    yield Form("prefill-sink", sunk, with_sink, {**tokens})
    yield Form("decode-sink", decode, page_sink, {**paged})
    yield Form("prefill-sink-row", sunk_per_row, with_sink, refuse="sink")
    many = {"q": {0: "b", 2: "s"}, "kv": {0: "b", 1: "keys"}, "indices": {0: "b", 1: "s"}}
    for chunk in (K, 4, 5):
        yield Form(f"running-{chunk}", running(chunk), batches, many)
        yield Form(f"running-{chunk}-isinf", running(chunk, guard="isinf"), batches, many)
    yield Form("running-alpha", running(4, wrong="alpha"), batches, refuse=".")
    yield Form("running-eps", running(4, wrong="eps"), batches, refuse=".")
    yield Form("running-floor", running(4, floor=1.5), batches, refuse="floor")
    yield Form("masked", masked_softmax(1e-20), chosen, many)
    yield Form("masked-floor", masked_softmax(1e-6, shifted=False), chosen, refuse="floor")
    plain = ("dynamo",)  # the tracer has no logaddexp
    yield Form("halves", halves(), chosen, many, exporters=plain)
    yield Form("halves-swapped", halves("swap"), chosen, refuse=".", exporters=plain)
    yield Form("halves-mean", halves("mean"), chosen, refuse=".", exporters=plain)


def cases() -> Iterator[Case]:
    for form in _forms():
        for exporter in form.exporters:
            yield case_of("kernels", form, exporter, dynamic=False)
            if form.dynamic:
                yield case_of("kernels", form, exporter, dynamic=True)
