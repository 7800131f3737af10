"""Scales of keys behind the relu: never negative by themselves, or because the caller says so."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest

import sfa_onnx
from sfa_onnx.errors import UsageError
from sfa_onnx.passes.assume import METADATA
from sfa_onnx.runtime.feeds.draw import random_feeds
from tests.hand_indexers import CAUSAL, fused, indexer, refused

pytestmark = pytest.mark.kernel
SAID = "not-negative:key_scale"
MORE = ", float[B,T] key_scale"
BEHIND = " b = Unsqueeze(key_scale, one)\n m = Mul(s, b)\n"
HIDDEN = (
    f"{CAUSAL} b = Unsqueeze(key_scale, one)\n m0 = Mul(s, b)\n p0 = Unsqueeze(kept, one)\n"
    " p = And(seen, p0)\n m = Where(p, m0, low)\n"
)
DIVIDED = " b = Unsqueeze(key_scale, one)\n m = Div(s, b)\n"
STORED = " k8 = Cast<to=1>(c)\n kt = Transpose<perm=[0,2,1]>(k8)\n k4 = Unsqueeze(kt, one)\n"


def scaled(**steps: str) -> onnx.ModelProto:
    return indexer(MORE, **{"hidden": BEHIND, **steps})


def test_a_scale_of_float_keys_is_refused_and_the_hint_says_what_to_say() -> None:
    hint = refused(scaled(), "depends on the key, and key_scale may be negative")
    assert f"if it never is, say so: --assume {SAID}" in hint


def test_what_the_graph_makes_negative_cannot_be_said_away() -> None:
    turned = " b0 = Sub(key_scale, half)\n b = Unsqueeze(b0, one)\n m = Mul(s, b)\n"
    assert "--assume" not in refused(scaled(hidden=turned), "depends on the key")
    refused(scaled(hidden=turned), "depends on the key", assume=[SAID])


@pytest.mark.parametrize("hidden", [BEHIND, HIDDEN, DIVIDED], ids=["plain", "padding", "divided"])
def test_what_was_said_is_verified_and_written_down(hidden: str, tmp_path: Path) -> None:
    proof = tmp_path / "proof.json"
    more = MORE + ", bool[B,T] kept" if hidden == HIDDEN else MORE
    model = indexer(more, hidden=hidden)
    report = fused(model, assume=[SAID], certificate=proof)
    (site,) = report.selections
    assert site.record is not None
    assert any("'key_scale'" in a and f"assume {SAID}" in a for a in site.record.assumptions)
    assert report.assumed == (SAID,)
    assert json.loads(proof.read_text())["assumed"] == [SAID]
    assert {p.key: p.value for p in report.model.metadata_props}[METADATA] == SAID


def test_a_scale_may_stand_on_both_sides_of_the_relu() -> None:
    inside = " b = Unsqueeze(key_scale, one)\n b4 = Unsqueeze(b, one)\n z = Mul(x, b4)\n"
    behind = " m = Mul(s, b)\n"
    fused(scaled(relu=f"{inside} r = Relu(z)\n", hidden=behind), assume=[SAID])


def test_a_scale_of_heads_and_keys_is_none_of_keys() -> None:
    model = indexer(
        ", float[B,3,T] key_scale",
        relu=" r0 = Relu(x)\n b = Unsqueeze(key_scale, one)\n r = Mul(r0, b)\n",
    )
    refused(model, "", assume=[SAID])


@pytest.mark.parametrize("entry", ["not-negative:q8", "not-negative:kept", "not-negative:"])
def test_only_float_inputs_can_be_said_not_to_be_negative(entry: str) -> None:
    with pytest.raises(UsageError, match="assume="):
        sfa_onnx.fuse(indexer(MORE + ", bool[B,T] kept", hidden=BEHIND), assume=[entry])


def test_inputs_that_are_drawn_keep_what_was_assumed() -> None:
    """Said by the caller, or taken of keys in int8: the fused model carries it for `compare`."""
    other = indexer(", float[B,T] by", hidden=BEHIND.replace("key_scale", "by"))
    report = fused_by(other, "not-negative:by")
    assert (random_feeds(other, fused=report)["by"] >= 0).all()
    assert (random_feeds(other)["by"] < 0).any()
    narrow = indexer(
        ", int8[B,T,8] c, float[B,T] by",
        products=STORED + " x = MatMul(q, k4)\n",
        hidden=BEHIND.replace("key_scale", "by"),
    )
    taken = fused_by(narrow)
    assert {p.key: p.value for p in taken.metadata_props}[METADATA] == "not-negative:by"
    assert (random_feeds(narrow, fused=taken)["by"] >= 0).all()


def fused_by(model: onnx.ModelProto, *assume: str) -> onnx.ModelProto:
    report = sfa_onnx.fuse(model, assume=assume)
    assert [s.reason for s in report.selections] == [""]
    return report.model


def test_scales_of_stored_numbers_are_drawn_as_a_quantiser_makes_them() -> None:
    text = (
        '<ir_version: 8, opset_import: ["" : 17]>\n'
        "g (int8[B,T,8] c, float[B,T,1] by, float[B,T,8] plain, float s0) => (float[B,T,8] y)\n"
        "<int64[3] shape={0,-1,1}> {\n f = Cast<to=1>(c)\n b = Reshape(by, shape)\n z = Mul(b, f)\n"
        " d = DequantizeLinear(c, s0)\n e = Add(z, d)\n y = Mul(e, plain)\n}"
    )
    drawn = [random_feeds(onnx.parser.parse_model(text), seed) for seed in range(4)]
    assert all((d["by"] >= 0).all() and d["s0"] >= 0 for d in drawn)
    assert any((d["plain"] < 0).any() for d in drawn)
