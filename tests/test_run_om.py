"""run_om.py against doubles of pyACL and ais_bench: static, gears, ranges, caches in place."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from sfa_onnx.ascend import handover
from tests.test_flavour import build

X = np.arange(6, dtype=np.float32).reshape(2, 3)


def handed(folder: Path, dims: str | None) -> Path:
    """A hand-over of y = x + x for x [n, 3]; `dims` binds n."""
    shape = ["n" if dims else 2, 3]
    node = helper.make_node("Add", ["x", "x"], ["y"], "double")
    model = build([node], [("x", TensorProto.FLOAT, shape)], [("y", TensorProto.FLOAT, shape)])
    onnx.save(model, folder / "m.onnx")
    out = folder / "out"
    handover.write(
        folder / "m.onnx", out, soc_version="Ascend910B2", execute=False, inputs={"x": X},
        dims={"n": dims} if dims else {},
    )  # fmt: skip
    return out


def run(out: Path, fake: Path, **told: object) -> subprocess.CompletedProcess[str]:
    """run_om.py beside `out`, on a "compiled model" that the double of pyACL reads."""
    compiled = {"shape": [2, 3], "x_bytes": 24, "gears": [], "in_place": False} | told
    (out / "model.om").write_text(json.dumps(compiled))
    command = [sys.executable, "run_om.py", "model.om"]
    env = os.environ | {"PYTHONPATH": str(fake)}
    return subprocess.run(command, cwd=out, env=env, capture_output=True, text=True)


@pytest.fixture
def acl(tmp_path: Path) -> Path:
    """A machine with pyACL alone."""
    fake = tmp_path / "fake"
    fake.mkdir()
    shutil.copy(Path(__file__).with_name("acl_double.py"), fake / "acl.py")
    return fake


def result(out: Path) -> np.ndarray:
    return np.load(out / "outputs" / Path(json.loads((out / "outputs.json").read_text())[0]["file"])
                   .with_suffix(".npy"))  # fmt: skip


def test_a_static_file(tmp_path: Path, acl: Path) -> None:
    out = handed(tmp_path, None)
    done = run(out, acl)
    assert done.returncode == 0, done.stderr
    np.testing.assert_array_equal(result(out).reshape(2, 3), X + X)


def test_a_gear_is_chosen_and_the_room_of_the_largest_is_not_read(
    tmp_path: Path, acl: Path
) -> None:
    out = handed(tmp_path, "1,2,8")
    done = run(out, acl, gears=[[1, 3], [2, 3], [8, 3]], x_bytes=96)
    assert done.returncode == 0, done.stderr
    np.testing.assert_array_equal(result(out).reshape(2, 3), X + X)
    done = run(out, acl, gears=[[1, 3], [4, 3]], x_bytes=48)
    assert "choosing the gear of these inputs failed" in done.stderr


def test_a_file_of_another_kind_is_told(tmp_path: Path, acl: Path) -> None:
    assert "takes 2 inputs" in run(handed(tmp_path, None), acl, gears=[[2, 3]]).stderr


def test_a_cache_is_written_in_place(tmp_path: Path, acl: Path) -> None:
    out = handed(tmp_path, None)
    (out / "model.in_place.json").write_text(json.dumps([{"input_index": 0, "output_index": 0}]))
    done = run(out, acl, in_place=True)
    assert done.returncode == 0, done.stderr
    np.testing.assert_array_equal(result(out).reshape(2, 3), X + X)


def test_ranges_need_ais_bench(tmp_path: Path, acl: Path) -> None:
    assert "install ais_bench" in run(handed(tmp_path, "1~8"), acl).stderr


@pytest.mark.parametrize(
    ("dims", "mode"), [(None, "static"), ("1,2", "dymdims"), ("1~8", "dymshape")]
)
def test_ais_bench_is_told_the_mode(tmp_path: Path, dims: str | None, mode: str) -> None:
    out, module = handed(tmp_path, dims), tmp_path / "fake" / "ais_bench" / "infer"
    module.mkdir(parents=True)
    (module.parent / "__init__.py").touch()
    (module / "__init__.py").touch()
    room = "custom_sizes > 2 * inputs[0].nbytes" if mode == "dymshape" else "custom_sizes == 100000"
    (module / "interface.py").write_text(
        "class InferSession:\n"
        "    def __init__(self, device_id, model_path): self.path = model_path\n"
        "    def infer(self, inputs, mode='static', custom_sizes=100000):\n"
        f"        assert mode == {mode!r} and {room}\n"
        "        return [inputs[0] + inputs[0]]\n"
    )
    done = run(out, tmp_path / "fake")
    assert done.returncode == 0, done.stderr
    np.testing.assert_array_equal(result(out).reshape(2, 3), X + X)
