"""Reshapes that ask for -1 beside 0, which ONNX forbids, and the size that was meant.

A tensor without elements, as a rope of width 0 is, fits every size, so nothing can be inferred from
their number. Exporters write it all the same where one open size is left (the batch of a step of
one token). A view keeps what stands around the empty axis: with the axes of size 0 left out on both
sides, the numbers of elements are equal again, and the open size is told by the input's others.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from sfa_onnx.files.onnx_attrs import CONTROL_FLOW, attribute, constants, subgraphs
from sfa_onnx.guard.guarded import infer_shapes

__all__ = ["label", "settled", "unsettled"]

Dims = tuple[int | str | None, ...]  # sizes, names of open sizes, None for unknown ones


def settled(model: ModelProto) -> tuple[ModelProto, tuple[str, ...]]:
    """The model with such sizes written into the graph, and what was written where.

    Args:
        model: not changed. Shapes it does not declare are inferred.

    Returns:
        A copy and a line per Reshape; the model itself and () where there is nothing to settle, or
        where the shapes around do not tell the size.
    """
    if not any(True for _ in unsettled(model)):
        return model, ()
    out = ModelProto()
    out.CopyFrom(model)
    work = _Settling(out, _dims(infer_shapes(model)[0] or model) | _dims(model))
    work.graph(out.graph, {})
    return (out, tuple(work.done)) if work.done else (model, ())


def unsettled(model: ModelProto) -> Iterator[NodeProto]:
    """Reshapes with -1 beside 0 in a constant target, those in bodies too."""
    yield from (node for node, _ in _found(model.graph, {}))


def label(node: NodeProto) -> str:
    """How a message calls the node."""
    return f"{node.name or node.output[0]} (Reshape)"


def _found(
    graph: GraphProto, outer: Mapping[str, TensorProto]
) -> Iterator[tuple[NodeProto, list[int]]]:
    asked = [n for n in graph.node if n.op_type in CONTROL_FLOW or _zero_is_meant(n)]
    known = constants(graph, outer) if asked else {}
    for node in asked:
        if target := _target(node, known):
            yield node, target
        for body in subgraphs(node):
            yield from _found(body, known)


def _zero_is_meant(node: NodeProto) -> bool:
    return bool(node.op_type == "Reshape" and not node.domain and attribute(node, "allowzero", 0))


def _target(node: NodeProto, known: Mapping[str, TensorProto]) -> list[int]:
    """The sizes asked for, if one is -1 and one 0 and 0 is meant; else nothing."""
    if not _zero_is_meant(node):
        return []
    target = known.get(node.input[1])
    if target is None or target.data_location == TensorProto.EXTERNAL:
        return []
    sizes = [int(n) for n in np.atleast_1d(numpy_helper.to_array(target))]
    return sizes if sizes.count(-1) == 1 and 0 in sizes else []


def _dims(model: ModelProto) -> dict[str, Dims | None]:
    """Shapes by name, of every graph of the model; None where two bodies share a name."""
    found: dict[str, Dims | None] = {}
    graphs = [model.graph]
    while graphs:
        graph = graphs.pop()
        for value in (*graph.value_info, *graph.input, *graph.output):
            tensor = value.type.tensor_type
            if tensor.HasField("shape"):
                dims = tuple(
                    d.dim_value if d.HasField("dim_value") else d.dim_param or None
                    for d in tensor.shape.dim
                )
                found[value.name] = dims if found.get(value.name, dims) == dims else None
        graphs += [body for node in graph.node for body in subgraphs(node)]
    return found


class _Settling:
    """One model whose nodes are rewritten in place."""

    def __init__(self, model: ModelProto, dims: Mapping[str, Dims | None]) -> None:
        self.dims, self.done = dims, list[str]()
        self.taken = set(_names(model.graph))

    def graph(self, graph: GraphProto, outer: Mapping[str, TensorProto]) -> None:
        known = constants(graph, outer)
        nodes: list[NodeProto] = []
        for node in graph.node:
            for body in subgraphs(node):
                self.graph(body, known)
            target = _target(node, known)
            nodes += self._nodes(node, target) if target else []
            nodes.append(node)
        copies = [NodeProto.FromString(node.SerializeToString()) for node in nodes]
        del graph.node[:]
        graph.node.extend(copies)

    def _nodes(self, node: NodeProto, target: list[int]) -> list[NodeProto]:
        """What computes the target, for in front of the Reshape; nothing where no size is told."""
        meant = _meant(self.dims.get(node.input[0]), target, self.dims.get(node.output[0]))
        if meant is None:
            return []
        axes, factor = meant
        place = target.index(-1)
        nodes: list[NodeProto] = []

        def add(op: str, inputs: Sequence[str], **attrs: Any) -> str:
            name = self._fresh(f"{node.name or node.output[0]}/{op}")
            nodes.append(helper.make_node(op, inputs, [name], name, **attrs))
            return name

        def constant(sizes: Sequence[int]) -> str:
            return add("Constant", [], value=numpy_helper.from_array(np.array(sizes, np.int64)))

        if axes:
            size = add("Gather", [add("Shape", [node.input[0]]), constant(axes)], axis=0)
            size = add("ReduceProd", [size]) if len(axes) > 1 else size
            size = add("Mul", [size, constant([factor])]) if factor > 1 else size
            parts = target[:place], target[place + 1 :]
            ends = [constant(part) if part else "" for part in parts]
            node.input[1] = add("Concat", [n for n in (ends[0], size, ends[1]) if n], axis=0)
        else:
            node.input[1] = constant([*target[:place], factor, *target[place + 1 :]])
        told = [f"size {axis} of its input" for axis in axes]
        told += [str(factor)] if factor > 1 or not axes else []
        self.done.append(f"{label(node)}: -1 beside 0 is now {' times '.join(told)}")
        return nodes

    def _fresh(self, wanted: str) -> str:
        name, count = wanted, 1
        while name in self.taken:
            name, count = f"{wanted}_{count}", count + 1
        self.taken.add(name)
        return name


def _meant(
    given: Dims | None, target: Sequence[int], declared: Dims | None
) -> tuple[list[int], int] | None:
    """The open size: axes of the input to multiply, and a number; None where it is not told."""
    if given is None or given.count(0) != target.count(0):
        return None
    axes = [i for i, size in enumerate(given) if not isinstance(size, int)]
    known = math.prod(n for n in given if isinstance(n, int) and n)
    rest = math.prod(n for n in target if n > 0)
    if known % rest:
        return None
    factor = known // rest
    wanted = declared[target.index(-1)] if declared and len(declared) == len(target) else None
    if isinstance(wanted, int) and (axes or wanted != factor):
        return None  # the file says otherwise
    if isinstance(wanted, str) and wanted in given and (given[axes[0]], len(axes), factor) != (
        wanted, 1, 1,
    ):  # fmt: skip
        return None
    return axes, factor


def _names(graph: GraphProto) -> Iterator[str]:
    """Names of values and nodes, in bodies too."""
    yield from (v.name for v in (*graph.input, *graph.initializer))
    for node in graph.node:
        yield from (node.name, *node.input, *node.output)
        for body in subgraphs(node):
            yield from _names(body)
