"""Nodes that hold graphs: what these capture, and what they are known to return."""

from __future__ import annotations

import onnx

from sfa_onnx.files.onnx_attrs import CONTROL_FLOW, control_flow

__all__ = ["Dim", "bodies", "captured", "declared_dims", "owners", "returned_info"]

Dim = int | str | None
_STANDARD = ("", "ai.onnx")


def bodies(node: onnx.NodeProto) -> dict[str, onnx.GraphProto]:
    """The graphs that a node holds, by attribute: "then_branch", "body"; "name[0]" in a list."""
    found: dict[str, onnx.GraphProto] = {}
    if node.op_type not in CONTROL_FLOW and node.domain in _STANDARD:
        return found
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            found[attribute.name] = attribute.g
        elif attribute.type == onnx.AttributeProto.GRAPHS:
            found |= {f"{attribute.name}[{i}]": g for i, g in enumerate(attribute.graphs)}
    return found


def owners(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """The nodes of a graph that may hold graphs, found without a look at their attributes."""
    return [n for n in graph.node if n.op_type in CONTROL_FLOW or n.domain not in _STANDARD]


def captured(node: onnx.NodeProto) -> set[str]:
    """Names of outer values that the sub-graphs of `node` read."""
    found: set[str] = set()
    return found.union(*(_free_names(body) for body in bodies(node).values()))


def _free_names(graph: onnx.GraphProto) -> set[str]:
    bound = {v.name for v in graph.input} | {t.name for t in graph.initializer}
    used = {v.name for v in graph.output}
    for node in graph.node:
        bound.update(node.output)
        used.update(node.input)
    used = used.union(*(captured(node) for node in owners(graph)))
    return {name for name in used - bound if name}


def declared_dims(info: onnx.ValueInfoProto) -> tuple[Dim, ...] | None:
    """The dims of a declared shape; None where there is none. A size of -1 is an open one."""
    if not info.type.tensor_type.HasField("shape"):
        return None
    return tuple(
        int(d.dim_value) if d.HasField("dim_value") and d.dim_value >= 0 else (d.dim_param or None)
        for d in info.type.tensor_type.shape.dim
    )


def returned_info(owner: onnx.NodeProto, value: str) -> onnx.ValueInfoProto:
    """What the bodies of a node declare of a value that it returns; dims that differ stay open.

    A state of a loop has only those sizes that the body takes and returns alike.
    """
    infos, stacked = _inside(owner, list(owner.output).index(value))
    found = onnx.ValueInfoProto(name=value)
    if not infos:
        return found
    found.type.tensor_type.elem_type = infos[0].type.tensor_type.elem_type
    shapes = [dims for info in infos if (dims := declared_dims(info)) is not None]
    if not shapes or len({len(dims) for dims in shapes}) > 1:
        return found
    shape = found.type.tensor_type.shape
    shape.SetInParent()
    if stacked:
        shape.dim.add()
    for sizes in zip(*shapes, strict=True):
        dim = shape.dim.add()
        agreed = sizes[0] if len(shapes) == len(infos) and len(set(sizes)) == 1 else None
        if isinstance(agreed, int):
            dim.dim_value = agreed
        elif agreed is not None:
            dim.dim_param = agreed
    return found


def _inside(owner: onnx.NodeProto, at: int) -> tuple[list[onnx.ValueInfoProto], bool]:
    """The values of bodies that output `at` of their node may be, and whether runs are stacked."""
    inner = list(bodies(owner).values())
    kind = control_flow(owner)
    if not kind:  # an operator of somebody else: what it does with its graphs nobody knows
        return [], False
    if kind == "Loop":
        stacked = at + 2 >= len(owner.input)
        states = [] if stacked else [inner[0].input[at + 2]]
        return [inner[0].output[at + 1], *states], stacked
    if kind == "Scan":
        given = {a.name: a for a in owner.attribute}
        stacked = at >= len(owner.input) - given["num_scan_inputs"].i
        if stacked and "scan_output_axes" in given and any(given["scan_output_axes"].ints):
            return [], True
        states = [] if stacked else [inner[0].input[at]]
        return [inner[0].output[at], *states], stacked
    return [body.output[at] for body in inner if at < len(body.output)], False
