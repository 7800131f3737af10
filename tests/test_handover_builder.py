"""The other road to an .om: build_om.py, compiled and run against a double of GE's builder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from sfa_onnx.ascend import handover
from sfa_onnx.ascend.handover import command
from sfa_onnx.ascend.handover.builder import builder_files
from sfa_onnx.ascend.handover.in_place import reuse_option
from sfa_onnx.kv_convert import convert
from sfa_onnx.passes.graph.cache_pairs import cache_pairs
from tests.plugin_double import ROOT
from tests.test_kv_convert import growing

F32, I64 = TensorProto.FLOAT, TensorProto.INT64
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


def caches(op_type: str = "ScatterND", out_shape: tuple[int, ...] = (8, 4)) -> onnx.ModelProto:
    """Two caches; the first output is no cache, the second cache's output has a view behind."""
    nodes = [
        helper.make_node("Add", ["x", "x"], ["y"]),
        helper.make_node(op_type, ["k", "i", "u"], ["k_new"]),
        helper.make_node(op_type, ["v", "i", "u"], ["v_flat"]),
        helper.make_node("Identity", ["v_flat"], ["v_new"]),
    ]
    inputs = [
        helper.make_tensor_value_info("x", F32, [2]),
        helper.make_tensor_value_info("v", F32, [8, 4]),
        helper.make_tensor_value_info("i", I64, [2, 1]),
        helper.make_tensor_value_info("u", F32, [2, 4]),
        helper.make_tensor_value_info("k", F32, [8, 4]),
    ]
    outputs = [
        helper.make_tensor_value_info("y", F32, [2]),
        helper.make_tensor_value_info("k_new", F32, list(out_shape)),
        helper.make_tensor_value_info("v_new", F32, [8, 4]),
    ]
    graph = helper.make_graph(nodes, "g", inputs, outputs)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])


def test_pairs_are_positions_among_inputs_and_outputs() -> None:
    pairs = cache_pairs(caches())
    assert [(p.input, p.output) for p in pairs] == [("k", "k_new"), ("v", "v_new")]
    assert reuse_option(pairs) == "4,1|1,2"


def test_a_constant_listed_as_input_has_no_position() -> None:
    model = caches()
    model.graph.initializer.append(helper.make_tensor("x", F32, [2], [0.0, 0.0]))
    assert reuse_option(cache_pairs(model)) == "3,1|0,2"


def test_another_shape_is_no_cache() -> None:
    assert [p.input for p in cache_pairs(caches(out_shape=(4, 8)))] == ["v"]


def test_a_cache_that_grows_or_passes_through_is_none() -> None:
    assert cache_pairs(growing()) == []
    model = caches()
    del model.graph.node[1]
    model.graph.node.insert(1, helper.make_node("Identity", ["k"], ["k_new"]))
    assert [p.input for p in cache_pairs(model)] == ["v"]


def test_an_input_written_twice_is_none_for_the_second_write_would_see_the_first() -> None:
    model = caches()
    model.graph.node[2].input[0] = "k"
    assert cache_pairs(model) == []


@pytest.mark.parametrize("dims", [{}, {"n": "4"}, {"n": "1,2"}, {"n": "1~8"}])
def test_every_option_of_the_atc_call_has_its_key(dims: dict[str, str]) -> None:
    model = caches()
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "n"
    call = command.build(model, soc_version="Ascend910B2", dims=dims)
    plan = json.loads(builder_files(model, call, "model.atc.onnx")["build_om.json"])
    assert plan["global"] == {"ge.socVersion": "Ascend910B2"}
    assert plan["build"]["ge.exec.outputReuseInputMemIndexes"] == "4,1|1,2"
    assert ("ge.dynamicDims" in plan["build"]) == ("," in dims.get("n", ""))


@pytest.fixture(scope="module")
def toolkit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like a toolkit: headers and libraries of the double."""
    home = tmp_path_factory.mktemp("cann")
    shutil.copytree(ROOT / "testing" / "include", home / "include")
    (home / "lib64").mkdir()
    line = ["g++", "-std=c++17", "-O0", "-fPIC", "-shared", "-D_GLIBCXX_USE_CXX11_ABI=0"]
    line += [f"-I{home / 'include'}", str(ROOT / "testing" / "builder_double.cc")]
    subprocess.run([*line, "-o", str(home / "lib64" / "libge_compiler.so")], check=True)
    for name in ("libfmk_onnx_parser.so", "libgraph.so"):
        (home / "lib64" / name).symlink_to("libge_compiler.so")
    return home


def hand_over(folder: Path, cann: str = "9.1") -> Path:
    model = convert(growing(), to="paged-int8", block_size=16).model
    onnx.save(model, folder / "model.onnx")
    handover.write(
        folder / "model.onnx",
        folder / "out",
        soc_version="Ascend910B2",
        cann=cann,
        execute=False,
    )
    library = next((folder / "out" / "opp" / "vendors").iterdir()) / "framework" / "onnx"
    library.mkdir(parents=True, exist_ok=True)
    (library / "libcust_onnx_parsers.so").write_bytes(b"")  # built elsewhere, say
    return folder / "out"


def build(out: Path, home: Path | None, **more: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("ASCEND")} | more
    if home is not None:
        env["ASCEND_HOME_PATH"] = str(home)
    script = [sys.executable, str(out / "build_om.py")]
    return subprocess.run(script, env=env, capture_output=True, text=True)


@needs_compiler
def test_build_om_says_everything_to_ge(tmp_path: Path, toolkit: Path) -> None:
    out = hand_over(tmp_path)
    plan = json.loads((out / "build_om.json").read_text())
    dims = {name: "4" for text in plan["build"].values() for name in _variables(text)}
    assert dims, "the converted model has open dims"
    refused = build(out, toolkit)
    assert refused.returncode == 1
    assert "is not set, see README.md" in refused.stderr
    done = build(out, toolkit, **dims)
    assert done.returncode == 0, done.stderr
    assert (out / "model.om").is_file()
    said = done.stdout.splitlines()
    assert "global ge.socVersion=Ascend910B2" in said
    pair = plan["in_place"][0]
    reuse = f"{pair['input_index']},{pair['output_index']}"
    assert f"build ge.exec.outputReuseInputMemIndexes={reuse}" in said
    assert json.loads((out / "model.in_place.json").read_text()) == plan["in_place"]
    assert "${" not in done.stdout
    assert not list(out.glob(".*"))


@needs_compiler
def test_a_build_that_fails_or_is_killed_leaves_the_old_model(tmp_path, toolkit) -> None:
    out = hand_over(tmp_path)
    texts = json.loads((out / "build_om.json").read_text())["build"].values()
    dims = {name: "4" for text in texts for name in _variables(text)}
    assert build(out, toolkit, **dims).returncode == 0
    pairs = (out / "model.in_place.json").read_text()
    (out / "model.om").write_text("old")
    for end, code in (("exit 3", 3), ("kill -9 $$", 128 + 9), ("exit 0", 1)):
        half = "" if end == "exit 0" else 'echo half > "$2.om"; '
        (out / "build_om").write_text(f"#!/bin/bash\n{half}{end}\n")
        done = build(out, toolkit, **dims)
        assert done.returncode % 256 in (code, 256 - 9), done.stderr
        assert (out / "model.om").read_text() == "old"
        assert (out / "model.in_place.json").read_text() == pairs
        assert not list(out.glob(".*"))


def _variables(text: str) -> list[str]:
    return [part.split("}")[0] for part in text.split("${")[1:]]


@needs_compiler
@pytest.mark.parametrize("step", ["initialize", "parse", "build", "save"])
def test_a_failing_step_is_named(tmp_path: Path, toolkit: Path, step: str) -> None:
    out = hand_over(tmp_path)
    plan = json.loads((out / "build_om.json").read_text())
    dims = {name: "4" for text in plan["build"].values() for name in _variables(text)}
    done = build(out, toolkit, DOUBLE_FAILS=step, **dims)
    assert done.returncode == 1
    words = {"initialize": "aclgrphBuildInitialize", "parse": "parsing"}
    assert f"{words.get(step, step.rstrip('e'))}" in done.stderr
    assert not (out / "model.in_place.json").exists()


def test_no_toolkit_and_old_lines(tmp_path: Path) -> None:
    out = hand_over(tmp_path)
    done = build(out, None)
    assert "source CANN's set_env.sh first" in done.stderr
    old = tmp_path / "old"
    old.mkdir()
    assert not (hand_over(old, cann="8.5") / "build_om.py").exists()
