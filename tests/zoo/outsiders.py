"""Family: spellings of serving code: global row numbers, page tables, written masks, guards."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import nn

from tests.zoo.base import ANTIQUANT, FLOAT_KV, Case, Feeds, export, to_torch

B, S1, N, S2, K, C, R, TILE, PAGE = 2, 3, 4, 24, 6, 64, 16, 32, 8
D, SCALE, LOW = C + R, (C + R) ** -0.5, float("-inf")


def _batch():
    return torch.arange(B)[:, None, None]


def _attend(q, k, hidden=None):
    x = torch.matmul(q, k.transpose(-1, -2)) * SCALE
    return x if hidden is None else x.masked_fill(hidden, LOW)


def _mix(x, k):
    return torch.matmul(torch.softmax(x, -1), k[..., :C])


# ---- masks over all keys -------------------------------------------------------------------------
def _put(idx, value=True, base=False, kind=torch.bool):
    mask = torch.ones(B, S1, S2, dtype=kind) if base is True else torch.zeros(B, S1, S2, dtype=kind)
    mask = torch.full((B, S1, S2), LOW) if base == LOW else mask
    mask[_batch(), torch.arange(S1)[None, :, None], idx] = value
    return mask


def _flags(idx, value=1):
    return torch.zeros(B, S1, S2, dtype=torch.int32).scatter(-1, idx, value)


def _seen(wish):
    return wish > -1.5


KEEPS: dict[str, Callable] = {
    "put": lambda idx, wish: _put(idx) & _seen(wish),
    "equal-one": lambda idx, wish: (_flags(idx) == 1) & _seen(wish),
    "times": lambda idx, wish: (_flags(idx) * _seen(wish).int()) > 0,
    "least": lambda idx, wish: torch.minimum(_flags(idx), _seen(wish).int()) == 1,
    "not-inf": lambda idx, wish: ~torch.isinf(torch.full((B, S1, S2), LOW).scatter(-1, idx, 0.0)),
    "unlike-inf": lambda idx, wish: torch.full((B, S1, S2), LOW).scatter(-1, idx, 0.0) != LOW,
}
KEEP_MISSES: dict[str, Callable] = {
    "most": lambda idx, wish: torch.maximum(_flags(idx), _seen(wish).int()) == 1,
    "times-zero": lambda idx, wish: (_flags(idx) * _seen(wish).int()) == 0,
    "put-false": lambda idx, wish: _put(idx, False, True),
    "pairs-once": lambda idx, wish: torch.zeros(B, S1, S2).scatter_add(-1, idx // 2, torch.ones(1)
                                                                  .expand(idx.shape)) == 1,
}  # fmt: skip
ADDS: dict[str, Callable] = {
    "put-zero": lambda idx, wish: _put(idx, 0.0, LOW, torch.float32),
    "flag-less-one": lambda idx, wish: (_flags(idx).float() - 1) * 1e30,
    "logarithm": lambda idx, wish: torch.log(_flags(idx).float()),
}
ADD_MISSES: dict[str, Callable] = {
    "flag-less-one-soft": lambda idx, wish: (_flags(idx).float() - 1) * 5,
    "put-graded": lambda idx, wish: _put(
        idx, torch.linspace(0, 1, K).expand(B, S1, K), LOW, torch.float32
    ),
}


class Masked(nn.Module):
    """Scores over all keys, hidden by a bool mask or by one that is added."""

    def __init__(self, make: Callable, adds: bool) -> None:
        super().__init__()
        self.make, self.adds = make, adds

    def forward(self, q, kv, wish):
        mask = self.make(wish.topk(K, -1)[1], wish).unsqueeze(2)
        x = _attend(q, kv.unsqueeze(1))
        x = x + mask if self.adds else x.masked_fill(~mask, LOW)
        return _mix(x, kv.unsqueeze(1))


def masked_feeds(seed: int) -> Feeds:
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.standard_normal(shape, np.float32)  # noqa: E731
    return {"q": draw(B, S1, N, D), "kv": draw(B, S2, D), "wish": draw(B, S1, S2)}


# ---- softmax written out, rows without keys guarded ----------------------------------------------
def _exponentials(x, most):
    e = torch.exp(x - most)
    return e, e.sum(-1, keepdim=True)


def _flash(x, floor=0.0):
    most = x.amax(-1, keepdim=True)
    e, total = _exponentials(x, torch.where(torch.isinf(most), torch.zeros_like(most), most))
    empty = total <= floor if floor else total == 0
    return e / torch.where(empty, torch.ones_like(total), total)


def _shifted(x, axis, **bounds):
    e, total = _exponentials(x, x.amax(axis, keepdim=True).clamp(**bounds))
    return e / total


def _or_one(total):
    return torch.where(total == 0, torch.ones_like(total), total)


def _near(x, safe):
    """Rows whose exponentials all vanish become 0."""
    e, total = _exponentials(x, x.amax(-1, keepdim=True).clamp(min=0.0))
    return e / safe(total)


SOFTS: dict[str, Callable] = {
    "flash": _flash,
    "bounded": lambda x: _shifted(x, -1, min=-1e30),
    # exponentials of scores that lie far below 0 are all 0, and the original NaN: softmax elsewhere
    "bounded-near": lambda x: _shifted(x, -1, min=0.0),
}
SOFT_MISSES: dict[str, Callable] = {
    "flash-floor": lambda x: _flash(x, 1.2),
    "bounded-heads": lambda x: _shifted(x, 2, min=-1e30),
    "bounded-near-floor": lambda x: _near(x, lambda total: total.clamp(min=1e-6)),
    "bounded-near-guard": lambda x: _near(x, _or_one),
    "plain-guard": lambda x: torch.exp(x) / _or_one(torch.exp(x).sum(-1, keepdim=True)),
}


class Soft(nn.Module):
    """Selected rows, every slot of which is visible or not by a mask."""

    def __init__(self, soft: Callable) -> None:
        super().__init__()
        self.soft = soft

    def forward(self, q, kv, wish):
        best, idx = wish.topk(K, -1)
        k = kv[_batch(), idx]
        x = _attend(q, k, (best < 0.3).unsqueeze(2))
        return torch.matmul(self.soft(x), k[..., :C])


# ---- rows by number ------------------------------------------------------------------------------
T, ROWS = 6, 48


class Rows(nn.Module):
    """Tokens that read rows of one flat cache through a table of their sequence."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, q, kv, idx, table, sequence):
        own = table[sequence.long()]  # [T, M]
        page, size = (idx, 1) if self.kind == "slots" else (idx // PAGE, PAGE)
        at = torch.gather(own, 1, page.clamp(0, own.shape[1] - 1).long()) * size + idx % size
        row = torch.where(idx < 0, torch.full_like(at, -1), at)
        empty = row == -1
        k = kv[row.masked_fill(empty, 0).long()]
        x = _attend(q, k, empty.unsqueeze(1))
        if self.kind in ("slots", "pages"):
            return _mix(x, k)
        total = torch.logsumexp(x, -1)
        if self.kind == "shown-total":
            return torch.matmul(torch.exp(x - total.unsqueeze(-1)), k[..., :C]), total
        out = torch.matmul(torch.exp(x - total.unsqueeze(-1)), k[..., :C])
        return out.masked_fill((total == LOW).unsqueeze(-1), 1.0 if self.kind == "ones" else 0.0)


def row_feeds(kind: str, seed: int) -> Feeds:
    rng = np.random.default_rng(seed)
    length = 16 if kind == "slots" else S2
    idx = rng.permuted(np.broadcast_to(np.arange(length), (T, length)), axis=-1)[:, :K]
    idx[1, 4:], idx[4, 2:] = -1, -1
    if kind == "guard":
        idx[3] = -1
    count, top = (length, ROWS) if kind == "slots" else (S2 // PAGE, ROWS // PAGE)
    return {
        "q": rng.standard_normal((T, N, D), np.float32),
        "kv": rng.standard_normal((ROWS, D), np.float32),
        "idx": idx.astype(np.int32),
        "table": rng.permuted(np.broadcast_to(np.arange(top), (B, top)), axis=-1)[:, :count]
        .astype(np.int32),
        "sequence": np.sort(rng.integers(0, B, T)).astype(np.int32),
    }  # fmt: skip


class Packed8(nn.Module):
    """int8 rows of sequences that follow each other: prefix sums begin with 0."""

    def __init__(self, split: bool) -> None:
        super().__init__()
        self.split = split

    def forward(self, q, nope, scale, rope, idx, sequence, starts):
        begin = starts[sequence.long()]
        length = starts[sequence.long() + 1] - begin
        empty = (idx < 0) | (idx >= length[:, None])
        row = torch.where(empty, 0, idx) + begin[:, None]
        rows, scales = nope[row], scale[row]
        if self.split:  # tile by tile
            parts = zip(rows.split(TILE, -1), scales.split(1, -1), strict=True)
            latent = torch.cat([x.float() * s for x, s in parts], -1)
        else:
            latent = (rows.float().unflatten(-1, (-1, TILE)) * scales.unsqueeze(-1)).flatten(-2)
        k = torch.cat([latent, rope[row]], -1)
        return _mix(_attend(q, k, empty.unsqueeze(1)), k)


def packed_feeds(seed: int) -> Feeds:
    rng = np.random.default_rng(seed)
    starts, sequence = np.array([0, 11, 17, 30]), np.array([0, 0, 0, 1, 1, 2])
    idx = np.full((T, K), -1)
    for t, b in enumerate(sequence):
        own = rng.permutation(starts[b + 1] - starts[b])[: K - t % 3]
        idx[t, : len(own)] = own
    return {
        "q": rng.standard_normal((T, N, D), np.float32),
        "nope": rng.integers(-127, 128, (30, C)).astype(np.int8),
        "scale": rng.uniform(0.005, 0.03, (30, C // TILE)).astype(np.float32),
        "rope": rng.standard_normal((30, R), np.float32),
        "idx": idx,
        "sequence": sequence,
        "starts": starts,
    }


def _case(name: str, module: Callable, feeds: Callable, exporter: str = "ts", **more) -> Case:
    opset = 17 if exporter == "ts" else 18
    names = ("out", "total") if "shown" in name else ("out",)

    def make():
        return export(module(), to_torch(feeds(0)), names, exporter=exporter, opset=opset)

    tags = {"exporter": exporter, "opset": opset, "dtype": "f32", "dynamic": False}
    return Case(f"outsider-{name}-{exporter}", "outsiders", make, feeds, tags=tags, **more)


def cases() -> Iterator[Case]:
    for adds, right, wrong in ((False, KEEPS, KEEP_MISSES), (True, ADDS, ADD_MISSES)):
        for name, make in right.items():
            module = lambda make=make, adds=adds: Masked(make, adds)  # noqa: E731
            yield _case(f"mask-{name}", module, masked_feeds, op=FLOAT_KV)
        for name, make in wrong.items():
            module = lambda make=make, adds=adds: Masked(make, adds)  # noqa: E731
            yield _case(f"miss-mask-{name}", module, masked_feeds, expect="refuse")
    yield _case(
        "mask-put", lambda: Masked(KEEPS["put"], False), masked_feeds, "dynamo", op=FLOAT_KV
    )
    for name, soft in SOFTS.items():
        module = lambda soft=soft: Soft(soft)  # noqa: E731
        for exporter in ("ts", "dynamo"):
            yield _case(f"soft-{name}", module, masked_feeds, exporter, op=FLOAT_KV)
    for name, soft in SOFT_MISSES.items():
        module = lambda soft=soft: Soft(soft)  # noqa: E731
        yield _case(f"miss-soft-{name}", module, masked_feeds, expect="refuse")
    for kind in ("slots", "pages", "guard", "shown-total"):
        feeds = lambda seed, kind=kind: row_feeds(kind, seed)  # noqa: E731
        yield _case(f"rows-{kind}", lambda kind=kind: Rows(kind), feeds, op=FLOAT_KV)
    ones, feeds = lambda: Rows("ones"), lambda seed: row_feeds("ones", seed)
    yield _case("miss-rows-ones", ones, feeds, expect="refuse", reason="rows are replaced by 1")
    for split in (False, True):
        module = lambda split=split: Packed8(split)  # noqa: E731
        yield _case(f"packed-{'split' if split else 'tiles'}", module, packed_feeds, op=ANTIQUANT)
