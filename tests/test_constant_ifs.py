"""An If whose condition is a constant: the branch that it takes is read like any other nodes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import parser

import sfa_onnx
from sfa_onnx.passes.certificate import check_certificate
from tests.zoo.judge import run_fused, run_original, scaled_error

_TEXT = """<ir_version: 9, opset_import: ["" : 18]>
site (float[B,S,4,40] q, float[B,T,40] kv, float[B,S,T] wish, bool ask) => (float[B,S,4,32] o)
<int64[1] six={{6}}, int64[1] zero={{0}}, int64[1] cut={{32}}, int64[1] last={{2}},
 bool yes={{{yes}}}, float sc={{0.2}}, int64[1] two={{2}}>
{{
 best, idx = TopK(wish, six)
 shape = Shape(wish)
 far = ConstantOfShape<value=float[1] {{-inf}}>(shape)
 mask = If({condition}) <
  then_branch = then () => (m) {{
   few = Shape(idx)
   none = ConstantOfShape<value=float[1] {{0.0}}>(few)
   m = ScatterElements<axis=-1>(far, idx, none)
  }},
  else_branch = other () => (m) {{
   few = Shape(wish)
   m = ConstantOfShape<value=float[1] {{0.0}}>(few)
  }}
 >
 m4 = Unsqueeze(mask, two)
 s = Einsum<equation="bshd,btd->bsht">(q, kv)
 scaled = Mul(s, sc)
 masked = Add(scaled, m4)
 p = Softmax<axis=-1>(masked)
 v = Slice(kv, zero, cut, last)
 o = Einsum<equation="bsht,btd->bshd">(p, v)
}}"""


def _model(yes: int = 1, condition: str = "yes", asked: str = "") -> onnx.ModelProto:
    """`asked`: an axis of q; the branch is taken where it has size 4, and nowhere else."""
    text = _TEXT.format(yes=yes, condition="even" if asked else condition)
    nodes = f""" dims = Shape(q)
 at = Constant<value=int64 {{{asked}}}>()
 four = Constant<value=int64 {{4}}>()
 size = Gather<axis=0>(dims, at)
 even = Equal(size, four)
"""
    return parser.parse_model(text.replace(" mask = If", f"{nodes} mask = If") if asked else text)


def _feeds(seed: int, batch: int, rows: int, keys: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = {"q": (batch, rows, 4, 40), "kv": (batch, keys, 40), "wish": (batch, rows, keys)}
    drawn = {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    return {**drawn, "ask": np.array(True)}


def test_the_branch_that_a_constant_chooses_is_fused(tmp_path: Path) -> None:
    before, after, proof = (tmp_path / n for n in ("a.onnx", "b.onnx", "proof.json"))
    onnx.save(_model(), before)
    report = sfa_onnx.fuse(before, after, certificate=proof)
    assert [s.status for s in report.sites] == ["fused"], [s.reason for s in report.sites]
    assert report.taken == ("mask",)
    assert "If" not in {node.op_type for node in report.model.graph.node}
    assert check_certificate(proof, before, after).holds
    for seed, sizes in ((0, (2, 3, 24)), (1, (1, 1, 9)), (2, (3, 5, 31))):
        feeds = _feeds(seed, *sizes)
        want, got = run_original(_model(), feeds), run_fused(report.model, feeds)
        assert scaled_error(want, got) < 1e-5


def test_a_size_that_no_call_changes_chooses_as_well(tmp_path: Path) -> None:
    before, after, proof = (tmp_path / n for n in ("a.onnx", "b.onnx", "proof.json"))
    onnx.save(_model(asked="2"), before)
    report = sfa_onnx.fuse(before, after, certificate=proof)
    assert [s.status for s in report.sites] == ["fused"], [s.reason for s in report.sites]
    assert report.taken == ("mask",)
    assert check_certificate(proof, before, after).holds


@pytest.mark.parametrize("options", [{"yes": 0}, {"condition": "ask"}, {"asked": "1"}], ids=str)
def test_another_branch_and_one_that_inputs_choose_stay_as_they_are(options) -> None:
    model = _model(**options)
    report = sfa_onnx.fuse(model)
    assert not report.fused
    assert report.taken == ()
    assert report.model.SerializeToString() == model.SerializeToString()


def test_a_condition_that_is_only_a_default_stays_the_callers() -> None:
    model = _model()
    model.graph.input.append(onnx.helper.make_tensor_value_info("yes", onnx.TensorProto.BOOL, []))
    report = sfa_onnx.fuse(model)
    assert not report.fused
    assert report.taken == ()
