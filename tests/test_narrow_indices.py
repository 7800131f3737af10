"""Indices that pass through a type too narrow for them name other tokens there, and stay so."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

import sfa_onnx
from tests.zoo.judge import run_fused, run_original

_GATHERED = """
<ir_version: 10, opset_import: ["": 20]>
narrow (float[B, S1, 2, 16] q, float[B, S1, 2, 8] q_rope, float[B, S2, 16] kv,
        float[B, S2, 8] k_rope, float[B, S1, S2] wish) => (float[B, S1, 2, 16] out)
<int64[1] count = {12}, int64[1] last = {3}, float scale = {0.21}>
{
  best, token = TopK <axis = -1> (wish, count)
  short = Cast <to = TYPE> (token)
  index = Cast <to = 7> (short)
  at = Unsqueeze (index, last)
  key = GatherND <batch_dims = 1> (kv, at)
  rope = GatherND <batch_dims = 1> (k_rope, at)
  key_t = Transpose <perm = [0, 1, 3, 2]> (key)
  rope_t = Transpose <perm = [0, 1, 3, 2]> (rope)
  a = MatMul (q, key_t)
  b = MatMul (q_rope, rope_t)
  ab = Add (a, b)
  scores = Mul (ab, scale)
  weights = Softmax <axis = -1> (scores)
  out = MatMul (weights, key)
}
"""


@pytest.mark.parametrize("elem_type", [onnx.TensorProto.INT8, onnx.TensorProto.UINT8])
def test_indices_that_wrap_in_a_narrow_type_name_the_same_rows(elem_type: int) -> None:
    model = onnx.parser.parse_model(_GATHERED.replace("TYPE", str(elem_type)))
    report = sfa_onnx.fuse(model)
    assert len(report.fused) == 1
    rng = np.random.default_rng(3)
    shapes = {"q": (2, 3, 2, 16), "q_rope": (2, 3, 2, 8), "kv": (2, 700, 16)}
    shapes |= {"k_rope": (2, 700, 8), "wish": (2, 3, 700)}
    feeds = {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    want, got = run_original(model, feeds), run_fused(report.model, feeds)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-4, atol=1e-5)
