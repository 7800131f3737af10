"""A model of DeepSeek-V3.2's size without its weights: 61 layers, about 130,000 nodes.

The graph is real in structure (each layer holds one int8 gather site), the weights are pointers
into a sparse file of 1.5 TB that occupies no disk.
"""

from pathlib import Path

import onnx
from onnx import TensorProto, helper

from tests.hand_sites import GATHER_INT8, model_of

LAYERS = 61
EXPERTS = 256
WEIGHTS_BYTES = 1_500_000_000_000
_STACK = "".join(f'  File "modeling.py", line {n}, in forward\n' for n in range(24))


def _external(name, dims, offset, kind=TensorProto.BFLOAT16):
    length = 2
    for d in dims:
        length *= d
    tensor = TensorProto(name=name, data_type=kind, dims=dims, data_location=TensorProto.EXTERNAL)
    for key, value in (("location", "w.bin"), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor, offset + length


def build(layers=LAYERS, experts=EXPERTS, filler=140, metadata=False):
    """The graph; `metadata` adds what torch's exporter writes on every node."""
    site = model_of(GATHER_INT8).graph
    graph = onnx.GraphProto(name="big")
    offset = 0
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        for value in site.input:
            new = graph.input.add()
            new.CopyFrom(value)
            new.name = prefix + value.name
        for tensor in site.initializer:
            new = graph.initializer.add()
            new.CopyFrom(tensor)
            new.name = prefix + tensor.name
        for node in site.node:
            new = graph.node.add()
            new.CopyFrom(node)
            new.name = prefix + node.name
            for field in (new.input, new.output):
                for i, name in enumerate(field):
                    field[i] = prefix + name
        last = prefix + "y"
        for n in range(filler):
            out = f"{prefix}f{n}"
            graph.node.add(op_type="Relu", input=[last], output=[out], name=out)
            last = out
        for expert in range(experts if layer >= 3 else 0):
            base = f"{prefix}experts.{expert}."
            value = last
            for part in ("gate", "up", "down"):
                weight, offset = _external(base + part, [7168, 2048], offset)
                graph.initializer.append(weight)
                out = base + part + "_out"
                graph.node.add(op_type="MatMul", input=[value, base + part], output=[out], name=out)
                value = out
            for k in range(5):
                out = f"{base}act{k}"
                graph.node.add(op_type="Sigmoid", input=[value], output=[out], name=out)
                value = out
        graph.output.add().CopyFrom(
            helper.make_tensor_value_info(last, TensorProto.FLOAT, ["B", "S1", 4, 16])
        )
    if metadata:
        _annotate(graph)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def _annotate(graph):
    for node in graph.node:
        scope = ".".join(node.name.split(".")[:3])
        node.metadata_props.add(key="namespace", value=f": Model/{scope}: Layer/{node.name}")
        node.metadata_props.add(key="pkg.torch.onnx.stack_trace", value=_STACK)
        node.metadata_props.add(key="pkg.torch.onnx.name_scopes", value=f"['', '{scope}', '']")
    known = onnx.shape_inference.infer_shapes(model_of(GATHER_INT8)).graph.value_info
    types = {v.name: v.type for v in known}
    plain = helper.make_tensor_type_proto(TensorProto.FLOAT, ["B", "S1", 4, 16])
    for node in graph.node:
        name = node.output[0]
        if not name.endswith(".y"):
            graph.value_info.add(name=name).type.CopyFrom(types.get(name.split(".")[-1], plain))


def write(folder, **options):
    """Write the model and its weightless weights; returns the path."""
    path = Path(folder) / "big.onnx"
    path.write_bytes(build(**options).SerializeToString())
    with (Path(folder) / "w.bin").open("wb") as stream:
        stream.truncate(WEIGHTS_BYTES)
    return path
