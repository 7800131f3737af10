"""Putting converted nodes into order, and taking out what nobody reads any more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx

from sfa_onnx.kv_convert.emit import Emitter
from sfa_onnx.passes.graph.order import in_order, live_values, reads

__all__ = ["Arrangement", "declare_domain"]


class Arrangement:
    """Remembers what was alive before a rewrite; `settle` keeps the order of all that stays."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.graph = graph
        self._live_before = live_values(graph)
        self._used_before = {name for node in graph.node for name in reads(node)}

    def settle(self, emit: Emitter) -> None:
        """Drop nodes that died, put each new node right before its first reader."""
        graph = self.graph
        graph.node.extend(emit.nodes)
        graph.initializer.extend(emit.initializers)
        fresh = {name for node in emit.nodes for name in node.output}
        live = live_values(graph)
        kept = [n for n in graph.node if self._stays(n, live, fresh)]
        old = [n for n in kept if not any(name in fresh for name in n.output)]
        new = [n for n in kept if any(name in fresh for name in n.output)]
        ordered = in_order([*old, *new])
        del graph.node[:]
        graph.node.extend(ordered)
        self._drop_leftovers()

    def _stays(self, node: onnx.NodeProto, live: set[str], fresh: set[str]) -> bool:
        names = [name for name in node.output if name]
        if any(name in live for name in names):
            return True
        was_live = any(name in self._live_before or name in fresh for name in names)
        return not was_live  # what was dead before is none of our business

    def _drop_leftovers(self) -> None:
        graph = self.graph
        used = {name for node in graph.node for name in reads(node)}
        used |= {value.name for value in graph.output}
        produced = {name for node in graph.node for name in node.output}
        _keep(graph.initializer, lambda t: t.name in used or t.name not in self._used_before)
        known = produced | used | {value.name for value in graph.input}
        _keep(graph.value_info, lambda v: v.name in known)


def _keep(items: Any, wanted: Callable[[Any], bool]) -> None:
    """Drop from a repeated field what is not wanted."""
    kept = [item for item in items if wanted(item)]
    if len(kept) != len(items):
        del items[:]
        items.extend(kept)


def declare_domain(model: onnx.ModelProto, domain: str, version: int) -> None:
    """Import `domain` unless the model does so already."""
    if all(entry.domain != domain for entry in model.opset_import):
        model.opset_import.add(domain=domain, version=version)
