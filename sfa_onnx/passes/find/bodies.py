"""Rows that the body of a Loop or Scan gathers, one sequence or token at a time."""

from __future__ import annotations

from collections.abc import Callable

import onnx

from sfa_onnx.files.onnx_attrs import attributes, control_flow
from sfa_onnx.passes.graph.kinds import GATHERS, PARTS

__all__ = ["gathered_in_body"]

_MOVES = PARTS | {"Concat", "ScatterND"}
_FAR = 64


def gathered_in_body(node: onnx.NodeProto, value: str, selects: Callable[[str, str], bool]) -> bool:
    """Whether `value` of a Loop or Scan holds rows that its body gathers.

    Args:
        node: the Loop or Scan.
        value: one of its outputs.
        selects: whether outer values (data, indices) make a gather a selection of rows.
    """
    body = attributes(node).get("body")
    kind = control_flow(node)
    if kind not in ("Loop", "Scan") or body is None:
        return False
    first = 1 if kind == "Loop" else 0  # its body returns a condition, too
    skipped = 2 if kind == "Loop" else 0  # number of the run, and the condition
    given = dict(zip([i.name for i in body.input][skipped:], node.input[skipped:], strict=False))
    own = {o: n for n in body.node for o in n.output if o}
    inner = {i.name for i in body.input}

    def outer(name: str) -> set[str]:
        """The values from outside that a value of the body is made from."""
        found, stack, seen = set[str](), [name], set[str]()
        while stack and len(seen) < _FAR:
            here = stack.pop()
            if here in seen or not here:
                continue
            seen.add(here)
            if here in own:
                stack += own[here].input
            elif here in given:
                found.add(given[here])
            elif here not in inner:
                found.add(here)
        return found

    stack, seen = [body.output[list(node.output).index(value) + first].name], set[str]()
    while stack and len(seen) < _FAR:
        maker = own.get(name := stack.pop())
        if maker is None or name in seen:
            continue
        seen.add(name)
        if maker.op_type in GATHERS:
            data, indices = (outer(n) for n in maker.input[:2])
            if any(selects(a, b) for a in data for b in indices):
                return True
        if maker.op_type in _MOVES | GATHERS:
            stack += [n for n in maker.input[:1] if n]
            stack += [n for n in maker.input[1:] if n and maker.op_type in ("Concat", "ScatterND")]
    return False
