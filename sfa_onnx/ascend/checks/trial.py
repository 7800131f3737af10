"""Run a rewritten node and its replacement side by side in onnxruntime: do they say the same?

Inputs are small integers (exact in every dtype involved, sums included), so results must be equal
to the last bit. Dims the model leaves open are bound to small numbers, equal symbols to equal ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import onnx
from onnx import NodeProto, TensorProto

from sfa_onnx.ascend.flavour.scope import Scope
from sfa_onnx.files.onnx_attrs import attribute
from sfa_onnx.guard.guarded import Stage, evaluate

__all__ = ["compare"]

_T = TensorProto
_LIMIT: Final = 1 << 24  # elements of one trial input
_OPEN_DIM: Final = 6
_INDEXED: Final = {"GatherND": 1, "ScatterND": 1, "ScatterElements": 1, "GatherElements": 1}

Array = np.ndarray[Any, Any]


def compare(
    scope: Scope,
    old: NodeProto,
    new: Sequence[NodeProto],
    forced: dict[str, Array] | None = None,
    *,
    loose: bool = False,
) -> str:
    """Why it is not shown that both agree bit for bit on trial inputs; empty when it is.

    `forced` gives the value of inputs that are not free (a proven k). `loose`: the old node leaves
    the order along its axis open (TopK, sorted = 0), so both sides are sorted first.
    """
    feeds: dict[str, Array] = {}
    for name in dict.fromkeys(old.input):
        if not name:
            continue
        value = (forced or {}).get(name)
        value = scope.array(name) if value is None else value
        if value is None:
            value = _draw(scope, old, name)
        if value is None:
            return f"nothing is known of the shape or dtype of {name!r}"
        feeds[name] = np.asarray(value)
    outputs = [o for o in old.output if o]
    try:
        before = _run(scope, [old], feeds, outputs)
        after = _run(scope, new, feeds, outputs)
    except Exception as error:  # onnxruntime has one exception type per status; all mean "no"
        return f"the trial did not run: {str(error).splitlines()[0][:160]}"
    if loose:
        axis = int(attribute(old, "axis", -1))
        before, after = ([np.sort(a, axis=axis) for a in side] for side in (before, after))
    for name, a, b in zip(outputs, before, after, strict=True):
        if a.dtype != b.dtype or a.shape != b.shape or not _equal(a, b):
            return f"output {name!r} differs in the trial run"
    return ""


def _equal(a: Array, b: Array) -> bool:
    return a.tobytes() == b.tobytes() or bool(np.array_equal(a, b, equal_nan=a.dtype.kind == "f"))


def _draw(scope: Scope, node: NodeProto, name: str) -> Array | None:
    dims, elem = scope.dims(name), scope.dtype(name)
    if dims is None or not elem:
        return None
    labels = _labels(node, name)
    sizes = _label_sizes(scope, node) if len(labels) == len(dims) else {}
    shape = tuple(
        d if d is not None else sizes.get(labels[i], _OPEN_DIM) if sizes else _OPEN_DIM
        for i, d in enumerate(dims)
    )
    if np.prod(shape, dtype=np.float64) > _LIMIT:
        return None
    rng = np.random.default_rng(len(shape))
    dtype = onnx.helper.tensor_dtype_to_np_dtype(elem)
    position = list(node.input).index(name)
    if _INDEXED.get(node.op_type) == position:
        return _indices(scope, node, shape, rng)
    if elem == _T.BOOL:
        return rng.integers(0, 2, shape).astype(bool)
    low = 1 if node.op_type in ("Mod", "Div") and position == 1 else -4
    if dtype.kind == "u":
        low = max(low, 0)
    return rng.integers(low, 5, shape).astype(dtype)


def _labels(node: NodeProto, name: str) -> str:
    """The subscripts of an Einsum operand; "" for other ops."""
    equation = attribute(node, "equation")
    if node.op_type != "Einsum" or equation is None:
        return ""
    operands = equation.replace(" ", "").partition("->")[0].split(",")
    position = list(node.input).index(name)
    return operands[position] if position < len(operands) else ""


def _label_sizes(scope: Scope, node: NodeProto) -> dict[str, int]:
    """Sizes that one operand of an Einsum knows hold for the other one too."""
    sizes: dict[str, int] = {}
    for name in node.input:
        pairs = zip(_labels(node, name), scope.dims(name) or (), strict=False)
        sizes.update({c: d for c, d in pairs if d is not None})
    return sizes


def _indices(
    scope: Scope, node: NodeProto, shape: tuple[int, ...], rng: np.random.Generator
) -> Array | None:
    """Indices inside the data, negative ones among them; no slot twice where that is ambiguous."""
    known = scope.dims(node.input[0])
    if not known or not shape:
        return None
    data = [_OPEN_DIM if d is None else d for d in known]
    if node.op_type in ("ScatterElements", "GatherElements"):
        axis = int(attribute(node, "axis", 0))
        if len(shape) != len(data) or not -len(data) <= axis < len(data):
            return None
        size = data[axis]
        if shape[axis] > size:
            return None
        order = rng.permuted(np.broadcast_to(np.arange(size), (*shape[:-1], size)), axis=-1)
        rows = order[..., : shape[-1]] if axis in (-1, len(shape) - 1) else None
        return _along(shape, axis, size, rng) if rows is None else rows - size * (rows % 2)
    batch = int(attribute(node, "batch_dims", 0)) if node.op_type == "GatherND" else 0
    sizes = np.asarray(data[batch : batch + shape[-1]])
    if len(sizes) != shape[-1] or not sizes.all():
        return None  # more indices than the data has axes, or an axis of nothing: none is legal
    drawn = rng.integers(0, sizes, shape) if node.op_type == "GatherND" else _distinct(shape, sizes)
    return None if drawn is None else drawn - sizes * (drawn % 2)


def _along(shape: tuple[int, ...], axis: int, size: int, rng: np.random.Generator) -> Array:
    moved = (*shape[:axis], *shape[axis + 1 :], size)
    order = rng.permuted(np.broadcast_to(np.arange(size), moved), axis=-1)[..., : shape[axis]]
    return np.moveaxis(order, -1, axis)


def _distinct(shape: tuple[int, ...], sizes: Array) -> Array | None:
    count = int(np.prod(shape[:-1]))
    if count > int(np.prod(sizes)):
        return None
    return np.stack(np.unravel_index(np.arange(count), tuple(sizes)), -1).reshape(shape)


def _run(
    scope: Scope, nodes: Sequence[NodeProto], feeds: dict[str, Array], outputs: list[str]
) -> list[Array]:
    made = {o for n in nodes for o in n.output}
    read = {i for n in nodes for i in n.input if i} - made
    constants = []
    for name in sorted(read - feeds.keys()):
        tensor = scope.initializer(name)
        if tensor is None:
            raise ValueError(f"the replacement reads {name!r}, which the node did not")
        constants.append(tensor)
    inputs = [
        onnx.helper.make_tensor_value_info(
            n, onnx.helper.np_dtype_to_tensor_dtype(feeds[n].dtype), feeds[n].shape
        )
        for n in sorted(read & feeds.keys())
    ]
    results = [onnx.helper.make_empty_tensor_value_info(o) for o in outputs]
    graph = onnx.helper.make_graph(list(nodes), "trial", inputs, results, constants)
    opset = onnx.helper.make_opsetid("", scope.opset)
    model = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=10)
    given = {n: feeds[n] for n in read & feeds.keys()}
    if any(v.dtype.kind == "V" or v.dtype.name == "bfloat16" for v in given.values()):
        # onnxruntime's CPU provider lacks bf16 kernels for these ops; onnx's own evaluator has them
        return evaluate(model, given)
    return Stage(model, fallback=False, what=f"{nodes[0].op_type} {nodes[0].name!r}").run(
        outputs, given
    )
