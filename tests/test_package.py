"""The vendor package: layout, the one-line build, a toolkit that is there or not."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from sfa_onnx.ascend import doctor
from sfa_onnx.ascend.handover import package
from sfa_onnx.errors import UsageError
from sfa_onnx.operator import op

SOURCES = Path(__file__).parents[1] / "kernels" / "ascend"
LIBRARY = "opp/vendors/sfa_onnx/framework/onnx/libcust_onnx_parsers.so"


@pytest.fixture
def no_cann(monkeypatch):
    for name in ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME", "CXX", "ASCEND_CUSTOM_OPP_PATH"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def quick_compiler(no_cann, monkeypatch, tmp_path):
    """The real compiler without its optimiser."""
    path = tmp_path / "quick-g++"
    path.write_text('#!/bin/bash\nexec g++ "${@/-O2/-O0}"\n')
    path.chmod(0o755)
    monkeypatch.setenv("CXX", str(path))


@pytest.fixture
def fake_cann(no_cann, monkeypatch, tmp_path):
    """A toolkit reduced to the headers our plug-in includes."""
    home = tmp_path / "cann"
    shutil.copytree(SOURCES / "testing" / "include", home / "include")
    monkeypatch.setenv("ASCEND_HOME_PATH", str(home))
    return home


def test_layout_without_a_toolkit(no_cann, tmp_path):
    done = package.write(tmp_path)
    vendor = tmp_path / "opp" / "vendors" / "sfa_onnx"
    assert (tmp_path / "opp/vendors/config.ini").read_text() == "load_priority=sfa_onnx\n"
    # CANN 8.5 was seen to skip, without a word, a folder whose version.info says 9.1.0.
    assert not (vendor / "version.info").exists()
    assert (vendor / "framework" / "onnx").is_dir()
    assert not done.built
    assert "run ./build_plugin.sh on the machine that has one" in done.notes[0]
    assert {p.name for p in (tmp_path / "plugin").iterdir()} >= {"register.cc", "attribute_table.h"}
    assert (tmp_path / "python/sfa_onnx_ge_plugin/_tables.py").is_file()
    assert all((tmp_path / name).is_file() for name in done.files)


def test_set_env_puts_the_vendor_first_wherever_the_folder_lies(no_cann, tmp_path):
    package.write(tmp_path)
    script = tmp_path / "opp/vendors/sfa_onnx/bin/set_env.bash"
    shell = f'export ASCEND_CUSTOM_OPP_PATH=/other; source "{script}"; echo $ASCEND_CUSTOM_OPP_PATH'
    done = subprocess.run(["bash", "-uc", shell], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"{tmp_path}/opp/vendors/sfa_onnx:/other"
    done = subprocess.run(
        ["bash", "-uc", f'source "{script}"; echo $ASCEND_CUSTOM_OPP_PATH'],
        capture_output=True, text=True, check=True, env={"PATH": os.environ["PATH"]},
    )  # fmt: skip
    assert done.stdout.strip() == f"{tmp_path}/opp/vendors/sfa_onnx"


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_the_plug_in_is_built_when_a_toolkit_is_there(fake_cann, quick_compiler, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    done = package.write(out)
    assert done.built
    assert LIBRARY in done.files
    symbols = subprocess.run(["nm", "-DC", str(out / LIBRARY)], capture_output=True, text=True)
    assert "domi::OpReceiver::OpReceiver" in symbols.stdout


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_the_build_script_builds_it_later(quick_compiler, tmp_path):
    package.write(tmp_path)
    headers = SOURCES / "testing"
    env = os.environ | {"ASCEND_HOME_PATH": str(headers)}
    done = subprocess.run(
        ["./build_plugin.sh"], cwd=tmp_path, capture_output=True, text=True, env=env
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / LIBRARY).is_file()


def test_the_build_script_says_when_there_is_no_toolkit(no_cann, tmp_path):
    package.write(tmp_path)
    done = subprocess.run(["./build_plugin.sh"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0
    assert "ASCEND_HOME_PATH" in done.stderr


def test_a_failing_compiler_is_reported_not_raised(fake_cann, tmp_path):
    (fake_cann / "include/graph/operator.h").write_text("#error broken toolkit\n")
    out = tmp_path / "out"
    out.mkdir()
    done = package.write(out)
    assert not done.built
    assert "the compiler failed" in done.notes[0]


def test_a_missing_compiler_is_reported(fake_cann, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler")
    out = tmp_path / "out"
    out.mkdir()
    assert "no compiler no-such-compiler" in package.write(out).notes[0]


def test_nothing_is_overwritten_without_force(no_cann, tmp_path):
    package.write(tmp_path)
    with pytest.raises(UsageError, match="exists already"):
        package.write(tmp_path)
    package.write(tmp_path, force=True)


def test_a_folder_without_headers_is_no_toolkit(monkeypatch, tmp_path):
    monkeypatch.setenv("ASCEND_HOME_PATH", str(tmp_path))
    monkeypatch.delenv("ASCEND_TOOLKIT_HOME", raising=False)
    assert package.toolkit() is None


def test_sources_are_found_in_this_tree():
    assert Path(package.plugin_root() / "plugin" / "register.cc").is_file()


# ---- doctor: fake trees, read the way CANN reads real ones --------------------------------------

OURS = "op_impl/ai_core/tbe/config/ascend910b/aic-ascend910b-ops-info.json"


def probes():
    return {p.name: p for p in doctor.examine_cann()}


def operators(folder: Path, entries) -> None:
    path = folder / OURS
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(entries))


@pytest.fixture
def tree(fake_cann, monkeypatch):
    """A toolkit with the built-in operators and no vendor package."""
    (fake_cann / "compiler").mkdir()
    (fake_cann / "compiler" / "version.info").write_text("Version=9.1.0\n")
    builtin = {b.ge_type: {"input0": {"name": "query"}} for b in op.BINDINGS if b.name != "recipes"}
    operators(fake_cann / "opp" / "built-in", builtin)
    monkeypatch.delenv("ASCEND_OPP_PATH", raising=False)
    return fake_cann


def test_doctor_without_cann(no_cann, monkeypatch):
    monkeypatch.setattr(doctor, "_usual_place", lambda: None)
    (only,) = doctor.examine_cann()
    assert (only.state, only.name) == ("info", "CANN toolkit")


def test_doctor_with_builtins_only(tree):
    found = probes()
    assert found["CANN toolkit"].state == "ok"
    assert "9.1.0" in found["CANN toolkit"].text
    assert found["operator KvQuantSparseFlashAttention"].state == "ok"
    assert found["operator SparseFlashAttentionAntiquant"].state == "info"
    assert "not visible" in found["our plug-in"].text


def test_doctor_warns_of_an_old_release(tree):
    (tree / "compiler" / "version.info").write_text("Version=8.2.RC1\n")
    assert "8.5.0 is the first release" in probes()["CANN toolkit"].text


def test_doctor_sees_the_load_order_and_what_is_not_loaded(tree, monkeypatch, tmp_path):
    custom = tmp_path / "mine"
    custom.mkdir()
    monkeypatch.setenv("ASCEND_CUSTOM_OPP_PATH", f"{custom}:{tmp_path}/gone")
    vendors = tree / "opp" / "vendors"
    for name in ("a", "b", "forgotten"):
        (vendors / name).mkdir(parents=True)
    (vendors / "config.ini").write_text("load_priority=b,a\n")
    order = [v.name for v in doctor.vendors(tree / "opp")]
    assert order == ["mine", "gone", "b", "a", "forgotten", "built-in"]
    found = probes()
    assert found["vendor 2: gone"].state == "warning"
    assert "not in config.ini" in found["vendor 5: forgotten"].text


def test_doctor_finds_our_plug_in_once_or_twice(tree, monkeypatch, tmp_path):
    for name in ("one", "two"):
        folder = tmp_path / name / "framework" / "onnx"
        folder.mkdir(parents=True)
        (folder / package.LIBRARY).write_bytes(b"..NPUKvQuantSparseFlashAttention..")
    monkeypatch.setenv("ASCEND_CUSTOM_OPP_PATH", str(tmp_path / "one"))
    assert probes()["our plug-in"].state == "ok"
    monkeypatch.setenv("ASCEND_CUSTOM_OPP_PATH", f"{tmp_path}/two:{tmp_path}/one")
    assert "found 2 times" in probes()["our plug-in"].text


def test_doctor_tells_the_namesake_from_the_recipes_operator(tree, monkeypatch, tmp_path):
    recipes = {"SparseFlashAttentionAntiquant": {"attr": {"list": "scale_value,tile_size"}}}
    namesake = {
        "SparseFlashAttentionAntiquant": {"attr": {"list": "scale_value,sparse_shard_size"}}
    }
    operators(tmp_path / "recipes", recipes)
    operators(tmp_path / "experimental", namesake)
    name = "operator SparseFlashAttentionAntiquant"
    both = [str(tmp_path / "experimental"), str(tmp_path / "recipes")]
    monkeypatch.setenv("ASCEND_CUSTOM_OPP_PATH", ":".join(both))
    assert "experimental namesake" in probes()[name].text
    monkeypatch.setenv("ASCEND_CUSTOM_OPP_PATH", ":".join(reversed(both)))
    assert "recipes (ASCEND_CUSTOM_OPP_PATH) wins over experimental" in probes()[name].text
    monkeypatch.setenv("ASCEND_CUSTOM_OPP_PATH", both[1])
    assert probes()[name].state == "ok"
