"""Attention operators that keep their cache: past and new keys are joined in front of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import parser

import sfa_onnx
from sfa_onnx.passes.certificate import check_certificate
from sfa_onnx.passes.graph.attention_caches import join_caches
from tests.zoo.judge import run_fused, run_original, scaled_error

_TEXT = """<ir_version: 11, opset_import: ["" : {opset}]>
site (float[B,4,S,40] q, float[B,1,S,40] k, float[B,1,P,40] past, float[B,S,T] wish)
    => (float[B,4,S,32] o, float[B,1,T,40] keys, float[B,1,T,32] values)
<int64[1] four={{4}}, int64[1] one={{1}}, int64[1] zero={{0}}, int64[1] cut={{32}},
 int64[1] last={{3}}, int64[1] off={{8}}, int64[1] end={{40}}, float low={{-1.0}}>
{{
 best, idx = TopK(wish, four)
 shape = Shape(wish)
 far = ConstantOfShape<value=float[1] {{-inf}}>(shape)
 few = Shape(idx)
 none = ConstantOfShape<value=float[1] {{0.0}}>(few)
 scattered = ScatterElements<axis=-1>(far, idx, none)
 shown = Unsqueeze(scattered, one)
 v = Slice(k, zero, cut, last)
 {before} = Slice(past, {low_column}, {high_column}, last)
 {mask}
 o, keys, values = Attention<scale=0.2{more}>(q, k, v, m, past, pv)
}}"""
_FLOAT, _BOOL = "m = Identity(shown)", "m = Greater(shown, low)"


def _model(opset=24, mask=_FLOAT, more="", columns=("zero", "cut")):
    return parser.parse_model(
        _TEXT.format(
            opset=opset,
            mask=mask,
            more=more,
            before="pv",
            low_column=columns[0],
            high_column=columns[1],
        )
    )


def _feeds(seed, batch=2, rows=3, past=8):
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    return {
        "q": draw(batch, 4, rows, 40),
        "k": draw(batch, 1, rows, 40),
        "past": draw(batch, 1, past, 40),
        "wish": draw(batch, rows, past + rows),
    }


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"opset": 23},
        {"mask": _BOOL},
        {"more": ", is_causal=1"},
        {"mask": _BOOL, "more": ", is_causal=1"},
    ],
    ids=str,
)
def test_a_cache_of_its_own_is_joined_and_returned(options, tmp_path: Path) -> None:
    model = _model(**options)
    before, after, proof = (tmp_path / n for n in ("a.onnx", "b.onnx", "proof.json"))
    onnx.save(model, before)
    report = sfa_onnx.fuse(before, after, certificate=proof)
    assert [s.status for s in report.sites] == ["fused"], [s.reason for s in report.sites]
    assert report.joined == ("o",)
    assert check_certificate(proof, before, after).holds
    for seed, sizes in ((0, {}), (1, {"batch": 1, "rows": 1}), (2, {"batch": 3, "past": 17})):
        feeds = _feeds(seed, **sizes)
        given, made = run_original(model, feeds), run_fused(report.model, feeds)
        causal = "is_causal" in options.get("more", "")  # rows may see none of their keys
        assert scaled_error(given, made, nan_is_free=causal) < 1e-5


@pytest.mark.parametrize("more", ["", ", is_causal=1"])
def test_the_join_changes_no_number(more: str) -> None:
    model = _model(more=more)
    joined = join_caches(model, ["o"])
    (node,) = (n for n in joined.graph.node if n.op_type == "Attention")
    assert len(node.input) == 4
    assert len(node.output) == 1
    feeds = _feeds(3)
    given, made = run_original(model, feeds), run_original(joined, feeds)
    assert scaled_error(given, made, nan_is_free=True) < 1e-6


def test_values_of_other_columns_are_refused_and_the_file_stays_as_it_is() -> None:
    model = _model(columns=("off", "end"))
    report = sfa_onnx.fuse(model)
    (site,) = report.sites
    assert site.status == "refused"
    assert "cache of its own" in site.reason
    assert report.joined == ()
    assert report.model.SerializeToString() == model.SerializeToString()


def test_a_window_of_its_own_is_refused() -> None:
    text = _model(opset=25, more=", left_window_size=2")
    (site,) = sfa_onnx.fuse(text).sites
    assert site.status == "refused"
