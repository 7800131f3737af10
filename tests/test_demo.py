"""The demo's road, from its model to the hand-over, without torch."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from sfa_onnx import demo
from sfa_onnx.cli import main
from sfa_onnx.errors import UsageError


@pytest.mark.kernel
def test_the_demo_fuses_converts_compares_and_hands_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", "-o", str(tmp_path), "--json"]) == 0
    done = json.loads(capsys.readouterr().out)
    (site,) = done["fuse"]["sites"]
    assert site["status"] == "fused"
    assert site["op_type"] == "NPUSparseFlashAttention"
    assert site["layer"] == "layers.0.self_attn"
    assert site["npu_limits"] == []
    assert max(p["error"] for p in site["record"]["probes"]) < 1e-9
    assert done["fuse"]["weights_bytes_read"] == 0
    assert done["kv_cache"]["added_inputs"] == ["past_latent_packed"]
    assert done["kv_cache"]["bytes_per_token_after"] == 656
    assert (tmp_path / "atc" / "atc.sh").is_file()
    script = (tmp_path / "atc" / "atc.sh").read_text()
    assert "past_latent_packed:1,8191,1,656" in script
    assert "--precision_mode=must_keep_origin_dtype" in script
    page = (Path(__file__).parents[1] / "docs" / "ascend.md").read_text(encoding="utf-8")
    (line,) = done["atc"]["engines"].values()
    assert line in " ".join(page.split()), "docs/ascend.md quotes what the demo prints"


def test_the_demo_model_is_the_same_everywhere(tmp_path: Path) -> None:
    first, second = demo.materialise(tmp_path / "a"), demo.materialise(tmp_path / "b")
    weights = "decode_layer.weights"
    assert (first.parent / weights).read_bytes() == (second.parent / weights).read_bytes()
    with pytest.raises(UsageError, match="exists and is not overwritten"):
        demo.materialise(tmp_path / "a")
    a, b = demo.feeds(), demo.feeds()
    for name, array in a.items():
        np.testing.assert_array_equal(array, b[name])
