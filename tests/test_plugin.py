"""The C++ parser plug-in, driven the way CANN's parser drives it; its Python twin beside it."""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from sfa_onnx import op
from sfa_onnx.ascend import flavour, package_tables
from tests.test_flavour import fused, ours

DATA = Path(__file__).parent / "data" / "atc"
# Cases our plug-in must refuse although the parser (or its demo plug-in) let them pass.
REFUSED = {
    "252-kvquant-ten-inputs",
    "253-kvquant-missing-required",
    "255-kvquant-no-scale",
    "256-kvquant-no-quant-mode",
    "257-kvquant-unknown-attr",
    "258-kvquant-wrong-type",
    "269-antiquant-defaults-only",
}
ROOT = Path(__file__).parents[1] / "kernels" / "ascend"
NAMES = [b.atc_type for b in op.BINDINGS] + ["KvCachePack"]

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


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

    def parse(self, key, text, inputs, name="sfa_0", preset=None):
        raw = (ctypes.c_char_p * len(inputs))(*(i.encode() for i in inputs))
        out = self._double.double_parse(
            key.encode(), name.encode(), None if text is None else text.encode(), raw,
            ctypes.c_size_t(len(inputs)), preset.encode() if preset else None,
        )  # fmt: skip
        return json.loads(out) if out else None

    def missing(self, ge_type):
        self._double.double_missing_prototype(ge_type.encode())

    def all_there(self):
        self._double.double_all_prototypes()


def _compile(out: Path, sources, abi: int) -> Path:
    command = ["g++", "-std=c++17", "-O1", "-fPIC", "-shared", f"-D_GLIBCXX_USE_CXX11_ABI={abi}"]
    command += [f"-I{ROOT / 'testing' / 'include'}", *map(str, sources), "-o", str(out)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return out


@pytest.fixture(scope="session")
def plugin(tmp_path_factory):
    """CANN's old string ABI for the double, the machine's new one for the plug-in: both load."""
    folder = tmp_path_factory.mktemp("plugin")
    double = _compile(folder / "libdouble.so", [ROOT / "testing" / "ge_double.cc"], abi=0)
    library = _compile(folder / "libplugin.so", sorted((ROOT / "plugin").glob("*.cc")), abi=1)
    return Plugin(double, library)


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
        entry["floats"] = list(attr.floats)
    return entry


def key(node_type: str, opset=18) -> str:
    return f"ai.onnx::{opset}::{node_type}"


def atc_node(contract: op.OpContract, binding="kv-quant", **values) -> onnx.NodeProto:
    node = ours(contract, **values)
    return flavour.to_atc(fused(contract, node), binding=binding).graph.node[0]


def typed(attr: onnx.AttributeProto, spec: op.Attribute) -> str:
    if spec.kind == "float":
        return f"float:{float(attr.f).hex()}"
    if spec.kind == "string":
        return f"string:{attr.s.decode()}"
    return f"bool:{int(attr.i != 0)}" if spec.ge_kind == "bool" else f"int:{attr.i}"


def as_hex(text: str) -> str:
    kind, _, value = text.partition(":")
    return f"float:{float.fromhex(value).hex()}" if kind == "float" else text


# ---- tables ------------------------------------------------------------------------------------


def test_generated_tables_are_up_to_date():
    hint = "run: python -m sfa_onnx.ascend.package_tables"
    assert (ROOT / package_tables.CPP_TABLE).read_text() == package_tables.cpp_table(), hint
    assert (ROOT / package_tables.PYTHON_TABLE).read_text() == package_tables.python_table(), hint


def test_keys_name_every_operator_at_every_opset(plugin):
    keys = plugin.keys()
    expected = {b.atc_type: b.ge_type for b in op.BINDINGS} | {"KvCachePack": "PartitionedCall"}
    wanted = {}
    for onnx_type, ge_type in expected.items():
        own = "sfa_onnx" if onnx_type == "KvCachePack" else "npu"
        wanted[f"{own}::1::{onnx_type}"] = ge_type
        wanted |= {key(onnx_type, v): ge_type for v in range(11, 19)}
    assert keys == wanted


def test_no_string_of_either_abi_and_no_protobuf_crosses_the_border(plugin):
    symbols = subprocess.run(
        ["nm", "-DC", "--undefined-only", plugin._library._name], capture_output=True, text=True
    ).stdout
    border = [line for line in symbols.splitlines() if "ge::" in line or "domi::" in line]
    assert len(border) > 20
    assert not [line for line in border if "basic_string" in line or "cxx11" in line]
    assert "protobuf" not in symbols


# ---- one node in, one GE operator out ----------------------------------------------------------


@pytest.mark.parametrize("contract", [b.contract for b in op.BINDINGS], ids=lambda c: c.name)
@pytest.mark.parametrize("opset", [11, 18])
def test_every_attribute_is_set_explicitly_with_ges_type(plugin, contract, opset):
    canonical = contract
    binding = "recipes"
    if contract is op.KV_QUANT_SPARSE_FLASH_ATTENTION:
        canonical, binding = op.SPARSE_FLASH_ATTENTION_ANTIQUANT, "kv-quant"
    node = atc_node(canonical, binding)
    done = plugin.parse(key(node.op_type, opset), parser_text(node), node.input)
    given = {a.name: a for a in node.attribute}
    expected = {a.name: typed(given[a.name], a) for a in contract.attributes}
    assert {k: as_hex(v) for k, v in done["node"]["attrs"].items()} == expected


def test_zeros_and_empty_strings_are_written(plugin):
    node = atc_node(op.SPARSE_FLASH_ATTENTION_ANTIQUANT, scale_value=0.0, layout_kv="",
                    sparse_mode=0, attention_mode=0)  # fmt: skip
    text = parser_text(node)
    entry = next(e for e in json.loads(text)["attribute"] if e["name"] == "layout_kv")
    assert entry == {"name": "layout_kv", "type": 3}
    attrs = plugin.parse(key(node.op_type), text, node.input)["node"]["attrs"]
    assert as_hex(attrs["scale_value"]) == f"float:{(0.0).hex()}"
    assert (attrs["layout_kv"], attrs["sparse_mode"]) == ("string:", "int:0")
    assert attrs["attention_mode"] == "int:0"


@pytest.mark.parametrize(
    "scale",
    [0.1352337747812271, 1 / 3, 0.0041666669, 1e-30, 1.4e-45, 16777216.0, -0.04419417, 576**-0.5],
)
def test_the_scale_is_exact_to_the_last_bit(plugin, scale):
    node = atc_node(op.SPARSE_FLASH_ATTENTION_ANTIQUANT, scale_value=scale)
    attrs = plugin.parse(key(node.op_type), parser_text(node), node.input)["node"]["attrs"]
    assert as_hex(attrs["scale_value"]) == f"float:{float(np.float32(scale)).hex()}"


def test_without_the_companion_the_six_digits_are_used(plugin):
    node = atc_node(op.SPARSE_FLASH_ATTENTION_ANTIQUANT, scale_value=0.1352337747812271)
    node.attribute.remove(next(a for a in node.attribute if a.name == "scale_value_exact"))
    attrs = plugin.parse(key(node.op_type), parser_text(node), node.input)["node"]["attrs"]
    assert as_hex(attrs["scale_value"]) == f"float:{float(np.float32('0.135234')).hex()}"


def test_trailing_inputs_may_be_left_out(plugin):
    node = atc_node(op.SPARSE_FLASH_ATTENTION_ANTIQUANT)
    assert plugin.parse(key(node.op_type), parser_text(node), list(node.input)[:4])


def _without(name):
    def change(node):
        node.attribute.remove(next(a for a in node.attribute if a.name == name))

    return change


def _with(*attributes):
    def change(node):
        for name, value in attributes:
            kept = [a for a in node.attribute if a.name != name]
            del node.attribute[:]
            node.attribute.extend([*kept, helper.make_attribute(name, value)])

    return change


def _inputs(change):
    return lambda node: change(node.input)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        *((_without(a.name), f"attribute {a.name} of NPUKvQuantSparseFlashAttention is missing")
          for a in op.KV_QUANT_SPARSE_FLASH_ATTENTION.attributes),
        (_with(("foo", 3)), "unknown attribute foo"),
        (_with(("scale_value", 1)), "attribute scale_value is INT, expected FLOAT"),
        (_with(("sparse_mode", 3.0)), "attribute sparse_mode is FLOAT, expected INT"),
        (_with(("layout_kv", 1)), "attribute layout_kv is INT, expected STRING"),
        (_with(("tile_size", [128])), "attribute tile_size is INTS, expected INT"),
        (_with(("scale_value_exact", 0.5)), "scale_value_exact is FLOAT of 0 elements"),
        (_with(("scale_value_exact", [0.5, 0.5])), "FLOATS of 2 elements, expected FLOATS of one"),
        (_with(("scale_value_exact", [0.5])), "but scale_value_exact says 0.5"),
        (_inputs(lambda i: i.append("ten")), "10 inputs, NPUKvQuantSparseFlashAttention has 9"),
        (_inputs(lambda i: i.__setitem__(3, "")), r"required input 3 (sparse_indices)"),
        (_inputs(lambda i: i.__delitem__(slice(2, None))), "required input 2 (value)"),
        (_inputs(lambda i: i.__delitem__(slice(None))), "required input 0 (query)"),
    ],
)  # fmt: skip
def test_bad_nodes_fail_with_one_clear_line(plugin, capfd, change, reason):
    node = atc_node(op.SPARSE_FLASH_ATTENTION_ANTIQUANT)
    change(node)
    assert plugin.parse(key(node.op_type), parser_text(node), node.input) is None
    err = capfd.readouterr().err
    assert err.startswith("[sfa_onnx plug-in] node sfa_0: ")
    assert reason in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "text", ['{"attribute": [', "[]", '{"attribute": 3}', '{"attribute": [{"i": "x"}]}', "", "{} x"]
)
def test_broken_attribute_text_fails(plugin, capfd, text):
    node = atc_node(op.SPARSE_FLASH_ATTENTION_ANTIQUANT)
    assert plugin.parse(key(node.op_type), text, node.input) is None
    assert "attributes are not readable" in capfd.readouterr().err or text == ""


def test_no_attributes_at_all_and_an_attribute_twice(plugin, capfd):
    node = atc_node(op.SPARSE_FLASH_ATTENTION_ANTIQUANT)
    assert plugin.parse(key(node.op_type), None, node.input) is None
    assert "attribute scale_value" in capfd.readouterr().err
    node.attribute.append(node.attribute[0])
    assert plugin.parse(key(node.op_type), parser_text(node), node.input) is None
    assert "given twice" in capfd.readouterr().err


def test_the_experimental_namesake_is_recognised(plugin, capfd):
    node = atc_node(op.SPARSE_FLASH_ATTENTION_ANTIQUANT, "recipes")
    text = parser_text(node)
    assert plugin.parse(key(node.op_type), text, node.input)
    assert plugin.parse(key(node.op_type), text, node.input, preset="sparse_shard_size") is None
    assert "experimental namesake" in capfd.readouterr().err


# ---- recorded texts of the real parser --------------------------------------------------------


def recorded(group):
    for case in json.loads((DATA / "cases.json").read_text())["cases"]:
        if case["group"] != group:
            continue
        model = onnx.load(DATA / "cases" / f"{case['id']}.onnx", load_external_data=False)
        want = "AttrEcho" if group == "attributes" else "SparseFlashAttention"
        node = next((n for n in model.graph.node if want in n.op_type), None)
        if node is not None and ("graph" in case or case["id"] in REFUSED):
            opset = next(i.version for i in model.opset_import if i.domain in ("", "ai.onnx"))
            nodes = case.get("graph", {}).get("nodes", [])
            graph = next((g for g in nodes if want in g["type"]), None)
            yield pytest.param(case["id"], opset, node, graph, id=case["id"])


@pytest.mark.parametrize(("case", "opset", "node", "graph"), list(recorded("fused")))
def test_recorded_fused_cases(plugin, case, opset, node, graph):
    """Same attributes as the recorded graph; the scale bit-exact when its companion is there."""
    origin = f"{node.domain or 'ai.onnx'}::{1 if node.domain else opset}::{node.op_type}"
    done = plugin.parse(origin, parser_text(node), node.input)
    if case in REFUSED:
        assert done is None
        return
    assert done["node"]["type"] == graph["type"]
    got = {k: v.partition(":")[2] for k, v in done["node"]["attrs"].items()}
    assert got.keys() == graph["attrs"].keys()
    for name, value in graph["attrs"].items():
        if name == "scale_value":
            assert float.fromhex(got[name]) == value
        else:
            assert got[name] == str(value)


def recorded_text(graph):
    text = graph["attrs"]["text"]
    return None if text.startswith("<") else text


@pytest.mark.parametrize(("case", "opset", "node", "graph"), list(recorded("attributes")))
def test_recorded_attribute_texts_are_readable(plugin, capfd, case, opset, node, graph):
    """The reader takes every recorded text: what fails then is the contract, not the reading."""
    text = recorded_text(graph)
    assert plugin.parse(key("NPUKvQuantSparseFlashAttention"), text, ["a"]) is None
    err = capfd.readouterr().err
    assert "not readable" not in err
    assert "unknown attribute" in err or "missing" in err


@pytest.mark.parametrize(("case", "opset", "node", "graph"), list(recorded("attributes")))
def test_our_printer_writes_what_the_parser_wrote(case, opset, node, graph):
    if not {a.type for a in node.attribute} <= {1, 2, 3, 6}:
        pytest.skip("TENSOR, INTS and STRINGS are not ours")
    text = recorded_text(graph)
    if text is None:
        assert parser_text(node) is None
        return
    mine = {e["name"]: e for e in json.loads(parser_text(node))["attribute"]}
    for entry in json.loads(text)["attribute"]:
        assert mine[entry["name"]] == entry


# ---- KvCachePack -------------------------------------------------------------------------------


def pack_node(rope="bfloat16", inputs=("nope", "rope"), tile=128):
    node = helper.make_node("KvCachePack", list(inputs), ["packed"], "pack", tile_size=tile)
    node.attribute.append(helper.make_attribute("rope_dtype", rope))
    return node


def expand(plugin, node):
    done = plugin.parse(key("KvCachePack"), parser_text(node), node.input, name="pack")
    return done and {n["name"].removeprefix("pack_"): n for n in done["graph"]}, done


@pytest.mark.parametrize("rope", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    "inputs", [("nope", "rope"), ("nope", "rope", "", "clip"), ("n", "r", "s")]
)
def test_kv_cache_pack_expands_to_rows(plugin, rope, inputs):
    graph, done = expand(plugin, pack_node(rope, inputs))
    assert done["node"]["attrs"]["original_type"] == "string:ai.onnx::18::KvCachePack"
    assert done["node"]["dynamic"] == f"in:args:{len(inputs)} out:output:1 "
    parts = dict(graph["packed"]["in"])
    first = "pack_input0" if len(inputs) == 3 else "pack_nope_rows"
    assert list(parts.values()) == [first, "pack_rope_rows", "pack_scale_rows"]
    assert graph["packed"]["attrs"]["concat_dim"] == "int:-1"
    bits = dict(graph["rope_bits" if rope == "bfloat16" else "rope_rows_bits"]["in"])["x"]
    assert bits == ("pack_rope_float" if rope == "bfloat16" else "pack_input1")
    data = sorted(n["attrs"]["index"] for n in graph.values() if n["type"] == "Data")
    assert data == [f"int:{i}" for i, name in enumerate(inputs) if name]
    assert done["inputs"] == len(data)
    assert ("Maximum" in {n["type"] for n in graph.values()}) == ("clip" in inputs)


def evaluate(graph, feeds):
    """Run an expansion with NumPy: what the built-in GE operators mean."""
    import ml_dtypes

    kinds = {"0": np.float32, "1": np.float16, "2": np.int8, "9": np.int64}
    done: dict[str, np.ndarray] = {}

    def value(name):
        name = name.removeprefix("pack_")
        if name not in done:
            done[name] = one(graph[name])
        return done[name]

    def const(text):
        _, kind, dims, items = text.split(":")
        parse = float.fromhex if kind == "0" else int
        flat = np.array([parse(i) for i in items.split(",") if i], kinds[kind])
        return flat.reshape([int(d) for d in dims.strip("[]").split(",") if d])

    def one(node):
        kind, attrs = node["type"], {k: v.partition(":")[2] for k, v in node["attrs"].items()}
        if kind == "Data":
            return feeds[int(attrs["index"])]
        if kind == "Const":
            return const(node["attrs"]["value"])
        args = [value(name) for _, name in node["in"]]
        f32 = np.float32
        table = {
            "Shape": lambda x: np.array(x.shape, np.int64),
            "StridedSliceV2": lambda x, b, e, ax, st: x[..., b[0] : e[0]],
            "ConcatD": lambda *p: np.concatenate(p, int(attrs["concat_dim"])),
            "Reshape": lambda x, s: x.reshape(s),
            "Cast": lambda x: x.astype(kinds[attrs["dst_type"]]),
            "Abs": np.abs,
            "Neg": np.negative,
            "Round": np.rint,
            "ReduceMax": lambda x, ax: x.max(tuple(ax), keepdims=attrs["keep_dims"] == "1"),
            "Mul": lambda a, b: (a * b).astype(f32),
            "Maximum": np.maximum,
            "Minimum": np.minimum,
            "DivNoNan": lambda a, b: np.divide(a, b, out=np.zeros_like(b), where=b != 0),
            "Bitcast": lambda x: x.view(kinds[attrs["type"]]).reshape(*x.shape, x.itemsize),
        }
        assert ml_dtypes.bfloat16 not in [getattr(a, "dtype", None) for a in args] or kind == "Cast"
        return table[kind](*args)

    return value("packed")


@pytest.mark.parametrize("rope", ["bfloat16", "float16"])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_the_expansion_means_what_the_reference_does(plugin, rope, clip):
    import ml_dtypes

    from sfa_onnx import kv_cache

    rng = np.random.default_rng(3)
    nope = rng.standard_normal((2, 3, 512)).astype(np.float32)
    nope[0, 1, 128:256] = 0  # an all-zero tile
    kind = ml_dtypes.bfloat16 if rope == "bfloat16" else np.float16
    lanes = rng.standard_normal((2, 3, 64)).astype(kind)
    names = ("nope", "rope", "", "clip") if clip else ("nope", "rope")
    graph, _ = expand(plugin, pack_node(rope, names))
    feeds = {0: nope, 1: lanes} | ({3: np.float32(clip)} if clip else {})
    rows = evaluate(graph, feeds)
    np.testing.assert_array_equal(rows, kv_cache.pack(nope, lanes, clip=clip))
    q, scale = kv_cache.quantise(nope)
    graph, _ = expand(plugin, pack_node(rope, ("nope", "rope", "scale")))
    rows = evaluate(graph, {0: q, 1: lanes, 2: scale})
    np.testing.assert_array_equal(rows, kv_cache.pack(q, lanes, scale))


@pytest.mark.parametrize(
    ("node", "reason"),
    [
        (pack_node(inputs=("n", "r", "s", "c")), "has scale (int8 rows are copied) and clip"),
        (pack_node(inputs=("n",)), "without rope"),
        (pack_node(rope="float32"), "rope_dtype float32"),
        (pack_node(tile=0), "tile_size 0"),
        (helper.make_node("KvCachePack", ["n", "r"], ["y"], "pack"), "attribute tile_size"),
    ],
)
def test_kv_cache_pack_refusals(plugin, capfd, node, reason):
    assert expand(plugin, node)[1] is None
    assert reason in capfd.readouterr().err


def test_a_missing_prototype_is_named(plugin, capfd):
    plugin.missing("Bitcast")
    try:
        assert expand(plugin, pack_node())[1] is None
    finally:
        plugin.all_there()
    assert "needs GE operator Bitcast" in capfd.readouterr().err


# ---- the Python twin ----------------------------------------------------------------------------


@pytest.fixture
def twin(monkeypatch):
    """The twin imported against a stand-in of GE's interface."""
    registered = {}

    class Registration:
        def __init__(self, **facts):
            self.facts = facts

        def parse_node(self, function):
            for opset in self.facts["opsets"]:
                name = f"{self.facts['domain']}::{opset}::{self.facts['source']}"
                assert name not in registered
                registered[name] = (self.facts["target"], function)
            return function

    ge, module = types.ModuleType("ge"), types.ModuleType("ge.onnx_plugin")
    module.onnx_plugin = Registration
    monkeypatch.setitem(sys.modules, "ge", ge)
    monkeypatch.setitem(sys.modules, "ge.onnx_plugin", module)
    monkeypatch.syspath_prepend(str(ROOT / "python"))
    for name in ("sfa_onnx_ge_plugin", "sfa_onnx_ge_plugin._tables"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    importlib.import_module("sfa_onnx_ge_plugin")
    return registered


def ge_node(node: onnx.NodeProto):
    attrs = {}
    for a in node.attribute:
        value = helper.get_attribute_value(a)
        attrs[a.name] = value.decode() if isinstance(value, bytes) else value
    return types.SimpleNamespace(
        name=node.name, origin_type=key(node.op_type), attrs=attrs,
        inputs=tuple(node.input), outputs=tuple(node.output),
    )  # fmt: skip


class Target:
    def __init__(self):
        self.attrs = {}

    def set_attr(self, name, value):
        self.attrs[name] = value


@pytest.mark.parametrize("contract", [b.contract for b in op.BINDINGS], ids=lambda c: c.name)
def test_the_twin_sets_what_the_plug_in_sets(plugin, twin, contract):
    canonical, binding = contract, "recipes"
    if contract is op.KV_QUANT_SPARSE_FLASH_ATTENTION:
        canonical, binding = op.SPARSE_FLASH_ATTENTION_ANTIQUANT, "kv-quant"
    node = atc_node(canonical, binding)
    ge_type, function = twin[key(node.op_type)]
    target = Target()
    assert function(ge_node(node), target) is None
    done = plugin.parse(key(node.op_type), parser_text(node), node.input)["node"]
    assert done["type"] == ge_type
    kinds = {int: "int", float: "float", str: "string", bool: "bool"}
    mine = {
        k: f"float:{v.hex()}"
        if isinstance(v, float)
        else f"{kinds[type(v)]}:{int(v) if type(v) is bool else v}"
        for k, v in target.attrs.items()
    }
    assert mine == {k: as_hex(v) for k, v in done["attrs"].items()}


def test_the_twin_refuses_what_the_plug_in_refuses(twin):
    node = atc_node(op.SPARSE_FLASH_ATTENTION_ANTIQUANT)
    _with(("foo", 3))(node)
    _, function = twin[key(node.op_type)]
    with pytest.raises(ValueError, match="unknown attribute foo"):
        function(ge_node(node), Target())
    assert key("KvCachePack") not in twin


def test_flavour_names_the_rope_type_for_the_plug_in():
    for kind, name in ((TensorProto.BFLOAT16, "bfloat16"), (TensorProto.FLOAT16, "float16")):
        node = flavour.to_atc(fused(op.KV_CACHE_PACK, qtype=kind)).graph.node[0]
        given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        assert given == {"tile_size": 128, "rope_dtype": name.encode()}
