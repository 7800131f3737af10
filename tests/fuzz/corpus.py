"""Where mutations start from: small models of every kind that the verbs know."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, helper, numpy_helper

import sfa_onnx
from tests.broken_models import BROKEN, sound
from tests.hand_sites import GATHER_FLOAT, GATHER_INT8, model_of, several_sites
from tests.zoo import bodies

_ATC = Path(__file__).parents[1] / "data" / "atc" / "cases"


def gathered(kind: int = TensorProto.INT32, opset: int = 17) -> ModelProto:
    """Rows gathered by listed indices, the hidden ones masked: what exporters write most."""
    nodes = [
        helper.make_node("Cast", ["indices"], ["i"], to=TensorProto.INT64),
        helper.make_node("Less", ["i", "zero"], ["bad"]),
        helper.make_node("Unsqueeze", ["bad", "a2"], ["bad4"]),
        helper.make_node("Max", ["i", "zero"], ["safe"]),
        helper.make_node("Unsqueeze", ["safe", "m1"], ["at"]),
        helper.make_node("GatherND", ["kv", "at"], ["rows"], batch_dims=1),
        helper.make_node("Transpose", ["rows"], ["t"], perm=[0, 1, 3, 2]),
        helper.make_node("MatMul", ["query", "t"], ["s"]),
        helper.make_node("Mul", ["s", "scale"], ["x"]),
        helper.make_node("Where", ["bad4", "low", "x"], ["y"]),
        helper.make_node("Softmax", ["y"], ["p"], axis=-1),
        helper.make_node("Slice", ["rows", "z1", "w", "m1"], ["v"]),
        helper.make_node("MatMul", ["p", "v"], ["out"]),
    ]
    ints = {"zero": 0, "a2": [2], "z1": [0], "m1": [-1], "w": [32]}
    weights = [  # a scalar or a list of one
        helper.make_tensor(n, 7, np.shape(v), np.ravel(v)) for n, v in ints.items()
    ]
    weights += [helper.make_tensor(n, 1, [], [v]) for n, v in (("scale", 0.16), ("low", -1e30))]
    inputs = [
        ("query", 1, ["B", "S", 4, 40]),
        ("kv", 1, ["B", "T", 40]),
        ("indices", kind, ["B", "S", 6]),
    ]
    graph = helper.make_graph(
        nodes,
        "gathered",
        [helper.make_tensor_value_info(*i) for i in inputs],
        [helper.make_tensor_value_info("out", 1, ["B", "S", 4, 32])],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def _with_files(model: ModelProto) -> ModelProto:
    """Initializers of more than 8 bytes in an external file (which need not be there)."""
    for tensor in model.graph.initializer:
        array = numpy_helper.to_array(tensor)
        if array.nbytes >= 4:
            tensor.CopyFrom(
                TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
            )
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in (
                ("location", "w.bin"),
                ("offset", "0"),
                ("length", str(array.nbytes)),
            ):
                tensor.external_data.add(key=key, value=value)
    return model


def seeds() -> Iterator[tuple[str, ModelProto]]:
    """Every model that mutations start from, with its name."""
    yield "gathered", gathered()
    yield "gathered-int64-13", gathered(TensorProto.INT64, 13)
    yield "gathered-external", _with_files(gathered())
    plain = {"gather-float": GATHER_FLOAT, "gather-int8": GATHER_INT8}
    for name, text in plain.items():
        yield name, model_of(text)
        yield f"{name}-in-if", bodies.in_if(model_of(text))
        fused = sfa_onnx.fuse(model_of(text))
        assert fused.fused, name
        yield f"{name}-fused", fused.model
    yield "three-sites", several_sites(3)[0]
    call = helper.make_node(
        "Site", [v.name for v in gathered().graph.input], ["out"], domain="local"
    )
    whole = gathered()
    whole.functions.append(bodies.as_function(gathered(), "Site"))
    whole.functions[0].domain = "local"
    del whole.graph.node[:]
    whole.graph.node.append(call)
    whole.opset_import.append(helper.make_opsetid("local", 1))
    yield "function", whole
    for name, (change, _) in BROKEN.items():
        model = sound()
        change(model)
        yield f"broken-{name.replace(' ', '-')}", model
    for path in sorted(_ATC.glob("*.onnx"))[::9]:
        yield path.stem, onnx.load(path, load_external_data=False)
