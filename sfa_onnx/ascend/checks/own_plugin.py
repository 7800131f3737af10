"""What a parser plug-in refuses: ours to the letter, a user's as far as its key shows."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import onnx
from onnx import AttributeProto, NodeProto

from sfa_onnx.ascend.checks.context import Context, Node
from sfa_onnx.ascend.checks.finding import Finding, misread, refused
from sfa_onnx.ascend.checks.plugin import Plugin
from sfa_onnx.ascend.flavour.cache_writes import writes_padding
from sfa_onnx.files.onnx_attrs import find_attribute
from sfa_onnx.operator.contract import OpContract
from sfa_onnx.operator.op import KV_CACHE_PACK, KV_CACHE_WRITE

__all__ = ["refusals"]

_CODE = "E19999"
_KINDS = {"int": AttributeProto.INT, "float": AttributeProto.FLOAT}
_TEXT_TOLERANCE = 1e-5  # the parser prints FLOAT with 6 digits; its companion is exact
_SHORT = 9  # characters; longer texts are numbers in full precision
_NPU_ROPES = ("", "float16", "bfloat16")  # "": not known when the file was written


def refusals(ctx: Context, node: Node) -> Iterator[Finding]:
    """What the plug-in refuses of a node's attributes, inputs and outputs, or cannot read whole."""
    plugin = ctx.plugin(node)
    if plugin is None:
        return
    problems = [*_attributes(plugin, node.proto)]
    if plugin.contract is not None and not problems:
        problems += [*_values(plugin.contract, node.proto)]
    if problems:
        yield refused(
            "plugin-attributes",
            f"the plug-in of {node.op_type} refuses the attributes: {', '.join(problems)} (an"
            " installed CANN may print E11010 instead)",
            _CODE,
            node.name,
            hint="write every attribute of the contract, and no other",
        )
    problems = [*_interface(plugin, node.proto)]
    if problems:
        yield refused(
            "plugin-interface",
            f"the plug-in of {node.op_type} refuses the node: {', '.join(problems)}",
            _CODE,
            node.name,
            hint="run `sfa-onnx atc` on the fused model; it writes what the plug-in takes",
        )
    if plugin.contract is not None and ctx.takes_as_is(node):
        yield from _rounded(plugin.contract, node)
        if plugin.contract is KV_CACHE_WRITE and not problems:
            yield from _written(ctx, node)


def _written(ctx: Context, node: Node) -> Iterator[Finding]:
    """Where ScatterNdUpdate is not known to do what the contract says."""
    if writes_padding(ctx.rewrite_scope(node.scope), node.proto):
        yield misread(
            "cache-write-padding",
            "warning",
            "negative slots mean padding, but become indices of ScatterNdUpdate, which is not"
            " documented to skip them",
            node.name,
            hint="run `sfa-onnx atc`, which replaces padding in front of the node",
            evidence="documented",
        )
    dims = ctx.view.shape(node.scope, node.proto.input[2])
    if dims is None or list(dims) != [1]:
        yield misread(
            "cache-write-order",
            "info",
            "of two rows for one slot the last is to stay; CANN documents no order of"
            " ScatterNdUpdate's updates",
            node.name,
            hint="give each new token a slot of its own, as serving engines do",
            evidence="documented",
        )


def _rounded(contract: OpContract, node: Node) -> Iterator[Finding]:
    for spec in contract.attributes:
        attr = find_attribute(node.proto, spec.name)
        if spec.kind != "float" or attr is None:
            continue
        text = f"{attr.f:g}"
        whole = len(text) > _SHORT or np.float32(text) == np.float32(attr.f)
        if not whole and find_attribute(node.proto, f"{spec.name}_exact") is None:
            yield misread(
                "scale-six-digits",
                "warning",
                f"{spec.name} reaches the plug-in as {text}: the parser prints 6 digits",
                node.name,
                hint=f"run `sfa-onnx atc`, which adds {spec.name}_exact",
            )


def _attributes(plugin: Plugin, node: NodeProto) -> Iterator[str]:
    given = {a.name: a.type for a in node.attribute}
    for name, kind in plugin.required_attributes:
        if name not in given:
            yield f"{name} is missing"
        elif given[name] != _KINDS.get(kind, AttributeProto.STRING):
            yield f"{name} is not {kind}"
    if plugin.contract is None:
        return
    legal = {a.name for a in plugin.contract.attributes} | plugin.extra_attributes
    yield from (f"{name} is unknown" for name in given if name not in legal)
    if len(given) < len(node.attribute):
        yield "one is given twice"


def _values(contract: OpContract, node: NodeProto) -> Iterator[str]:
    for spec in contract.attributes:
        attr = find_attribute(node, spec.name)
        if attr is None:
            continue
        if spec.kind == "float":
            yield from _scale(spec.name, attr.f, find_attribute(node, f"{spec.name}_exact"))
        elif spec.ge_kind == "bool" and attr.i not in (0, 1):
            yield f"{spec.name} is {attr.i}, neither 0 nor 1"
    if contract is KV_CACHE_PACK:
        yield from _pack(node)


def _scale(name: str, value: float, exact: onnx.AttributeProto | None) -> Iterator[str]:
    if not math.isfinite(value):
        yield f"{name} is {value}"
    elif exact is None:
        return
    elif exact.type != AttributeProto.FLOATS or len(exact.floats) != 1:
        yield f"{exact.name} is not FLOATS of one element"
    elif not abs(exact.floats[0] - value) <= _TEXT_TOLERANCE * abs(exact.floats[0]):
        yield f"{name} is {value:g}, but {exact.name} says {exact.floats[0]:g}"


def _pack(node: NodeProto) -> Iterator[str]:
    tile, rope = find_attribute(node, "tile_size"), find_attribute(node, "rope_dtype")
    if tile is not None and tile.i <= 0:
        yield f"tile_size is {tile.i}"
    if rope is not None and rope.type != AttributeProto.STRING:
        yield "rope_dtype is not string"
    elif rope is not None and rope.s.decode(errors="replace") not in _NPU_ROPES:
        yield f"rope_dtype is {rope.s.decode(errors='replace')}, neither float16 nor bfloat16"


def _interface(plugin: Plugin, node: NodeProto) -> Iterator[str]:
    if plugin.contract is None:
        return
    inputs = plugin.contract.ge_inputs
    if len(node.input) > len(inputs):
        yield f"{len(node.input)} inputs, it takes {len(inputs)}"
    for i, tensor in enumerate(inputs):
        if not tensor.optional and not "".join(node.input[i : i + 1]):
            yield f"required input {i} ({tensor.name}) is left out"
    outputs = max((i + 1 for i, name in enumerate(node.output) if name), default=0)
    if plugin.outputs is not None and outputs > plugin.outputs:
        yield f"{outputs} outputs, it has {plugin.outputs}"
    if plugin.contract is KV_CACHE_PACK:
        _, rope, scale, clip = (*map(bool, node.input), *[False] * 4)[:4]
        if not rope:
            yield "no rope: the NPU operator takes rope_head_dim 64 only"
        if scale and clip:
            yield "scale (int8 rows are copied) and clip (rows are quantised) together"
