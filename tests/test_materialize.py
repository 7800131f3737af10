"""`materialize_absorbed`: W_UK and W_UV as initializers, computed from the stored bytes."""

import json
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import sfa_onnx
from sfa_onnx import runtime
from sfa_onnx.cli import main
from sfa_onnx.errors import UsageError, VerificationError, WeightsError
from sfa_onnx.files.external import iter_tensors
from sfa_onnx.passes.certificate import check_certificate
from tests.absorbed_models import (
    TYPES,
    B,
    C,
    D,
    N,
    R,
    S,
    V,
    expanding,
    feeds,
    model_text,
    parts_of,
    saved,
    stored_weight,
)
from tests.hand_sites import gather_site
from tests.zoo.bodies import in_if


def _made(model, folder=""):
    tensors = {t.name: t for t in model.graph.initializer}
    return [numpy_helper.to_array(tensors[f"W.{part}"], str(folder)) for part in ("w_uk", "w_uv")]


def _views_of_weights(model):
    stored = {t.name for t in model.graph.initializer if t.name.startswith("W")}
    return [n.op_type for n in model.graph.node if n.op_type != "MatMul" and stored & {*n.input}]


@pytest.mark.parametrize("kind", ["float", "float16"])
def test_the_same_numbers_without_slices(kind):
    model = expanding(kind)
    plain = sfa_onnx.fuse(model, expect_sites=1)
    assert plain.weights_bytes_read == 0
    assert plain.materialized == []
    report = sfa_onnx.fuse(model, expect_sites=1, materialize_absorbed=True)
    assert report.sites[0].record.probes
    weight = stored_weight(kind)
    for made, expected in zip(_made(report.model), parts_of(weight), strict=True):
        np.testing.assert_array_equal(made, expected)
    assert "W" not in {t.name for t in report.model.graph.initializer}
    assert _views_of_weights(report.model) == []
    assert _views_of_weights(plain.model) == ["Reshape"]
    assert abs(report.model.ByteSize() - plain.model.ByteSize()) < 2000
    given = feeds(TYPES[kind])
    a, b = (runtime.run(runtime.session(r.model), given) for r in (plain, report))
    assert a["y0"].tobytes() == b["y0"].tobytes()
    (found,) = report.materialized
    assert (found.bytes_read, found.bytes_written) == (weight.nbytes, weight.nbytes)
    assert report.weights_bytes_read == weight.nbytes
    assert f"{weight.nbytes} bytes of weights read" in report.notes[-1]
    onnx.checker.check_model(report.model, full_check=True)


VIEWED = {
    "transposed": ("W = Transpose<perm=[1,0]>(Ws)", "float", lambda w: w.T),
    "reshaped": ("W = Reshape(Ws, flat)", "float", lambda w: w.reshape(C * N, D + V)),
    "cast": ("W = Cast<to=10>(Ws)", "float16", lambda w: w.astype(np.float32) * 1.0003),
    "copied": ("W = Identity(Ws)", "float", lambda w: w),
}


@pytest.mark.parametrize("name", VIEWED)
def test_views_in_the_graph_are_looked_through(name):
    before, kind, stored = VIEWED[name]
    array = np.ascontiguousarray(stored(stored_weight(kind)))
    model = expanding(kind, before, array, name="Ws")
    report = sfa_onnx.fuse(model, expect_sites=1, materialize_absorbed=True)
    tensors = {t.name: numpy_helper.to_array(t) for t in report.model.graph.initializer}
    weight = array.astype(np.float16) if name == "cast" else stored_weight(kind)
    for part, expected in zip(("w_uk", "w_uv"), parts_of(weight), strict=True):
        np.testing.assert_array_equal(tensors[f"Ws.{part}"], expected)
        assert tensors[f"Ws.{part}"].dtype == TYPES[kind]
    assert "Ws" not in tensors
    assert _views_of_weights(report.model) == []


def test_bfloat16_weights():
    """onnxruntime's CPU provider has no bfloat16 MatMul, so only the stored bytes are compared."""
    report = sfa_onnx.fuse(expanding("bfloat16"), expect_sites=1, materialize_absorbed=True)
    for made, expected in zip(
        _made(report.model), parts_of(stored_weight("bfloat16")), strict=True
    ):
        assert made.dtype == ml_dtypes.bfloat16
        assert made.tobytes() == np.ascontiguousarray(expected).tobytes()


def test_external_weights_go_beside_the_output(tmp_path):
    path = saved(expanding(), tmp_path)
    plain = sfa_onnx.fuse(path, tmp_path / "plain.onnx")
    report = sfa_onnx.fuse(path, tmp_path / "o.onnx", materialize_absorbed=True)
    weight = stored_weight()
    made = tmp_path / "o.absorbed.bin"
    assert made.stat().st_size < weight.nbytes + 4096
    assert (tmp_path / "o.onnx").stat().st_size < plain.path.stat().st_size + 500
    model = onnx.load(tmp_path / "o.onnx", load_external_data=False)
    onnx.checker.check_model(str(tmp_path / "o.onnx"))
    for found, expected in zip(_made(model, tmp_path), parts_of(weight), strict=True):
        np.testing.assert_array_equal(found, expected)
    for tensor in model.graph.initializer:
        entries = {e.key: e.value for e in tensor.external_data}
        assert int(entries.get("offset", 0)) % 4096 == 0
    assert report.weights_bytes_read == weight.nbytes
    a, b = (runtime.run(runtime.session(r.path), feeds())["y0"] for r in (plain, report))
    assert a.tobytes() == b.tobytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        *("m.onnx", "o.absorbed.bin", "o.onnx", "plain.onnx", "w.bin")
    ]


def test_external_weights_need_a_place(tmp_path):
    path = saved(expanding(), tmp_path)
    with pytest.raises(UsageError, match=r"lies in an external file.*pass an output path"):
        sfa_onnx.fuse(path, materialize_absorbed=True)
    (tmp_path / "o.absorbed.bin").write_bytes(b"mine")
    with pytest.raises(UsageError, match=r"o\.absorbed\.bin exists already"):
        sfa_onnx.fuse(path, tmp_path / "o.onnx", materialize_absorbed=True)
    assert (tmp_path / "o.absorbed.bin").read_bytes() == b"mine"
    sfa_onnx.fuse(path, tmp_path / "o.onnx", materialize_absorbed=True, force=True)
    assert (tmp_path / "o.absorbed.bin").read_bytes() == b"mine", "an older model may read it"
    assert (tmp_path / "o.absorbed-2.bin").stat().st_size > 4096
    onnx.checker.check_model(str(tmp_path / "o.onnx"))


def test_failures_leave_nothing(tmp_path):
    (tmp_path / "in").mkdir()
    extra, outputs = " z = MatMul(kv, W)", [f"float[{B},{S},{N * (D + V)}] z"]
    path = saved(expanding(extra=extra, outputs=outputs), tmp_path / "in")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(VerificationError, match="2 were expected"):
        sfa_onnx.fuse(path, tmp_path / "o.onnx", expect_sites=2, materialize_absorbed=True)
    with pytest.raises(WeightsError, match="pass weights='copy'"):
        sfa_onnx.fuse(path, tmp_path / "o.onnx", materialize_absorbed=True)
    (tmp_path / "in" / "w.bin").write_bytes(b"short")
    with pytest.raises(WeightsError, match="truncated"):
        sfa_onnx.fuse(path, tmp_path / "in" / "o.onnx", materialize_absorbed=True)
    assert sorted(tmp_path.rglob("*")) == before


def test_copied_weights_and_models_in_memory(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    extra, outputs = " z = MatMul(kv, W)", [f"float[{B},{S},{N * (D + V)}] z"]
    path = saved(expanding(extra=extra, outputs=outputs), tmp_path / "in")
    report = sfa_onnx.fuse(
        path, tmp_path / "out" / "o.onnx", materialize_absorbed=True, weights="copy"
    )
    again = sfa_onnx.fuse(
        onnx.load(path, load_external_data=False),
        path.with_name("a.onnx"),
        materialize_absorbed=True,
    )
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "o.absorbed.bin",
        "o.onnx",
        "w.bin",
    ]
    a, b = (runtime.run(runtime.session(r.path), feeds()) for r in (report, again))
    assert all(a[k].tobytes() == b[k].tobytes() for k in ("y0", "z"))


def test_a_weight_with_another_reader_stays():
    extra, outputs = " z = MatMul(kv, W)", [f"float[{B},{S},{N * (D + V)}] z"]
    report = sfa_onnx.fuse(expanding(extra=extra, outputs=outputs), materialize_absorbed=True)
    assert {"W", "W.w_uk", "W.w_uv"} <= {t.name for t in report.model.graph.initializer}
    assert report.materialized[0].kept == "z"
    assert "W stays: z reads it too" in report.notes


def test_sites_that_share_a_weight_share_what_is_made(tmp_path):
    path = saved(expanding(sites=2), tmp_path)
    report = sfa_onnx.fuse(path, tmp_path / "o.onnx", expect_sites=2, materialize_absorbed=True)
    (found,) = report.materialized
    assert len(found.sites) == 2
    assert sorted(found.made) == ["W.w_uk", "W.w_uv"]
    assert found.bytes_read == stored_weight().nbytes
    assert (tmp_path / "o.absorbed.bin").stat().st_size < stored_weight().nbytes + 4096


@pytest.mark.parametrize("hoist", [True, False])
def test_bodies_read_what_lies_where_their_weight_does(tmp_path, hoist):
    model = expanding()
    for node in model.graph.node:
        node.name = node.output[0]
    model = in_if(model, hoist=hoist, suffix="/else")
    if hoist:
        path = saved(model, tmp_path)
    else:
        path = tmp_path / "m.onnx"
        path.write_bytes(model.SerializeToString())
    output, proof = tmp_path / "o.onnx", tmp_path / "proof.json"
    report = sfa_onnx.fuse(
        path, output, expect_sites=2, materialize_absorbed=True, certificate=proof
    )
    names = [name for found in report.materialized for name in found.made]
    if hoist:
        assert names == ["W.w_uk", "W.w_uv"]
        assert len(report.materialized[0].sites) == 2
        assert {"W.w_uk", "W.w_uv"} <= {t.name for t in report.model.graph.initializer}
    else:
        assert sorted(names) == [f"W/{b}.{w}" for b in ("else", "then") for w in ("w_uk", "w_uv")]
    assert {t.name for t in iter_tensors(report.model)}.isdisjoint({"W", "W/then", "W/else"})
    assert check_certificate(proof, path, output).problems == ()
    for branch in (True, False):
        given = feeds() | {"use_cache_branch": np.array(branch)}
        a, b = (runtime.run(runtime.session(p), given)["y0"] for p in (path, output))
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


def test_sites_in_latent_space_have_nothing_to_write():
    model, _ = gather_site()
    report = sfa_onnx.fuse(model, materialize_absorbed=True)
    assert report.materialized == []
    assert "no fused site expands its keys and values" in report.notes[-1]


REFUSED = {
    "computed": ("W = Relu(Ws)", "is computed by Relu"),
    "an input": ("", "is an input of the graph: its value is not in the file"),
    "default": ("", "its stored value is a default"),
    "float64": ("W = Cast<to=1>(Ws)", "is stored as DOUBLE"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_stored_is_left_as_it_is(name):
    before, reason = REFUSED[name]
    array = stored_weight().astype(np.float64) if name == "float64" else stored_weight()
    model = expanding(before=before, weight=array, name="Ws" if before else "W")
    if not before:
        model.graph.input.append(helper.make_tensor_value_info("W", 1, array.shape))
    if name == "an input":
        del model.graph.initializer[-1]
    plain = sfa_onnx.fuse(model, expect_sites=1)
    report = sfa_onnx.fuse(model, expect_sites=1, materialize_absorbed=True)
    assert reason in report.materialized[0].reason
    assert report.materialized[0].made == {}
    assert any(f"not materialized at {report.sites[0].site_id}" in n for n in report.notes)
    assert report.model.SerializeToString() == plain.model.SerializeToString()
    assert report.weights_bytes_read == 0


def test_the_certificate_covers_the_new_weights(tmp_path):
    path = saved(expanding(), tmp_path)
    proof = tmp_path / "proof.json"
    sfa_onnx.fuse(path, tmp_path / "o.onnx", certificate=proof, materialize_absorbed=True)
    stated = json.loads(proof.read_text())
    assert stated["weights_bytes_read"] == stored_weight().nbytes
    assert sorted(stated["materialized"][0]["made"]) == ["W.w_uk", "W.w_uv"]
    assert check_certificate(proof, path, tmp_path / "o.onnx").problems == ()
    file = tmp_path / "o.absorbed.bin"
    data = bytearray(file.read_bytes())
    data[5] ^= 1
    file.write_bytes(data)
    problems = check_certificate(proof, path, tmp_path / "o.onnx").problems
    assert problems == ("the weight 'W.w_uk' holds other bytes than were written",)
    file.unlink()
    problems = check_certificate(proof, path, tmp_path / "o.onnx").problems
    assert all("cannot be read" in text for text in problems)
    assert len(problems) == 2


def test_the_command(tmp_path, capsys):
    path = saved(expanding(), tmp_path)
    assert main(["fuse", str(path), "--materialize-absorbed", "--dry-run"]) == 0
    assert main(["fuse", str(path), "--materialize-absorbed", "--expect-sites", "1"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "2 initializers from 1 expansion weights" in text
    assert "written to m.sfa.absorbed.bin" in text


def test_memory_is_bounded_by_one_weight(tmp_path):
    """Eight layers of 8 MB each: the peak is that of one, so 61 of 67 MB need no 4 GB."""
    layers, heads, nope, latent = 8, 32, 64, 512
    shape = (latent, heads * 2 * nope)
    size = 4 * latent * heads * 2 * nope
    text = model_text("float", "", layers, "", ())
    for old, new in (
        (f",{C}]", f",{latent}]"),
        (f",{N},", f",{heads},"),
        (f"{D + R}]", f"{nope + R}]"),
    ):
        text = text.replace(old, new)
    model = onnx.parser.parse_model(text)
    tables = {t.name: t for t in model.graph.initializer}
    for name, values in (
        ("to4", [B, S, heads, 2 * nope]),
        ("parts", [nope, nope]),
        ("wide", [B, heads, S, R]),
    ):
        tables[name].CopyFrom(numpy_helper.from_array(np.array(values, np.int64), name))
    for layer in range(layers):
        node = next(n for n in model.graph.node if n.output[0] == f"kvb{layer}")
        node.input[1] = f"W{layer}"
        model.graph.output[layer].type.tensor_type.shape.dim[3].dim_value = nope
        tensor = TensorProto(name=f"W{layer}", data_type=1, dims=shape, data_location=1)
        for key, value in (("location", "w.bin"), ("offset", layer * size), ("length", size)):
            tensor.external_data.add(key=key, value=str(value))
        model.graph.initializer.append(tensor)
    with Path(tmp_path / "w.bin").open("wb") as file:
        file.truncate(layers * size)
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    tracemalloc.start()
    try:
        report = sfa_onnx.fuse(
            tmp_path / "m.onnx", tmp_path / "o.onnx", verify=False, materialize_absorbed=True
        )
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert report.weights_bytes_read == layers * size
    assert (tmp_path / "o.absorbed.bin").stat().st_size >= layers * size
    assert peak < 4 * size
