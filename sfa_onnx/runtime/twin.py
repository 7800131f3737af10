"""Twins: a model with the same mathematics in another float type.

bfloat16 models get a float32 twin, because onnxruntime's CPU provider lacks bfloat16 for most
operators; float64 twins show what a model loses to its own rounding. Weights and inputs keep their
types and get a Cast behind them, so no weight is read into Python. Our operators keep working in
the original types, between Casts.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import numpy as np
from onnx import (
    AttributeProto,
    GraphProto,
    ModelProto,
    NodeProto,
    TensorProto,
    helper,
    numpy_helper,
)

from sfa_onnx.operator.op import find_op
from sfa_onnx.runtime.elem_types import ElemTypes

__all__ = ["FLOATS", "float32_twin", "twin", "uses"]

FLOATS: Final = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)
_SUFFIX: Final = "__twin"
_TYPE_ATTRIBUTES: Final = ("to", "dtype", "output_dtype", "softmax_precision", "stash_type")


def uses(model: ModelProto, elem_type: int) -> bool:
    """Whether some tensor of the model is declared, stored or cast to this type."""
    graph = model.graph
    values = (*graph.input, *graph.output, *graph.value_info)
    return (
        any(t.data_type == elem_type for t in graph.initializer)
        or any(v.type.tensor_type.elem_type == elem_type for v in values)
        or any(
            a.i == elem_type for n in graph.node for a in n.attribute if a.name in _TYPE_ATTRIBUTES
        )
    )


def twin(
    model: ModelProto,
    types: Iterable[int],
    to: int,
    *,
    rounded: int = 0,
    known: ElemTypes | None = None,
) -> ModelProto:
    """A copy of `model` that computes in `to` where it computed in one of `types`.

    Names, integer arithmetic and the types of graph inputs and weights stay; float outputs and
    everything between have type `to`. With `rounded`, an element type, every result that had one of
    `types` is rounded to it: this emulates a model where onnxruntime cannot run it, or one that was
    never made. `known` gives the types when `model` itself does not say them any more.
    """
    out = ModelProto()
    out.CopyFrom(model)
    rewriter = _Twin(frozenset(types), to, known or ElemTypes(model), rounded)
    rewriter.graph(out.graph, {}, main=True)
    for function in out.functions:
        if find_op(function.domain, function.name) is None:
            nodes = [new for node in function.node for new in rewriter.node(node, {})]
            del function.node[:]
            function.node.extend(nodes)
    return out


def float32_twin(model: ModelProto) -> ModelProto:
    """The model with bfloat16 computed in float32, our operators excepted."""
    return twin(model, [TensorProto.BFLOAT16], TensorProto.FLOAT)


class _Twin:
    def __init__(self, types: frozenset[int], to: int, known: ElemTypes, rounded: int) -> None:
        self.types, self.to, self.known, self.rounded = types, to, known, rounded

    def graph(self, graph: GraphProto, outer: dict[str, str], main: bool = False) -> None:
        """Rewrite one graph in place; `outer` renames what a sub-graph captures."""
        names, nodes = dict(outer), []
        wide = [t.name for t in graph.initializer if t.data_type in self.types]
        if main:
            wide += [v.name for v in graph.input if v.type.tensor_type.elem_type in self.types]
        for name in dict.fromkeys(wide):
            names[name] = name + _SUFFIX
            if self.rounded:
                nodes.append(self._cast(name, name + "__stored", self.rounded))
                nodes.append(self._cast(name + "__stored", names[name], self.to))
            else:
                nodes.append(self._cast(name, names[name], self.to))
        for node in graph.node:
            nodes += self.node(node, names)
        for value in (*graph.output, *(() if main else graph.input)):
            if value.type.tensor_type.elem_type in self.types:
                value.type.tensor_type.elem_type = self.to
        del graph.node[:]
        graph.node.extend(nodes)
        del graph.value_info[:]

    def node(self, node: NodeProto, names: dict[str, str]) -> list[NodeProto]:
        """What stands for one node."""
        originals = list(node.input)
        for i, value in enumerate(originals):
            node.input[i] = names.get(value, value)
        if node.domain and find_op(node.domain, node.op_type) is not None:
            return self._own(node, originals)
        for attribute in node.attribute:
            self._attribute(node, attribute, names)
        if node.op_type == "Constant" and self._lies_elsewhere(node):
            value = node.output[0]
            node.output[0] = value + "__stored"
            return [node, self._cast(node.output[0], value, self.to)]
        silent = node.op_type == "ConstantOfShape" and not node.attribute
        if silent and TensorProto.FLOAT in self.types:  # its default is a float32 zero
            zero = helper.make_tensor("value", self.to, [1], [0.0])
            node.attribute.append(helper.make_attribute("value", zero))
        return [node, *(self._roundings(node) if self.rounded else ())]

    def _lies_elsewhere(self, node: NodeProto) -> bool:
        """Whether a Constant's value is in a file: like weights it keeps its type."""
        tensors = (a.t for a in node.attribute if a.type == AttributeProto.TENSOR)
        external = TensorProto.EXTERNAL
        return any(t.data_location == external and t.data_type in self.types for t in tensors)

    def _roundings(self, node: NodeProto) -> list[NodeProto]:
        """Casts of each output to the type it is rounded to and back; its name is kept."""
        casts = []
        for i, value in enumerate(list(node.output)):
            kind = self.known.of(value) if value else None
            if kind in self.types:
                node.output[i] = value + "__exact"
                casts.append(self._cast(node.output[i], value + "__rounded", self.rounded))
                casts.append(self._cast(value + "__rounded", value, self.to))
        return casts

    def _cast(self, value: str, name: str, to: int) -> NodeProto:
        return helper.make_node("Cast", [value], [name], name=f"{name}/Cast", to=to)

    def _attribute(self, node: NodeProto, attribute: AttributeProto, names: dict[str, str]) -> None:
        if attribute.name in _TYPE_ATTRIBUTES and attribute.i in self.types:
            attribute.i = self.to
        elif attribute.type == AttributeProto.TENSOR:
            attribute.t.CopyFrom(self._tensor(attribute.t))
        elif attribute.name in ("value_float", "value_floats") and node.op_type == "Constant":
            if TensorProto.FLOAT in self.types and not attribute.ref_attr_name:
                single = attribute.name == "value_float"
                array = np.array(attribute.f if single else list(attribute.floats), np.float32)
                value = self._tensor(numpy_helper.from_array(array))
                attribute.CopyFrom(helper.make_attribute("value", value))
        elif attribute.HasField("g"):
            self.graph(attribute.g, names)
        for graph in attribute.graphs:
            self.graph(graph, names)

    def _tensor(self, tensor: TensorProto) -> TensorProto:
        if tensor.data_type not in self.types or tensor.data_location == TensorProto.EXTERNAL:
            return tensor
        array = np.asarray(numpy_helper.to_array(tensor))
        dtype = helper.tensor_dtype_to_np_dtype(self.to)
        made: TensorProto = numpy_helper.from_array(array.astype(dtype), tensor.name)
        return made

    def _own(self, node: NodeProto, originals: list[str]) -> list[NodeProto]:
        """One of our operators: back to the original types, compute, and forth."""
        before, after = [], []
        for i, value in enumerate(originals):
            kind = self.known.of(value) if value else None
            if kind in self.types:
                name = f"{value}__{node.output[0]}_{i}"
                before.append(self._cast(node.input[i], name, int(kind or 0)))
                node.input[i] = name
        for i, value in enumerate(list(node.output)):
            if value and self.known.of(value) in self.types:
                node.output[i] = value + "__narrow"
                after.append(self._cast(node.output[i], value, self.to))
        return [*before, node, *after]
