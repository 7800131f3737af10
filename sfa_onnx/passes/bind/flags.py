"""What a float or integer tensor can hold: 0 and 1 alone, as masks that were cast or counted."""

from __future__ import annotations

import onnx

from sfa_onnx.passes.axes.trace import Ref, Tracer

__all__ = ["counts", "flags", "less_one", "line"]


def flags(tracer: Tracer, value: str) -> bool:
    """Whether `value` is a cast of a bool tensor: nothing but 0 and 1."""
    node = tracer.index.origin(value)
    return (
        node is not None
        and node.op_type == "Cast"
        and tracer.sizes.elem_type(node.input[0]) == onnx.TensorProto.BOOL
    )


def counts(tracer: Tracer, value: str) -> bool:
    """Whether a tensor counts or flags: 0 and 1 scattered or reduced, or a cast bool."""
    for _ in range(16):
        node = tracer.index.node_of(value)
        if node is None:
            return False
        if node.op_type in ("ScatterElements", "ScatterND", "ReduceSum", "ReduceMax"):
            return True
        if node.op_type in ("Mul", "Min", "Max"):
            return all(counts(tracer, n) for n in node.input)
        if flags(tracer, value):
            return True
        if node.op_type not in (
            "Cast",
            "Identity",
            "Slice",
            "Unsqueeze",
            "Squeeze",
            "Reshape",
            "Transpose",
            "Expand",
        ):
            return False
        value = node.input[0]
    return False


def less_one(tracer: Tracer, ref: Ref) -> Ref | None:
    """The flag of flag - 1."""
    node = tracer.index.node_of(ref.value)
    if node is None or node.op_type not in ("Sub", "Add") or not counts(tracer, node.input[0]):
        return None
    one = 1 if node.op_type == "Sub" else -1
    found = tracer.fill(node.input[1]) == one
    return tracer.operand(node.input[0], ref.coords) if found else None


def line(tracer: Tracer, ref: Ref) -> tuple[Ref, float, float]:
    """(x, a, b) of a * x + b, with numbers a and b; (`ref`, 1, 0) where it is nothing of the kind.

    Some exporters spell every scaling as Mul and Add, so 1 - mask is mask * -1 + 1.
    """
    a, b = 1.0, 0.0
    for _ in range(16):
        node = tracer.index.node_of(ref.value)
        if node is None or node.op_type not in ("Mul", "Add", "Sub", "Neg", "Identity", "Cast"):
            break
        if len(node.input) == 1:
            if node.op_type == "Cast" and flags(tracer, ref.value):
                break
            own, a = 0, -a if node.op_type == "Neg" else a
        else:
            numbers = [tracer.fill(name) for name in node.input]
            own = 0 if numbers[1] is not None else 1
            number = numbers[1 - own]
            if number is None:
                break
            if node.op_type == "Mul":
                a *= number
            else:
                b += a * number * (-1 if node.op_type == "Sub" and not own else 1)
                a = -a if node.op_type == "Sub" and own else a
        ref = tracer.operand(node.input[own], ref.coords)
    return ref, a, b
