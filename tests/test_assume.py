"""What the caller asserts about a float mask: asked for, verified, written down."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest

import sfa_onnx
from sfa_onnx.errors import UsageError
from sfa_onnx.passes.assume import METADATA
from sfa_onnx.passes.plan import read_plan, write_plan
from sfa_onnx.runtime.feeds.draw import random_feeds
from tests.hand_sites import GATHER_FLOAT

ASSERTED = "two-valued:shown"


def model(masked: str) -> onnx.ModelProto:
    """Gathered keys whose scores meet a float tensor from outside."""
    text = GATHER_FLOAT.replace("int32[B] len)", "int32[B] len, float[B,S1,1,K] shown)")
    plain = "  masked = Where(keep, scaled, ninf)"
    assert plain in text
    return onnx.parser.parse_model(
        text.replace(plain, f"{plain.replace('masked', 'kept')}\n{masked}")
    )


PLAIN = "  masked = Add(kept, shown)"
SOFTENED = "  soft = Mul(shown, scale3)\n  masked = Add(kept, soft)"


def softened() -> onnx.ModelProto:
    """A mask of -1e4 is -1 behind the factor: it hides nothing."""
    made = model(SOFTENED)
    made.graph.initializer.append(onnx.numpy_helper.from_array(np.float32(1e-4), "scale3"))
    return made


def test_nothing_is_assumed_unasked() -> None:
    (site,) = sfa_onnx.fuse(model(PLAIN)).sites
    assert site.status == "refused"
    assert "it may be a bias" in site.reason
    assert f"--assume {ASSERTED}" in site.hint


def test_what_was_asserted_is_verified_and_written_down(tmp_path: Path) -> None:
    proof = tmp_path / "proof.json"
    report = sfa_onnx.fuse(model(PLAIN), assume=[ASSERTED], certificate=proof)
    (site,) = report.fused
    assert site.record is not None
    assert any("'shown' holds 0" in a and "the caller" in a for a in site.record.assumptions)
    assert report.assumed == (ASSERTED,)
    assert json.loads(proof.read_text())["assumed"] == [ASSERTED]
    assert {p.key: p.value for p in report.model.metadata_props}[METADATA] == ASSERTED


def test_compare_draws_such_a_mask() -> None:
    report = sfa_onnx.fuse(model(PLAIN), assume=[ASSERTED])
    drawn = random_feeds(model(PLAIN), fused=report.model)["shown"]
    assert ((drawn == 0) | (drawn <= -1e4)).all()


def test_an_assertion_is_no_licence() -> None:
    """The site is verified for such masks: one that is weakened on its way is found out."""
    (site,) = sfa_onnx.fuse(softened(), assume=[ASSERTED]).sites
    assert site.status == "refused"


@pytest.mark.parametrize("entry", ["shown", "bias:shown", "two-valued:", "two-valued:idx"])
def test_what_makes_no_sense_is_refused(entry: str) -> None:
    with pytest.raises(UsageError, match="assume="):
        sfa_onnx.fuse(model(PLAIN), assume=[entry])


@pytest.mark.parametrize("name", ["plan.yaml", "plan.json"])
def test_a_plan_carries_it(tmp_path: Path, name: str) -> None:
    report = sfa_onnx.fuse(model(PLAIN), assume=[ASSERTED])
    path = write_plan(report, tmp_path / name)
    assert read_plan(path).assume == (ASSERTED,)
    assert len(sfa_onnx.fuse(model(PLAIN), plan=path).fused) == 1


def test_one_minus_a_mask_is_no_mask_of_two_values_and_the_hint_says_what_to_do() -> None:
    """(1 - mask) * low: the input is 1 where keys are seen, if it is a mask at all."""
    made = model(
        "  other = Sub(one1, shown)\n  hides = Mul(other, low4)\n  masked = Add(kept, hides)"
    )
    for name, value in (("one1", 1.0), ("low4", -1e4)):
        made.graph.initializer.append(onnx.numpy_helper.from_array(np.float32(value), name))
    (site,) = sfa_onnx.fuse(made).sites
    assert site.status == "refused"
    assert "shown is added to the scores" in site.reason
    assert "cast it to bool" in site.hint
    assert "two-valued" not in site.hint
