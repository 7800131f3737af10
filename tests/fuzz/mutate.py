"""Mutations of a model: of its structure, its values, its bytes. The same seed, the same mutant."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Sequence
from typing import Any

from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper

_SIZES = (0, 1, -1, -7, 2, 3, 64, 1 << 20, 1 << 31, (1 << 63) - 1, -(1 << 63))
_NAMES = ("", "\x1b[2Jx", "a\nb", "ghost", "x" * 300, "../up", "\u202eabc", "[bold]")
_OPS = (
    *("Relu", "Max", "Min", "Slice", "Reshape", "GatherND", "Gather", "TopK", "Softmax", "Where"),
    *("Einsum", "MatMul", "Expand", "Squeeze", "Unsqueeze", "Concat", "Split", "Cast", "Tile"),
    *("ScatterND", "ScatterElements", "Range", "If", "Loop", "Transpose", "Pad", "Nothing"),
)


def _graphs(model: ModelProto) -> list[GraphProto]:
    found, stack = [], [model.graph]
    while stack:
        graph = stack.pop()
        found.append(graph)
        for node in graph.node:
            stack += [a.g for a in node.attribute if a.type == AttributeProto.GRAPH]
    return found


def _node(r: random.Random, model: ModelProto) -> NodeProto | None:
    nodes = [n for g in _graphs(model) for n in g.node] + [
        n for f in model.functions for n in f.node
    ]
    return r.choice(nodes) if nodes else None


def _values(model: ModelProto) -> list[str]:
    graph = model.graph
    named = [*graph.input, *graph.initializer]
    return [v.name for v in named] + [o for n in graph.node for o in n.output] + list(_NAMES)


def _input(r: random.Random, m: ModelProto) -> None:
    node = _node(r, m)
    if node is None:
        return
    action = r.randrange(4)
    if action == 0 and node.input:
        del node.input[r.randrange(len(node.input)) :]
    elif action == 1:
        node.input.append(r.choice(_values(m)))
    elif node.input:
        node.input[r.randrange(len(node.input))] = r.choice(_values(m))


def _output(r: random.Random, m: ModelProto) -> None:
    node = _node(r, m)
    if node is not None:
        if node.output and r.random() < 0.6:
            node.output[r.randrange(len(node.output))] = r.choice(_values(m))
        else:
            node.output.append(r.choice(_NAMES))


def _operator(r: random.Random, m: ModelProto) -> None:
    node = _node(r, m)
    if node is not None:
        if r.random() < 0.8:
            node.op_type = r.choice(_OPS)
        else:
            node.domain = r.choice(("", "ai.onnx", "com.microsoft", "npu", "local", "sfa"))


def _attribute(r: random.Random, m: ModelProto) -> None:
    node = _node(r, m)
    if node is None:
        return
    if not node.attribute:
        node.attribute.append(helper.make_attribute(r.choice(("axis", "to", "perm", "k")), 1))
        return
    at = r.randrange(len(node.attribute))
    attribute = node.attribute[at]
    action = r.randrange(5)
    if action == 0:
        del node.attribute[at]
    elif action == 1:
        attribute.type = r.choice(list(AttributeProto.AttributeType.values()))
    elif action == 2:
        attribute.i = r.choice(_SIZES)
    elif action == 3:
        attribute.ints[:] = [r.choice(_SIZES) for _ in range(r.randrange(5))]
        attribute.type = AttributeProto.INTS
    else:
        attribute.name = r.choice(("axis", "axes", "batch_dims", "equation", "", "value"))


def _info(r: random.Random, m: ModelProto) -> None:
    infos = [*m.graph.input, *m.graph.output, *m.graph.value_info]
    if not infos:
        return
    info = r.choice(infos)
    action = r.randrange(4)
    tensor = info.type.tensor_type
    if action == 0:
        tensor.elem_type = r.choice((0, 1, 6, 7, 8, 9, 10, 11, 16, 99))
    elif action == 1 and tensor.shape.dim:
        dim = r.choice(list(tensor.shape.dim))
        dim.dim_value = r.choice(_SIZES)
    elif action == 2:
        tensor.shape.dim.add(dim_param=r.choice(("B", "S", "", "B*2", "\x1b[1m")))
    else:
        info.name = r.choice(_values(m))


def _initializer(r: random.Random, m: ModelProto) -> None:
    if not m.graph.initializer:
        return
    at = r.randrange(len(m.graph.initializer))
    tensor = m.graph.initializer[at]
    action = r.randrange(6)
    if action == 0:
        del m.graph.initializer[at]
    elif action == 1:
        tensor.data_type = r.choice((0, 1, 6, 7, 8, 9, 10, 16, 99))
    elif action == 2:
        tensor.dims[:] = [r.choice(_SIZES) for _ in range(r.randrange(3))]
    elif action == 3:
        tensor.raw_data = r.randbytes(r.choice((0, 3, 4, 8, 16)))
    elif action == 4:
        _other_values(r, tensor)
    else:
        tensor.data_location = TensorProto.EXTERNAL
        for key in ("location", "offset", "length"):
            tensor.external_data.add(
                key=key, value=r.choice(("", "0", "-1", "12kb", "w.bin", "../w"))
            )


def _other_values(r: random.Random, tensor: TensorProto) -> None:
    """Values that keep the tensor sound: sizes and axes that make no sense."""
    for field in ("int64_data", "int32_data", "float_data"):
        values: Any = getattr(tensor, field)
        for i in range(len(values)):
            values[i] = r.choice((0, 1, -1, 5, 1 << 20)) if field != "float_data" else 1e38
    if tensor.raw_data and len(tensor.raw_data) % 8 == 0 and tensor.data_type == TensorProto.INT64:
        sizes = [r.choice(_SIZES) for _ in range(len(tensor.raw_data) // 8)]
        tensor.raw_data = b"".join(s.to_bytes(8, "little", signed=True) for s in sizes)


def _nodes(r: random.Random, m: ModelProto) -> None:
    graph = r.choice(_graphs(m))
    if not graph.node:
        return
    at = r.randrange(len(graph.node))
    if r.random() < 0.5:
        del graph.node[at]
    else:
        graph.node.add().CopyFrom(graph.node[at])


def _model(r: random.Random, m: ModelProto) -> None:
    action = r.randrange(4)
    if action == 0 and m.opset_import:
        r.choice(list(m.opset_import)).version = r.choice((-1, 0, 1, 9, 12, 17, 24, 99))
    elif action == 1:
        m.ir_version = r.choice((0, 1, 3, 8, 13, 99))
    elif action == 2:
        del m.graph.output[:]
    elif m.functions:
        m.functions.add().CopyFrom(r.choice(list(m.functions)))


def _names(r: random.Random, m: ModelProto) -> None:
    node = _node(r, m)
    if node is not None:
        node.name = r.choice(_NAMES)


_MUTATIONS: Sequence[Callable[[random.Random, ModelProto], None]] = (
    *(_input, _input, _output, _operator, _operator, _attribute, _attribute, _info, _info),
    *(_initializer, _initializer, _nodes, _model, _names),
)


def _soft_value(r: random.Random, m: ModelProto) -> None:
    if m.graph.initializer:
        _other_values(r, r.choice(list(m.graph.initializer)))


def _soft_attribute(r: random.Random, m: ModelProto) -> None:
    """Another number of the same type."""
    node = _node(r, m)
    for attribute in [] if node is None else node.attribute:
        if attribute.type == AttributeProto.INT:
            attribute.i = r.choice((0, 1, -1, 2, 3, -5, 7, 1 << 31))
        elif attribute.type == AttributeProto.INTS and attribute.ints:
            at = r.randrange(len(attribute.ints))
            attribute.ints[at] = r.choice((0, 1, -1, 2, 5, 1 << 20))


def _soft_input(r: random.Random, m: ModelProto) -> None:
    """A value that stands already: no cycle, nothing unmade, but other shapes and types."""
    nodes = m.graph.node
    if not nodes:
        return
    at = r.randrange(len(nodes))
    known = [v.name for v in (*m.graph.input, *m.graph.initializer)]
    known += [o for n in nodes[:at] for o in n.output if o]
    if nodes[at].input and known:
        nodes[at].input[r.randrange(len(nodes[at].input))] = r.choice(known)


def _soft_operator(r: random.Random, m: ModelProto) -> None:
    """An operator that takes as many inputs."""
    alike = [("Max", "Min", "Add", "Sub", "Mul", "Div", "MatMul", "Pow", "Mod", "Gather", "Expand")]
    alike += [("Relu", "Neg", "Exp", "Identity", "Shape", "Abs", "Sqrt", "Size", "NonZero")]
    alike += [("Less", "LessOrEqual", "Greater", "Equal", "GreaterOrEqual")]
    nodes = [n for n in m.graph.node if any(n.op_type in group for group in alike)]
    if nodes:
        node = r.choice(nodes)
        node.op_type = r.choice(next(g for g in alike if node.op_type in g))


_SOFT: Sequence[Callable[[random.Random, ModelProto], None]] = (
    *(_soft_value, _soft_value, _soft_attribute, _soft_attribute, _soft_input, _soft_operator),
    *(_info, _names),
)


def mutant(seeds: Sequence[tuple[str, ModelProto]], number: int) -> bytes:
    """Mutant `number`: a serialised model, one to four steps away from a seed.

    Six of ten keep the rules of the format, and so get past the first look at them.
    """
    r = random.Random(number)
    soft = r.random() < 0.6
    name, seed = r.choice(seeds)
    while name.startswith("broken-") and (soft or r.random() < 0.8):
        name, seed = r.choice(seeds)
    model = ModelProto()
    model.CopyFrom(seed)
    for _ in range(r.choice((1, 1, 2, 3, 4))):
        with contextlib.suppress(ValueError, TypeError):  # a number that the field cannot hold
            r.choice(_SOFT if soft else _MUTATIONS)(r, model)
    data = bytearray(model.SerializeToString())
    if data and not soft and r.random() < 0.2:
        for _ in range(r.choice((1, 2, 8))):
            data[r.randrange(len(data))] = r.choice((0, 0xFF, 0x80, r.randrange(256)))
        if r.random() < 0.2:
            del data[r.randrange(len(data)) :]
    return bytes(data)
