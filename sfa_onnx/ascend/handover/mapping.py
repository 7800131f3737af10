"""Which nodes of the original each fused node stands for: the file that lines dumps up.

msProbe and its like match dumps of the NPU with dumps of a golden ONNX model by node name.
Untouched nodes keep their names; this mapping gives the rest: fused node -> replaced nodes, and
new -> old names where CANN's parser forced a change.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
from onnx import GraphProto, ModelProto, NodeProto

from sfa_onnx.ascend.flavour.nodes import is_ours
from sfa_onnx.ascend.flavour.norms import ADD_RMS_NORM, RMS_NORM
from sfa_onnx.files.model import load_model
from sfa_onnx.operator.op import BINDINGS, EXPANDED

__all__ = ["find_original", "mapping"]

MAPPING_VERSION = 1
_NORMS = {RMS_NORM: "RmsNorm", ADD_RMS_NORM: "AddRmsNorm"}
_GE_TYPES = {b.atc_type: b.ge_type for b in BINDINGS} | _NORMS
_GE_TYPES |= dict.fromkeys((op.name for op in EXPANDED), "(expanded)")


def find_original(path: Path) -> Path | None:
    """The file a fused one was made from, when it lies beside it: model.sfa.onnx -> model.onnx."""
    parts = path.name.split(".")
    for cut in range(len(parts) - 2, 0, -1):
        candidate = path.with_name(".".join(parts[:cut]) + ".onnx")
        if candidate != path and candidate.is_file():
            return candidate
    return None


def mapping(
    atc: ModelProto, renamed: list[str], original: Path | None, model_name: str
) -> dict[str, Any]:
    """The mapping as a JSON-ready dict.

    Args:
        atc: the ATC flavour.
        renamed: "old -> new" node names changed for the parser.
        original: the model before fusing; None: replaced nodes are not known.
        model_name: file name of the ATC flavour.
    """
    before = load_model(original).graph if original else None
    entries = [
        _entry(node, place, then, now)
        for place, now, then in _graphs(atc.graph, before)
        for node in now.node
        if is_ours(node) or node.op_type in _NORMS
    ]
    pairs = (text.split(" -> ") for text in renamed)
    return {
        "schema": "sfa-onnx/mapping",
        "version": MAPPING_VERSION,
        "model": model_name,
        "golden": None if original is None else original.name,
        "nodes": entries,
        "renamed": {new: old for old, new in pairs},
    }


def _graphs(
    now: GraphProto, then: GraphProto | None, place: str = ""
) -> Iterator[tuple[str, GraphProto, GraphProto | None]]:
    """Every graph of the ATC flavour with its twin of the original; nodes are met by outputs."""
    yield place, now, then
    old = {} if then is None else {tuple(n.output): n for n in then.node}
    for node in now.node:
        twin = old.get(tuple(node.output), NodeProto())
        bodies = {a.name: a.g for a in twin.attribute if a.type == onnx.AttributeProto.GRAPH}
        for attr in node.attribute:
            if attr.type == onnx.AttributeProto.GRAPH:
                inner = f"{place}{node.name}/{attr.name}/"
                yield from _graphs(attr.g, bodies.get(attr.name), inner)


def _entry(
    node: NodeProto, place: str, before: GraphProto | None, after: GraphProto
) -> dict[str, Any]:
    return {
        "node": place + node.name,
        "onnx_type": node.op_type,
        "ge_type": _GE_TYPES.get(node.op_type, node.op_type),
        "outputs": list(node.output),
        "replaces": None if before is None else _replaced(node, before, after),
    }


def _replaced(node: NodeProto, before: GraphProto, after: GraphProto) -> list[str]:
    """Nodes of the original above the fused output that the fused graph no longer has.

    What another node of the fused graph still makes, whatever it is made of, ends the walk.
    """
    kept = {_key(n) for n in after.node}
    made = {out for n in after.node if n is not node for out in n.output if out}
    producers = {out: n for n in before.node for out in n.output}
    queue, found, seen = list(_landing(node, before, after)), [], set()
    while queue:
        producer = producers.get(queue.pop())
        if producer is None or id(producer) in seen or _key(producer) in kept:
            continue
        seen.add(id(producer))
        found.append(producer)
        queue += [name for name in producer.input if name not in made]
    order = {id(n): i for i, n in enumerate(before.node)}
    found.sort(key=lambda n: order.get(id(n), 0))
    return [n.name or n.output[0] for n in found]


def _key(node: NodeProto) -> tuple[str, tuple[str, ...]]:
    return node.op_type, tuple(node.output)


def _landing(node: NodeProto, before: GraphProto, after: GraphProto) -> set[str]:
    """The values of the original that the fused node (and glue after it) gives again."""
    known = {out for n in before.node for out in n.output}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for n in after.node:
        for name in n.input:
            readers.setdefault(name, []).append(n)
    queue, landing, seen = list(node.output), set(), set()
    while queue:
        name = queue.pop()
        if name in seen:
            continue
        seen.add(name)
        if name in known:
            landing.add(name)
            continue
        queue += [out for n in readers.get(name, ()) for out in n.output]
    return landing
