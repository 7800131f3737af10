"""The examples run, as a reader would run them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run_example(name: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / name), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p != str(ROOT))},
        timeout=400,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return done.stdout


@pytest.mark.torch
@pytest.mark.kernel
def test_decoding_with_int8_pages_agrees_with_torch() -> None:
    printed = run_example("generate.py", "--tokens", "64")
    rows = re.findall(r"same next token +([\d.]+)% +logits differ by (\S+)", printed)
    fused, paged, rounded, beside = [(float(a), float(b)) for a, b in rows]
    assert fused[0] == 100.0
    assert fused[1] < 1e-4
    assert paged[0] >= 95.0
    assert beside[1] < 1e-3, "pages give what int8 rounding alone gives"
    assert paged[1] == pytest.approx(rounded[1], rel=0.05, abs=1e-3)
    assert "2 sites fused: model.layers.0.self_attn, model.layers.1.self_attn" in printed


@pytest.mark.torch
def test_the_packaged_demo_model_is_what_its_script_exports(tmp_path: Path) -> None:
    import onnx

    target = tmp_path / "layer.onnx"
    run_example("export_demo.py", "-o", str(target))
    shipped = onnx.load(ROOT / "sfa_onnx" / "demo" / "decode_layer.onnx", load_external_data=False)
    fresh = onnx.load(target, load_external_data=False)
    assert [n.op_type for n in fresh.graph.node] == [n.op_type for n in shipped.graph.node]
    assert [t.name for t in fresh.graph.initializer] == [t.name for t in shipped.graph.initializer]


@pytest.mark.torch
@pytest.mark.kernel
def test_the_paged_decode_loop_agrees_with_unpacked_attention() -> None:
    printed = run_example("paged_decode.py")
    assert "step 7: lengths [48, 15]" in printed
    lines = (ROOT / "examples" / "paged_decode.py").read_text().splitlines()
    assert len(lines) <= 65
