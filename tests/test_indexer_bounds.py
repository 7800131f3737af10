"""Selections whose masks look like causality at small sizes, or whose hidden keys somebody reads.

Whatever is decided, the model that `fuse` gives must select and attend as the original does.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import Tensor

import sfa_onnx
from sfa_onnx import runtime
from tests.op_models import needs_library

pytestmark = pytest.mark.torch
K, HEADS, WIDTH, LATENT = 5, 3, 8, 16
NAMES = ["q", "k", "w", "query", "latent"]
DYNAMIC = {n: {0: "b", 1: "t" if n in ("k", "latent") else "s"} for n in NAMES}


class Layer(torch.nn.Module):
    """A selection under a mask, and attention to all that was selected."""

    def __init__(self, hide: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.hide = hide

    def forward(self, q: Tensor, k: Tensor, w: Tensor, query: Tensor, latent: Tensor) -> Tensor:
        scores = torch.relu(torch.matmul(q, k.transpose(1, 2).unsqueeze(1)))  # [B, S1, H, S2]
        scores = torch.matmul(w.unsqueeze(-2), scores).squeeze(-2)
        rows, keys = torch.arange(q.shape[1])[:, None], torch.arange(k.shape[1])[None]
        indices = self.hide(scores, rows + (k.shape[1] - q.shape[1]), keys).topk(K, -1)[1]
        at = indices.reshape(indices.shape[0], -1, 1).expand(-1, -1, LATENT)
        rows_read = torch.gather(latent, 1, at).reshape(*indices.shape, LATENT)
        own = torch.einsum("bsnc,bskc->bsnk", query, rows_read) * 0.3
        return torch.einsum("bsnk,bskc->bsnc", torch.softmax(own, -1), rows_read)


def _past(scores: Tensor, rows: Tensor, keys: Tensor) -> Tensor:
    first = rows - rows[:1]
    return scores.masked_fill(keys > first + 1, -torch.inf)


HIDING = {
    "window of 64": lambda x, r, c: x.masked_fill(~((r - c >= 0) & (r - c < 64)), -torch.inf),
    "chunks of 64": lambda x, r, c: x.masked_fill(~((c <= r) & (c // 64 == r // 64)), -torch.inf),
    "one key": lambda x, r, c: x.masked_fill(c == 70, -torch.inf),
    "a past of one": _past,
    "a share of 1": lambda x, r, c: x.masked_fill(~((c <= r) & ((r - c) * 0.01 < 1)), -torch.inf),
    "blocks of blocks": lambda x, r, c: x.masked_fill(c // 10 // 10 != r // 10 // 10, -torch.inf),
    "shifted numbers": lambda x, r, c: x.masked_fill((c >> 6) != (r >> 6), -torch.inf),
    "a decay": lambda x, r, c: x.masked_fill(torch.exp((c - r) * 0.05) <= 0.01, -torch.inf),
    "a window of as many rows": lambda x, r, c: x.masked_fill(r - c >= len(r) * 5, -torch.inf),
    "keys far from the rows": lambda x, r, c: x.masked_fill(
        c < (c.shape[1] - r.shape[0]) // 80, -torch.inf
    ),
    "whole numbers": lambda x, r, c: x.long().float(),
    "a low that is added": lambda x, r, c: x + torch.where(c <= r, 0.0, -1e4),
    "two lows": lambda x, r, c: x.masked_fill(c > r, -1e9).masked_fill(c == 0, -torch.inf),
}


def _feeds(batch: int, rows: int, keys: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(rows * keys)
    shapes = {
        "q": (batch, rows, HEADS, WIDTH), "k": (batch, keys, WIDTH), "w": (batch, rows, HEADS),
        "query": (batch, rows, 2, LATENT), "latent": (batch, keys, LATENT),
    }  # fmt: skip
    return {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}


def _exported(layer: Layer, batch: int = 2) -> bytes:
    stream = io.BytesIO()
    given = tuple(torch.from_numpy(a) for a in _feeds(batch, 3, 12).values())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            layer, given, stream, input_names=NAMES, output_names=["o"],
            opset_version=17, dynamo=False, dynamic_axes=DYNAMIC,
        )  # fmt: skip
    return stream.getvalue()


def _rows_of_batch(scores: Tensor, rows: Tensor, keys: Tensor) -> Tensor:
    """As many rows as there are sequences: it runs at one sequence too, and hides nothing then."""
    counted = torch.arange(scores.shape[0])[:, None] + (scores.shape[2] - scores.shape[0])
    return scores.masked_fill(keys > counted, -torch.inf)


def test_axes_of_one_input_are_not_made_one_by_broadcasting() -> None:
    report = sfa_onnx.fuse(onnx.load_from_string(_exported(Layer(_rows_of_batch), batch=3)))
    (selection,) = report.selections
    assert selection.status == "refused"
    assert selection.reason.startswith("sizes b and s are broadcast to each other")


@needs_library
@pytest.mark.parametrize("kind", HIDING)
def test_what_fuse_gives_selects_as_the_original(kind: str) -> None:
    model = _exported(Layer(HIDING[kind]))
    report = sfa_onnx.fuse(onnx.load_from_string(model))
    before = ort.InferenceSession(model)
    after = runtime.session(report.model)
    for sizes in ((2, 3, 12), (2, 6, 6), (2, 4, 150)):
        feeds = _feeds(*sizes)
        (want,), (got,) = before.run(None, feeds), after.run(None, feeds)
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5, err_msg=str(sizes))
