"""Our operators for GE's Python ONNX plug-in interface (`ge.onnx_plugin`, CANN 9.2 and newer).

The twin of the C++ plug-in, for machines without a compiler: put the folder that holds this package
on ASCEND_CUSTOM_OPP_PATH *instead of* the vendor folder of the C++ plug-in (both register the same
keys). The interface maps one node to one operator: `KvCachePack`, `KvCacheWrite` need the C++ one.
"""

import math
import struct

from ge.onnx_plugin import onnx_plugin

from ._tables import OPS

OPSETS = range(11, 19)
_KINDS = {"float": float, "int": int, "string": str}
_TEXT_TOLERANCE = 1e-5


class PluginError(ValueError):
    """A node is not what its operator's contract says; the message names the node."""


def _float32(value):
    return struct.unpack("f", struct.pack("f", value))[0]


def _check(node, table):
    known = {name for name, _, _ in table["attributes"]} | set(table["companions"])
    for name in node.attrs:
        if name not in known:
            raise PluginError(f"{node.name}: unknown attribute {name} of {table['onnx_type']}")
    for name, kind, _ in table["attributes"]:
        if name not in node.attrs:
            raise PluginError(f"{node.name}: attribute {name} of {table['onnx_type']} is missing")
        if type(node.attrs[name]) is not _KINDS[kind]:
            got = type(node.attrs[name]).__name__
            raise PluginError(f"{node.name}: attribute {name} is {got}, expected {kind}")
    if len(node.inputs) > len(table["inputs"]):
        raise PluginError(
            f"{node.name}: {len(node.inputs)} inputs, {table['onnx_type']} has"
            f" {len(table['inputs'])}"
        )
    for index, (name, required) in enumerate(table["inputs"]):
        present = index < len(node.inputs) and bool(node.inputs[index])
        if required and not present:
            raise PluginError(f"{node.name}: required input {index} ({name}) is missing")
    outputs = max((i + 1 for i, name in enumerate(node.outputs) if name), default=0)
    if outputs > table["outputs"]:
        raise PluginError(
            f"{node.name}: {outputs} outputs, {table['onnx_type']} has {table['outputs']}"
        )


def _exact(node, name):
    value = node.attrs[name]
    if not math.isfinite(value):
        raise PluginError(f"{node.name}: attribute {name} is {value}, expected a finite number")
    companion = node.attrs.get(name + "_exact")
    if companion is None:
        return value
    if not isinstance(companion, list) or len(companion) != 1:
        raise PluginError(f"{node.name}: attribute {name}_exact, expected FLOATS of one element")
    exact = _float32(companion[0])
    if not math.isclose(exact, value, rel_tol=_TEXT_TOLERANCE):
        raise PluginError(f"{node.name}: {name} is {value}, but {name}_exact says {exact}")
    return exact


def fill(node, target, table):
    """Set every attribute of `target` (a GE operator) from `node`, after checking the node."""
    _check(node, table)
    for name, kind, is_bool in table["attributes"]:
        value = _exact(node, name) if kind == "float" else node.attrs[name]
        if is_bool and value not in (0, 1):
            raise PluginError(f"{node.name}: attribute {name} is {value}, expected 0 or 1")
        target.set_attr(name, bool(value) if is_bool else value)


def _register(table):
    for domain, opsets in ((table["domain"], (1,)), ("ai.onnx", tuple(OPSETS))):
        plugin = onnx_plugin(
            source=table["onnx_type"], domain=domain, opsets=opsets, target=table["ge_type"]
        )

        def parse(node, target, table=table):
            fill(node, target, table)

        plugin.parse_node(parse)


for _table in OPS:
    _register(_table)
