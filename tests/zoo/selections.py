"""Family: rows and masks that are addressed by arithmetic: packed sequences, pages, blocks, unions.

Whatever the arithmetic means, the operator must be given the tokens that the graph reads: a case
with another offset or another block size is no near miss, it must fuse with its own numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from tests.zoo.base import FLOAT_KV, Case, Feeds, export, to_torch

B, S1, N, S2, K, C, R = 2, 3, 4, 24, 6, 32, 16
SEQUENCES, TOKENS, LONGEST, BLOCK = 3, 9, 20, 4
D, SCALE = C + R, 0.2


def attend(q, rows, hide=None):
    """Q [.., N, D] over rows [.., K, D]; `hide` [.., K]."""
    x = torch.matmul(q, rows.transpose(-1, -2)) * SCALE
    if hide is not None:
        x = x.masked_fill(hide.unsqueeze(-2), float("-inf"))
    return torch.matmul(torch.softmax(x, -1), rows[..., :C])


def dense(q, kv, keep):
    x = torch.einsum("bsnd,btd->bsnt", q, kv) * SCALE
    x = x.masked_fill(~keep.unsqueeze(2), float("-inf"))
    return torch.einsum("bsnt,btc->bsnc", torch.softmax(x, -1), kv[..., :C])


def best(score, k=K):
    return score.topk(k, dim=-1)[1]


def marked(idx, n):
    return torch.zeros(*idx.shape[:-1], n, dtype=torch.int64).scatter(-1, idx, 1) > 0


def own(kv, idx):
    return kv[torch.arange(kv.shape[0]).view(-1, 1, 1), idx]


def at(q, kv, idx, start):
    return attend(q, kv[idx.clamp(min=0) + start.unsqueeze(-1)], idx < 0)


def sequence(q, ends):
    return (torch.arange(q.shape[0]).unsqueeze(-1) >= ends).sum(-1)


def positions(q, kv):
    """(key positions, [S1, 1] positions of the queries): the newest tokens."""
    rows = torch.arange(q.shape[1]).unsqueeze(-1) + kv.shape[1] - q.shape[1]
    return torch.arange(kv.shape[1]), rows


def window(q, kv, n=4):
    keys, rows = positions(q, kv)
    return (keys <= rows) & (keys > rows - n)


def tokens_of(blocks, size=BLOCK):
    return (blocks.unsqueeze(-1) * BLOCK + torch.arange(size)).flatten(-2)


def paged(q, pages, idx, owner, block_table):
    safe = idx.clamp(min=0)
    page = block_table[owner.unsqueeze(-1), safe // BLOCK]
    return attend(q, pages[page, safe % BLOCK], idx < 0)


def masked_blocks(q, kv, coarse):
    keep = marked(best(coarse, 3), coarse.shape[-1])
    return dense(q, kv, keep.repeat_interleave(BLOCK, -1))


def rope_first(q, kv, score, start=R):
    rows = own(kv, best(score))
    x = torch.matmul(q, rows.transpose(-1, -2)) * SCALE
    return torch.matmul(torch.softmax(x, -1), rows[..., start : start + C])


def two_scatters(q, kv, score, other, second=1):
    keep = torch.zeros(*score.shape, dtype=torch.int64).scatter(-1, best(score, 10), 1)
    return dense(q, kv, keep.scatter(-1, best(other, 4), second) > 0)


def in_front(q, kv, idx):
    table = torch.cat([torch.zeros(kv.shape[0], 1, D), kv], 1)
    return attend(q, own(table, idx + 1), idx < 0)


FLAT: dict[str, Callable[..., Any]] = {
    "cu-owner": lambda q, kv, idx, owner, cu_kv: at(q, kv, idx, cu_kv[owner]),
    "cu-both": lambda q, kv, idx, cu_q, cu_kv: at(q, kv, idx, cu_kv[sequence(q, cu_q[1:])]),
    "cu-less-one": lambda q, kv, idx, cu_q, cu_kv: at(q, kv, idx, cu_kv[sequence(q, cu_q) - 1]),
    "lengths-summed": lambda q, kv, idx, owner, lengths: at(
        q, kv, idx, (lengths.cumsum(0) - lengths)[owner]
    ),
    "lengths-padded": lambda q, kv, idx, owner, lengths: at(
        q, kv, idx, nn.functional.pad(lengths.cumsum(0), (1, 0))[owner]
    ),
    "slots": lambda q, kv, idx, owner: at(q, kv, idx, owner * LONGEST),
    "slots-next": lambda q, kv, idx, owner: at(q, kv, idx, owner * LONGEST + 1),  # off by one
    "pages-owner": paged,
    "pages-cu": lambda q, pages, idx, cu_q, block_table: paged(
        q, pages, idx, sequence(q, cu_q[1:]), block_table
    ),
}

SELECTED: dict[str, Callable[..., Any]] = {
    "shared": lambda q, kv, score: attend(q, kv[0][best(score)]),
    "blocks": lambda q, kv, coarse: attend(q, own(kv, tokens_of(best(coarse, 3)))),
    "blocks-short": lambda q, kv, coarse: attend(q, own(kv, tokens_of(best(coarse, 3), 3))),
    "blocks-view": lambda q, kv, coarse: attend(
        q, own(kv.unflatten(1, (S2 // BLOCK, BLOCK)), best(coarse, 3)).flatten(2, 3)
    ),
    "blocks-mask": masked_blocks,
    "blocks-scatter": lambda q, kv, coarse: dense(q, kv, marked(tokens_of(best(coarse, 3)), S2)),
    "union": lambda q, kv, score, other: dense(
        q, kv, marked(best(score), S2) | marked(best(other, 4), S2)
    ),
    "union-window": lambda q, kv, score: dense(q, kv, marked(best(score), S2) | window(q, kv)),
    "union-first": lambda q, kv, score: dense(
        q, kv, marked(best(score), S2) | (torch.arange(S2) < 2)
    ),
    "union-scatters": two_scatters,
    "minus-scatter": lambda q, kv, score, other: two_scatters(q, kv, score, other, 0),
    "minus": lambda q, kv, score, other: dense(
        q, kv, marked(best(score, 10), S2) & ~marked(best(other, 4), S2)
    ),
    "both": lambda q, kv, score, other: dense(
        q, kv, marked(best(score, 20), S2) & marked(best(other, 18), S2)
    ),
    "in-front": in_front,
    "in-front-mask": lambda q, kv, idx: dense(q, kv, marked(idx + 1, S2 + 1)[..., 1:]),
    "rope-first": rope_first,
}

REFUSED: dict[str, tuple[Callable[..., Any], str]] = {
    "union-any": (
        lambda q, kv, score, mask: dense(q, kv, marked(best(score), S2) | mask),
        "not a selection that other masks only narrow",
    ),
    "union-open-window": (
        lambda q, kv, score: dense(
            q, kv, marked(best(score), S2) | (positions(q, kv)[0] <= positions(q, kv)[1])
        ),
        "not a selection that other masks only narrow",
    ),
    "value-amid-rope": (lambda q, kv, score: rope_first(q, kv, score, 8), "2 parts besides"),
    "value-off-by-one": (lambda q, kv, score: rope_first(q, kv, score, R - 1), "2 parts besides"),
}


def feeds(names: tuple[str, ...], flat: bool, seed: int) -> Feeds:
    """The named inputs; rows of indices end with -1."""
    rng = np.random.default_rng(seed)
    queries = rng.multinomial(TOKENS - SEQUENCES, [1 / SEQUENCES] * SEQUENCES) + 1
    lengths = rng.integers(8, LONGEST, SEQUENCES)
    rows = (TOKENS,) if flat else (B, S1)
    limits = np.repeat(lengths, queries) if flat else np.full(B * S1, S2)
    idx = np.full((len(limits), K), -1)
    for row, limit in zip(idx, limits, strict=True):
        count = rng.integers(1, K + 1)
        row[:count] = rng.permutation(limit)[:count]
    f32 = np.float32
    pages = SEQUENCES * LONGEST // BLOCK
    made = {
        "q": lambda: rng.standard_normal((*rows, N, D), f32),
        "kv": lambda: rng.standard_normal(
            (SEQUENCES * LONGEST + 1, D) if flat else (B, S2, D), f32
        ),
        "pages": lambda: rng.standard_normal((pages + 2, BLOCK, D), f32),
        "idx": lambda: idx.reshape(*rows, K),
        "cu_q": lambda: np.concatenate([[0], np.cumsum(queries)]),
        "cu_kv": lambda: np.concatenate([[0], np.cumsum(lengths)]),
        "lengths": lambda: lengths,
        "owner": lambda: np.repeat(np.arange(SEQUENCES), queries),
        "block_table": lambda: rng.permutation(pages + 2)[:pages].reshape(SEQUENCES, -1),
        "score": lambda: rng.standard_normal((B, S1, S2), f32),
        "other": lambda: rng.standard_normal((B, S1, S2), f32),
        "coarse": lambda: rng.standard_normal((B, S1, S2 // BLOCK), f32),
        "mask": lambda: rng.random((B, S1, S2)) < 0.3,
    }
    return {name: made[name]() for name in names}


def _names(function: Callable[..., Any]) -> tuple[str, ...]:
    code, defaults = function.__code__, function.__defaults__ or ()
    return code.co_varnames[: code.co_argcount - len(defaults)]


def _case(name: str, function: Callable[..., Any], exporter: str, **more: Any) -> Case:
    names = _names(function)
    flat = "kv" not in names or "owner" in names or any(n.startswith("cu_") for n in names)
    scope: dict[str, Any] = {"f": function}
    given = ", ".join(names)
    exec(f"def forward(self, {given}): return f({given})", scope)

    def make():
        module = type("Selecting", (nn.Module,), {"forward": scope["forward"]})()
        opset = 18 if exporter == "dynamo" else 17
        return export(module, to_torch(feeds(names, flat, 0)), exporter=exporter, opset=opset)

    tags = {"exporter": exporter, "opset": 18, "dtype": "f32", "dynamic": False}
    return Case(
        f"select-{name}-{exporter}",
        "selections",
        make,
        lambda seed: feeds(names, flat, seed),
        tags=tags,
        **more,
    )


def cases() -> Iterator[Case]:
    for name, function in {**FLAT, **SELECTED}.items():
        for exporter in ("dynamo", "ts"):
            if name == "blocks-mask" and exporter == "ts":
                continue  # the tracer loses the rank of what repeat_interleave makes
            yield _case(name, function, exporter, op=FLOAT_KV)
    for name, (function, reason) in REFUSED.items():
        yield _case(f"miss-{name}", function, "dynamo", expect="refuse", reason=reason)
