"""Who outside asks whether the result is a number: rows without keys are NaN there, and 0 fused."""

from __future__ import annotations

import math

import onnx

from sfa_onnx.passes.axes.trace import Stop, Tracer, is_float
from sfa_onnx.passes.bind.literals import HIDDEN
from sfa_onnx.passes.bind.site import Site
from sfa_onnx.passes.graph.index import GraphIndex
from sfa_onnx.passes.values.attention_op import is_attention

__all__ = ["check_nan"]

_LIMIT = 64  # values looked at, in each direction
_SAME = frozenset(
    ("Cast", "CastLike", "Identity", "Reshape", "Squeeze", "Unsqueeze", "Transpose", "Expand")
) | frozenset(("Flatten", "Slice", "Split", "Gather", "Concat"))
_LINEAR = frozenset(("MatMul", "Einsum", "Mul", "Div", "Neg", "FusedMatMul"))  # 0 stays 0
_MOVED = frozenset(("Add", "Sub", "Sum", "Gemm"))  # 0 becomes something else
_PRODUCTS = frozenset(("MatMul", "Einsum", "Gemm", "FusedMatMul", "TopK"))


def check_nan(site: Site) -> None:
    """Refuse a result whose NaN somebody reads, where rows may be left without keys.

    The softmax of a row that is -inf throughout is NaN; the operator gives 0. `Where(IsNaN(out),
    0, out)` makes both the same, and so it may stay.

    Raises:
        Stop: a test for NaN that does anything else.
    """
    narrowed = site.visible or site.kept is not None or any(s.valid for s in site.selected)
    tracer = site.tracer
    if not narrowed or is_attention(tracer.index.nodes[site.attention.anchor]):
        return
    reached, tests = _reached(tracer, site.out.value)
    if not tests or _scrubbed(tracer, site) or not _infinite(tracer, site):
        return
    for i in tests:
        node = tracer.index.nodes[i]
        if not _gives_zero(tracer, node.output[0], node.op_type == "IsNaN", reached):
            raise Stop(
                f"NaN of rows without keys is read by {node.op_type} {tracer.index.label(i)}",
                node.output[0],
                "put 0 in their place (Where(IsNaN(out), 0, out)): the operator gives 0 there",
            )


def _reached(tracer: Tracer, value: str) -> tuple[dict[str, bool], list[int]]:
    """Values that are NaN where `value` is, with whether 0 stays 0 on the way; and their tests."""
    index = tracer.index
    reached, todo, tests = {value: True}, [value], []
    while todo and len(reached) < _LIMIT:
        here = todo.pop()
        for i, position in index.uses(here):
            node = index.nodes[i]
            kind = node.op_type
            if kind == "IsNaN" or (kind == "Equal" and node.input[0] == node.input[1]):
                tests.append(i)
                continue
            passes = (kind in _SAME and (not position or kind == "Concat")) or kind in _LINEAR
            if not passes and kind not in _MOVED:
                continue
            for name in node.output:
                if name and name not in reached:
                    reached[name] = passes and reached[here]
                    todo.append(name)
    return reached, list(dict.fromkeys(tests))


def _gives_zero(tracer: Tracer, test: str, truth: bool, reached: dict[str, bool]) -> bool:
    """Whether whoever reads `test`, which is `truth` for NaN, puts 0 in place of what was NaN."""
    index = tracer.index
    todo, seen = [(test, truth)], 0
    while todo:
        value, truth = todo.pop()
        seen += 1
        if index.is_graph_output(value) or seen > _LIMIT:
            return False
        for i, position in index.uses(value):
            node = index.nodes[i]
            kind = node.op_type
            if kind == "Expand" and position:  # as many zeros as are written
                if tracer.fill(node.input[0]) != 0:
                    return False
            elif (
                kind in (*_SAME, "ReduceSum") or kind == "Not" or kind == ("Or" if truth else "And")
            ):
                todo.append((node.output[0], truth != (kind == "Not")))
            elif kind == "NonZero" and truth:
                if not _writes_zero(tracer, node, reached):
                    return False
            elif kind != "Where" or position or not _chooses_zero(tracer, node, truth, reached):
                return False
    return True


def _chooses_zero(
    tracer: Tracer, node: onnx.NodeProto, truth: bool, reached: dict[str, bool]
) -> bool:
    at_nan, else_ = node.input[1:] if truth else reversed(node.input[1:])
    return tracer.fill(at_nan) == 0 and reached.get(else_, False)


def _writes_zero(tracer: Tracer, node: onnx.NodeProto, reached: dict[str, bool]) -> bool:
    """Whether all that reads the positions of a test is a ScatterND of zeros."""
    index = tracer.index
    todo = [node.output[0]]
    while todo:
        for i, _ in index.uses(todo.pop()):
            user = index.nodes[i]
            if user.op_type in ("Transpose", "Shape", "Size", "Identity"):
                todo += user.output if user.op_type in ("Transpose", "Identity") else []
                continue
            zero = user.op_type == "ScatterND" and tracer.fill(user.input[2]) == 0
            if not zero or not reached.get(user.input[0], False):
                return False
    return True


def _scrubbed(tracer: Tracer, site: Site) -> bool:
    """Whether a guard between the weights and the result zeroes such rows already."""
    index = tracer.index
    todo, seen = [site.attention.weights], set[str]()
    while todo and len(seen) < _LIMIT:
        value = todo.pop()
        seen.add(value)
        if value == site.out.value:
            continue
        for i, _ in index.uses(value):
            if index.nodes[i].op_type in ("Where", "IsNaN", "ScatterND"):
                return True
            todo += [o for o in index.nodes[i].output if o and o not in seen]
    return False


def _infinite(tracer: Tracer, site: Site) -> bool:
    """Whether scores may be hidden by -inf: nothing says that all masks are finite."""
    index: GraphIndex = tracer.index
    todo, seen = [site.attention.scores], set[str]()
    low = False
    while todo and len(seen) < _LIMIT:
        value = todo.pop()
        seen.add(value)
        fill = tracer.fill(value)
        if fill is not None:
            if math.isinf(fill):
                return True
            low = low or fill < HIDDEN
            continue
        node = index.maker(value)
        if node is None:
            if is_float(tracer.sizes.elem_type(value)) and len(tracer.shape(value)) > 1:
                return True
        elif node.op_type not in _PRODUCTS:
            todo += [n for n in node.input if n and n not in seen]
    return not low
