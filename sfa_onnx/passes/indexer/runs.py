"""Parts of a graph, run at sizes of our choice."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from sfa_onnx.passes.graph.index import GraphIndex
from sfa_onnx.passes.shapes.concrete import Concrete
from sfa_onnx.passes.shapes.dims import size_of
from sfa_onnx.passes.verify.execute import Executable
from sfa_onnx.passes.verify.extract import UnverifiableError, embedded_constant

__all__ = ["at_sizes", "evaluated", "of_sizes"]

_T = onnx.TensorProto
_ENDS = 2.0**31 - 1  # what ends a slice that has no end
_LOW = -1e4  # what hides a key
_MOST = 200  # nodes of a mask that sizes alone decide


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


def largest_number(index: GraphIndex, nodes: Sequence[int]) -> int:
    """The largest number that these nodes read or make; lows and ends of slices are none."""
    names = {n for i in nodes for n in (*index.nodes[i].input, *index.nodes[i].output) if n}
    largest = 0.0
    for name in names:
        array = index.constant(name)
        if array is None or array.size == 0 or array.dtype.kind not in "iuf":
            continue
        size = np.abs(array.astype(np.float64))
        kept = size[(size < _ENDS) & ((array > _LOW) | (array.dtype.kind in "iu"))]
        largest = max(largest, float(kept.max(initial=0.0)))
    return int(largest)


def evaluated(
    index: GraphIndex, value: str, every: Iterable[Concrete]
) -> list[NDArray[Any]] | None:
    """What sizes alone make of `value` at each of these sizes; None where it cannot be run."""
    found = of_sizes(index, value)
    if found is None:
        return None
    nodes, shaped = found
    graph = onnx.GraphProto(name="mask")
    graph.node.extend(index.nodes[i] for i in nodes)
    read = {n for node in graph.node for n in node.input if n}
    made = {o for node in graph.node for o in node.output}
    every = list(every)
    try:
        for name in sorted(read - made - set(shaped)):
            graph.initializer.append(embedded_constant(index, name))
        feeds = [_shapes(shaped, sizes) for sizes in every]
        for name in shaped:
            if name not in made:
                rank = [None] * feeds[0][name].ndim
                graph.input.append(helper.make_tensor_value_info(name, _T.FLOAT, rank))
        graph.output.extend([onnx.ValueInfoProto(name=value)])
        imports = [helper.make_opsetid(d, v) for d, v in index.opsets.items()]
        model = helper.make_model(graph, opset_imports=imports, ir_version=10)
        runner = Executable(model)
        return [runner.run({n: f[n] for n in shaped if n not in made})[0] for f in feeds]
    except (RuntimeError, UnverifiableError, KeyError, ValueError):
        return None


def _shapes(shaped: Iterable[str], sizes: Concrete) -> dict[str, NDArray[Any]]:
    """Tensors of these shapes that hold nothing of interest."""
    feeds = {}
    for name in shaped:
        shape = sizes.shape(name)
        if shape is None:
            raise KeyError(name)
        feeds[name] = np.zeros([int(d) for d in shape], np.float32)
    return feeds
