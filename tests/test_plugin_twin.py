"""The Python twin of the parser plug-in, beside the C++ one."""

from __future__ import annotations

import importlib
import sys
import types

import onnx
import pytest
from onnx import helper

from sfa_onnx.operator import op
from tests.plugin_double import (
    ROOT,
    as_hex,
    atc_node,
    bound_node,
    given,
    key,
    needs_compiler,
    parser_text,
    plugin,
)

__all__ = ["plugin"]  # the fixture

pytestmark = needs_compiler


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


@pytest.mark.parametrize("binding", op.BINDINGS, ids=lambda b: b.name)
def test_the_twin_sets_what_the_plug_in_sets(plugin, twin, binding):
    node = bound_node(binding)
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
    given(("foo", 3))(node)
    _, function = twin[key(node.op_type)]
    with pytest.raises(ValueError, match="unknown attribute foo"):
        function(ge_node(node), Target())
    node = atc_node(op.SPARSE_FLASH_ATTENTION_ANTIQUANT)
    node.output.append("lse")
    with pytest.raises(ValueError, match="2 outputs, NPUKvQuantSparseFlashAttention has 1"):
        function(ge_node(node), Target())
    del node.output[1:]
    given(("scale_value", float("inf")))(node)
    with pytest.raises(ValueError, match="scale_value is inf, expected a finite number"):
        function(ge_node(node), Target())
    _, function = twin[key("NPULightningIndexer")]
    with pytest.raises(ValueError, match="return_values is 2, expected 0 or 1"):
        function(ge_node(atc_node(op.LIGHTNING_INDEXER, return_values=2)), Target())
    assert not {key(contract.name) for contract in op.EXPANDED} & set(twin)
