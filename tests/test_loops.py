"""Loops over sequences, written out: rows that are a Concat of gathers from one tensor each."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

import sfa_onnx
from tests.zoo.base import export, to_torch
from tests.zoo.judge import run_fused, run_original

pytestmark = [pytest.mark.kernel, pytest.mark.torch]

B, S1, N, S2, K, C, R, PAGE = 2, 3, 4, 24, 6, 32, 16, 8
W = C + R
EACH = range(B)


def feeds(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "q": rng.standard_normal((B, S1, N, W), np.float32),
        "kv": rng.standard_normal((B, S2, W), np.float32),
        "codes": rng.integers(-127, 127, (B, S2, C)).astype(np.int8),
        "scale": rng.random((B, S2, 1), np.float32) + 0.1,
        "pages": rng.standard_normal((B * 3, PAGE, W), np.float32),
        "table": rng.permutation(B * 3).reshape(B, 3).astype(np.int64),
        "wish": rng.standard_normal((B, S1, S2), np.float32),
    }


def attend(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return torch.softmax(q @ k.transpose(-1, -2) * W**-0.5, -1) @ k[..., :C]


def per_token(kv, idx):
    return torch.stack([torch.stack([kv[b][idx[b, s]] for s in range(S1)]) for b in EACH])


def flat_tokens(kv, idx):
    rows = [kv[b][idx[b, s]] for b in EACH for s in range(S1)]
    return torch.stack(rows).view(B, S1, K, W)


def in_parts(kv, idx):
    nope = torch.stack([kv[b][idx[b]][..., :C] for b in EACH])
    return torch.cat([nope, torch.stack([kv[b][idx[b]][..., C:] for b in EACH])], -1)


def joined_inside(kv, idx):
    rows = [torch.cat([kv[b, :, :C], kv[b, :, C:]], -1)[idx[b]] for b in EACH]
    return torch.stack(rows)


def offsets(kv, idx):
    return torch.stack([kv.flatten(0, 1)[idx[b] + b * S2] for b in EACH])


def selected(kv, idx):
    rows = [kv[b].index_select(0, idx[b].reshape(-1)) for b in EACH]
    return torch.cat(rows).view(B, S1, K, W)


def unbound(kv, idx):
    return torch.stack([k[i] for k, i in zip(kv.unbind(0), idx.unbind(0), strict=True)])


def written(kv, idx):
    rows = torch.empty(B, S1, K, W)
    for b in EACH:
        rows[b] = kv[b][idx[b]]
    return rows


def written_twice(kv, idx):
    rows = torch.empty(B, S1, K, W)
    for b, other in ((0, 1), (0, 0), (1, 1)):  # what is written last stays
        rows[b] = kv[other][idx[other]]
    return rows


ROWS: dict[str, Callable] = {
    "sequences": lambda kv, idx: torch.stack([kv[b][idx[b]] for b in EACH]),
    "tokens": per_token,
    "flat_tokens": flat_tokens,
    "parts": in_parts,
    "joined_inside": joined_inside,
    "offsets": offsets,
    "index_select": selected,
    "unbound": unbound,
    "written": written,
    "written_twice": written_twice,
}


def written_in_part(kv, idx):
    rows = kv[:, :1, None].expand(B, S1, K, W).clone()
    rows[0] = kv[0][idx[0]]
    return rows


def added_twice(kv, idx):
    rows = torch.zeros(B, S1, K, W)
    for b in (0, 1, 1):
        rows = rows.index_add(0, torch.tensor([b]), kv[b][idx[b]].unsqueeze(0))
    return rows


MISSES: dict[str, Callable] = {
    "indices_crossed": lambda kv, idx: torch.stack([kv[b][idx[1 - b]] for b in EACH]),
    "caches_crossed": lambda kv, idx: torch.stack([kv[1 - b][idx[b]] for b in EACH]),
    "order": lambda kv, idx: torch.stack([kv[b][idx[b]] for b in (1, 0)]),
    "first_only": lambda kv, idx: torch.stack([kv[0][idx[0]] for b in EACH]),
    "first_cache": lambda kv, idx: torch.stack([kv[0][idx[b]] for b in EACH]),
    "scales": lambda kv, idx: torch.stack([kv[b][idx[b]] * (1 + b) for b in EACH]),
    "written_in_part": written_in_part,
    "added_twice": added_twice,
    "rope_crossed": lambda kv, idx: torch.stack(
        [torch.cat([kv[b, :, :C], kv[1 - b, :, C:]], -1)[idx[b]] for b in EACH]
    ),
    "rope_indices": lambda kv, idx: torch.stack(
        [torch.cat([kv[b, :, :C][idx[b]], kv[b, :, C:][idx[0]]], -1) for b in EACH]
    ),
}


class Rows(nn.Module):
    """One softmax over rows that a loop gathers."""

    def __init__(self, rows: Callable) -> None:
        super().__init__()
        self.rows = rows

    def forward(self, q, kv, wish):
        return attend(q, self.rows(kv, wish.topk(K, -1)[1]))


class Pages(nn.Module):
    def forward(self, q, pages, table, wish):
        idx = wish.topk(K, -1)[1]
        return attend(q, torch.stack([pages[table[b]].flatten(0, 1)[idx[b]] for b in EACH]))


class Int8(nn.Module):
    """Rows of int8 codes times scales; `other` reads the scales of the other sequence."""

    def __init__(self, other: bool = False) -> None:
        super().__init__()
        self.other = other

    def forward(self, q, kv, codes, scale, wish):
        idx, rows = wish.topk(K, -1)[1], []
        for b in EACH:
            own = scale[1 - b if self.other else b]
            nope = codes[b][idx[b]].float() * own[idx[b]]
            rows.append(torch.cat([nope, kv[b, :, C:][idx[b]]], -1))
        return attend(q, torch.stack(rows))


class Each(nn.Module):
    """A softmax per sequence; `other` reads the indices of the other sequence."""

    def __init__(self, other: bool = False) -> None:
        super().__init__()
        self.other = other

    def forward(self, q, kv, wish):
        idx = wish.topk(K, -1)[1]
        at = [1 - b if self.other else b for b in EACH]
        return torch.stack([attend(q[b], kv[b][idx[at[b]]]) for b in EACH])


def fused_sites(
    module: nn.Module, names: tuple[str, ...], exporter: str = "ts"
) -> tuple[int, list[str]]:
    """How many sites fuse, and reasons; whatever fuses must compute the same numbers."""
    own = {k: v for k, v in feeds(0).items() if k in names}
    model = export(module, to_torch(own), ("out",), exporter=exporter, opset=18)
    report = sfa_onnx.fuse(model)
    for seed in (1, 2) if report.fused else ():
        given = {k: v for k, v in feeds(seed).items() if k in names}
        for a, b in zip(run_original(model, given), run_fused(report.model, given), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    return len(report.fused), [s.reason for s in report.sites if s.reason]


@pytest.mark.parametrize("name", ROWS)
def test_rows_gathered_sequence_by_sequence(name):
    assert fused_sites(Rows(ROWS[name]), ("q", "kv", "wish")) == (1, [])


def test_rows_written_sequence_by_sequence_by_the_new_exporter():
    assert fused_sites(Rows(written), ("q", "kv", "wish"), "dynamo") == (1, [])


def test_pages_gathered_sequence_by_sequence():
    assert fused_sites(Pages(), ("q", "pages", "table", "wish")) == (1, [])


@pytest.mark.parametrize("other", [False, True])
def test_int8_rows_gathered_sequence_by_sequence(other):
    count, _ = fused_sites(Int8(other), ("q", "kv", "codes", "scale", "wish"))
    assert count == (not other)


@pytest.mark.parametrize("other", [False, True])
def test_a_softmax_per_sequence(other):
    assert fused_sites(Each(other), ("q", "kv", "wish")) == (B, [])


@pytest.mark.parametrize("name", MISSES)
def test_other_rows_fuse_into_equal_numbers_or_not_at_all(name):
    count, reasons = fused_sites(Rows(MISSES[name]), ("q", "kv", "wish"))
    assert count + len(reasons) == 1
    if name in ("indices_crossed", "caches_crossed", "order", "scales"):
        assert "are put together from gathers that are not one" in reasons[0]
    if name in ("added_twice", "scales", "rope_crossed", "rope_indices"):
        assert count == 0
