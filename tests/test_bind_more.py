"""More spellings that are fused, with the same numbers: roundings, exponentials and masks."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

import sfa_onnx
from sfa_onnx.runtime import run, session

pytestmark = pytest.mark.kernel

_HEAD = """<ir_version: 8, opset_import: ["" : 17]>
site ({types}[2,3,4,40] q, float[2,24,40] kv, float[2,3,24] scores) => ({types}[2,3,4,32] o)
<int64[1] kk={{8}}, float sc={{0.25}}, int64[1] m1={{-1}}, int64[1] ax2={{2}}, int64[1] z={{0}},
 int64[1] c32={{32}}, int64[1] ax3={{3}}, int64 depth={{24}}, int64[2] onoff={{0, 1}},
 float low={{-30000.0}}>
{{
 val, idx = TopK(scores, kk)
"""
_SCORES = """
 kt = Transpose<perm=[0,1,3,2]>(k)
 raw = MatMul(q, kt)
 s = Mul(raw, sc)
"""
_SUM = " v = Slice(k, z, c32, ax3)\n o = MatMul(p, v)\n}"
_ROWS = "ix = Unsqueeze(idx, m1)\n k = GatherND<batch_dims=1>(kv, ix)\n"


def _model(rows=_ROWS, scores=_SCORES, weights="p = Softmax<axis=-1>(s)\n", types="float"):
    return onnx.parser.parse_model(_HEAD.format(types=types) + rows + scores + weights + _SUM)


def _feeds(model: onnx.ModelProto, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    feeds = {}
    for value in model.graph.input:
        tensor = value.type.tensor_type
        kind = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        shape = [d.dim_value for d in tensor.shape.dim]
        feeds[value.name] = rng.standard_normal(shape).astype(kind)
    return feeds


def _fused(model: onnx.ModelProto, tolerance: float = 1e-5) -> onnx.ModelProto:
    """The only site is fused, and computes what the graph did."""
    report = sfa_onnx.fuse(model)
    assert [s.status for s in report.sites] == ["fused"], [s.reason for s in report.sites]
    before, after = session(model), session(report.model)
    for seed in (1, 2):
        feeds = _feeds(model, seed)
        want, got = (np.float64(run(s, feeds)["o"]) for s in (before, after))
        assert np.abs(want - got).max() <= tolerance * np.abs(want).max()
    return report.model


def test_a_query_rounded_to_float16_stays_rounded():
    scores = _SCORES.replace("(q, kt)", "(rounded, kt)")
    _fused(_model(scores=" half = Cast<to=10>(q)\n rounded = Cast<to=1>(half)\n" + scores))


def test_a_float32_cache_under_a_float16_operator_is_read_in_place():
    """Rows are rounded to the operator's own type: before or after the gather is the same."""
    scores = " sc16 = Cast<to=10>(sc)" + _SCORES.replace("(raw, sc)", "(raw, sc16)")
    rows = _ROWS.replace("k =", "wide =") + " k = Cast<to=10>(wide)\n"
    model = _model(rows, scores, types="float16")
    fused = _fused(model, 5e-3)
    assert not any(n.op_type.startswith("Gather") and "kv" in n.input for n in fused.graph.node)
