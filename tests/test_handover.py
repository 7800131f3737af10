"""The hand-over folder: what is written, cut, run and compared; nothing of it needs CANN."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from sfa_onnx import runtime
from sfa_onnx.ascend.handover import against as handover_against
from sfa_onnx.ascend.handover import data as handover_data
from sfa_onnx.ascend.handover import folder as handover
from sfa_onnx.ascend.handover import mapping as handover_mapping
from sfa_onnx.errors import UsageError
from sfa_onnx.operator import kv_cache, op
from tests.test_flavour import build, ours

SOC = "Ascend910B2"
RNG = np.random.default_rng(11)
HALF = TensorProto.FLOAT16


@pytest.fixture(autouse=True)
def no_cann(monkeypatch):
    for name in ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME", "ASCEND_CUSTOM_OPP_PATH"):
        monkeypatch.delenv(name, raising=False)


def attention(batch=1, name="/layers.0/attn"):
    """One fused node over a contiguous packed cache, and inputs for it."""
    node = ours(op.SPARSE_FLASH_ATTENTION_ANTIQUANT, name=name, layout_kv="BSND")
    node.input[:] = ["query", "key", "key", "sparse_indices"]
    inputs = [
        ("query", HALF, [batch, 2, 16, 576]),
        ("key", TensorProto.INT8, [batch, 64, 1, 656]),
        ("sparse_indices", TensorProto.INT32, [batch, 2, 1, 32]),
    ]
    model = build([node], inputs, [("attention_out", HALF, [batch, 2, 16, 512])], domains=("npu",))
    rows = RNG.standard_normal((1, 64, 1, 512)).astype(np.float32)
    rope = RNG.standard_normal((1, 64, 1, 64)).astype(np.float16)
    feeds = {
        "query": RNG.standard_normal((1, 2, 16, 576)).astype(np.float16),
        "key": kv_cache.pack(rows, rope),
        "sparse_indices": np.tile(np.arange(32, dtype=np.int32), (1, 2, 1, 1)),
    }
    return model, feeds


@pytest.fixture
def fused(tmp_path):
    model, feeds = attention()
    path = tmp_path / "m.sfa.onnx"
    onnx.save(model, path)
    return path, feeds


def test_everything_is_there_and_the_report_says_what_to_do(fused, tmp_path):
    path, feeds = fused
    report = handover.write(path, tmp_path / "out", soc_version=SOC, inputs=feeds)
    assert report.passed, report.errors
    for name in ("model.atc.onnx", "atc.sh", "README.md", "mapping.json", "run_om.py",
                 "outputs.json", "inputs/inputs.json", "build_plugin.sh"):  # fmt: skip
        assert (tmp_path / "out" / name).is_file(), name
    assert set(report.files) <= {
        str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*")
    }
    script = (tmp_path / "out" / "atc.sh").read_text()
    assert "--input_shape='query:1,2,16,576;key:1,64,1,656;sparse_indices:1,2,1,32'" in script
    assert "source opp/vendors/sfa_onnx/bin/set_env.bash" in script
    assert "E16005" in (tmp_path / "out" / "README.md").read_text()
    assert "atc.sh" in report.lines()[-1]
    shell = subprocess.run(["bash", "-n", str(tmp_path / "out" / "atc.sh")])
    assert shell.returncode == 0


@pytest.mark.kernel
@pytest.mark.parametrize("binding", op.CHOICES)
def test_the_atc_file_gives_the_same_bits_in_onnxruntime(fused, tmp_path, binding):
    path, feeds = fused
    report = handover.write(path, tmp_path / "out", soc_version=SOC, binding=binding, inputs=feeds)
    mine, theirs = runtime.run(path, feeds), runtime.run(report.model, feeds)
    np.testing.assert_array_equal(mine["attention_out"], theirs["attention_out"])


def test_symbolic_dims_are_asked_for_by_the_script(tmp_path):
    model, _ = attention()
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "batch"
    onnx.save(model, tmp_path / "m.onnx")
    report = handover.write(tmp_path / "m.onnx", tmp_path / "out", soc_version=SOC)
    assert report.unbound == {"batch": "DIM_BATCH"}
    fake = tmp_path / "bin"
    fake.mkdir()
    (fake / "atc").write_text("#!/bin/bash\nexit 0\n")
    (fake / "atc").chmod(0o755)
    env = {"PATH": f"{fake}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "out/atc.sh"], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "DIM_BATCH" in done.stderr
    bound = handover.write(
        tmp_path / "m.onnx", tmp_path / "two", soc_version=SOC, dims={"batch": 1}
    )
    assert not bound.unbound
    assert "query:1,2,16,576" in bound.command


def test_weights_stay_where_they_are(tmp_path):
    weight = RNG.standard_normal((576, 576)).astype(np.float16)
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], "mm")]
    io = ("x", HALF, [1, 576]), ("y", HALF, [1, 576])
    model = build(nodes, io[:1], io[1:], inits=[("w", weight)])
    folder = tmp_path / "model"
    folder.mkdir()
    onnx.save(model, folder / "m.onnx", save_as_external_data=True, location="m.bin")
    before = (folder / "m.bin").stat()
    report = handover.write(folder / "m.onnx", tmp_path / "out", soc_version=SOC)
    assert report.model == folder / "m.atc.onnx"
    assert (folder / "m.bin").stat() == before
    assert not list((tmp_path / "out").glob("*.bin"))
    assert "--model=../model/m.atc.onnx" in report.command
    assert "--external_weight=1" in report.command
    tensor = onnx.load(report.model, load_external_data=False).graph.initializer[0]
    assert {e.key for e in tensor.external_data} <= {"location", "offset", "length"}
    x = np.ones((1, 576), np.float16)
    np.testing.assert_array_equal(
        runtime.run(report.model, {"x": x})["y"], runtime.run(folder / "m.onnx", {"x": x})["y"]
    )


def test_nothing_is_overwritten_and_nothing_half_written(fused, tmp_path):
    path, feeds = fused
    handover.write(path, tmp_path / "out", soc_version=SOC, inputs=feeds)
    with pytest.raises(UsageError, match="a hand-over in it already"):
        handover.write(path, tmp_path / "out", soc_version=SOC)
    handover.write(path, tmp_path / "out", soc_version=SOC, inputs=feeds, force=True)
    broken, _ = attention()
    broken.graph.node[0].attribute.remove(broken.graph.node[0].attribute[0])
    onnx.save(broken, tmp_path / "broken.onnx")
    with pytest.raises(ValueError, match="scale_value is missing"):
        handover.write(tmp_path / "broken.onnx", tmp_path / "new", soc_version=SOC)
    assert not (tmp_path / "new").exists()


@pytest.mark.kernel
def test_sample_inputs_are_ones_the_operator_can_use(fused, tmp_path):
    path, _ = fused
    handover.write(path, tmp_path / "out", soc_version=SOC)
    feeds = handover_data.read_arrays(tmp_path / "out" / "inputs", "inputs.json")
    out = runtime.run(path, feeds)["attention_out"].astype(np.float32)
    assert np.isfinite(out).all()
    assert np.abs(out).max() > 0.01


def test_what_is_unknown_is_said(fused, tmp_path):
    path, feeds = fused
    report = handover.write(path, tmp_path / "out", soc_version="Ascend910_9391", inputs=feeds)
    assert report.passed
    assert any("not supported on Atlas A3" in line for line in report.lines())


def test_what_the_operator_refuses_makes_the_report_fail(tmp_path):
    model, _ = attention()
    spec = next(a for a in model.graph.node[0].attribute if a.name == "tile_size")
    spec.i = 64
    onnx.save(model, tmp_path / "m.onnx")
    report = handover.write(tmp_path / "m.onnx", tmp_path / "out", soc_version=SOC)
    assert not report.passed
    assert any("tile_size" in text for text in report.errors)


# ---- atc itself (a fake one: only its log matters here) -----------------------------------------


_WRITES = 'for word; do case $word in --output=*) echo new > "${word#*=}_linux.om";; esac; done'


@pytest.mark.parametrize(
    ("body", "passed"),
    [
        (f'echo "$@" > call.txt; {_WRITES}; echo "ATC run success"', True),
        (f'{_WRITES}; echo "E10501: IR for Op [sfa_0] is not registered"; exit 1', False),
        ('echo "ATC run success, though nothing was written"', False),
    ],
)
def test_atc_is_run_when_it_is_there(fused, tmp_path, monkeypatch, body, passed):
    path, feeds = fused
    headers = tmp_path / "cann"  # a toolkit and a compiler that only leave their traces
    (headers / "include" / "register").mkdir(parents=True)
    (headers / "include" / "register" / "register.h").touch()
    fake = tmp_path / "bin"
    fake.mkdir()
    (fake / "atc").write_text(f"#!/bin/bash\n{body}\n")
    (fake / "atc").chmod(0o755)
    (fake / "g++").write_text('#!/bin/bash\ntouch "${@: -1}"\n')
    (fake / "g++").chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake}:{os.environ['PATH']}")
    monkeypatch.setenv("ASCEND_HOME_PATH", str(headers))
    report = handover.write(path, tmp_path / "out", soc_version=SOC, inputs=feeds, execute=True)
    assert report.plugin_built
    assert report.ran is not None
    assert report.passed is passed
    if passed:
        assert "--soc_version=Ascend910B2" in (tmp_path / "out" / "call.txt").read_text()
    elif "E10501" in body:
        assert "no prototype" in "\n".join(report.lines())
    # What atc had begun to write when it failed takes no earlier file's place.
    (built := tmp_path / "out" / "model_linux.om").write_text("old\n")
    again = subprocess.run(["bash", tmp_path / "out" / "atc.sh"], capture_output=True)
    assert (again.returncode == 0) is passed
    assert [p.read_text() for p in built.parent.glob("*.om")] == ["new\n" if passed else "old\n"]


# ---- mapping -------------------------------------------------------------------------------------


def test_mapping_names_the_replaced_nodes(tmp_path):
    chain = [
        helper.make_node("Abs", ["x"], ["a"], "first"),
        helper.make_node("Neg", ["a"], ["b"], "inner1"),
        helper.make_node("Exp", ["b"], ["c"], "inner2"),
        helper.make_node("Add", ["c", "a"], ["out"], "inner3"),
        helper.make_node("Abs", ["out"], ["y"], "last"),
    ]
    io = ("x", HALF, [1, 2, 16, 576]), ("y", HALF, None)
    before = build(chain, io[:1], io[1:])
    onnx.save(before, tmp_path / "m.onnx")
    node = ours(op.SPARSE_FLASH_ATTENTION_ANTIQUANT, name="fused")
    node.input[:] = ["a", "k", "k", "i"]
    node.output[:] = ["attended"]
    inputs = [
        *io[:1],
        ("k", TensorProto.INT8, [1, 8, 1, 656]),
        ("i", TensorProto.INT32, [1, 2, 1, 4]),
    ]
    cast = helper.make_node("Cast", ["attended"], ["out"], "glue", to=HALF)
    after = build([chain[0], node, cast, chain[4]], inputs, io[1:], domains=("npu",))
    onnx.save(after, tmp_path / "m.sfa.onnx")
    assert handover_mapping.find_original(tmp_path / "m.sfa.onnx") == tmp_path / "m.onnx"
    handover.write(tmp_path / "m.sfa.onnx", tmp_path / "out", soc_version=SOC)
    written = json.loads((tmp_path / "out" / "mapping.json").read_text())
    assert written["golden"] == "m.onnx"
    (entry,) = written["nodes"]
    assert entry["ge_type"] == "KvQuantSparseFlashAttention"
    assert entry["replaces"] == ["inner1", "inner2", "inner3"]


def test_mapping_lists_fused_norms_each_with_its_own_nodes(tmp_path):
    """Two layers: x -> +r -> norm -> Neg -> + -> norm; the second does not reach into the first."""
    nodes, residual = [], "x"
    for i in "12":
        nodes += [
            helper.make_node("Add", [residual, "r" if i == "1" else "n1"], [f"s{i}"], f"add{i}"),
            helper.make_node("Mul", [f"s{i}", f"s{i}"], [f"q{i}"], f"square{i}"),
            helper.make_node("ReduceMean", [f"q{i}", "axes"], [f"m{i}"], f"mean{i}"),
            helper.make_node("Add", [f"m{i}", "eps"], [f"e{i}"], f"plus{i}"),
            helper.make_node("Sqrt", [f"e{i}"], [f"d{i}"], f"root{i}"),
            helper.make_node("Div", [f"s{i}", f"d{i}"], [f"u{i}"], f"unit{i}"),
            helper.make_node("Mul", [f"u{i}", "g"], [f"y{i}"], f"gamma{i}"),
            helper.make_node("Neg", [f"y{i}"], [f"n{i}"], f"neg{i}"),
        ]
        residual = f"s{i}"
    flat = [("x", TensorProto.FLOAT, [2, 8]), ("r", TensorProto.FLOAT, [2, 8])]
    inits = [
        onnx.numpy_helper.from_array(np.asarray(v), n)
        for n, v in (("g", np.ones(8, np.float32)), ("eps", np.float32(1e-6)), ("axes", [-1]))
    ]
    model = build(nodes, flat, [("n2", TensorProto.FLOAT, [2, 8])])
    model.graph.initializer.extend(inits)
    onnx.save(model, tmp_path / "m.onnx")
    onnx.save(model, tmp_path / "m.sfa.onnx")
    handover.write(tmp_path / "m.sfa.onnx", tmp_path / "out", soc_version=SOC)
    told = json.loads((tmp_path / "out" / "mapping.json").read_text())["nodes"]
    assert [(e["onnx_type"], e["ge_type"]) for e in told] == [("NPUAddRmsNorm", "AddRmsNorm")] * 2
    for entry, i in zip(told, "12", strict=True):
        parts = ("add", "square", "mean", "plus", "root", "unit", "gamma")
        assert entry["replaces"] == [part + i for part in parts]


# ---- inputs, the device, outputs ----------------------------------------------------------------


def test_inputs_are_written_in_graph_order_with_their_bits(tmp_path):
    kinds = [("b", TensorProto.BFLOAT16), ("a", HALF), ("n", TensorProto.INT64)]
    nodes = [helper.make_node("Identity", ["b"], ["y"], "id")]
    model = build(nodes, [(n, t, [3]) for n, t in kinds], [("y", TensorProto.BFLOAT16, [3])])
    feeds = {
        "n": np.arange(3),
        "a": np.arange(3, dtype=np.float16),
        "b": np.array([1.5, -2, 3], ml_dtypes.bfloat16),
    }
    handover_data.write_inputs(model, feeds, tmp_path)
    names = sorted(p.name for p in tmp_path.glob("*.bin"))
    assert names == ["000_b.bin", "001_a.bin", "002_n.bin"]
    assert (tmp_path / "000_b.bin").read_bytes() == feeds["b"].tobytes()
    assert np.load(tmp_path / "000_b.npy").dtype == np.uint16
    back = handover_data.read_arrays(tmp_path, "inputs.json")
    for name, array in feeds.items():
        assert back[name].dtype == array.dtype
        np.testing.assert_array_equal(back[name], array)
    with pytest.raises(UsageError, match="no array for a"):
        handover_data.write_inputs(model, {"b": feeds["b"], "n": feeds["n"]}, tmp_path)


def device(folder, feeds, path, spoil=None, noise=0.0):
    """Stand in for ais_bench: answers with the model's own outputs, a little off."""
    outputs = runtime.run(path, feeds)
    values = []
    for array in outputs.values():
        wide = array.astype(np.float64)
        wide = wide * (1 + noise * RNG.standard_normal(array.shape))
        if spoil is not None:
            wide.flat[spoil] += 1
        values.append(wide.astype(array.dtype))
    module = folder / "fake" / "ais_bench" / "infer"
    module.mkdir(parents=True, exist_ok=True)
    (module.parent / "__init__.py").touch()
    (module / "__init__.py").touch()
    np.savez(folder / "answer.npz", *values)
    (module / "interface.py").write_text(
        "import numpy as np\n"
        "class InferSession:\n"
        "    def __init__(self, device, path): self.path = path\n"
        "    def infer(self, inputs, mode):\n"
        "        assert mode == 'static'\n"
        "        assert [i.shape for i in inputs][0] == (1, 2, 16, 576)\n"
        f"        return list(np.load({str(folder / 'answer.npz')!r}).values())\n"
    )
    env = os.environ | {"PYTHONPATH": str(folder / "fake")}
    subprocess.run([sys.executable, "run_om.py", "model.om"], cwd=folder, env=env, check=True)


@pytest.mark.kernel
def test_a_device_run_is_compared_with_the_npus_roundings_in_mind(fused, tmp_path):
    path, feeds = fused
    out = tmp_path / "out"
    handover.write(path, out, soc_version=SOC, inputs=feeds)
    device(out, feeds, path, noise=2e-3)
    report = handover.compare_against(path, out)
    assert report.passed, report.verdict
    assert "roundings" in report.notes[0]
    assert handover.compare_against(path, out / "outputs").passed
    device(out, feeds, path, spoil=5)
    report = handover.compare_against(path, out)
    assert not report.passed
    assert report.outputs[0].difference.worst_index == (0, 0, 0, 5)
    assert handover.compare_against(path, out, atol=10.0, rtol=10.0).passed


def test_the_npus_roundings_are_small_but_not_nothing():
    assert 1e-4 < handover_against.npu_rounding("float16") < 2e-2
    assert 1e-4 < handover_against.npu_rounding("bfloat16") < 2e-2


def test_comparing_needs_what_run_om_wrote(fused, tmp_path):
    path, feeds = fused
    handover.write(path, tmp_path / "out", soc_version=SOC, inputs=feeds)
    with pytest.raises(UsageError, match=r"outputs\.json: not found"):
        handover.compare_against(path, tmp_path / "out")


def test_scripts_are_executable(fused, tmp_path):
    handover.write(fused[0], tmp_path / "out", soc_version=SOC, inputs=fused[1])
    for name in ("atc.sh", "build_plugin.sh", "opp/vendors/sfa_onnx/bin/set_env.bash"):
        assert (tmp_path / "out" / name).stat().st_mode & stat.S_IXUSR


def test_what_is_mechanical_is_fixed_and_told(tmp_path):
    nodes = [
        helper.make_node("TopK", ["x", "k"], ["v", "i"], "top"),
        helper.make_node("Mul", ["i", "two"], ["y"], "twice"),
    ]
    inits = [("k", np.array([2])), ("two", np.array([2]))]
    model = build(nodes, [("x", 1, [4])], [("y", 7, [2])], inits=inits)
    onnx.save(model, tmp_path / "m.onnx")
    report = handover.write(tmp_path / "m.onnx", tmp_path / "out", soc_version=SOC)
    assert any(note.startswith("fixed:") and "top" in note for note in report.notes)
    x = np.array([3, 9, 1, 7], np.float32)
    np.testing.assert_array_equal(runtime.run(report.model, {"x": x})["y"], [2, 6])


def test_a_size_of_zero_is_a_size_and_not_an_open_one(tmp_path):
    """Rows without elements, as the cache of a layer without rope holds them."""
    nodes = [helper.make_node("Concat", ["past", "new"], ["all"], "grow", axis=1)]
    inputs = [("past", HALF, [2, "s", 0]), ("new", HALF, [2, 1, 0])]
    onnx.save(build(nodes, inputs, [("all", HALF, [2, "t", 0])]), tmp_path / "m.onnx")
    report = handover.write(tmp_path / "m.onnx", tmp_path / "out", soc_version=SOC, dims={"s": 3})
    assert not report.unbound
    assert "--input_shape='past:2,3,0;new:2,1,0'" in report.command
    assert (tmp_path / "out" / "inputs" / "inputs.json").is_file(), report.notes
    outputs = json.loads((tmp_path / "out" / "outputs.json").read_text())
    assert outputs[0]["shape"][2] == 0
