"""The parser plug-in loaded beside a test double of CANN; nodes as its parser gives them."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import json
import math
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import onnx
import pytest

from sfa_onnx.ascend.flavour import model as flavour
from sfa_onnx.operator import op
from tests.test_flavour import fused, ours

ROOT = Path(__file__).parents[1] / "kernels" / "ascend"
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


class Plugin:
    """The plug-in loaded into this process beside the double."""

    def __init__(self, double: Path, library: Path):
        self._double = ctypes.CDLL(str(double), mode=os.RTLD_NOW | os.RTLD_GLOBAL)
        self._library = ctypes.CDLL(str(library), mode=os.RTLD_NOW)
        self._double.double_parse.restype = ctypes.c_char_p
        self._double.double_keys.restype = ctypes.c_char_p

    def keys(self) -> dict[str, str]:
        text = self._double.double_keys().decode()
        return dict(line.split(" ") for line in text.splitlines())

    def parse(self, key, text, inputs, name="sfa_0", preset=None, outputs=("out",)):
        out = self._double.double_parse(
            key.encode(), name.encode(), None if text is None else text.encode(), _names(inputs),
            _names(outputs), preset.encode() if preset else None,
        )  # fmt: skip
        return json.loads(out) if out else None

    def missing(self, ge_type):
        self._double.double_missing_prototype(ge_type.encode())

    def all_there(self):
        self._double.double_all_prototypes()


def _names(names) -> ctypes.Array:
    """A null-terminated array of C strings."""
    return (ctypes.c_char_p * (len(names) + 1))(*(n.encode() for n in names), None)


def _compile(out: Path, sources, abi: int) -> subprocess.Popen:
    command = ["g++", "-std=c++17", "-O0", "-fPIC", "-shared", f"-D_GLIBCXX_USE_CXX11_ABI={abi}"]
    command += [f"-I{ROOT / 'testing' / 'include'}", *map(str, sources), "-o", str(out)]
    return subprocess.Popen(command)


def _built() -> Path:
    """Both libraries, compiled once per version of their sources and kept for the next run."""
    sources = sorted(p for p in ROOT.rglob("*") if p.suffix in (".cc", ".h"))
    digest = hashlib.sha256(b"".join(p.read_bytes() for p in sources)).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"sfa-onnx-plugin-{digest}"
    if not folder.is_dir():
        fresh = Path(tempfile.mkdtemp(prefix="sfa-onnx-plugin-"))
        jobs = [
            _compile(fresh / "libdouble.so", [ROOT / "testing" / "ge_double.cc"], abi=0),
            _compile(fresh / "libplugin.so", sorted((ROOT / "plugin").glob("*.cc")), abi=1),
        ]
        assert [job.wait(timeout=300) for job in jobs] == [0, 0]
        with contextlib.suppress(OSError):  # another worker was faster
            fresh.rename(folder)
    return folder


@functools.cache
def _load() -> Plugin:
    """CANN's old string ABI for the double, the machine's new one for the plug-in: both load.

    Once per process: a second double would share its symbols with the first.
    """
    folder = _built()
    return Plugin(folder / "libdouble.so", folder / "libplugin.so")


@pytest.fixture
def plugin() -> Plugin:
    """The plug-in, ready to parse."""
    return _load()


def parser_text(node: onnx.NodeProto) -> str | None:
    """A node's attributes as CANN's parser prints them for a ByOperator plug-in."""
    if not node.attribute:
        return None
    return json.dumps({"attribute": [_entry(a) for a in node.attribute]}, indent=2)


def _entry(attr: onnx.AttributeProto) -> dict:
    entry: dict = {"name": attr.name, "type": attr.type}
    if attr.type == onnx.AttributeProto.FLOAT and (attr.f or str(attr.f) == "-0.0"):
        text = f"{attr.f:g}"  # as C's %g
        entry["f"] = text if len(text) <= 9 else attr.f
    elif attr.type == onnx.AttributeProto.INT and attr.i:
        entry["i"] = attr.i
    elif attr.type == onnx.AttributeProto.STRING and attr.s:
        plain = {ord("\n"): "\\n", ord('"'): '\\"', ord("\\"): "\\\\"}
        entry["s"] = "".join(
            plain.get(b, chr(b) if 32 <= b < 127 else f"\\{b:03o}") for b in attr.s
        )
    elif attr.type == onnx.AttributeProto.FLOATS and attr.floats:
        entry["floats"] = [f if math.isfinite(f) else None for f in attr.floats]
    return entry


def key(node_type: str, opset=18) -> str:
    return f"ai.onnx::{opset}::{node_type}"


def atc_node(contract: op.OpContract, binding="kv-quant", **values) -> onnx.NodeProto:
    node = ours(contract, **values)
    return flavour.to_atc(fused(contract, node), binding=binding).graph.node[0]


def bound_node(binding: op.Binding) -> onnx.NodeProto:
    """The node that `atc` writes for a binding; every one of the table, a newcomer's too."""
    choice = binding.name if binding.name in op.CHOICES else op.CHOICES[0]
    node = atc_node(binding.canonical, choice)
    assert node.op_type == binding.atc_type
    return node


def given(*attributes):
    """A change to a node: these attributes (name, value) instead of what it has."""

    def change(node):
        for name, value in attributes:
            kept = [a for a in node.attribute if a.name != name]
            del node.attribute[:]
            node.attribute.extend([*kept, onnx.helper.make_attribute(name, value)])

    return change


def typed(attr: onnx.AttributeProto, spec: op.Attribute) -> str:
    if spec.kind == "float":
        return f"float:{float(attr.f).hex()}"
    if spec.kind == "string":
        return f"string:{attr.s.decode()}"
    return f"bool:{int(attr.i != 0)}" if spec.ge_kind == "bool" else f"int:{attr.i}"


def as_hex(text: str) -> str:
    kind, _, value = text.partition(":")
    return f"float:{float.fromhex(value).hex()}" if kind == "float" else text
