"""Opening and saving models: the weights stay where they are and are never read."""

import gzip
import os
import pickle
from pathlib import Path

import numpy as np
import onnx
import pytest
from google.protobuf import json_format, text_format
from onnx import TensorProto, helper, numpy_helper

from sfa_onnx.errors import ModelError, UsageError, WeightsError
from sfa_onnx.files.external import StorageReader
from sfa_onnx.files.model import atomic_write, hash_tensors_and_nodes, load_model, save_model
from sfa_onnx.files.weights import external_files, place_weights, weights_findings
from sfa_onnx.summary import summarise

_ONNX = tuple(int(part) for part in onnx.__version__.split(".")[:2])


def _external(name, array, location, offset):
    tensor = TensorProto(
        name=name,
        data_type=helper.np_dtype_to_tensor_dtype(array.dtype),
        dims=array.shape,
        data_location=TensorProto.EXTERNAL,
    )
    for key, value in (("location", location), ("offset", offset), ("length", array.nbytes)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def _model(location="w.bin"):
    """Y = X @ W + Gather(table): W is a weight, `table` an integer table behind it."""
    weight = np.arange(12, dtype=np.float32).reshape(3, 4)
    table = np.array([2, 0, 1], np.int64)
    nodes = [
        helper.make_node("Gather", ["x", "table"], ["g"], axis=1),
        helper.make_node("MatMul", ["g", "w"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", 1, [2, 3])],
        [helper.make_tensor_value_info("y", 1, [2, 4])],
        [_external("w", weight, location, 0), _external("table", table, location, 48)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    return model, weight.tobytes() + table.tobytes()


@pytest.fixture
def saved(tmp_path):
    model, data = _model()
    (tmp_path / "w.bin").write_bytes(data)
    path = tmp_path / "m.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def test_load_needs_no_weights_file(saved):
    (saved.parent / "w.bin").unlink()
    model = load_model(saved)
    assert model.graph.initializer[0].data_location == TensorProto.EXTERNAL


def test_load_returns_a_model_as_it_is():
    model, _ = _model()
    assert load_model(model) is model


@pytest.mark.parametrize(
    ("content", "error", "words"),
    [
        (None, UsageError, "no such file"),
        (b"a text of no format at all\n", ModelError, "not a binary ONNX model"),
        (b"", ModelError, "no ONNX graph"),
    ],
)
def test_load_explains_bad_files(tmp_path, content, error, words):
    path = tmp_path / "m.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(error, match=words):
        load_model(path)
    with pytest.raises(UsageError, match="is a folder"):
        load_model(tmp_path)


def test_save_is_atomic_and_does_not_overwrite(saved):
    model = load_model(saved)
    out = save_model(model, saved.parent / "o.onnx", source_dir=saved.parent)
    assert out.read_bytes() == saved.read_bytes()
    with pytest.raises(UsageError, match="exists already"):
        save_model(model, out, source_dir=saved.parent)
    save_model(model, out, source_dir=saved.parent, force=True)
    assert sorted(p.name for p in saved.parent.iterdir()) == ["m.onnx", "o.onnx", "w.bin"]


def test_failed_write_leaves_nothing(tmp_path, monkeypatch):
    def fail(*args):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fdopen", fail)
    with pytest.raises(OSError, match="no space"):
        atomic_write(tmp_path / "a", b"data")
    assert list(tmp_path.iterdir()) == []


def test_other_folder_is_refused_unless_copied(saved, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    model = load_model(saved)
    with pytest.raises(WeightsError, match=r"w\.bin.*model's own folder.*weights='copy'"):
        save_model(model, other / "o.onnx", source_dir=saved.parent)
    assert list(other.iterdir()) == []
    save_model(model, other / "o.onnx", source_dir=saved.parent, weights="copy")
    loaded = onnx.load(other / "o.onnx")
    np.testing.assert_array_equal(numpy_helper.to_array(loaded.graph.initializer[1]), [2, 0, 1])
    onnx.checker.check_model(str(other / "o.onnx"))


def test_copy_keeps_holes(tmp_path):
    source, target = tmp_path / "a", tmp_path / "b"
    source.mkdir()
    target.mkdir()
    model, data = _model()
    with (source / "w.bin").open("wb") as stream:
        stream.write(data)
        stream.truncate(1 << 34)
    place_weights(model, source, target / "m.onnx", mode="copy")
    copied = target / "w.bin"
    assert copied.stat().st_size == 1 << 34
    assert copied.stat().st_blocks * 512 < 1 << 20
    assert copied.open("rb").read(len(data)) == data


def test_model_in_memory_needs_its_weights_beside_the_output(saved, tmp_path):
    model, _ = _model()
    save_model(model, saved.parent / "o.onnx")
    (tmp_path / "other").mkdir()
    with pytest.raises(WeightsError, match="given in memory"):
        save_model(model, tmp_path / "other" / "o.onnx")


def test_output_may_not_be_a_weights_file(saved):
    with pytest.raises(UsageError, match="is a weights file"):
        save_model(load_model(saved), saved.parent / "w.bin", source_dir=saved.parent, force=True)


def test_reader_reads_exact_ranges_and_logs_them(saved):
    model = load_model(saved)
    reader = StorageReader(saved.parent)
    np.testing.assert_array_equal(reader.weight(model.graph.initializer[1]), [2, 0, 1])
    assert reader.log == ["table: w.bin[48:72]"]
    assert reader.bytes_read == 24
    assert reader("w.bin", 52, 4) == (saved.parent / "w.bin").read_bytes()[52:56]
    assert reader.log[1:] == ["w.bin[52:56]"]
    assert reader.bytes_read == 28


@pytest.mark.parametrize("location", ["../w.bin", "/etc/passwd", "a/../../w.bin"])
def test_reader_refuses_paths_that_escape(saved, location):
    model, _ = _model(location)
    with pytest.raises(WeightsError, match="leads out of the model's folder"):
        StorageReader(saved.parent).weight(model.graph.initializer[1])


def test_reader_explains_missing_and_short_files(saved):
    tensor = load_model(saved).graph.initializer[1]
    weights = saved.parent / "w.bin"
    weights.write_bytes(b"\0" * 50)
    with pytest.raises(WeightsError, match="ends before byte 72"):
        StorageReader(saved.parent).weight(tensor)
    weights.unlink()
    with pytest.raises(WeightsError, match="cannot be opened"):
        StorageReader(saved.parent).weight(tensor)
    os.mkfifo(weights)  # nobody ever writes into it
    with pytest.raises(WeightsError, match="a folder, pipe or device"):
        StorageReader(saved.parent).weight(tensor)
    weights.unlink()
    with pytest.raises(WeightsError, match="given in memory"):
        StorageReader(None).weight(tensor)


def test_reader_rejects_lengths_that_do_not_fit(saved):
    tensor = _external("t", np.zeros(3, np.int64), "w.bin", 0)
    tensor.dims[0] = 2
    with pytest.raises(WeightsError, match=r"external length is 24 bytes.*need 16"):
        StorageReader(saved.parent).weight(tensor)
    with pytest.raises(WeightsError, match="at most"):
        StorageReader(saved.parent)("w.bin", 0, 1 << 21)


def _layouts(folder: Path, data: bytes):
    """One model folder per layout that people build."""
    outside = folder / "outside"
    outside.mkdir()
    (outside / "w.bin").write_bytes(data)
    for name in ("plain", "hard", "inside", "linked", "missing", "short"):
        (folder / name).mkdir()
    (folder / "plain" / "w.bin").write_bytes(data)
    (folder / "hard" / "w.bin").write_bytes(data)
    (folder / "hard" / "again.bin").hardlink_to(folder / "hard" / "w.bin")
    (folder / "inside" / "real.bin").write_bytes(data)
    (folder / "inside" / "w.bin").symlink_to("real.bin")
    (folder / "linked" / "w.bin").symlink_to(outside / "w.bin")
    (folder / "short" / "w.bin").write_bytes(data[:10])


def _onnx_accepts(path):
    try:
        onnx.load(path)
    except Exception:
        return False
    return True


def _ort_accepts(path):
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    try:
        ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception:
        return False
    return True


def test_findings_agree_with_the_readers(tmp_path):
    model, data = _model()
    _layouts(tmp_path, data)
    expected = {
        "plain": "plain",
        "hard": "hard link",
        "inside": "symlink inside",
        "linked": "symlink outside",
        "missing": "missing",
        "short": "too short",
    }
    for folder, layout in expected.items():
        path = tmp_path / folder / "m.onnx"
        path.write_bytes(model.SerializeToString())
        (finding,) = weights_findings(model, path.parent)
        assert finding.layout == layout
        if layout in ("plain", "missing") or _ONNX >= (1, 21):  # older ones did not look closely
            assert ("onnx" in finding.accepted_by) == _onnx_accepts(path), folder
        assert ("onnxruntime" in finding.accepted_by) == _ort_accepts(path), folder
        assert finding.ok == (layout == "plain")
        assert finding.ok or finding.fix


@pytest.mark.parametrize("location", ["../outside/w.bin", "/outside/w.bin"])
def test_findings_for_paths_that_escape(tmp_path, location):
    model, _ = _model(location)
    (finding,) = weights_findings(model, tmp_path)
    assert finding.layout == "outside"
    assert finding.accepted_by == ()


def test_external_files_sees_subgraphs():
    model, _ = _model()
    body = helper.make_graph(
        [helper.make_node("Identity", ["c"], ["o"])],
        "body",
        [],
        [helper.make_tensor_value_info("o", 7, [4])],
        [_external("c", np.zeros(4, np.int64), "other.bin", 0)],
    )
    model.graph.node.append(
        helper.make_node("If", ["cond"], ["z"], then_branch=body, else_branch=body)
    )
    assert external_files(model) == {"w.bin": 72, "other.bin": 32}


def test_hashes_cover_every_node_and_pointer(saved):
    model = load_model(saved)
    tensors, nodes = hash_tensors_and_nodes(model.graph)
    assert set(tensors) == {"w", "table"}
    model.graph.initializer[0].external_data[1].value = "4"
    model.graph.node[0].doc_string = "x"
    tensors_after, nodes_after = hash_tensors_and_nodes(model.graph)
    assert tensors_after["w"] != tensors["w"]
    assert tensors_after["table"] == tensors["table"]
    assert [a == b for a, b in zip(nodes, nodes_after, strict=True)] == [False, True]


def test_summary_counts_what_lies_in_bodies(tmp_path):
    value = helper.make_tensor_value_info("v", 1, [3])
    body = helper.make_graph(
        [helper.make_node("Identity", ["w"], ["v"])],
        "body",
        [],
        [value],
        [_external("w", np.zeros(3, np.float32), "inner.bin", 0)],
    )
    node = helper.make_node("If", ["c"], ["y"], then_branch=body, else_branch=body)
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("c", TensorProto.BOOL, [])],
        [helper.make_tensor_value_info("y", 1, [3])],
    )
    path = tmp_path / "m.onnx"
    path.write_bytes(helper.make_model(graph).SerializeToString())
    found = summarise(path)
    assert (found.nodes, found.initializers, found.weight_bytes) == (3, 2, 24)
    assert found.op_counts == {"Identity": 2, "If": 1}
    assert found.external_files == ("inner.bin",)


@pytest.mark.parametrize(
    ("head", "told"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 9\n", "git lfs pull"),
        (b"\x20\x00\x00\x00ORTM" + bytes(100), r"\.ort"),
    ],
)
def test_files_that_stand_for_other_things_are_named(tmp_path, head, told):
    path = tmp_path / "m.onnx"
    path.write_bytes(head)
    with pytest.raises(ModelError, match=told):
        load_model(path)


def test_what_is_often_taken_for_a_model_is_named(tmp_path):
    model, _ = _model("w.bin")
    del model.graph.initializer[:]
    place = tmp_path / "m.onnx"
    for data, told in (
        (gzip.compress(model.SerializeToString()), "packed by gzip"),
        (b"PK\x03\x04" + bytes(40), "a zip archive"),
        (json_format.MessageToJson(model).encode(), "text \\(JSON\\)"),
        (text_format.MessageToString(model).encode(), "text_format.Parse"),
        (b"<!DOCTYPE html><html></html>", "onnx's own syntax"),
        (pickle.dumps({"a": 1}), "a Python pickle"),
        (b"\x7fELF" + bytes(40), "a program or library"),
    ):
        place.write_bytes(data)
        with pytest.raises(ModelError, match=told):
            load_model(place)
