"""Layers without a rope: rope columns of width 0, made by whatever lies in front of them."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

import sfa_onnx
from tests.zoo.judge import run_fused, run_original
from tests.zoo.write import Graph

N, C, HEAD, VALUE, K = 4, 256, 320, 192, 5
WIDE = N * (HEAD + VALUE)  # columns of kv_b: 2 MiB, more than a structural constant may have


def expanded(g: Graph, x: str, cache: str, weight: str, layer: int) -> str:
    """One layer: keys and values of each head from the latent, an empty rope behind the key."""
    rows = g.op("MatMul", cache, weight)
    rows = g.op("Reshape", rows, g.ints(0, 0, N, HEAD + VALUE))
    rows = g.op("Transpose", rows, perm=[0, 2, 1, 3])
    key, value = g.op("Split", rows, g.ints(HEAD, VALUE), outputs=2, axis=-1)
    # The rope: no column of what this layer projects, behind those that were cached.
    made = g.op("MatMul", x, g.const(np.ones((N * VALUE, 8), np.float32) / 100))
    none = g.cut(made, 8, 8)
    rope = g.unsqueeze(g.op("Concat", f"past_rope_{layer}", none, axis=1), 1)
    wide = g.op("Expand", rope, g.op("Concat", g.op("Shape", key, end=3), g.ints(0), axis=0))
    key = g.op("Concat", key, wide, axis=-1)
    _, chosen = g.op("TopK", f"score_{layer}", g.ints(K), outputs=2, axis=-1)
    low = g.op("Expand", g.const(-np.inf, np.float32), g.op("Shape", f"score_{layer}"))
    zeros = g.op("ConstantOfShape", g.op("Shape", chosen))
    mask = g.unsqueeze(g.op("ScatterElements", low, chosen, zeros, axis=-1), 1)
    query = g.op("MatMul", x, g.const(query_weight(layer)))
    query = g.op("Transpose", g.reshape(query, 0, 0, N, HEAD), perm=[0, 2, 1, 3])
    scores = g.op("MatMul", query, g.op("Transpose", key, perm=[0, 1, 3, 2]))
    scores = g.op("Add", g.op("Mul", scores, g.const(0.05, np.float32)), mask)
    out = g.op("MatMul", g.op("Softmax", scores, axis=-1), value)
    return str(g.reshape(g.op("Transpose", out, perm=[0, 2, 1, 3]), 0, 0, N * VALUE))


def query_weight(layer: int) -> np.ndarray:
    rng = np.random.default_rng(layer)
    return (rng.standard_normal((N * VALUE, N * HEAD)) / 28).astype(np.float32)


def two_layers() -> onnx.ModelProto:
    g = Graph(18)
    rng = np.random.default_rng(3)
    x, inputs = "x", {"x": ("f32", ("b", "s", N * VALUE))}
    for layer in range(2):
        weight = g.const((rng.standard_normal((C, WIDE)) / 16).astype(np.float32))
        inputs[f"past_{layer}"] = ("f32", ("b", "t", C))
        inputs[f"past_rope_{layer}"] = ("f32", ("b", "r", 0))
        inputs[f"score_{layer}"] = ("f32", ("b", "s", "t"))
        x = expanded(g, x, f"past_{layer}", weight, layer)
    return g.model(inputs, {"out": ("f32", ("b", "s", N * VALUE))}, [x])


@pytest.fixture(scope="module")
def model() -> onnx.ModelProto:
    return two_layers()


def test_sites_without_a_rope_fuse_whatever_made_it(model: onnx.ModelProto) -> None:
    report = sfa_onnx.fuse(model)
    assert [s.status for s in report.sites] == ["fused", "fused"], [s.reason for s in report.sites]
    for site in report.sites:
        assert site.record is not None
        assert max(p.error for p in site.record.probes) < 1e-12
    for batch, keys in ((1, K), (2, 17)):
        rng = np.random.default_rng(keys)
        given = {
            v.name: rng.standard_normal(
                [
                    {"b": batch, "s": 2, "t": keys, "r": keys - 2}.get(d.dim_param, d.dim_value)
                    for d in v.type.tensor_type.shape.dim
                ]
            ).astype(np.float32)
            for v in model.graph.input
        }
        (want,), (got,) = run_original(model, given), run_fused(report.model, given)
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-5)
