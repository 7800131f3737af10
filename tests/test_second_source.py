"""Our plug-in's tables against a second source: what the vendor's torch adapter builds in GE.

Its wheel holds, per operator, a converter that names the GE type with every input, attribute and
output in order. The wheel is downloaded, never installed or imported: the converters are read as
syntax trees. Without a network the test is skipped.
"""

from __future__ import annotations

import ast
import subprocess
import sys
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from sfa_onnx.operator.op import BINDINGS, Binding

VERSION = "2.14.0"
FOLDER = "torch_npu/dynamo/torchair/_ge_concrete_graph/ge_converter/custom/"
FILES = {
    "KvQuantSparseFlashAttention": "kv_quant_sparse_flash_attention.py",
    "SparseFlashAttention": "sparse_flash_attention.py",
    "LightningIndexer": "lightning_indexer.py",
    "QuantLightningIndexer": "quant_lightning_indexer.py",
}
KINDS = {"Float": "float", "Int": "int", "Str": "string", "Bool": "bool"}
# What the adapter has beyond the prototypes of released CANN lines: inputs at the end.
NEWER_INPUTS = {"KvQuantSparseFlashAttention": ["sinks"], "SparseFlashAttention": ["sinks"]}


@dataclass
class Prototype:
    """One operator as a converter builds it."""

    ge_type: str
    inputs: list[str]
    attributes: dict[str, str]  # name -> kind, in order
    outputs: list[str]
    defaults: dict[str, Any]  # attribute -> default of the converter's own parameter
    later_inputs: list[str] = field(default_factory=list)  # added under a condition


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The adapter's wheel, downloaded."""
    folder = tmp_path_factory.mktemp("wheel")
    wanted = ["--platform", "manylinux_2_28_x86_64", "--python-version", "3.11"]
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--quiet", "--disable-pip-version-check", "--retries", "1", "--timeout", "20"]
    done = subprocess.run(
        [*command, *wanted, "-d", str(folder), f"torch-npu=={VERSION}"],
        capture_output=True, text=True,
    )  # fmt: skip
    found = sorted(Path(folder).glob("*.whl"))
    if done.returncode or not found:
        pytest.skip(f"the wheel could not be downloaded: {done.stderr.strip()[-200:]}")
    return zipfile.ZipFile(found[0])


def read(wheel: zipfile.ZipFile, ge_type: str) -> Prototype:
    """The call of `custom_op` and the signature around it."""
    tree = ast.parse(wheel.read(FOLDER + FILES[ge_type]).decode("utf-8"))
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
    for function in functions:
        for node in ast.walk(function):
            if isinstance(node, ast.Call) and _named(node.func) == "custom_op":
                return _prototype(function, node)
    raise AssertionError(f"{ge_type}: no call of custom_op in {FILES[ge_type]}")


def _named(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def _prototype(function: ast.FunctionDef, call: ast.Call) -> Prototype:
    keywords = {k.arg: k.value for k in call.keywords if k.arg}
    inputs, later = keywords["inputs"], []
    if isinstance(inputs, ast.Name):
        later = [
            n.targets[0].slice.value
            for n in ast.walk(function)
            if isinstance(n, ast.Assign)
            and isinstance(n.targets[0], ast.Subscript)
            and isinstance(n.targets[0].slice, ast.Constant)
        ]
        inputs = next(
            n.value
            for n in ast.walk(function)
            if isinstance(n, ast.Assign) and _named(n.targets[0]) == keywords["inputs"].id
        )
    attributes, parameters = {}, {}
    attrs = keywords["attrs"]
    for key, value in zip(attrs.keys, attrs.values, strict=True):
        attributes[key.value] = KINDS[_named(value.func)]
        parameters[key.value] = _named(value.args[0])
    signature = _defaults(function)
    defaults = {n: signature[p] for n, p in parameters.items() if p in signature}
    return Prototype(
        call.args[0].value,
        [k.value for k in inputs.keys],
        attributes,
        [e.value for e in keywords["outputs"].elts],
        defaults,
        later,
    )


def _defaults(function: ast.FunctionDef) -> dict[str, Any]:
    """Defaults of keyword parameters; numbers may be written as sums and shifts."""
    found = {}
    for argument, default in zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True):
        if default is not None:
            text = ast.unparse(default)
            found[argument.arg] = eval(text, {"__builtins__": {}}, {})  # constants only
    return found


def bindings() -> dict[str, Binding]:
    return {b.ge_type: b for b in BINDINGS if b.ge_type in FILES}


def test_every_operator_of_ours_is_there() -> None:
    assert set(bindings()) == set(FILES)


@pytest.mark.parametrize("ge_type", FILES)
def test_the_second_source_agrees(wheel: zipfile.ZipFile, ge_type: str) -> None:
    theirs, binding = read(wheel, ge_type), bindings()[ge_type]
    contract = binding.contract
    assert theirs.ge_type == ge_type
    released = [t.name for t in contract.inputs if t.released]
    newer = [t.name for t in contract.inputs if not t.released]
    assert released == theirs.inputs
    assert theirs.later_inputs == NEWER_INPUTS.get(ge_type, [])
    assert set(newer) <= set(theirs.later_inputs)
    kinds = {a.name: a.ge_kind or a.kind for a in contract.attributes}
    assert list(kinds.items()) == list(theirs.attributes.items())
    assert list(binding.ge_outputs) == theirs.outputs


@pytest.mark.parametrize("ge_type", FILES)
def test_defaults_agree(wheel: zipfile.ZipFile, ge_type: str) -> None:
    theirs, contract = read(wheel, ge_type), bindings()[ge_type].contract
    ours = {a.name: a.default for a in contract.attributes if a.default is not None}
    assert ours.keys() == theirs.defaults.keys()
    differing = {n for n, v in ours.items() if v != theirs.defaults[n]}
    assert not differing, {n: (ours[n], theirs.defaults[n]) for n in differing}
