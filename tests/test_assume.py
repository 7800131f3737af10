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
from tests.zoo.judge import run_fused, run_original, scaled_error

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


@pytest.mark.parametrize(
    "entry", ["shown", "bias:shown", "two-valued:", "two-valued:idx", "zero-one:nobody"]
)
def test_what_makes_no_sense_is_refused(entry: str) -> None:
    with pytest.raises(UsageError, match="assume="):
        sfa_onnx.fuse(model(PLAIN), assume=[entry])


@pytest.mark.parametrize("name", ["plan.yaml", "plan.json"])
def test_a_plan_carries_it(tmp_path: Path, name: str) -> None:
    report = sfa_onnx.fuse(model(PLAIN), assume=[ASSERTED])
    path = write_plan(report, tmp_path / name)
    assert read_plan(path).assume == (ASSERTED,)
    assert len(sfa_onnx.fuse(model(PLAIN), plan=path).fused) == 1


def turned(kind: str = "float", hides: str = "hides = Mul(other, low4)") -> onnx.ModelProto:
    """(1 - mask) * low: the input is 1 where keys are seen, if it is a mask at all."""
    cast = f"other0 = Cast<to=1>(shown)\n  other = Sub(one1, other0)\n  {hides}"
    made = model(f"  {cast}\n  masked = Add(kept, hides)")
    next(v for v in made.graph.input if v.name == "shown").type.tensor_type.elem_type = (
        onnx.TensorProto.FLOAT if kind == "float" else onnx.TensorProto.INT64
    )
    for name, value in (("one1", 1.0), ("low4", -1e4)):
        made.graph.initializer.append(onnx.numpy_helper.from_array(np.float32(value), name))
    return made


def test_one_minus_a_mask_is_refused_and_the_hint_says_what_to_say() -> None:
    (site,) = sfa_onnx.fuse(turned()).sites
    assert site.status == "refused"
    assert "shown is added to the scores" in site.reason
    assert "cast it to bool" in site.hint
    assert "--assume zero-one:shown" in site.hint
    assert "two-valued" not in site.hint


@pytest.mark.parametrize("kind", ["float", "int64"])
def test_a_mask_of_zeros_and_ones_is_verified_as_one(kind: str, tmp_path: Path) -> None:
    made, proof = turned(kind), tmp_path / "proof.json"
    report = sfa_onnx.fuse(made, assume=["zero-one:shown"], certificate=proof)
    (site,) = report.fused
    assert site.record is not None
    assert any("'shown' holds 0 and 1 only" in a for a in site.record.assumptions)
    assert any("assume zero-one:shown" in a for a in site.record.assumptions)
    assert json.loads(proof.read_text())["assumed"] == ["zero-one:shown"]
    feeds = random_feeds(made, fused=report.model)
    assert set(np.unique(feeds["shown"])) <= {0, 1}
    feeds["shown"] = np.random.default_rng(3).integers(0, 2, feeds["shown"].shape)
    feeds["shown"][..., 0] = 1  # a row without keys is an edge
    feeds["idx"].sort()  # key 0 comes first, which all rows see
    feeds["shown"] = feeds["shown"].astype(np.float32 if kind == "float" else np.int64)
    before, after = run_original(made, feeds), run_fused(report.model, feeds)
    assert scaled_error(before, after, nan_is_free=True) < 1e-5


@pytest.mark.parametrize(
    ("hides", "said"),
    [
        ("hides = Identity(other)", "zero-one:shown"),  # adds 1, hides nothing
        ("hides = Mul(other, one1)", "zero-one:shown"),
        ("hides = Mul(other, low4)", "two-valued:shown"),  # 1 - (-1e4) times -1e4
    ],
)
def test_a_mask_of_zeros_and_ones_that_hides_nothing_is_refused(hides: str, said: str) -> None:
    (site,) = sfa_onnx.fuse(turned(hides=hides), assume=[said]).sites
    assert site.status == "refused"
