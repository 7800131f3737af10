"""A site and its replacement as one list of nodes, every use of a constant a value of its own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from sfa_onnx.passes.candidate import Candidate
from sfa_onnx.passes.graph.index import GraphIndex

__all__ = ["SHAPE_INPUTS", "SiteGraph"]

Array = NDArray[Any]
# Inputs that say sizes; others of integer type hold positions.
SHAPE_INPUTS: dict[str, tuple[int, ...]] = {
    "Reshape": (1,),
    "Expand": (1,),
    "Slice": (1, 2),
    "Range": (0, 1),
    "Split": (1,),
    "ConstantOfShape": (0,),
    "Tile": (1,),
    "TopK": (1,),
    "Pad": (1,),
    "OneHot": (1,),
}


@dataclass
class SiteGraph:
    """Nodes in order, the replacement's behind the site's.

    Attributes:
        nodes: copies; constants are read under a name per use, computed shapes through an Identity.
        own: how many of them belong to the site.
        constants: name of a use -> the array.
        edges: the Identity outputs in front of shape inputs that are computed.
        replaced: output of the site -> the name it has in the replacement.
    """

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    own: int = 0
    constants: dict[str, Array] = field(default_factory=dict)
    edges: set[str] = field(default_factory=set)
    replaced: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        region: onnx.ModelProto,
        replacement: onnx.ModelProto,
        candidate: Candidate,
    ) -> SiteGraph:
        """Both models, as `extract_region` and `extract_replacement` cut them out."""
        found = cls()
        fused = {o for n in candidate.replacement for o in n.output}
        support = [n for n in replacement.graph.node if not set(n.output) & fused]
        made = {o for n in region.graph.node for o in n.output}
        extra = [n for n in support if not set(n.output) <= made]
        leaves = _leaves(region) | _leaves(replacement)
        for node in (*region.graph.node, *extra):
            found._add(node, leaves, {})
        found.own = len(found.nodes)
        found.replaced = {o: f"{o}@fused" for o in candidate.outputs}
        for node in candidate.replacement:
            found._add(node, leaves, found.replaced)
        return found

    def _add(
        self, source: onnx.NodeProto, leaves: dict[str, Array], renamed: dict[str, str]
    ) -> None:
        if source.op_type == "Constant" and source.output[0] in leaves:
            return
        node = onnx.NodeProto()
        node.CopyFrom(source)
        at = len(self.nodes)
        shapes = SHAPE_INPUTS.get(node.op_type, ())
        for k, name in enumerate(node.input):
            if name in leaves:
                node.input[k] = f"{name}@{at}.{k}"
                self.constants[node.input[k]] = leaves[name]
            elif k in shapes:
                node.input[k] = f"{name}@{at}.{k}"
                self.edges.add(node.input[k])
                self.nodes.append(helper.make_node("Identity", [name], [node.input[k]]))
        node.output[:] = [renamed.get(o, o) for o in node.output]
        self.nodes.append(node)

    def model(self, inputs: list[onnx.ValueInfoProto], opsets: dict[str, int]) -> onnx.ModelProto:
        """As a model for shapes; of constants it holds the types only."""
        graph = onnx.GraphProto(name="site")
        graph.node.extend(self.nodes)
        graph.input.extend(inputs)
        for name, array in self.constants.items():
            kind = helper.np_dtype_to_tensor_dtype(array.dtype)
            graph.value_info.append(helper.make_tensor_value_info(name, kind, None))
        imports = [helper.make_opsetid(d, v) for d, v in opsets.items()]
        made: onnx.ModelProto = helper.make_model(graph, opset_imports=imports, ir_version=10)
        return made


def _leaves(model: onnx.ModelProto) -> dict[str, Array]:
    """Constants of a model by name: initializers and Constant nodes."""
    found = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    index = GraphIndex.of(model)
    for node in model.graph.node:
        if node.op_type == "Constant" and (array := index.constant(node.output[0])) is not None:
            found[node.output[0]] = array
    return found
