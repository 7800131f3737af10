"""The command between a person and a shell: help, pipes, colours, progress, Ctrl-C, completion."""

from __future__ import annotations

import argparse
import importlib
import io
import json
import os
import pty
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import rich.console

from sfa_onnx import demo
from sfa_onnx.cli import build_parser, main, progress
from sfa_onnx.cli.console import Console

COMMAND = [sys.executable, "-m", "sfa_onnx"]
COLOUR = re.compile(r"\x1b\[[0-9;]*3[0-7]m")


def parsers() -> dict[str, argparse.ArgumentParser]:
    (verbs,) = (a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    return dict(verbs.choices)


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's model under a path longer than any terminal is wide."""
    return demo.materialise(tmp_path_factory.mktemp("m") / ("deep" * 30))


def on_a_terminal(*words: object, **environment: str) -> str:
    """What the command writes where standard output and error are a terminal."""
    leader, follower = pty.openpty()
    plain = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "COLUMNS")}
    process = subprocess.Popen(
        [*COMMAND, *map(str, words)],
        stdout=follower,
        stderr=follower,
        env=plain | {"TERM": "xterm-256color"} | environment,
    )
    os.close(follower)
    seen = b""
    while True:
        try:
            chunk = os.read(leader, 65536)
        except OSError:  # the other side was closed
            break
        if not chunk:
            break
        seen += chunk
    assert process.wait() == 0, seen
    os.close(leader)
    return seen.decode()


@pytest.mark.parametrize("verb", parsers())
def test_help_explains_every_option_and_gives_an_example_that_parses(verb: str) -> None:
    parser = parsers()[verb]
    text = parser.format_help()
    for action in parser._actions:
        assert action.help, action.dest
        if action.option_strings and action.default not in (None, False, argparse.SUPPRESS, []):
            assert f"default: {action.default}" in re.sub(r"\s+", " ", text), action.dest
    sentences = re.sub(r"\s+", " ", text)
    assert "exit codes: 0 done, 1 error, 2 usage," in sentences
    assert "130 interrupted" in sentences
    example = text.split("example:\n")[1].splitlines()[0]
    for words in (shlex.split(part) for part in re.findall(r"sfa-onnx [^&)\"]+", example)):
        args = build_parser().parse_args(words[1:])
        module, _, name = args.action.partition(":")
        assert callable(getattr(importlib.import_module(f"sfa_onnx.cli.{module}"), name))


def test_more_is_said_where_v_is_offered(deep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    offered = {n for n, p in parsers().items() if "-v" in p._option_string_actions}
    assert offered == {"demo", "inspect", "fuse", "compare", "run", "check"}
    for words in (
        ["inspect", deep, "--no-verify"],
        ["fuse", deep, "--dry-run", "--no-verify"],
        ["compare", deep, deep],
        ["run", deep],
        ["check", deep],
    ):
        told = []
        for more in ([], ["-v"]):
            main([*map(str, words), *more])
            told.append(capsys.readouterr().out)
        assert len(told[1].splitlines()) > len(told[0].splitlines()) or words[0] == "inspect"
        assert len(told[1]) > len(told[0]), words


@pytest.mark.parametrize("width", [60, 120])
def test_numbers_of_a_table_are_never_broken(width: int) -> None:
    console, shown = Console(), io.StringIO()
    console.piped, console.out = False, rich.console.Console(file=shown, width=width)
    columns = ("", "site", "where", "max |diff|", "relative", "x own rounding", "")
    row = ("site", "node_topk__1", "layers.0.self_attn.indexer", "1.22e-04", "1.3e-05", "1.0", "✓")
    console.table(columns, [row, row], right=(3, 4, 5))
    lines = shown.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert all(shown.getvalue().count(cell) >= 2 for cell in row)
    told = "  max |diff| 1.22e-04  relative 1.3e-05  x own rounding 1.0"
    assert (told in lines) is (width == 60)


def test_piped_text_is_not_wrapped(deep: Path) -> None:
    narrow = os.environ | {"COLUMNS": "40"}
    fused = [*COMMAND, "fuse", deep, "--force", "--no-verify"]
    done = subprocess.run(fused, capture_output=True, text=True, env=narrow)
    written = deep.with_name("decode_layer.sfa.onnx")
    assert f"written: {written}" in done.stdout.splitlines()
    done = subprocess.run([*fused[:-2]], capture_output=True, text=True, env=narrow)
    line = done.stderr.splitlines()[-1]
    assert line.startswith("error: ")
    assert str(written) in line
    assert "--force" in line


def test_a_terminal_has_colours_unless_told_otherwise(deep: Path) -> None:
    words = ("inspect", deep, "--no-verify")
    assert COLOUR.search(on_a_terminal(*words))
    assert not COLOUR.search(on_a_terminal(*words, NO_COLOR="1"))


def test_columns_tells_the_width_of_a_terminal(deep: Path) -> None:
    rows = on_a_terminal("inspect", deep, "--no-verify", COLUMNS="60", NO_COLOR="1").splitlines()
    table = [r for r in rows if "layers.0" in r or "fuses" in r]
    assert table
    assert max(map(len, (re.sub(r"\x1b\[[0-9;]*m", "", r) for r in table))) <= 60


@pytest.mark.parametrize(("form", "first"), [("--json", "{\n"), ("--no-verify", "")])
def test_a_reader_may_go_away(deep: Path, form: str, first: str) -> None:
    command = shlex.join([*COMMAND, "inspect", str(deep), "--no-verify", form])
    reader = "head -1" if first else "true"  # which is gone before the first line
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command} | {reader}"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, first)
    assert "rror" not in done.stderr


def test_a_stream_that_cannot_spell_a_mark_gets_another(deep: Path) -> None:
    done = subprocess.run(
        [*COMMAND, "inspect", deep, "--no-verify"],
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
    )
    assert done.returncode == 0, done.stderr
    assert b"? fuses" in done.stdout


@pytest.mark.parametrize("moment", [0.4, 1.0, 1.8, 2.6])
def test_an_interrupt_leaves_nothing_and_says_so_once(tmp_path: Path, moment: float) -> None:
    model = demo.materialise(tmp_path)
    before = sorted(tmp_path.iterdir())
    process = subprocess.Popen(
        [*COMMAND, "fuse", model],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    time.sleep(moment)
    os.killpg(process.pid, signal.SIGINT)  # what a terminal does at Ctrl-C
    _, said = process.communicate(timeout=60)
    if process.returncode == 0 or ("Traceback" in said and "in main\n" not in said):
        return  # it was done already, or Python had not come to `main` yet
    # Interrupted inside an `exec` of an import, Python ends by the signal: to a shell that is 130.
    assert process.returncode in (130, -signal.SIGINT), said
    early = "interrupted: nothing was begun"  # a busy machine imports for long
    assert said.splitlines()[-1] in (early, "interrupted: nothing was left half-written")
    assert "Traceback" not in said
    assert sorted(tmp_path.iterdir()) == before
    assert gone(process.pid), "the worker goes with it"


def gone(group: int) -> bool:
    """Whether no process of the group is left, after a moment."""
    for _ in range(50):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


def test_progress_is_told_in_lines_and_only_where_it_takes_long(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with Console().progress("work") as report:
        report("first", 0.1)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(progress, "PATIENCE", 0.02)
    monkeypatch.setattr(progress, "_PAUSE", 0.01)
    with Console().progress("work") as report:
        for stage in ("first\x1b[31m", "second"):
            report(stage, 0.5)
            time.sleep(0.2)
    assert capsys.readouterr().err == "work: first\\x1b[31m (0 s)\nwork: second (0 s)\n"
    with Console(json=True).progress("work"):
        time.sleep(0.1)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_gets_a_script(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    assert "sfa-onnx" in capsys.readouterr().out


def test_verbs_options_and_values_are_completed(tmp_path: Path) -> None:
    for line, expected in (
        ("sfa-onnx inspe", "inspect"),
        ("sfa-onnx fuse --mat", "--materialize-absorbed"),
        ("sfa-onnx kv-cache --to paged-", "paged-int8"),
    ):
        answer = tmp_path / "answer"
        asked = {
            "_ARGCOMPLETE": "1",
            "_ARGCOMPLETE_STDOUT_FILENAME": str(answer),
            "COMP_LINE": line,
            "COMP_POINT": str(len(line)),
        }
        subprocess.run([*COMMAND], env=os.environ | asked, check=True)
        assert answer.read_text().strip() == expected


def test_nothing_fused_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import onnx
    from onnx import TensorProto, helper

    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])
    graph = helper.make_graph([helper.make_node("Add", ["x", "x"], ["y"])], "g", [x], [y])
    model = tmp_path / "a plain.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), model)
    proof = ["--certificate", str(tmp_path / "proof.json")]
    assert main(["fuse", str(model), *proof]) == 0
    told = capsys.readouterr().out
    assert "nothing was fused, so nothing was written" in told
    assert f"sfa-onnx inspect '{model}' --explain" in told
    assert main(["fuse", str(model), "--expect-sites", "some"]) == 3
    assert main(["atc", str(model), "--soc-version", "Ascend910B2", "-o", str(tmp_path / "a")]) in (
        0,
        3,
    )
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith("this model holds no fused operator")
    assert sorted(p.name for p in tmp_path.iterdir() if p.suffix != ".onnx") == ["a"]


def test_a_site_has_one_name_in_every_verb(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def told(*words: object) -> dict[str, Any]:
        main([*map(str, words), "--json"])
        document: dict[str, Any] = json.loads(capsys.readouterr().out)
        return document

    model = demo.materialise(tmp_path)
    fused, page = tmp_path / "f.onnx", tmp_path / "page.md"
    seen = told("inspect", model, "--no-verify", "--estimate", "--plan", tmp_path / "plan.yaml")
    (name,) = (s["site_id"] for s in seen["sites"])
    assert name == "node_softmax"
    assert [s["node"] for s in seen["estimate"]["sites"] if "Index" not in s["op_type"]] == [name]
    assert name in (tmp_path / "plan.yaml").read_text()
    fusing = ("fuse", model, "-o", fused, "--no-verify", "--report", page)
    assert [s["site_id"] for s in told(*fusing)["sites"]] == [name]
    assert name in page.read_text()
    rows = told("compare", model, fused)["sites"]
    (row,) = (r for r in rows if "Attention" in r["op_type"])
    assert (row["name"], row["layer"]) == (name, "layers.0.self_attn")
    back = told("unfuse", fused)["sites"]
    assert [s["site_id"] for s in back if "Attention" in s["op_type"]] == [name]


def test_a_summary_names_what_the_file_holds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = demo.materialise(tmp_path)
    assert main(["fuse", str(model), "--kv-cache", "packed-int8", "--no-verify"]) == 0
    told = capsys.readouterr().out
    assert "1 x NPUSparseFlashAttentionAntiquant\n" in told
    assert "x NPUSparseFlashAttention\n" not in told
