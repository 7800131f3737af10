"""The nodes and the initializers of a graph as fields of bytes, copied as little as possible."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.descriptor import FieldDescriptor
from onnx import GraphProto, ModelProto, NodeProto, TensorProto

from sfa_onnx.files.fields import Fields, loop, wires
from sfa_onnx.files.spans import spans

__all__ = ["Parts", "parts_of_graph", "parts_of_model"]

_GRAPH: Final = {name: field.number for name, field in GraphProto.DESCRIPTOR.fields_by_name.items()}
_MANY: Final = ("node", "initializer", "value_info", "input", "output")
_TAGS: Final = bytes(_GRAPH[name] << 3 | 2 for name in _MANY)
_MAIN: Final = ModelProto.DESCRIPTOR.fields_by_name["graph"].number

Parts = tuple[Fields | None, Fields | None]  # nodes and initializers; None: not as protobuf writes


def parts_of_model(data: bytes) -> Parts | None:
    """Those of the main graph of a model as a file holds it; None where it is written unusually."""
    found: list[tuple[int, int]] = []
    for _, number, begin, end, _ in loop(data, 0, 0, len(data), 0, wires(ModelProto)):
        if number == _MAIN:
            found.append((begin, end))
        elif number < 0:
            return None
    if len(found) != 1:
        return None
    fields = spans(np.frombuffer(data, np.uint8), *found[0], _TAGS)
    if fields is None:
        return None
    numbers, starts, ends = fields
    nodes, tensors = (np.flatnonzero(numbers == _GRAPH[n]) for n in ("node", "initializer"))
    return (
        Fields.within(NodeProto, data, starts[nodes], ends[nodes]),
        Fields.within(TensorProto, data, starts[tensors], ends[tensors]),
    )


def parts_of_graph(graph: GraphProto, *, small: bool) -> Parts:
    """Those of a graph; a small one is copied at once.

    Of a large graph, initializers that lie in the file itself are left empty.
    """
    if small:
        flat = _FLAT.FromString(graph.SerializeToString())
        return Fields.of(NodeProto, flat.node), Fields.of(TensorProto, flat.initializer)
    outside = TensorProto.EXTERNAL
    return Fields.of(NodeProto, (node.SerializeToString() for node in graph.node)), Fields.of(
        TensorProto,
        (t.SerializeToString() if t.data_location == outside else b"" for t in graph.initializer),
    )


def _two_lists() -> Any:
    """A message of GraphProto's numbers that keeps nodes and initializers as their bytes."""
    file = descriptor_pb2.FileDescriptorProto(name="flat.proto", syntax="proto2")
    flat = file.message_type.add(name="Flat")
    for name in ("node", "initializer"):
        flat.field.add(
            name=name, number=_GRAPH[name], type=FieldDescriptor.TYPE_BYTES,
            label=FieldDescriptor.LABEL_REPEATED,
        )  # fmt: skip
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("Flat"))


_FLAT: Final = _two_lists()
