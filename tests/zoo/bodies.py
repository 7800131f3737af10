"""Edits that move any model into bodies of If, Loop and Scan, or into local functions."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

__all__ = [
    "as_function",
    "calls",
    "in_if",
    "in_loop",
    "in_scan",
    "merged",
    "nested",
    "renamed",
    "with_inputs",
]

COND = "use_cache_branch"


def renamed(graph: onnx.GraphProto, suffix: str, keep: set[str]) -> onnx.GraphProto:
    """A copy in which every value made inside has a suffix; `keep` and outer values stay."""
    out = onnx.GraphProto()
    out.CopyFrom(graph)
    made = {o for n in out.node for o in n.output} | {t.name for t in out.initializer}
    made |= {v.name for v in out.input}
    names = {name: name + suffix for name in made - keep if name}
    for node in out.node:
        node.name += suffix if node.name else ""
        node.input[:] = [names.get(i, i) for i in node.input]
        node.output[:] = [names.get(o, o) for o in node.output]
    for field in (out.initializer, out.value_info, out.input, out.output):
        for item in field:
            item.name = names.get(item.name, item.name)
    return out


def _outer(model: onnx.ModelProto, inputs, outputs, nodes, initializers=()) -> onnx.ModelProto:
    graph = helper.make_graph(nodes, "outer", inputs, outputs, list(initializers))
    made = helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    made.functions.extend(model.functions)
    return made


def _body(graph: onnx.GraphProto, first: int = 0, *, hoist: bool = False) -> onnx.GraphProto:
    """Nodes from `first` on, capturing what they need; `hoist`: constants stay outside."""
    body = onnx.GraphProto(name=graph.name)
    body.node.extend(graph.node[first:])
    if not hoist:
        body.initializer.extend(graph.initializer)
    body.value_info.extend(graph.value_info)
    made = {o for n in body.node for o in n.output}
    body.output.extend(o for o in graph.output if o.name in made)
    return body


def in_if(
    model: onnx.ModelProto,
    *,
    first: int = 0,
    hoist: bool = False,
    suffix: str = "",
    other: onnx.ModelProto | None = None,
) -> onnx.ModelProto:
    """`model` behind a condition; both branches hold it unless `other` gives the second one.

    Args:
        first: nodes before this one stay outside and are captured.
        hoist: constants stay outside.
        suffix: of the names in the else branch; "" leaves the same names in both.
        other: a model of the same inputs and outputs for the else branch.
    """
    hoist = hoist or first > 0
    graph = model.graph
    then = renamed(_body(graph, first, hoist=hoist), "/then" if suffix else "", set())
    second = (other or model).graph
    otherwise = renamed(_body(second, first, hoist=hoist), suffix, set())
    outs = [o.name.removesuffix("/then") for o in then.output]
    node = helper.make_node(
        "If", [COND], outs, "decoder_if", then_branch=then, else_branch=otherwise
    )
    inputs = [*graph.input, helper.make_tensor_value_info(COND, TensorProto.BOOL, [])]
    kept = graph.initializer if hoist else []
    return _outer(model, inputs, graph.output, [*graph.node[:first], node], kept)


def merged(prefill: onnx.ModelProto, decode: onnx.ModelProto) -> onnx.ModelProto:
    """A merged decoder: the union of both models' inputs, each model in a branch."""
    inputs = {v.name: v for v in (*prefill.graph.input, *decode.graph.input)}
    both = in_if(decode, other=prefill)
    cond = both.graph.input[-1]
    del both.graph.input[:]
    both.graph.input.extend([*inputs.values(), cond])
    return both


def _stacked(info: onnx.ValueInfoProto, steps: int | None = None) -> onnx.ValueInfoProto:
    """A value with a new first axis."""
    made = onnx.ValueInfoProto()
    made.CopyFrom(info)
    made.name = f"{info.name}/all"
    shape = made.type.tensor_type.shape
    shape.ClearField("dim")
    first = shape.dim.add()
    if steps is not None:
        first.dim_value = steps
    shape.dim.extend(info.type.tensor_type.shape.dim)
    return made


def in_loop(
    model: onnx.ModelProto, states: tuple[str, ...] = (), *, declared: bool = True, trips: int = 1
) -> onnx.ModelProto:
    """`model` as the body of a Loop; its outputs are scanned, `states` are handed on as they are.

    Args:
        states: inputs of the model that become states of the loop (`name` -> `name/it`).
        declared: whether body inputs have shapes.
        trips: how often the loop runs.
    """
    graph = model.graph
    body = _body(graph)
    body.ClearField("output")
    fresh = {s: f"{s}/it" for s in states}
    for node in body.node:
        node.input[:] = [fresh.get(i, i) for i in node.input]
    infos = {v.name: v for v in graph.input}
    body.input.append(helper.make_tensor_value_info("it", TensorProto.INT64, []))
    body.input.append(helper.make_tensor_value_info("go", TensorProto.BOOL, []))
    body.output.append(helper.make_tensor_value_info("go/next", TensorProto.BOOL, []))
    body.node.append(helper.make_node("Identity", ["go"], ["go/next"]))
    for state in states:
        for name, field in ((fresh[state], body.input), (f"{state}/next", body.output)):
            info = field.add()
            info.CopyFrom(infos[state])
            info.name = name
            if not declared:
                info.type.tensor_type.ClearField("shape")
        body.node.append(helper.make_node("Identity", [fresh[state]], [f"{state}/next"]))
    outs = [f"{o.name}/all" for o in graph.output]
    body.output.extend(graph.output)
    nodes = [
        helper.make_node(
            "Loop", ["trips", "", *states], [*(f"{s}/last" for s in states), *outs], "steps",
            body=body,
        )
    ]  # fmt: skip
    outputs = [_stacked(info) for info in graph.output]
    constant = numpy_helper.from_array(np.asarray(trips, np.int64), "trips")
    return _outer(model, graph.input, outputs, nodes, [constant])


def in_scan(model: onnx.ModelProto, along: tuple[str, ...], steps: int) -> onnx.ModelProto:
    """`model` as the body of a Scan over a new first axis of the inputs `along`."""
    graph = model.graph
    body = _body(graph)
    nodes, inputs = [], []
    for info in graph.input:
        inputs.append(_stacked(info, steps) if info.name in along else info)
        body.input.extend([info] if info.name in along else [])
    outs = [f"{o.name}/all" for o in graph.output]
    order = [v.name for v in body.input]
    nodes.append(
        helper.make_node(
            "Scan", [f"{n}/all" for n in order], outs, "layers", body=body,
            num_scan_inputs=len(order),
        )
    )  # fmt: skip
    outputs = [_stacked(info) for info in graph.output]
    return _outer(model, inputs, outputs, nodes)


def nested(model: onnx.ModelProto, states: tuple[str, ...] = ()) -> onnx.ModelProto:
    """`model` in a branch of an If in a Loop."""
    return in_loop(in_if(model, suffix="/else"), states)


def as_function(model: onnx.ModelProto, name: str, **references: str) -> onnx.FunctionProto:
    """The model as a local function; constants become Constant nodes.

    Args:
        references: constant -> attribute of the function that gives it instead (a float).
    """
    nodes = []
    for tensor in model.graph.initializer:
        made = helper.make_node("Constant", [], [tensor.name], f"{name}_{tensor.name}")
        if tensor.name in references:
            given = made.attribute.add(name="value_float", type=onnx.AttributeProto.FLOAT)
            given.ref_attr_name = references[tensor.name]
        else:
            made.attribute.append(helper.make_attribute("value", tensor))
        nodes.append(made)
    return helper.make_function(
        "local",
        name,
        [v.name for v in model.graph.input],
        [v.name for v in model.graph.output],
        [*nodes, *model.graph.node],
        [helper.make_opsetid("", model.opset_import[0].version)],
        attributes=sorted(set(references.values())),
    )


def calls(
    model: onnx.ModelProto, function: onnx.FunctionProto, attributes: list[dict]
) -> onnx.ModelProto:
    """A model that calls `function` once per entry, each on inputs of its own ("q.0")."""
    inputs, outputs, nodes = [], [], []
    for i, given in enumerate(attributes):
        for field, made in ((model.graph.input, inputs), (model.graph.output, outputs)):
            for info in field:
                new = onnx.ValueInfoProto()
                new.CopyFrom(info)
                new.name = f"{info.name}.{i}"
                made.append(new)
        nodes.append(
            helper.make_node(
                function.name, [f"{n}.{i}" for n in function.input],
                [f"{n}.{i}" for n in function.output], f"layers.{i}/attn", domain="local", **given,
            )
        )  # fmt: skip
    made = _outer(model, inputs, outputs, nodes)
    made.opset_import.append(helper.make_opsetid("local", 1))
    made.functions.append(function)
    return made


def with_inputs(model: onnx.ModelProto, prefix: str) -> onnx.ModelProto:
    """A copy whose inputs have other names."""
    out = onnx.ModelProto()
    out.CopyFrom(model)
    names = {v.name: prefix + v.name for v in out.graph.input}
    for node in out.graph.node:
        node.input[:] = [names.get(i, i) for i in node.input]
    for info in (*out.graph.input, *out.graph.value_info):
        info.name = names.get(info.name, info.name)
    return out
