import gc
import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

import sfa_onnx
from sfa_onnx import runtime
from sfa_onnx.cli import main
from sfa_onnx.doctor import examine
from sfa_onnx.errors import ContractError, MissingError, ModelError, UsageError
from sfa_onnx.operator.op import SPARSE_FLASH_ATTENTION, SPARSE_FLASH_ATTENTION_ANTIQUANT
from sfa_onnx.runtime.compare.run import compare
from sfa_onnx.runtime.feeds.draw import random_feeds
from tests.attention_cases import BF16, LAYOUTS, make_case
from tests.fuzz.corpus import gathered
from tests.op_models import needs_library, op_model


def tiny_model(nodes, inputs, outputs, opset=18, **kw):
    infos = [
        [helper.make_tensor_value_info(n, t, s) for n, t, s in group] for group in (inputs, outputs)
    ]
    graph = helper.make_graph(nodes, "tiny", *infos, **kw)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)


@pytest.fixture
def cast_model():
    return tiny_model(
        [
            helper.make_node("Cast", ["x"], ["wide"], to=TensorProto.FLOAT),
            helper.make_node("Add", ["wide", "y"], ["sum"]),
            helper.make_node("Cast", ["sum"], ["out"], to=TensorProto.BFLOAT16),
        ],
        [("x", TensorProto.BFLOAT16, ["n", 3]), ("y", TensorProto.FLOAT, ["n", 3])],
        [("out", TensorProto.BFLOAT16, ["n", 3]), ("sum", TensorProto.FLOAT, ["n", 3])],
    )


@pytest.mark.parametrize("n", [0, 1, 7])
def test_bfloat16_goes_in_and_comes_out(cast_model, n):
    r = np.random.default_rng(n)
    x = r.standard_normal((3, n)).astype(BF16).T  # not contiguous
    y = r.standard_normal((n, 3)).astype(np.float32)
    out = runtime.run(cast_model, {"x": x, "y": y})
    assert list(out) == ["out", "sum"]
    assert out["out"].dtype == BF16
    assert out["out"].shape == (n, 3)
    assert (out["sum"] == x.astype(np.float32) + y).all()
    assert (out["out"] == out["sum"].astype(BF16)).all()


def test_bfloat16_outputs_outlive_the_session(cast_model):
    feeds = {"x": np.ones((500, 3), BF16), "y": np.ones((500, 3), np.float32)}
    out = runtime.run(cast_model, feeds, ["out"])["out"]
    gc.collect()
    junk = [np.zeros(1500, np.uint16) for _ in range(50)]
    assert (out == 2).all()
    assert junk


def test_float8_passes_through():
    model = tiny_model(
        [helper.make_node("Identity", ["x"], ["y"])],
        [("x", TensorProto.FLOAT8E4M3FN, [4])],
        [("y", TensorProto.FLOAT8E4M3FN, [4])],
        opset=19,
    )
    x = np.array([1, -2, 0.5, 448], ml_dtypes.float8_e4m3fn)
    assert (runtime.run(model, {"x": x})["y"] == x).all()


def test_outputs_come_in_the_order_asked_for(cast_model):
    feeds = {"x": np.ones((1, 3), BF16), "y": np.ones((1, 3), np.float32)}
    assert list(runtime.run(cast_model, feeds, ["sum"])) == ["sum"]
    assert list(runtime.run(cast_model, feeds, ["sum", "out"])) == ["sum", "out"]


@pytest.mark.parametrize(
    ("feeds", "outputs", "text"),
    [
        ({"x": np.ones((1, 3), BF16)}, None, r"inputs \['y'\] are missing"),
        ({"x": np.ones((1, 3), BF16), "y": np.ones((1, 3))}, None, "expected float32, got float64"),
        (
            {"x": np.ones((1, 3), BF16), "y": np.ones((1, 3), np.float32), "z": np.ones(1)},
            None,
            "no input 'z'",
        ),
        ({}, ["nope"], r"no output \['nope'\]"),
    ],
)
def test_bad_calls_are_explained(cast_model, feeds, outputs, text):
    with pytest.raises(UsageError, match=text):
        runtime.run(cast_model, feeds, outputs)


def test_refusals_of_onnxruntime_are_model_errors(cast_model, tmp_path):
    cast_model.graph.node[0].op_type = "NoSuchOp"
    with pytest.raises(ModelError, match=r"onnxruntime .* refuses the model 'tiny'.*NoSuchOp"):
        runtime.session(cast_model)
    with pytest.raises(UsageError, match="no such file"):
        runtime.session(tmp_path / "missing.onnx")


def test_failures_while_running_are_model_errors():
    model = tiny_model(
        [helper.make_node("Reshape", ["x", "s"], ["y"])],
        [("x", TensorProto.FLOAT, ["n"]), ("s", TensorProto.INT64, [1])],
        [("y", TensorProto.FLOAT, None)],
    )
    with pytest.raises(ModelError, match=r"onnxruntime stopped: .*Reshape"):
        runtime.run(model, {"x": np.ones(3, np.float32), "s": np.array([7])})


def test_models_with_external_weights_are_taken_by_path(tmp_path):
    weight = onnx.numpy_helper.from_array(np.full((2000,), 2, np.float32), "w")
    model = tiny_model(
        [helper.make_node("Mul", ["x", "w"], ["y"])],
        [("x", TensorProto.FLOAT, [2000])],
        [("y", TensorProto.FLOAT, [2000])],
        initializer=[weight],
    )
    path = tmp_path / "m.onnx"
    onnx.save(model, path, save_as_external_data=True, location="w.bin", size_threshold=0)
    assert (runtime.run(path, {"x": np.ones(2000, np.float32)})["y"] == 2).all()
    with pytest.raises(ModelError, match="save it and pass the path"):
        runtime.session(onnx.load(path, load_external_data=False))


def test_a_missing_library_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("SFA_ONNX_LIBRARY", str(tmp_path / "none.so"))
    with pytest.raises(MissingError, match="which is not a file"):
        runtime.library_path()
    with pytest.raises(MissingError, match="SFA_ONNX_LIBRARY"):
        runtime.session(op_model(make_case()))
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"no library")
    monkeypatch.setenv("SFA_ONNX_LIBRARY", str(broken))
    with pytest.raises(MissingError, match="cannot load"):
        runtime.register(ort.SessionOptions())


@needs_library
def test_registering_twice_is_harmless():
    options = runtime.register(runtime.register(ort.SessionOptions()))
    model = op_model(make_case(dtype=np.float32))
    for _ in range(2):
        assert runtime.session(model, options).get_outputs()


@needs_library
@pytest.mark.parametrize("op", [SPARSE_FLASH_ATTENTION_ANTIQUANT, SPARSE_FLASH_ATTENTION])
@pytest.mark.parametrize("layouts", LAYOUTS, ids="-".join)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, BF16])
def test_the_library_agrees_with_the_reference(op, layouts, dtype):
    case = make_case(op, layouts, dtype=dtype, sparse_block_size=2)
    inputs = {n: a for n, a in case.inputs.items() if n != "value"}
    (got,) = runtime.run(op_model(case), inputs).values()
    exact = case.reference().astype(float)
    bound = 1e-5 if dtype == np.float32 else 4e-3
    error = np.linalg.norm(got.astype(float) - exact, axis=-1)
    assert (error <= bound * np.linalg.norm(exact, axis=-1) + 1e-30).all()


@needs_library
def test_the_operators_refusals_are_contract_errors():
    case = make_case(dtype=np.float32)
    case.inputs["block_table"][0, 0] = 999
    inputs = {n: a for n, a in case.inputs.items() if n != "value"}
    with pytest.raises(ContractError, match="block_table"):
        runtime.run(op_model(case), inputs)


@needs_library
def test_the_kernel_path_can_be_forced():
    code = "from sfa_onnx import runtime; print(runtime.kernel_isa())"
    env = {**os.environ, "SFA_ONNX_ISA": "scalar"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout.strip() == "scalar", done.stderr


def test_a_library_for_another_machine_is_our_error(monkeypatch, tmp_path):
    foreign = tmp_path / "libsfa_onnx_ops.so"
    foreign.write_bytes(b"\x7fELF\x02\x01\x01" + bytes(9) + b"\x03\x00\xf3\x00" + bytes(200))
    monkeypatch.setenv("SFA_ONNX_LIBRARY", str(foreign))
    with pytest.raises(MissingError, match="built for another"):
        runtime.kernel_isa()
    with pytest.raises(MissingError, match="cannot load"):
        runtime.register(ort.SessionOptions())
    assert not examine().healthy
    assert main(["doctor"]) == 3


def test_a_machine_without_the_library_is_not_healthy(monkeypatch, tmp_path):
    monkeypatch.setenv("SFA_ONNX_LIBRARY", str(tmp_path / "nothing.so"))
    report = examine()
    assert not report.healthy
    assert any(p.topic == "library" and p.state == "missing" for p in report.probes)


@needs_library
@pytest.mark.parametrize(
    ("location", "code"),
    [("w.bin", 0), ("gone.bin", 3), ("../w.bin", 3), ("/etc/passwd", 3), ("link.bin", 0)],
)
def test_weights_that_no_reader_takes_are_no_health(location, code, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for place in (folder, tmp_path):
        (place / "w.bin").write_bytes(bytes(16))
    (folder / "link.bin").symlink_to(tmp_path / "w.bin")  # some readers take it
    model = op_model(make_case(SPARSE_FLASH_ATTENTION))
    weight = model.graph.initializer.add(name="w", dims=[4], data_type=1, data_location=1)
    weight.external_data.add(key="location", value=location)
    (folder / "m.onnx").write_bytes(model.SerializeToString())
    assert main(["doctor", str(folder / "m.onnx")]) == code
    (folder / "m.onnx").write_bytes(b"no model")
    assert main(["doctor", str(folder / "m.onnx")]) == 3


@needs_library
def test_a_model_as_bytes():
    case = make_case(SPARSE_FLASH_ATTENTION)
    model = op_model(case)
    feeds = {n: a for n, a in case.inputs.items() if n != "value"}
    want = runtime.run(model, feeds)["attention_out"]
    got = runtime.run(model.SerializeToString(), feeds)["attention_out"]
    assert (want == got).all()


def test_a_constant_whose_value_lies_in_a_file(tmp_path):
    weight = numpy_helper.from_array(np.ones((64, 64), np.float32), "w")
    nodes = [
        helper.make_node("Constant", [], ["w"], value=weight),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    infos = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["b", 64]) for n in "xy"]
    graph = helper.make_graph(nodes, "g", infos[:1], infos[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    path = tmp_path / "m.onnx"
    onnx.save(
        model, path, save_as_external_data=True, location="w.bin", size_threshold=8,
        convert_attribute=True,
    )  # fmt: skip
    feeds = random_feeds(path)
    assert np.allclose(runtime.run(path, feeds)["y"], feeds["x"].sum(-1, keepdims=True), atol=1e-4)
    report = compare(path, path)
    assert report.passed
    assert report.outputs[0].difference.noise is not None
    with pytest.raises(ModelError, match="external files"):
        runtime.session(onnx.load(path, load_external_data=False))


def test_a_site_reads_the_constants_of_its_own_folder(tmp_path, monkeypatch):
    """The scale lies in a file beside the model; the caller's folder holds another such file."""
    model = gathered()
    scale = next(t for t in model.graph.initializer if t.name == "scale")
    model.graph.initializer.remove(scale)
    place = {"location": "w.bin", "offset": "0", "length": "4"}
    kept = TensorProto(name="scale", data_type=1, dims=[], data_location=TensorProto.EXTERNAL)
    for key, value in place.items():
        kept.external_data.add(key=key, value=value)
    model.graph.node.insert(0, helper.make_node("Constant", [], ["scale"], value=kept))
    onnx.save(model, tmp_path / "m.onnx")
    (tmp_path / "w.bin").write_bytes(np.float32(0.16).tobytes())
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for other in (np.float32(7).tobytes(), None):
        if other is None:
            Path("w.bin").unlink()
        else:
            Path("w.bin").write_bytes(other)
        report = sfa_onnx.fuse(tmp_path / "m.onnx", tmp_path / "out.onnx")
        assert report.sites[0].status == "fused", report.sites[0].reason
        (node,) = (n for n in report.model.graph.node if n.op_type.startswith("NPUSparse"))
        (found,) = (a.f for a in node.attribute if a.name == "scale_value")
        assert found == pytest.approx(0.16)
        (tmp_path / "out.onnx").unlink()


def test_an_output_that_is_no_tensor_is_named():
    node = helper.make_node("SequenceConstruct", ["x", "x"], ["both"])
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])
    both = helper.make_tensor_sequence_value_info("both", TensorProto.FLOAT, None)
    graph = helper.make_graph([node], "g", [value], [both, value])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    feeds = {"x": np.ones(2, np.float32)}
    with pytest.raises(UsageError, match=r"'both' is no tensor but seq\(tensor\(float\)\)"):
        runtime.run(model, feeds)
    np.testing.assert_array_equal(runtime.run(model, feeds, ["x"])["x"], feeds["x"])
