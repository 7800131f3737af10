"""Why two models could not be run, in words that say what to do."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Final

from onnx import ModelProto

from sfa_onnx.files.weights import weights_findings
from sfa_onnx.passes.graph.index import GraphIndex

__all__ = ["UNTOLD_KEYS", "unreadable", "untaken"]

_NODE: Final = re.compile(r"Name:\s*'([^']+)'")
_SHOWN: Final = 6
# Few selected keys, one of them another: no share of the result tells that from a fault.
UNTOLD_KEYS: Final = (
    "the original keeps no selection, so keys that int8 chose otherwise cannot be told from a"
    " fault: compare the fused float model with the converted one"
)


def unreadable(models: Sequence[ModelProto], folders: Sequence[Path | None]) -> str:
    """The first weights file that is not there, cut, or a pointer; "" where all can be read."""
    for model, folder in zip(models, folders, strict=True):
        if folder is None:
            continue
        for found in weights_findings(model, folder):
            if not found.readable:
                return f"the weights file {found.location} is {found.text}; {found.fix}"
    return ""


def untaken(model: ModelProto, failure: str, given: Collection[str]) -> str:
    """Which inputs to give, where random ones did not please the node that stopped; "" if none."""
    named = _NODE.search(failure)
    index = GraphIndex.of(model)
    nodes = [n for n in index.nodes if named and n.name == named[1]]
    if not nodes:
        return ""
    found, queue, seen = list[str](), list(nodes[0].input), set[str]()
    while queue:
        name = queue.pop(0)
        if name and name not in seen:
            seen.add(name)
            node = index.maker(name)
            if node is not None:
                queue += node.input
            elif index.is_graph_input(name) and name not in given:
                found.append(name)
    wanted = sorted(found, key=lambda n: _is_float(index, n))[:_SHOWN]  # the nearest ones first
    return f". Random values did not do: give --inputs with {', '.join(wanted)}" if wanted else ""


def _is_float(index: GraphIndex, name: str) -> bool:
    """Floats rarely decide whether a model runs: they are named last."""
    return index.elem_type(name) in (1, 10, 11, 16)
