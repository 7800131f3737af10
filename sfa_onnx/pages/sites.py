"""One fused site before and after, as boxes: the region, what enters it, one hop around it.

Constants are left out: they are many, and say little.
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx

from sfa_onnx.files.onnx_attrs import graphs
from sfa_onnx.pages.picture import MOST, Box
from sfa_onnx.report import SiteReport

__all__ = ["Graphs", "distinct"]


class Graphs:
    """The nodes of a model by the names that reports use."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.nodes = [node for graph in graphs(model.graph) for node in graph.node]
        self.makers = {o: n for n in self.nodes for o in n.output if o}
        self.constants = {t.name for t in model.graph.initializer}
        self.constants |= {n.output[0] for n in self.nodes if n.op_type == "Constant"}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in self.nodes:
            for value in node.input:
                self.readers.setdefault(value, []).append(node)

    def named(self, names: Iterable[str]) -> list[onnx.NodeProto]:
        """Nodes whose name, first output or place ends in one of the names, in graph order."""
        wanted = {name.rpartition("/")[2]: name for name in names} | {n: n for n in names}
        return [n for n in self.nodes if n.name in wanted or (n.output and n.output[0] in wanted)]

    def boxes(self, names: Iterable[str], role: str, roles: dict[str, str]) -> list[Box]:
        """The named nodes, what they read from outside and who reads them, one hop each.

        Args:
            names: the nodes of a region.
            role: their colour class.
            roles: value -> what it is to the attention.
        """
        inside = self.named(names)[: MOST * 3 // 4]
        made = {o: f"n{i}" for i, n in enumerate(inside) for o in n.output if o}
        own: list[Box] = []
        entering: dict[str, Box] = {}
        for i, node in enumerate(inside):
            reads = []
            for value in filter(None, node.input):
                if value in self.constants:
                    continue
                if value not in made:
                    entering.setdefault(value, self._around(value, roles))
                reads.append(made.get(value, f"v{value}"))
            own.append(Box(f"n{i}", node.op_type, node.name or node.output[0], role, reads))
        leaving = [
            Box(f"r{k}", reader.op_type, reader.name or reader.output[0], "around", [made[value]])
            for k, (value, reader) in enumerate(self._leaving(made, inside))
        ]
        return [*entering.values(), *own, *leaving]

    def _leaving(
        self, made: dict[str, str], inside: list[onnx.NodeProto]
    ) -> list[tuple[str, onnx.NodeProto]]:
        own = {id(n) for n in inside}
        return [(v, r) for v in made for r in self.readers.get(v, []) if id(r) not in own][:6]

    def _around(self, value: str, roles: dict[str, str]) -> Box:
        maker = self.makers.get(value)
        kind = roles.get(value, "around")
        title = maker.op_type if maker is not None else "input"
        return Box(f"v{value}", title if kind == "around" else kind, value, kind)


def distinct(sites: list[SiteReport]) -> list[tuple[SiteReport, int]]:
    """One site of each kind, with how many look alike: same family and number of nodes."""
    kinds: dict[tuple[object, ...], list[SiteReport]] = {}
    for site in sites:
        key = (site.op_type, site.family, len(site.removed), len(site.added))
        kinds.setdefault(key, []).append(site)
    return [(group[0], len(group)) for group in kinds.values()]
