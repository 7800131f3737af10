"""Parts of a graph, run at sizes of our choice."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from sfa_onnx.files.onnx_attrs import attributes
from sfa_onnx.passes.graph.index import GraphIndex
from sfa_onnx.passes.shapes.concrete import Concrete
from sfa_onnx.passes.shapes.dims import size_of
from sfa_onnx.passes.verify.execute import Executable
from sfa_onnx.passes.verify.extract import UnverifiableError, embedded_constant

__all__ = ["at_sizes", "evaluated", "of_sizes", "reach", "samples"]

_T = onnx.TensorProto
_ENDS: Final = 2.0**31 - 1  # what ends a slice that has no end
_LOW: Final = -1e4  # what hides a key
_FEW: Final = 8  # numbers of a constant that are added up
_FILLS: Final = frozenset(("Mul", "Trilu", "Where"))  # take a number that hides as it is
_ADDS: Final = (
    frozenset(("Add", "And", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Max"))
    | frozenset(("Min", "Neg", "Not", "Or", "Relu", "Sub", "Sum", "Where", "Xor", "Cast", "Clip"))
    | frozenset(("Concat", "Constant", "ConstantOfShape", "Expand", "Gather", "Identity", "Range"))
    | frozenset(("Reshape", "Shape", "Size", "Slice", "Squeeze", "Transpose", "Trilu", "Unsqueeze"))
)
_MOST: Final = 200  # nodes of a mask that sizes alone decide


def at_sizes(sizes: Concrete, chosen: Mapping[str, int]) -> Concrete:
    """Sizes of the graph with these numbers; symbols that were made one stay so."""
    numbers = dict(chosen)
    for form, symbol in sizes.equal:
        size = size_of(form, numbers)
        if size is not None:
            numbers[symbol] = size
    return Concrete(sizes.index, numbers)


def of_sizes(index: GraphIndex, value: str) -> tuple[list[int], list[str]] | None:
    """(nodes that make `value`, tensors whose shapes they read); None: more than sizes enters."""
    nodes: set[int] = set()
    shaped: dict[str, None] = {}
    stack, seen = [value], {value}
    while stack:
        name = stack.pop()
        i = index.producer.get(name)
        if i is None:
            if name not in index.initializers:
                return None
            continue
        nodes.add(i)
        node = index.nodes[i]
        if len(nodes) > _MOST or node.domain not in ("", "ai.onnx") or index.captures(i):
            return None
        if node.op_type in ("Shape", "Size"):
            if node.input[0] not in index.initializers:
                shaped[node.input[0]] = None
            continue
        new = [n for n in node.input if n and n not in seen]
        seen.update(new)
        stack += new
    return sorted(nodes), list(shaped)


def reach(index: GraphIndex, nodes: Sequence[int]) -> int | None:
    """How far from 0 the conditions of a mask may change their pattern, or None: anywhere.

    Where nodes only add, compare and choose, a condition is a sign of a sum of positions, sizes
    and the constants of the graph: what shows at any sizes shows at some near those constants.
    Quotients, powers, logarithms, fractions and the like make distances of their own.
    """
    readers: dict[str, set[str]] = {}
    for i in nodes:
        if not _adds(index, index.nodes[i]):
            return None
        for n in index.nodes[i].input:
            readers.setdefault(n, set()).add(index.nodes[i].op_type)
    total = 0
    for name in readers:
        array = _number(index, name)
        if array is None:
            continue
        low = readers[name] <= _FILLS and bool((np.abs(array.astype(np.float64)) >= -_LOW).all())
        size = 0 if low else _magnitude(array)
        if size is None:
            return None
        total += size
    return total


def _adds(index: GraphIndex, node: onnx.NodeProto) -> bool:
    """Whether a node adds, compares, chooses, or moves data."""
    if node.op_type == "CumSum":  # of ones: positions
        return index.fill_value(node.input[0]) is not None or _ones(index, node.input[0])
    if node.op_type == "Mul":  # flags times what hides
        lows = [a for n in node.input if (a := _number(index, n)) is not None]
        return len(lows) == 1 and bool((np.abs(lows[0].astype(np.float64)) >= -_LOW).all())
    return node.op_type in _ADDS


def _ones(index: GraphIndex, value: str) -> bool:
    """Whether a tensor holds one number, laid out by size."""
    made = index.maker(value)
    while made is not None and made.op_type in ("Cast", "Expand"):
        made = index.maker(made.input[0])
    return made is not None and made.op_type == "ConstantOfShape"


def _number(index: GraphIndex, value: str) -> NDArray[Any] | None:
    """A constant that is read as numbers; what ConstantOfShape lays out as well."""
    made = index.maker(value)
    if made is not None and made.op_type == "ConstantOfShape":
        given = attributes(made).get("value")
        return np.zeros(1) if given is None else onnx.numpy_helper.to_array(given)
    array = index.constant(value)
    return None if array is None or array.dtype.kind not in "iuf" else array


def _magnitude(array: NDArray[Any]) -> int | None:
    """The sum of a few numbers, or the largest and the length of many; None: fractions."""
    flat = array.reshape(-1).astype(np.float64)
    flat = flat[np.abs(flat) < _ENDS]
    if bool((flat != np.rint(flat)).any()):
        return None
    sizes = np.abs(flat)
    few = flat.size <= _FEW
    return int(sizes.sum() if few else sizes.max(initial=0.0) + sizes.size)


def samples(symbols: Sequence[str], reach: int) -> list[dict[str, int]]:
    """Sizes at which a mask shows all it does: each symbol small, and beyond `reach`."""
    near, far = (1, 2, 3, 5), (reach + 3, 2 * reach + 5)
    kinds = {0: (1,), 1: near + far, 2: near + far, 3: near[:3] + far}.get(len(symbols))
    if kinds is None:
        return []
    every = itertools.product(kinds, repeat=len(symbols))
    return [dict(zip(symbols, chosen, strict=True)) for chosen in every]


def evaluated(
    index: GraphIndex,
    value: str,
    made: tuple[Sequence[int], Sequence[str]],
    shapes: Sequence[Mapping[str, tuple[int, ...]]],
) -> list[NDArray[Any]] | None:
    """What sizes alone make of `value`; None where it cannot be run.

    Args:
        index: the graph.
        value: to be made.
        made: as `of_sizes` tells it.
        shapes: of the tensors whose shapes are read, one mapping per run.
    """
    nodes, shaped = made
    graph = onnx.GraphProto(name="mask")
    asked = [i for i in nodes if index.nodes[i].input[:1] and index.nodes[i].input[0] in shaped]
    asked = [i for i in asked if index.nodes[i].op_type in ("Shape", "Size")]
    graph.node.extend(index.nodes[i] for i in nodes if i not in asked)
    read = {n for node in graph.node for n in node.input if n}
    known = {o for node in graph.node for o in node.output}
    known |= {index.nodes[i].output[0] for i in asked}
    try:
        for name in sorted(read - known):
            graph.initializer.append(embedded_constant(index, name))
        for i in asked:
            node = index.nodes[i]
            dims = [] if node.op_type == "Size" else [None]
            graph.input.append(helper.make_tensor_value_info(node.output[0], _T.INT64, dims))
        graph.output.extend([onnx.ValueInfoProto(name=value)])
        imports = [helper.make_opsetid(d, v) for d, v in index.opsets.items()]
        model = helper.make_model(graph, opset_imports=imports, ir_version=10)
        runner = Executable(model)
        told = [{index.nodes[i].output[0]: _told(index.nodes[i], s) for i in asked} for s in shapes]
        return [runner.run(feeds)[0] for feeds in told]
    except (RuntimeError, UnverifiableError, KeyError, ValueError):
        return None


def _told(node: onnx.NodeProto, shapes: Mapping[str, tuple[int, ...]]) -> NDArray[Any]:
    """What Shape or Size say of a tensor."""
    shape, a = shapes[node.input[0]], attributes(node)
    if node.op_type == "Size":
        return np.asarray(math.prod(shape), np.int64)
    return np.asarray(shape[a.get("start", 0) : a.get("end", len(shape))], np.int64)
