"""Family: results that are tested for NaN, weights zeroed by their masks, masks added up."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import nn

from tests.zoo.base import FLOAT_KV, Case, Feeds, export, to_torch

B, S1, N, S2, K, C, R = 2, 3, 4, 24, 6, 64, 16
D, SCALE, LOW = C + R, (C + R) ** -0.5, float("-inf")


def _draw(seed: int) -> Feeds:
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.standard_normal(shape, np.float32)  # noqa: E731
    return {"q": draw(B, S1, N, D), "kv": draw(B, S2, D), "wish": draw(B, S1, S2)}


def _lonely(seed: int) -> Feeds:
    """A row whose keys are all hidden."""
    feeds = _draw(seed)
    feeds["wish"][1, 2] = -9
    return feeds


def _rows(kv, wish):
    best, idx = wish.topk(K, -1)
    return kv[torch.arange(B)[:, None, None], idx], best < -1


# ---- who reads the NaN of rows without keys ------------------------------------------------------
def _fill(x, number):
    return torch.where(torch.isnan(x), torch.full_like(x, number), x)


def _inplace(x, number):
    x = x.clone()
    x[torch.isnan(x)] = number
    return x


WEIGHT = torch.linspace(-1, 1, C * 8).view(C, 8)
TESTS: dict[str, Callable] = {
    "zero": lambda x: _fill(x, 0.0),
    "scrub": torch.nan_to_num,
    "finite": lambda x: torch.where(torch.isfinite(x), x, torch.zeros_like(x)),
    "unlike": lambda x: torch.where(x != x, torch.zeros_like(x), x),
    "behind": lambda x: torch.nan_to_num(x.flatten(0, 1) @ WEIGHT),
    "assigned": lambda x: _inplace(x, 0.0),
    "infinite": lambda x: torch.where(torch.isinf(x), torch.full_like(x, 7.0), x),
}
TEST_MISSES: dict[str, Callable] = {
    "seven": lambda x: _fill(x, 7.0),
    "scrub-one": lambda x: torch.nan_to_num(x, nan=1.0),
    "flag": lambda x: (torch.nan_to_num(x), torch.isnan(x).any(-1)),
    "kept": lambda x: torch.where(torch.isnan(x), x, torch.zeros_like(x)),
    "unlike-one": lambda x: torch.where(x != x, torch.ones_like(x), x),
    "biased": lambda x: torch.nan_to_num(x + 0.5),
    "assigned-one": lambda x: _inplace(x, 1.0),
}


class Tested(nn.Module):
    """Gathered rows; the result is asked whether it is a number."""

    def __init__(self, test: Callable, fill: float = LOW) -> None:
        super().__init__()
        self.test, self.fill = test, fill

    def forward(self, q, kv, wish):
        k, hidden = _rows(kv, wish)
        x = torch.matmul(q, k.transpose(-1, -2)) * SCALE
        x = x.masked_fill(hidden.unsqueeze(2), self.fill)
        return self.test(torch.matmul(torch.softmax(x, -1), k[..., :C]))


# ---- weights zeroed where no key is left ---------------------------------------------------------
EMPTY: dict[str, Callable] = {
    "all": lambda bad: bad.all(-1, keepdim=True),
    "not-any": lambda bad: ~((~bad).any(-1, keepdim=True)),
    "count": lambda bad: (~bad).sum(-1, keepdim=True) == 0,
    # More rows than those without keys: their keys are all hidden.
    "any": lambda bad: bad.any(-1, keepdim=True),
    "other": lambda bad: bad.roll(1, 1).all(-1, keepdim=True),
    "count-one": lambda bad: (~bad).sum(-1, keepdim=True) <= 1,
    "slots": lambda bad: bad.all(1, keepdim=True),  # slots that no row sees: not a row condition
}
EMPTY_MISSES: dict[str, Callable] = {
    "not-all": lambda bad: ~bad.all(-1, keepdim=True),
}


class Zeroed(nn.Module):
    """Gathered rows; weights of rows whose keys are all hidden are 0."""

    def __init__(self, empty: Callable) -> None:
        super().__init__()
        self.empty = empty

    def forward(self, q, kv, wish):
        k, hidden = _rows(kv, wish)
        x = torch.matmul(q, k.transpose(-1, -2)) * SCALE
        w = torch.softmax(x.masked_fill(hidden.unsqueeze(2), LOW), -1)
        w = w.masked_fill(self.empty(hidden).unsqueeze(2), 0.0)
        return torch.matmul(w, k[..., :C])


# ---- flags that are added or multiplied ----------------------------------------------------------
TABLE = torch.arange(S2) <= torch.tensor([7, 15, 23])[:, None]


def _flags(idx, kind=torch.int32):
    return torch.zeros(B, S1, S2, dtype=kind).scatter(-1, idx, 1)


def _seen(wish):
    return (wish > -1.5).int()


SUMS: dict[str, Callable] = {
    "two": lambda idx, wish: (_flags(idx) + _seen(wish)) == 2,
    "above": lambda idx, wish: (_flags(idx, torch.float32) + _seen(wish).float()) > 1.5,
    "not-below": lambda idx, wish: ~((_flags(idx) + _seen(wish)) < 2),
    "three": lambda idx, wish: (_flags(idx) + _seen(wish) + TABLE.int()) == 3,
    "table": lambda idx, wish: (_flags(idx) * TABLE.int()).bool(),
    "table-float": lambda idx, wish: (_flags(idx, torch.float32) * TABLE.float()) > 0,
    "plus-zero": lambda idx, wish: (torch.zeros(B, S1, S2) + _flags(idx, torch.float32)) > 0,
    "plus-one": lambda idx, wish: (1 + _flags(idx)) > 1,
}
SUM_MISSES: dict[str, Callable] = {
    "one": lambda idx, wish: (_flags(idx) + _seen(wish)) == 1,
    "above-none": lambda idx, wish: (_flags(idx) + _seen(wish)) > -1,
    "below": lambda idx, wish: (_flags(idx) + _seen(wish)) < 2,
    "three-two": lambda idx, wish: (_flags(idx) + _seen(wish) + TABLE.int()) == 2,
    "plus-one": lambda idx, wish: (1 + _flags(idx)) > 0,
}


# ---- selections with a window or first tokens beside them, sizes left open -----------------------
def _chosen(idx, wish):
    return torch.zeros(wish.shape, dtype=torch.bool).scatter(-1, idx, True)


def _ends(wish):
    """(distance from each row's own key back to every key)."""
    rows, keys = wish.shape[1:]
    return torch.arange(rows)[:, None] + (keys - rows) - torch.arange(keys)


def _set(mask, *at, value=True):
    mask = mask.clone()
    mask[at] = value
    return mask


JOINS: dict[str, Callable] = {
    "window-outer": lambda idx, w: (_chosen(idx, w) | (_ends(w) < 4)) & (_ends(w) >= 0),
    "window-own": lambda idx, w: _chosen(idx, w) | ((_ends(w) < 4) & (_ends(w) >= 0)),
    "first": lambda idx, w: _set(_chosen(idx, w), ..., slice(0, 2)),
    "first-causal": lambda idx, w: _set(_chosen(idx, w), ..., slice(0, 2)) & (_ends(w) >= 0),
    "last": lambda idx, w: _set(_chosen(idx, w), ..., slice(-2, None)),
    "without-first": lambda idx, w: _set(_chosen(idx, w), ..., slice(0, 2), value=False),
}
JOIN_MISSES: dict[str, Callable] = {
    "blocks-grow": lambda idx, w: torch.zeros((*w.shape[:2], 7), dtype=torch.bool).scatter(
        -1, w[..., :6].topk(2, -1)[1], True
    )[..., torch.arange(w.shape[-1]) // (w.shape[-1] // 6)],
    "window-open": lambda idx, w: _chosen(idx, w) | (_ends(w) < 4),
    "window-other": lambda idx, w: (_chosen(idx, w) | (_ends(w) < 4)) & (w > -1),
    "window-past": lambda idx, w: (_chosen(idx, w) | (_ends(w) >= 0)) & (_ends(w) > -3),
    "window-half": lambda idx, w: (
        _chosen(idx, w) | ((_ends(w) < w.shape[-1] // 3) & (_ends(w) >= 0))
    ),
    "first-half": lambda idx, w: _set(_chosen(idx, w), ..., slice(0, w.shape[-1] // 2)),
    "first-rows": lambda idx, w: _set(_chosen(idx, w), slice(None), slice(0, 1)),
}


class Summed(nn.Module):
    """Scores over all keys, hidden by a mask that is reckoned from flags."""

    def __init__(self, make: Callable) -> None:
        super().__init__()
        self.make = make

    def forward(self, q, kv, wish):
        keep = self.make(wish.topk(K, -1)[1], wish).unsqueeze(2)
        k = kv.unsqueeze(1)
        x = (torch.matmul(q, k.transpose(-1, -2)) * SCALE).masked_fill(~keep, LOW)
        return torch.matmul(torch.softmax(x, -1), k[..., :C])


OPEN = {
    "q": {0: "batch", 1: "rows"},
    "kv": {0: "batch", 1: "keys"},
    "wish": {0: "batch", 1: "rows", 2: "keys"},
}


def _case(name: str, module: Callable, feeds: Callable, exporter: str = "ts", **more) -> Case:
    opset = 17 if exporter == "ts" else 18
    names = ("out", "flag") if "flag" in name else ("out",)
    sizes = {"dynamic": OPEN} if "open-" in name else {}

    def make():
        return export(module(), to_torch(feeds(0)), names, exporter=exporter, opset=opset, **sizes)

    tags = {"exporter": exporter, "opset": opset, "dtype": "f32", "dynamic": bool(sizes)}
    return Case(f"guarded-{name}-{exporter}", "guarded", make, feeds, tags=tags, **more)


def cases() -> Iterator[Case]:
    reason = {
        "nan": "NaN of rows without keys is read by",
        "zeroed": "",
        "sum": "",
        "open": "",
        "join": "",
    }
    for kind, form, feeds, right, wrong in (
        ("nan", Tested, _lonely, TESTS, TEST_MISSES),
        ("zeroed", Zeroed, _lonely, EMPTY, EMPTY_MISSES),
        ("sum", Summed, _draw, SUMS, SUM_MISSES),
        ("open", Summed, _draw, JOINS, JOIN_MISSES),
        ("join", Summed, _draw, JOINS, {}),
    ):
        for exporter in ("dynamo",) if kind in ("open", "join") else ("ts", "dynamo"):
            for name, make in right.items():
                module = lambda form=form, make=make: form(make)  # noqa: E731
                stay = name in ("infinite", "other", "slots")  # rows without keys stay NaN
                draw = _draw if stay else feeds
                yield _case(f"{kind}-{name}", module, draw, exporter, op=FLOAT_KV)
            for name, make in wrong.items():
                module = lambda form=form, make=make: form(make)  # noqa: E731
                yield _case(
                    f"miss-{kind}-{name}",
                    module,
                    feeds,
                    exporter,
                    expect="refuse",
                    reason=reason[kind],
                )
    finite = lambda: Tested(TEST_MISSES["seven"], -1e30)  # noqa: E731
    yield _case("nan-never", finite, _draw, op=FLOAT_KV)
