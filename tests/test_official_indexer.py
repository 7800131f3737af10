"""A layer as the official inference code has it, indexer and absorbed attention in one.

The quantisation of its index keys is plain float or int8, with one scale per token behind the relu;
caches are carried or written in place. Hadamard rotations stay outside.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

import sfa_onnx
from sfa_onnx import runtime
from tests.op_models import needs_library
from tests.zoo.base import export

pytestmark = pytest.mark.torch
HIDDEN, LORA, HEADS, NOPE, ROPE, VALUE, LATENT = 48, 32, 4, 16, 8, 16, 32
INDEX_HEADS, INDEX, K, PAST, ROOM = 4, 16, 6, 14, 32
BETWEEN = {"TopK", "ScatterElements", "Relu", "Softmax"}


def rotated(x: Tensor, position: Tensor) -> Tensor:
    """[B, S, (H,) R] turned by its position [S]."""
    half = x.shape[-1] // 2
    angle = position[:, None] * torch.exp(-torch.arange(half) * 0.1)
    angle = angle.unsqueeze(1) if x.dim() == 4 else angle
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)


def hadamard(x: Tensor) -> Tensor:
    """An orthogonal rotation of the last axis."""
    matrix = torch.ones(1, 1)
    while len(matrix) < x.shape[-1]:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return x @ (matrix * x.shape[-1] ** -0.5)


class Layer(nn.Module):
    """Output, and the caches behind it."""

    def __init__(self, *, int8: bool, in_place: bool) -> None:
        super().__init__()
        self.int8, self.in_place = int8, in_place
        shapes = {
            "qa": (HIDDEN, LORA), "qb": (LORA, HEADS * (NOPE + ROPE)),
            "kva": (HIDDEN, LATENT + ROPE), "kvb": (HEADS, NOPE + VALUE, LATENT),
            "iq": (LORA, INDEX_HEADS * INDEX), "ik": (HIDDEN, INDEX), "iw": (HIDDEN, INDEX_HEADS),
        }  # fmt: skip
        make = torch.Generator().manual_seed(0)
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(shape, generator=make) * 0.2))
        self.norm = nn.LayerNorm(INDEX)

    def put(self, past: Tensor, new: Tensor) -> Tensor:
        if not self.in_place:
            return torch.cat([past, new], 1)
        end = PAST + new.shape[1]
        past = past.clone()
        past[:, PAST:end] = new
        return past[:, :end]

    def quantised(self, x: Tensor) -> tuple[Tensor, Any]:
        if not self.int8:
            return x, 1.0
        scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-4) / 127
        return torch.round(x / scale).clamp(-127, 127).to(torch.int8), scale

    def index(self, x: Tensor, low: Tensor, position: Tensor) -> tuple[Any, ...]:
        parts = (low @ self.iq).view(*x.shape[:2], INDEX_HEADS, INDEX), self.norm(x @ self.ik)
        turned = [torch.cat([rotated(p[..., :ROPE], position), p[..., ROPE:]], -1) for p in parts]
        (q, by_q), (k, by_k) = (self.quantised(hadamard(p)) for p in turned)
        weights = (x @ self.iw).unsqueeze(-1) * INDEX_HEADS**-0.5 * by_q * INDEX**-0.5
        return q, weights, k, by_k

    def forward(self, x: Tensor, latent: Tensor, rope: Tensor, keys: Tensor, *by: Tensor) -> Any:
        past = PAST if self.in_place else latent.shape[1]
        position = (past + torch.arange(x.shape[1])).float()
        low = x @ self.qa
        q = (low @ self.qb).view(*x.shape[:2], HEADS, NOPE + ROPE)
        new, turned = (x @ self.kva).split([LATENT, ROPE], -1)
        caches = [self.put(latent, new), self.put(rope, rotated(turned, position))]
        iq, weights, k, by_k = self.index(x, low, position)
        caches.append(self.put(keys, k))
        products = torch.einsum("bshd,btd->bsht", iq.float(), caches[2].float())
        scores = (torch.relu(products) * weights).sum(2)
        if self.int8:
            caches.append(self.put(by[0], by_k))
            scores = scores * caches[3].transpose(1, 2)
        end = caches[0].shape[1]
        causal = torch.full((x.shape[1], end), -torch.inf).triu(1 + end - x.shape[1])
        chosen = (scores + causal).topk(min(K, end), -1)[1]
        mask = torch.full(scores.shape, -torch.inf).scatter(-1, chosen, 0.0) + causal
        absorbed = torch.einsum("bshd,hdc->bshc", q[..., :NOPE], self.kvb[:, :NOPE])
        own = torch.einsum("bshc,btc->bsht", absorbed, caches[0])
        own = own + torch.einsum("bshr,btr->bsht", rotated(q[..., NOPE:], position), caches[1])
        p = torch.softmax(own * (NOPE + ROPE) ** -0.5 + mask.unsqueeze(2), -1)
        out = torch.einsum("bsht,btc->bshc", p, caches[0])
        return torch.einsum("bshc,hdc->bshd", out, self.kvb[:, -VALUE:]), *caches


def inputs(batch: int, rows: int, keys: int, *, int8: bool) -> dict[str, Tensor]:
    make = torch.Generator().manual_seed(keys)
    shapes = {"x": (rows, HIDDEN), "latent": (keys, LATENT), "rope": (keys, ROPE)}
    given = {n: torch.randn(batch, *s, generator=make) for n, s in shapes.items()}
    given["keys"] = torch.randn(batch, keys, INDEX, generator=make)
    if int8:
        given["keys"] = torch.randint(-127, 128, (batch, keys, INDEX), generator=make).to(
            torch.int8
        )
        given["by"] = torch.rand(batch, keys, 1, generator=make) * 0.02
    return given


def exported(rows: int, *, int8: bool, in_place: bool) -> onnx.ModelProto:
    given = inputs(2, rows, ROOM if in_place else PAST, int8=int8)
    axes: Any = {n: {0: "b"} if in_place or n == "x" else {0: "b", 1: "t"} for n in given}
    names = ("out", *(f"new_{n}" for n in list(given)[1:]))
    layer = Layer(int8=int8, in_place=in_place).eval()
    return export(layer, given, names, exporter="ts", opset=17, dynamic=axes)


@needs_library
@pytest.mark.parametrize(
    ("rows", "int8", "in_place"), [(1, True, False), (5, True, False), (5, False, True)]
)
def test_the_official_layer_keeps_nothing_between(rows: int, int8: bool, in_place: bool) -> None:
    model = exported(rows, int8=int8, in_place=in_place)
    report = sfa_onnx.fuse(model, expect_sites=1)
    assert [s.reason for s in (*report.selections, *report.sites)] == ["", ""]
    assert not BETWEEN & {n.op_type for n in report.model.graph.node}
    for batch, keys in ((2, ROOM), (3, ROOM)) if in_place else ((2, PAST), (3, 6), (1, 30)):
        feeds = {n: t.numpy() for n, t in inputs(batch, rows, keys, int8=int8).items()}
        want, got = (runtime.run(m, feeds) for m in (model, report.model))
        for name, array in want.items():
            np.testing.assert_allclose(got[name], array, rtol=1e-3, atol=1e-4, err_msg=name)
