"""What a site costs before and after fusing: floating-point operations and bytes moved.

A model, not a measurement: multiply-adds of every contraction, and every operand read and every
result written once. It exists to compare a region with its replacement (absorption trades
operations: with few keys per query it can lose to the dense form it replaces).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx

from sfa_onnx.files.onnx_attrs import attribute, attributes
from sfa_onnx.operator.op import SPARSE_FLASH_ATTENTION, SPARSE_FLASH_ATTENTION_ANTIQUANT
from sfa_onnx.passes.candidate import Candidate, Role
from sfa_onnx.passes.graph.index import GraphIndex
from sfa_onnx.passes.shapes.concrete import Concrete, Shape
from sfa_onnx.passes.shapes.known import known_shape

__all__ = [
    "Cost",
    "compare_costs",
    "nominal_sizes",
    "region_cost",
    "replacement_cost",
    "selection_cost",
]

NOMINAL_LENGTH = 4096  # for a symbolic sequence or cache length
NOMINAL_BATCH = 1
# A CPU core pair as a yardstick: operations and bytes per second, only their ratio matters.
FLOPS_PER_SECOND, BYTES_PER_SECOND = 4e11, 4e10
_VIEWS = frozenset(("Identity", "Reshape", "Squeeze", "Unsqueeze", "Shape", "Constant"))
_CONTRACTIONS = frozenset(("MatMul", "FusedMatMul", "Gemm"))


@dataclass(frozen=True)
class Cost:
    """Work of a set of nodes; `unknown` counts nodes whose shapes are unknown."""

    flops: float = 0.0
    bytes: float = 0.0
    unknown: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.flops + other.flops, self.bytes + other.bytes, self.unknown + other.unknown
        )

    @property
    def seconds(self) -> float:
        """Roofline time on the yardstick machine."""
        return max(self.flops / FLOPS_PER_SECOND, self.bytes / BYTES_PER_SECOND)


def nominal_sizes(index: GraphIndex, given: Mapping[str, int] | None = None) -> dict[str, int]:
    """A size for every symbol of the graph's inputs: `given`, else batch 1 and length 4096."""
    sizes = dict(given or {})
    for dims in index.entering.values():
        for position, dim in enumerate(dims or ()):
            if isinstance(dim, str) and dim.isidentifier():
                is_batch = "batch" in dim.lower() or dim.lower() in ("b", "bs", "n")
                nominal = NOMINAL_BATCH if is_batch and position == 0 else NOMINAL_LENGTH
                sizes.setdefault(dim, nominal)
    return sizes


def region_cost(sizes: Concrete, nodes: Iterable[onnx.NodeProto]) -> Cost:
    """Total cost of `nodes` at these sizes."""
    total = Cost()
    for node in nodes:
        if node.op_type not in _VIEWS:
            total += _node_cost(sizes, node)
    return total


def replacement_cost(sizes: Concrete, item: Candidate) -> Cost:
    """Cost of what takes the place of a site, at these sizes of the graph around it."""
    graph = onnx.GraphProto()
    graph.node.extend(item.replacement)
    graph.initializer.extend(item.replacement_initializers)
    made = {name for node in item.replacement for name in node.output}
    made |= {tensor.name for tensor in item.replacement_initializers}
    for name in dict.fromkeys(n for node in item.replacement for n in node.input if n):
        if name not in made:
            _enter(graph, sizes, name)
    own = Concrete(GraphIndex(graph, sizes.index.opsets))
    total = Cost()
    for node in item.replacement:
        if (node.domain, node.op_type) in _FUSED:
            _declare_result(own, node)
        if node.op_type not in _VIEWS:
            total += _node_cost(own, node)
    return total


def _enter(graph: onnx.GraphProto, sizes: Concrete, name: str) -> None:
    """A value of the graph around a replacement: a number where sizes decide it, else its shape."""
    known, shape = sizes.value(name), known_shape(sizes, name)
    if known is not None and known.dtype.kind in "iub":
        graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(known), name))
    elif shape is not None:
        elem = sizes.elem_type(name)
        info = onnx.helper.make_tensor_value_info(name, elem, [int(d) for d in shape])
        graph.input.append(info)


def _declare_result(sizes: Concrete, node: onnx.NodeProto) -> None:
    """The rows that the operator gives: as many as queries, as wide as values."""
    query = known_shape(sizes, node.input[0])
    if query is not None:
        packed = node.op_type == SPARSE_FLASH_ATTENTION_ANTIQUANT.name
        width = query[-1] - (_rope_width(sizes, node, packed) if packed else 0)
        sizes.declare(node.output[0], (*query[:-1], width), sizes.elem_type(node.input[0]))


def compare_costs(before: Cost, after: Cost) -> dict[str, float]:
    """The numbers a report carries for one site."""
    return {
        "flops_before": before.flops,
        "flops_after": after.flops,
        "bytes_before": before.bytes,
        "bytes_after": after.bytes,
        "time_ratio": after.seconds / before.seconds if before.seconds else math.inf,
    }


def _node_cost(sizes: Concrete, node: onnx.NodeProto) -> Cost:
    if (node.domain, node.op_type) in _FUSED:
        return _fused_cost(sizes, node)
    inputs = [known_shape(sizes, name) for name in node.input if name]
    outputs = [known_shape(sizes, name) for name in node.output if name]
    if any(shape is None for shape in (*inputs, *outputs)):
        return Cost(unknown=1)
    known_in = [shape for shape in inputs if shape is not None]
    known_out = [shape for shape in outputs if shape is not None]
    moved = _traffic(sizes, node, known_in, known_out)
    return Cost(_contraction_flops(node, known_in, known_out), moved)


def _contraction_flops(node: onnx.NodeProto, inputs: list[Shape], outputs: list[Shape]) -> float:
    if node.op_type in _CONTRACTIONS and inputs and inputs[0]:
        flags = attributes(node)
        inner = inputs[0][-2] if flags.get("transA") and len(inputs[0]) > 1 else inputs[0][-1]
        return 2.0 * math.prod(outputs[0]) * inner
    if node.op_type == "Einsum":
        equation = attribute(node, "equation", "")
        labels: dict[str, int] = {}
        for term, shape in zip(equation.split("->")[0].split(","), inputs, strict=False):
            labels |= dict(zip(term.strip(), shape, strict=False))
        return 2.0 * math.prod(labels.values()) if len(inputs) > 1 else 0.0
    if node.op_type == "Attention" and len(inputs) > 2:
        batch, heads, rows, width = (*inputs[0], 1, 1, 1, 1)[:4]
        keys, out = inputs[1][-2], inputs[2][-1]
        return 2.0 * batch * heads * rows * keys * (width + out)
    return 0.0


def _traffic(
    sizes: Concrete, node: onnx.NodeProto, inputs: list[Shape], outputs: list[Shape]
) -> float:
    """Bytes read and written; gathers and slices read what they take, not their whole source."""
    written = sum(math.prod(shape) for shape in outputs)
    takes = node.op_type.startswith("Gather") or node.op_type in ("Slice", "Split", "Expand")
    read = written if takes else sum(math.prod(shape) for shape in inputs)
    return float(_item_size(sizes, node) * (read + written))


def _item_size(sizes: Concrete, node: onnx.NodeProto) -> int:
    elem_type = sizes.index.elem_type(node.output[0]) if node.output else 0
    try:
        return int(onnx.helper.tensor_dtype_to_np_dtype(elem_type).itemsize) if elem_type else 4
    except (KeyError, ValueError):
        return 4


_FUSED = {op.key for op in (SPARSE_FLASH_ATTENTION, SPARSE_FLASH_ATTENTION_ANTIQUANT)}


def _fused_cost(sizes: Concrete, node: onnx.NodeProto) -> Cost:
    """2 * tokens * N1 * K * (key width + value width); K gathered rows per token."""
    query, key, indices = (known_shape(sizes, node.input[i]) for i in (0, 1, 3))
    if query is None or key is None or indices is None:
        return Cost(unknown=1)
    selected = min(indices[-1], max(1, key[1] if len(key) == 4 else key[0]))
    tokens, heads, width = math.prod(query[:-2]), query[-2], query[-1]
    packed = node.op_type == SPARSE_FLASH_ATTENTION_ANTIQUANT.name
    rope = _rope_width(sizes, node, packed)
    nope = width - rope if packed else width
    item = _item_size(sizes, node)
    row = key[-1] if packed else (nope + rope) * item
    flops = 2.0 * tokens * heads * selected * (2 * nope + rope)
    return Cost(flops, float(tokens * (selected * row + heads * (2 * nope + rope) * item)))


def _rope_width(sizes: Concrete, node: onnx.NodeProto, packed: bool) -> int:
    if packed:
        return int(attribute(node, "rope_head_dim", 0))
    position = SPARSE_FLASH_ATTENTION.input_index("query_rope")
    shape = known_shape(sizes, node.input[position]) if len(node.input) > position else None
    return shape[-1] if shape else 0


def selection_cost(sizes: Concrete, item: Candidate) -> Cost:
    """Of an indexer: 2 * tokens * Hi * keys * (Di + 1); scores are never written.

    Keys are read once per sequence; with padding they are copied first.
    """
    named: dict[str, int] = {}
    for operand in item.operands:
        shape = known_shape(sizes, operand.value)
        if shape is not None:
            named |= dict(zip(operand.axes, shape, strict=True))
    batch, rows, keys, heads, width = (named.get(n, 1) for n in ("B", "S1", "S2", "Hi", "Di"))
    copies = 3 if any(o.role is Role.MASK for o in item.operands) else 1
    moved = 4.0 * batch * (rows * heads * width + copies * keys * width)
    return Cost(2.0 * batch * rows * heads * keys * (width + 1), moved)
