"""The atc command line from the model, and atc's log in words."""

from __future__ import annotations

import shlex
import subprocess

import pytest
from onnx import TensorProto, helper

from sfa_onnx.ascend.handover import build_om
from sfa_onnx.ascend.handover import command as atc_command
from sfa_onnx.ascend.handover import log as atc_log
from sfa_onnx.errors import UsageError
from tests.test_flavour import build

SOC = "Ascend910B2"


def model(*inputs):
    nodes = [helper.make_node("Identity", [inputs[0][0]], ["y"], "id")]
    return build(nodes, inputs, [("y", inputs[0][1], None)])


def options(proto, **kw):
    kw.setdefault("soc_version", SOC)
    return dict(atc_command.build(proto, **kw).options)


def words(command: atc_command.AtcCommand) -> list[str]:
    return shlex.split(command.line("m.onnx", "m").replace("\\\n", " "))


def test_static_model():
    proto = model(
        ("q", 1, [1, 1, 16, 576]), ("n", 7, []), ("kv", TensorProto.INT8, [8, 128, 1, 656])
    )
    command = atc_command.build(proto, soc_version=SOC)
    assert words(command) == [
        "atc",
        "--model=m.onnx",
        "--framework=5",
        "--input_format=ND",
        "--input_shape=q:1,1,16,576;n:;kv:8,128,1,656",
        "--soc_version=Ascend910B2",
        "--precision_mode=must_keep_origin_dtype",
        "--external_weight=0",
        "--log=error",
        "--output=m",
    ]
    assert not command.unbound
    assert not command.notes


def test_initializers_listed_as_inputs_get_no_shape():
    import numpy as np

    nodes = [helper.make_node("Add", ["x", "w"], ["y"], "add")]
    proto = build(nodes, [("x", 1, [2]), ("w", 1, [2])], [("y", 1, [2])],
                  inits=[("w", np.ones(2, np.float32))])  # fmt: skip
    assert options(proto)["--input_shape"] == "x:2"


def test_external_weights():
    assert options(model(("x", 1, [2])), external_weights=True)["--external_weight"] == "1"


def test_numbers_and_ranges_bind_dims_by_name():
    proto = model(("x", 1, ["batch", "seq", 8]), ("y0", 7, ["batch"]))
    dims = {"batch": 4, "seq": "1~2048"}
    assert options(proto, dims=dims)["--input_shape"] == "x:4,1~2048,8;y0:4"


def test_bound_dims_can_be_written_into_a_copy_of_the_model():
    proto = model(("x", 1, ["b", None, 8]), ("m", 1, ["b", "s"]))
    bound = atc_command.bind_dims(proto, {"b": 4, "x:1": "16", "s": "1~9"})
    shapes = [
        [d.dim_value or d.dim_param for d in v.type.tensor_type.shape.dim]
        for v in bound.graph.input
    ]
    assert shapes == [[4, 16, 8], [4, "s"]]
    assert proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "b"


def test_gears_list_every_open_dim_in_order():
    proto = model(("x", 1, ["b", "s"]), ("m", 1, ["s", "b"]))
    crossed = options(proto, dims={"b": "1,2", "s": "16,32"})
    assert crossed["--dynamic_dims"] == "1,16,16,1;1,32,32,1;2,16,16,2;2,32,32,2"
    together = options(proto, dims={"b": "1,2", "s": "16,32"}, paired=True)
    assert together["--input_shape"] == "x:-1,-1;m:-1,-1"
    assert together["--dynamic_dims"] == "1,16,16,1;2,32,32,2"
    crossed = options(proto, dims={"b": "1,2,4", "s": "16,32"})
    assert len(crossed["--dynamic_dims"].split(";")) == 6
    with pytest.raises(UsageError, match="b has 3, s has 2"):
        options(proto, dims={"b": "1,2,4", "s": "16,32"}, paired=True)


def test_dims_that_are_expressions_follow_the_dims_in_them():
    proto = model(
        ("x", 1, ["b", "past"]), ("m", 1, ["b", "past + 1"]), ("i", 1, ["Min(8, past + 1)"])
    )
    assert set(atc_command.free_dims(proto)) == {"b", "past"}
    fixed = options(proto, dims={"b": 2, "past": 15})
    assert fixed["--input_shape"] == "x:2,15;m:2,16;i:8"
    ranged = options(proto, dims={"b": 2, "past": "3~15"})
    assert ranged["--input_shape"] == "x:2,3~15;m:2,4~16;i:4~8"
    geared = options(proto, dims={"b": 2, "past": "3,15"})
    assert geared["--input_shape"] == "x:2,-1;m:2,-1;i:-1"
    assert geared["--dynamic_dims"] == "3,4,4;15,16,8"
    bound = atc_command.bind_dims(proto, {"past": "15"})
    assert [d.dim_value for d in bound.graph.input[1].type.tensor_type.shape.dim] == [0, 16]
    open_sum = atc_command.build(model(("m", 1, ["past + 1", "64"])), soc_version=SOC)
    assert dict(open_sum.options)["--input_shape"] == "m:$((DIM_PAST + 1)),64"
    shell = {"DIM_PAST": "7", "PATH": "/usr/bin:/bin"}
    script = f"atc() {{ printf '%s\\n' \"$@\"; }}\n{open_sum.line('m.onnx', 'm')}"
    done = subprocess.run(["bash", "-uc", script], capture_output=True, text=True, env=shell)
    assert "--input_shape=m:8,64" in done.stdout.splitlines()


@pytest.mark.parametrize("past", [1, 3, 7, 12, 40])
@pytest.mark.parametrize(
    "text",
    ["past + 1", "Min(8, past)", "Min(8, past + 1, 2*past)", "Max(4, past - 2)", "past//4 + 1",
     "2*(past + 3)", "Max(1, Min(8, past) - 2)", "(past + 3)//2*2"],
)  # fmt: skip
def test_the_shell_and_build_om_compute_open_dims_alike(text, past, monkeypatch):
    """A shared selection is Min(top-k, past) wide: its stage's input has that dim."""
    call = atc_command.build(model(("x", 1, ["past"]), ("m", 1, [text, 4])), soc_version=SOC)
    want = f"x:{past};m:{atc_command.size_of(text, {'past': past})},4"
    script = f"atc() {{ printf '%s\\n' \"$@\"; }}\n{call.line('m.onnx', 'm')}"
    shell = {"DIM_PAST": str(past), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(["bash", "-uc", script], capture_output=True, text=True, env=shell)
    assert f"--input_shape={want}" in done.stdout.splitlines()
    monkeypatch.setenv("DIM_PAST", str(past))
    assert build_om.fill(dict(call.options)["--input_shape"]) == want


def test_build_om_asks_for_a_dim_inside_a_sum(monkeypatch):
    monkeypatch.delenv("DIM_PAST", raising=False)
    with pytest.raises(SystemExit, match="DIM_PAST is not set"):
        build_om.fill("m:$((DIM_PAST + 1)),64")
    monkeypatch.setenv("DIM_PAST", "1,2")
    with pytest.raises(SystemExit, match="needs a number"):
        build_om.fill("m:$((DIM_PAST + 1)),64")


def test_a_dim_the_shell_cannot_compute_is_asked_for_as_numbers():
    with pytest.raises(UsageError, match="past % 3 follows past: bind them to numbers"):
        options(model(("x", 1, ["past"]), ("m", 1, ["past % 3"])))


def test_unbound_dims_become_variables_the_shell_asks_for():
    proto = model(("x", 1, ["past len", None]), ("z", 1, None), ("it's $HOME", 1, ["past len"]))
    command = atc_command.build(proto, soc_version=SOC)
    assert command.unbound == {"past len": "DIM_PAST_LEN", "x:1": "DIM_X_1", "z": "SHAPE_Z"}
    line = command.line("m.onnx", "m")
    script = f"atc() {{ printf '%s\\n' \"$@\"; }}\n{line}"
    shell = {"DIM_PAST_LEN": "7", "DIM_X_1": "9", "SHAPE_Z": "1,2", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(["bash", "-uc", script], capture_output=True, text=True, env=shell)
    assert "--input_shape=x:7,9;z:1,2;it's $HOME:7" in done.stdout.splitlines()
    assert any("--dim past len=N" in note for note in command.notes)


@pytest.mark.parametrize(
    ("dims", "reason"),
    [
        ({"nobody": 3}, "the model has no such dim; it has b, s"),
        ({"b": "0"}, "expected a number, a~b, or gears"),
        ({"b": "8~4"}, "upside down"),
        ({"b": "1,2", "s": "1~4"}, "ranges or gears"),
        (
            {"b": ",".join(map(str, range(1, 12))), "s": ",".join(map(str, range(1, 13)))},
            "132 gears",
        ),
    ],
)
def test_bad_bindings(dims, reason):
    with pytest.raises(UsageError, match=reason):
        options(model(("x", 1, ["b", "s"])), dims=dims)


@pytest.mark.parametrize("soc", ["910B2", "Ascend", "Ascend910B2;rm", ""])
def test_bad_chip_names(soc):
    with pytest.raises(UsageError, match="expected the exact chip"):
        options(model(("x", 1, [2])), soc_version=soc)


def test_int8_inputs_with_dynamic_dims_are_remarked():
    proto = model(("kv", TensorProto.INT8, ["blocks", 128]))
    command = atc_command.build(proto, soc_version=SOC, dims={"blocks": "1~64"})
    assert any("int8 with a dynamic dim" in note for note in command.notes)


# ---- the log -----------------------------------------------------------------------------------

LOG = """ATC start working now, please wait for a moment.
[sfa_onnx plug-in] node sfa_0: attribute tile_size is INTS, expected INT
E11010: [PID: 7] 2026-08-01 Op [sfa_0] parse params failed.
E19999: Inner Error!
E19999: more of the same
[ERROR] GE(7,atc):2026-08-01 [graph_prepare.cc] Optype [X] of ops kernel is unsupported, reason: ...
E77777: something new
"""


def test_log_codes_are_explained_once_and_our_own_lines_come_first():
    found = atc_log.explain(LOG)
    assert [f.code for f in found] == ["plug-in", "E11010", "E19999", "", "E77777"]
    assert "tile_size is INTS" in found[0].meaning
    assert "refused the attributes" in found[1].meaning
    assert "no kernel for an operator" in found[3].meaning
    assert found[4].advice == "see CANN's error code reference"


def test_a_folder_skipped_by_its_version_is_explained():
    (found,) = atc_log.explain(
        "[WARNING] 9.1.0 is not in required_opp_abi_version:[630000, 850000]"
    )
    assert "skipped because of its version" in found.meaning


def test_a_quiet_log_has_no_findings():
    assert atc_log.explain("ATC run success, welcome to the next use.\nW11001: a warning") == []


@pytest.mark.parametrize(
    "code", ["E16005", "E13010", "E10501", "E13009", "E11010", "E16001", "E10001"]
)
def test_every_code_users_meet_has_advice(code):
    meaning, advice = atc_log.ERRORS[code]
    assert len(meaning) > 10
    assert len(advice) > 10


@pytest.mark.parametrize(
    ("body", "passed", "codes"),
    [
        ('echo "ATC run success, welcome to the next use."', True, []),
        ('echo "E13010: No parser is registered for Op [a]"; exit 1', False, ["E13010"]),
        ("echo done", False, []),  # exit code 0 without the success line
    ],
)
def test_a_run_keeps_the_log_and_reads_it(tmp_path, body, passed, codes):
    (tmp_path / "atc.sh").write_text(f"#!/bin/bash\n{body}\n")
    run = atc_log.run(tmp_path, timeout=20)
    assert run.passed is passed
    assert [f.code for f in run.findings] == codes
    assert run.log is not None
    assert run.log.read_text()
