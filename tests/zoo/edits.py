"""Edits of a graph that do not change what it computes, and packers of it as other tools do.

Each takes a model and returns a new one. `EDITS` are ours (names, order, residue), `TOOLS` are the
optimisers people run before us.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Model = onnx.ModelProto


def copy_of(model: Model) -> Model:
    """A deep copy without stale shapes of inner values."""
    new = Model()
    new.CopyFrom(model)
    return new


def _types(model: Model) -> dict[str, int]:
    graph = model.graph
    known = {}
    for value in (*graph.value_info, *graph.input, *graph.output):
        known[value.name] = value.type.tensor_type.elem_type
    return known | {t.name: t.data_type for t in graph.initializer}


def _replace_nodes(model: Model, nodes: Iterable[onnx.NodeProto]) -> Model:
    kept = [onnx.NodeProto.FromString(n.SerializeToString()) for n in nodes]
    del model.graph.node[:]
    model.graph.node.extend(kept)
    return model


def renamed(model: Model) -> Model:
    """Inner values and nodes get meaningless names; nothing tells roles by name any more."""
    model = copy_of(model)
    graph = model.graph
    fixed = {v.name for v in (*graph.input, *graph.output)}
    table: dict[str, str] = {"": ""}

    def new(name: str) -> str:
        if name in fixed:
            return name
        return table.setdefault(name, f"v{(len(table) * 7919) % 100003}")

    for number, node in enumerate(graph.node):
        node.name = f"n{number * 31 % 997}_{number}"
        node.doc_string = ""
        del node.metadata_props[:]
        node.input[:] = [new(n) for n in node.input]
        node.output[:] = [new(n) for n in node.output]
    for tensor in graph.initializer:
        tensor.name = new(tensor.name)
    del graph.value_info[:]
    return model


def unnamed(model: Model) -> Model:
    """No node names, no shapes of inner values, no metadata."""
    model = copy_of(model)
    for node in model.graph.node:
        node.name = node.doc_string = ""
        del node.metadata_props[:]
    del model.graph.value_info[:]
    return model


def commuted(model: Model) -> Model:
    """Operands of commutative nodes swapped."""
    model = copy_of(model)
    for node in model.graph.node:
        if node.op_type in ("Add", "Mul", "And", "Or", "Equal") and len(node.input) == 2:
            node.input[:] = list(node.input)[::-1]
    return model


def constants_as_nodes(model: Model) -> Model:
    """Small initializers become Constant nodes."""
    model = copy_of(model)
    small = [t for t in model.graph.initializer if np.prod(t.dims, dtype=int) < 64]
    nodes = [helper.make_node("Constant", [], [t.name], value=t) for t in small]
    for t in small:
        model.graph.initializer.remove(t)
    return _replace_nodes(model, [*nodes, *list(model.graph.node)])


def constants_as_initializers(model: Model) -> Model:
    """Constant nodes become initializers."""
    model = copy_of(model)
    kept = []
    for node in model.graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            tensor = node.attribute[0].t
            tensor.name = node.output[0]
            model.graph.initializer.append(tensor)
        else:
            kept.append(node)
    return _replace_nodes(model, kept)


def _after_each(
    model: Model, op_types: set[str], make: Callable[[str, str, int], list[onnx.NodeProto]]
) -> Model:
    """Put `make(source, target, elem_type)` behind the first output of chosen nodes."""
    model = onnx.shape_inference.infer_shapes(copy_of(model))
    types = _types(model)
    final = {v.name for v in model.graph.output}
    renames: dict[str, str] = {}
    nodes: list[onnx.NodeProto] = []
    taken = {o for n in model.graph.node for o in n.output}
    suffix = "__after"
    while any(name.endswith(suffix) for name in taken):  # this model was edited before
        suffix += "_"
    for node in model.graph.node:
        node.input[:] = [renames.get(n, n) for n in node.input]
        nodes.append(node)
        out = node.output[0]
        if (op_types and node.op_type not in op_types) or out in final or out not in types:
            continue
        extra = make(out, out + suffix, types[out])
        if extra:
            nodes.extend(extra)
            renames[out] = out + suffix
    return _replace_nodes(model, nodes)


def with_identities(model: Model) -> Model:
    """An Identity behind every node."""
    return _after_each(model, set(), lambda a, b, _: [helper.make_node("Identity", [a], [b])])


def with_cast_pairs(model: Model) -> Model:
    """Float results go through float64 and back."""

    def pair(a: str, b: str, kind: int) -> list[onnx.NodeProto]:
        if kind not in (TensorProto.FLOAT, TensorProto.FLOAT16):
            return []
        return [
            helper.make_node("Cast", [a], [b + "w"], to=TensorProto.DOUBLE),
            helper.make_node("Cast", [b + "w"], [b], to=kind),
        ]

    return _after_each(model, {"MatMul", "Einsum", "Mul", "Gather", "GatherND", "Concat"}, pair)


def with_same_casts(model: Model) -> Model:
    """Casts to the type a value has anyway, as the legacy exporter leaves them."""

    def cast(a: str, b: str, kind: int) -> list[onnx.NodeProto]:
        return [helper.make_node("Cast", [a], [b], to=kind)]

    return _after_each(model, {"MatMul", "Mul", "Softmax", "Reshape", "Gather"}, cast)


def with_views(model: Model) -> Model:
    """Results are unsqueezed and squeezed again."""

    def views(a: str, b: str, kind: int) -> list[onnx.NodeProto]:
        axes = helper.make_tensor(b + "ax", TensorProto.INT64, [1], [0])
        return [
            helper.make_node("Constant", [], [b + "ax"], value=axes),
            helper.make_node("Unsqueeze", [a, b + "ax"], [b + "u"]),
            helper.make_node("Squeeze", [b + "u", b + "ax"], [b]),
        ]

    ops = {"MatMul", "Einsum", "Mul", "Gather", "GatherND", "GatherElements", "Softmax", "Concat"}
    return _after_each(model, ops, views)


def with_flat_views(model: Model) -> Model:
    """Results of known rank are flattened and shaped back by their own Shape."""

    def views(a: str, b: str, kind: int) -> list[onnx.NodeProto]:
        flat = helper.make_tensor(b + "fl", TensorProto.INT64, [1], [-1])
        return [
            helper.make_node("Constant", [], [b + "fl"], value=flat),
            helper.make_node("Shape", [a], [b + "sh"]),
            helper.make_node("Reshape", [a, b + "fl"], [b + "r"]),
            helper.make_node("Reshape", [b + "r", b + "sh"], [b]),
        ]

    return _after_each(model, {"MatMul", "Einsum", "Softmax", "Concat"}, views)


def split_transposes(model: Model) -> Model:
    """Every Transpose of rank 3 or more becomes two."""
    model = copy_of(model)
    nodes = []
    for node in model.graph.node:
        perm = next((list(a.ints) for a in node.attribute if a.name == "perm"), None)
        if node.op_type != "Transpose" or not perm or len(perm) < 3:
            nodes.append(node)
            continue
        first = [*range(1, len(perm)), 0]
        second = [first.index(p) for p in perm]
        middle = node.output[0] + "__half"
        nodes.append(helper.make_node("Transpose", [node.input[0]], [middle], perm=first))
        nodes.append(helper.make_node("Transpose", [middle], [node.output[0]], perm=second))
    return _replace_nodes(model, nodes)


def shuffled(model: Model) -> Model:
    """Another topological order: nodes as late as possible."""
    model = copy_of(model)
    nodes = list(model.graph.node)
    makers = {o: i for i, n in enumerate(nodes) for o in n.output}
    order: list[int] = []
    seen: set[int] = set()
    todo = [(makers[v.name], False) for v in model.graph.output if v.name in makers]
    while todo:
        index, done = todo.pop()
        if done:
            order.append(index)
        elif index not in seen:
            seen.add(index)
            todo.append((index, True))
            needs = [makers[n] for n in nodes[index].input if n in makers]
            todo.extend((i, False) for i in sorted(set(needs)))
    return _replace_nodes(model, [nodes[i] for i in order])


def as_function(model: Model) -> Model:
    """The whole graph becomes one model-local function, called once."""
    model = copy_of(model)
    graph = model.graph
    body = list(graph.node)
    inits = [helper.make_node("Constant", [], [t.name], value=t) for t in graph.initializer]
    ins, outs = [v.name for v in graph.input], [v.name for v in graph.output]
    function = helper.make_function(
        "local.zoo", "Block", ins, outs, [*inits, *body], list(model.opset_import)
    )
    call = helper.make_node("Block", ins, outs, domain="local.zoo", name="block")
    call_graph = helper.make_graph([call], graph.name or "g", list(graph.input), list(graph.output))
    new = helper.make_model(
        call_graph,
        functions=[function],
        opset_imports=[*model.opset_import, helper.make_opsetid("local.zoo", 1)],
        ir_version=max(model.ir_version, 8),
    )
    return new


def scale_inverted(model: Model) -> Model:
    """Multiplications by a positive scalar constant become divisions by its inverse."""
    model = constants_as_initializers(model)
    values = {t.name: t for t in model.graph.initializer}
    for number, node in enumerate(model.graph.node):
        tensor = values.get(node.input[1]) if node.op_type == "Mul" else None
        if tensor is None or len(tensor.dims) > 0 or tensor.data_type != TensorProto.FLOAT:
            continue
        value = float(numpy_helper.to_array(tensor))
        if value <= 0:
            continue
        name = f"inverse_{number}"
        model.graph.initializer.append(
            numpy_helper.from_array(np.array(1.0 / value, np.float32), name)
        )
        node.op_type = "Div"
        node.input[1] = name
    return model


EDITS: dict[str, Callable[[Model], Model]] = {
    "renamed": renamed,
    "unnamed": unnamed,
    "commuted": commuted,
    "constant-nodes": constants_as_nodes,
    "constant-initializers": constants_as_initializers,
    "identities": with_identities,
    "cast-pairs": with_cast_pairs,
    "same-casts": with_same_casts,
    "views": with_views,
    "flat-views": with_flat_views,
    "split-transposes": split_transposes,
    "shuffled": shuffled,
    "function": as_function,
    "scale-inverted": scale_inverted,
}


def ort_optimised(model: Model, level: str = "basic") -> Model:
    """As onnxruntime's offline optimiser leaves it."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    levels = ort.GraphOptimizationLevel
    options.graph_optimization_level = (
        levels.ORT_ENABLE_BASIC if level == "basic" else levels.ORT_ENABLE_EXTENDED
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "out.onnx"
        options.optimized_model_filepath = str(path)
        ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return onnx.load(path)


def slimmed(model: Model) -> Model:
    """After onnxslim."""
    import onnxslim

    return onnxslim.slim(copy_of(model))


def simplified(model: Model) -> Model:
    """After onnxsim."""
    import onnxsim

    return onnxsim.simplify(copy_of(model))[0]


TOOLS: dict[str, Callable[[Model], Model]] = {
    "ort-basic": lambda m: ort_optimised(m, "basic"),
    "ort-extended": lambda m: ort_optimised(m, "extended"),
    "onnxslim": slimmed,
    "onnxsim": simplified,
}
