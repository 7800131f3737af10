"""What a float or integer tensor can hold: 0 and 1 alone, as masks that were cast or counted."""

from __future__ import annotations

import onnx

from sfa_onnx.files.onnx_attrs import attributes
from sfa_onnx.passes.axes.trace import Ref, Tracer

__all__ = ["binary", "counts", "flags", "is_table", "less_one", "line", "summands"]

_VIEWS = ("Cast", "Identity", "Slice", "Unsqueeze", "Squeeze", "Reshape", "Transpose", "Expand")


def flags(tracer: Tracer, value: str) -> bool:
    """Whether `value` is a cast of a bool tensor: nothing but 0 and 1."""
    node = tracer.index.real_maker(value)
    return (
        node is not None
        and node.op_type == "Cast"
        and tracer.sizes.elem_type(node.input[0]) == onnx.TensorProto.BOOL
    )


def counts(tracer: Tracer, value: str) -> bool:
    """Whether a tensor counts or flags: 0 and 1 scattered or reduced, or a cast bool."""
    for _ in range(16):
        node = tracer.index.node_of(value)
        if node is None or node.op_type == "Constant":
            return is_table(tracer, value)
        if node.op_type in ("ScatterElements", "ScatterND", "ReduceSum", "ReduceMax"):
            return True
        if node.op_type in ("Mul", "Min", "Max"):
            return all(counts(tracer, n) for n in node.input)
        if flags(tracer, value):
            return True
        if node.op_type not in _VIEWS:
            return False
        value = node.input[0]
    return False


def is_table(tracer: Tracer, value: str) -> bool:
    """Whether `value` is a constant table of 0 and 1."""
    if not tracer.shape(value):
        return False
    table = tracer.index.mask_table(value)
    return table is not None and table.size > 1 and bool(((table == 0) | (table == 1)).all())


def binary(tracer: Tracer, value: str) -> bool:
    """Whether a tensor holds nothing but 0 and 1: flags, not counts."""
    for _ in range(16):
        node = tracer.index.node_of(value)
        if node is None or node.op_type == "Constant":
            return is_table(tracer, value)
        if node.op_type in ("ScatterElements", "ScatterND"):
            plain = attributes(node).get("reduction", b"none") in (b"none", "none")
            return plain and {tracer.fill(node.input[0]), tracer.fill(node.input[2])} <= {0, 1}
        if node.op_type in ("Mul", "Min", "Max", "And", "Or"):
            return all(binary(tracer, n) for n in node.input)
        if flags(tracer, value):
            return True
        if node.op_type not in _VIEWS:
            return False
        value = node.input[0]
    return False


def summands(tracer: Tracer, ref: Ref) -> list[Ref]:
    """The flags of flag + flag + ...; empty where it is no such sum."""
    found: list[Ref] = []
    todo = [ref]
    while todo and len(found) < 16:
        part = todo.pop()
        node = tracer.index.node_of(part.value)
        if node is not None and node.op_type in ("Add", "Sum"):
            todo += [tracer.operand(n, part.coords) for n in node.input]
        elif node is not None and node.op_type in ("Cast", "Identity") and part == ref:
            ref = Ref(node.input[0], part.coords)
            todo.append(ref)
        elif tracer.fill(part.value) is None and binary(tracer, part.value):
            found.append(part)
        else:
            return []
    return found if len(found) > 1 and not todo else []


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
