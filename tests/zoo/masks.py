"""Family: visibility rules of every kind around the same attention, and decoys beside it.

A rule that hides selected keys, whatever it says, can be evaluated at the selected positions: it
must fuse with the right numbers. A rule that shows keys outside the selection must not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from tests.zoo.base import FLOAT_KV, Case, Feeds, export, to_torch


@dataclass(frozen=True)
class Spec:
    """Sizes and the rule."""

    B: int = 2
    S1: int = 6
    N: int = 4
    S2: int = 32
    K: int = 10
    C: int = 64
    R: int = 16
    form: str = "dense"  # or "gathered"
    rule: str = "causal"
    select: str = "topk"  # "topk", "unsorted", "topk_masked", "input"
    exporter: str = "dynamo"
    dynamic: bool = False


def visible(s: Spec, mask, lengths):
    """bool [B, S1, S2] (or broadcastable) of what a query may see, or None."""
    rows = torch.arange(s.S1).unsqueeze(-1) + (s.S2 - s.S1)
    keys = torch.arange(s.S2)
    causal = keys <= rows
    if s.rule == "none":
        return None
    if s.rule == "causal":
        return causal
    if s.rule == "strict":  # not itself
        return keys < rows
    if s.rule == "lookahead":
        return keys <= rows + 2
    if s.rule == "window":
        return causal & (keys > rows - 20)
    if s.rule == "window_or_sink":  # a window, plus the first tokens
        return causal & ((keys > rows - 12) | (keys < 4))
    if s.rule == "blocks":  # diagonal blocks
        return (keys // 8) <= (rows // 8)
    if s.rule == "input":
        return mask
    if s.rule == "input_and_causal":
        return mask & causal
    if s.rule == "padding":
        return mask[:, :1, :]
    if s.rule == "lengths":
        return keys < lengths.view(-1, 1, 1)
    if s.rule == "lengths_causal":
        return keys <= lengths.view(-1, 1, 1) - s.S1 + torch.arange(s.S1).unsqueeze(-1)
    if s.rule == "even":
        return keys % 2 == 0
    raise ValueError(s.rule)


class Ruled(nn.Module):
    """Absorbed attention, selected keys only, under a rule."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.s = spec

    def forward(self, q, latent, rope, score, mask, lengths):
        s = self.s
        see = visible(s, mask, lengths)
        if s.select == "topk_masked" and see is not None:
            score = score.masked_fill(~see, float("-inf"))
        if s.select == "unsorted":
            idx = score.topk(s.K, dim=-1, sorted=False)[1]
        elif s.select == "ascending":
            idx = torch.sort(score.topk(s.K, dim=-1)[1], dim=-1)[0]
        else:
            idx = score.topk(s.K, dim=-1)[1]
        key = torch.cat([latent, rope], -1)
        if s.form == "gathered":
            base = torch.arange(s.B).view(-1, 1, 1) * s.S2
            key = key.reshape(s.B * s.S2, -1)[idx + base]
            x = torch.matmul(q, key.transpose(-1, -2)) * 0.11
            if see is not None:
                chosen = torch.gather(see.expand(s.B, s.S1, s.S2), -1, idx)
                x = x.masked_fill(~chosen.unsqueeze(2), float("-inf"))
            return torch.matmul(torch.softmax(x, -1), key[..., : s.C])
        x = torch.einsum("bsnd,btd->bsnt", q, key) * 0.11
        keep = torch.zeros(s.B, s.S1, s.S2, dtype=torch.bool)
        keep = keep.scatter(-1, idx, torch.ones_like(idx, dtype=torch.bool))
        if see is not None:
            keep = keep & see
        x = x.masked_fill(~keep.unsqueeze(2), float("-inf"))
        return torch.einsum("bsnt,btc->bsnc", torch.softmax(x, -1), latent)


class Decoy(nn.Module):
    """Attention that is not ours, with the furniture of ours around it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, q, latent, rope, score, mask, lengths):
        key = torch.cat([latent, rope], -1)
        if self.kind == "router":  # mixture of experts: top-k, scatter, softmax, no attention
            logits = score.reshape(-1, score.shape[-1])
            best, which = logits.topk(4, dim=-1)
            weight = torch.zeros_like(logits).scatter(-1, which, torch.softmax(best, -1))
            return torch.matmul(weight, latent.reshape(-1, latent.shape[-1])[: logits.shape[-1]])
        x = torch.einsum("bsnd,btd->bsnt", q, key) * 0.11
        if self.kind == "window":
            rows = torch.arange(q.shape[1]).unsqueeze(-1)
            x = x.masked_fill((torch.arange(key.shape[1]) > rows + 20).unsqueeze(1), float("-inf"))
        if self.kind == "masked":
            x = x.masked_fill(~mask.unsqueeze(2), float("-inf"))
        if self.kind == "threshold":  # keys by score, not by index
            x = x.masked_fill((score < 0).unsqueeze(2), float("-inf"))
        if self.kind == "per_head":  # top-k of the attention's own scores
            best, which = x.topk(8, dim=-1)
            x = torch.full_like(x, float("-inf")).scatter(-1, which, best)
        if self.kind == "blocks":  # selects blocks of four keys
            which = score.reshape(*score.shape[:2], -1, 4).amax(-1).topk(4, dim=-1)[1]
            keep = torch.zeros(*score.shape[:2], score.shape[-1] // 4)
            keep = keep.scatter(-1, which, torch.ones(which.shape)).repeat_interleave(4, -1)
            x = x.masked_fill((keep < 0.5).unsqueeze(2), float("-inf"))
        return torch.einsum("bsnt,btc->bsnc", torch.softmax(x, -1), latent)


def feeds(s: Spec, seed: int) -> Feeds:
    rng = np.random.default_rng(seed)
    mask = rng.random((s.B, s.S1, s.S2)) < 0.8
    score = np.broadcast_to(np.arange(s.S2, dtype=np.float32), (s.B, s.S1, s.S2))
    score = rng.permuted(score, axis=-1) - s.S2 / 2
    score[..., 0], mask[..., 0] = s.S2, True  # token 0 is always selected and visible
    f32 = np.float32
    return {
        "q": rng.standard_normal((s.B, s.S1, s.N, s.C + s.R), f32),
        "latent": rng.standard_normal((s.B, s.S2, s.C), f32),
        "rope": rng.standard_normal((s.B, s.S2, s.R), f32),
        "score": score.astype(f32),
        "mask": mask,
        "lengths": rng.integers(s.S1 + 2, s.S2 + 1, s.B),
    }


def _case(name: str, module: nn.Module, s: Spec, **more) -> Case:
    def make():
        opset = 18 if s.exporter == "dynamo" else 17
        return export(module, to_torch(feeds(s, 0)), exporter=s.exporter, opset=opset)

    tags = {"exporter": s.exporter, "opset": 18, "dtype": "f32", "dynamic": False}
    return Case(f"mask-{name}", "masks", make, lambda seed: feeds(s, seed), tags=tags, **more)


RULES = (
    *("none", "causal", "strict", "lookahead", "window", "window_or_sink", "blocks", "input"),
    *("input_and_causal", "padding", "lengths", "lengths_causal", "even"),
)


def cases() -> Iterator[Case]:
    for form in ("dense", "gathered"):
        for rule in RULES:
            s = Spec(form=form, rule=rule)
            yield _case(f"{form}-{rule}", Ruled(s), s, op=FLOAT_KV)
        for select in ("unsorted", "topk_masked", "ascending"):
            s = Spec(form=form, rule="input_and_causal", select=select)
            yield _case(f"{form}-{select}", Ruled(s), s, op=FLOAT_KV)
        for rule in ("causal", "input", "lengths_causal"):
            s = Spec(form=form, rule=rule, exporter="ts")
            yield _case(f"{form}-{rule}-ts", Ruled(s), s, op=FLOAT_KV)
    for kind in ("router", "plain", "window", "masked", "threshold"):
        yield _case(f"decoy-{kind}", Decoy(kind), Spec(), expect="leave")
    yield _case("decoy-per_head", Decoy("per_head"), Spec(), expect="either")
    yield _case("decoy-blocks", Decoy("blocks"), Spec(), op=FLOAT_KV)
