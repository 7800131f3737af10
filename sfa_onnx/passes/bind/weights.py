"""From the attention weights to the weighted sum: only casts, views and guards in between."""

from __future__ import annotations

from sfa_onnx.passes.axes.trace import Dot, Move, Ref, Stop, Tracer
from sfa_onnx.passes.bind.guards import reduced_mask, zeroes_empty_rows
from sfa_onnx.passes.bind.scores import sums_products
from sfa_onnx.passes.bind.site import Anchor
from sfa_onnx.passes.graph.index import GraphIndex

__all__ = ["sides", "summed", "weighted_sum"]

_CARRIES_WEIGHTS = frozenset(
    ("Cast", "Dropout", "Expand", "Identity", "IsNaN", "Reshape", "Squeeze", "Transpose")
) | frozenset(("Unsqueeze", "Where", "Flatten", "And", "Greater", "IsInf", "Less"))
_CHANGES = frozenset(("Add", "Clip", "Div", "Max", "Min", "Mul", "Pow", "Round", "Sqrt", "Sub"))
_TESTS, _NEAR = 8, 64


def summed(tracer: Tracer, anchor: Anchor, out: Ref) -> Ref:
    """The element of the weighted sum that makes `out`: itself, or what is divided afterwards."""
    if anchor.divided is None:
        return out
    ref = tracer.operand(tracer.index.nodes[anchor.divided].input[0], out.coords)
    while isinstance(step := tracer.step(ref), Move):
        ref = step.ref
    return ref


def weighted_sum(tracer: Tracer, anchor: Anchor) -> tuple[int, str]:
    """The one product that consumes the weights; nobody else may."""
    index = tracer.index
    seen, todo, found = {anchor.weights}, [anchor.weights], []
    while todo:
        value = todo.pop()
        tracer.spend(value)
        if index.is_graph_output(value):
            raise Stop(
                f"the attention weights are a graph output ({value})",
                value,
                "export the model without returning attention weights",
            )
        for i, position in index.uses(value):
            node = index.nodes[i]
            if node.op_type == "CastLike" and position == 1:  # reads the type alone
                continue
            sums = node.op_type == "ReduceSum" and anchor.divided is not None
            if sums or node.op_type in ("Shape", "Size"):
                continue
            if node.op_type in ("MatMul", "Einsum", "FusedMatMul", "Gemm"):
                found.append(i)
            elif (summed := _summed_product(index, i)) is not None:
                found.append(summed)
            elif node.op_type in _CARRIES_WEIGHTS:
                todo += [o for o in node.output if o and o not in seen]
                seen.update(node.output)
            else:
                raise _other_use(index, i, value)
    if len(set(found)) != 1:
        names = ", ".join(index.label(i) for i in found) or "nothing"
        raise Stop(
            f"the attention weights are multiplied by {names}; expected one product",
            value,
            "the operator computes one weighted sum, of the keys' own rows",
        )
    return found[0], index.nodes[found[0]].output[0]


def _summed_product(index: GraphIndex, i: int) -> int | None:
    """The sum over keys that alone uses node `i`, a product: (weights * value).sum(keys)."""
    uses = index.uses(index.nodes[i].output[0]) if index.nodes[i].op_type == "Mul" else []
    alone = len(uses) == 1 and uses[0][1] == 0
    return uses[0][0] if alone and sums_products(index, index.nodes[uses[0][0]]) else None


def _other_use(index: GraphIndex, i: int, value: str) -> Stop:
    node = index.nodes[i]
    if node.op_type in ("Slice", "Split", "Gather"):
        return Stop(
            f"{node.op_type} {index.label(i)} cuts a column off the attention weights: scores of a"
            " sink were joined to those of the keys (Concat)",
            value,
            "the operator takes one sink per head, a tensor [N1], as it is",
        )
    changes = node.op_type in _CHANGES
    return Stop(
        f"the attention weights are also used by {node.op_type} {index.label(i)}"
        + (", behind the softmax" if changes else ""),
        value,
        "mask or scale the scores in front of the softmax: the weights must add up to 1"
        if changes
        else "hide scores in front of the softmax: its weights then add up to 1 by themselves"
        if node.op_type == "ReduceSum"
        else "only the weighted sum of values may use them",
    )


def sides(
    tracer: Tracer, anchor: Anchor, step: Dot, zeroed: list[tuple[Ref, bool]]
) -> tuple[Ref, Ref]:
    """(element of the weights, element of the value) of the weighted sum.

    `zeroed` takes the masks (and which of their values shows) that set weights to zero.
    """
    for weights, value in ((step.a, step.b), (step.b, step.a)):
        ref = _to_weights(tracer, anchor, weights, zeroed)
        if ref is not None:
            return ref, value
    raise _between(tracer, anchor, step)


def _between(tracer: Tracer, anchor: Anchor, step: Dot) -> Stop:
    """What keeps the weighted sum from being one of the weights."""
    index = tracer.index
    for ref in (step.a, step.b):
        while isinstance(back := tracer.step(ref), Move):
            ref = back.ref
        i = index.producer.get(ref.value)
        if i is None or not _leads_up(index, ref.value, anchor.weights):
            continue
        kind, label = index.nodes[i].op_type, index.label(i)
        if kind == "Dropout":
            return Stop(
                f"Dropout {label} drops attention weights (training mode)",
                ref.value,
                "export the model in evaluation mode",
            )
        return Stop(
            f"{kind} {label} lies between softmax and weighted sum",
            ref.value,
            "only casts, views and NaN guards may",
        )
    return Stop(
        "something other than a cast, a view or a NaN guard lies between softmax and weighted sum",
        anchor.weights,
        "multiply the weights by the values at once",
    )


def _leads_up(index: GraphIndex, value: str, wanted: str) -> bool:
    stack, seen = [value], set[str]()
    while stack and len(seen) < _NEAR:
        name = stack.pop()
        if name == wanted:
            return True
        if name not in seen and (node := index.node_of(name)) is not None:
            seen.add(name)
            stack += node.input
    return False


def _to_weights(
    tracer: Tracer, anchor: Anchor, ref: Ref, zeroed: list[tuple[Ref, bool]] | None = None
) -> Ref | None:
    """The element of the weights that `ref` is; None when it is something else."""
    guards: list[tuple[Ref, bool]] = []
    while ref.value != anchor.weights:
        back = _behind_infinity(tracer, anchor, ref) or tracer.step(ref)
        if isinstance(back, Move):
            ref = back.ref
            continue
        node = tracer.index.node_of(ref.value)
        if zeroed is None or node is None or node.op_type != "Where":
            return None
        condition, first, second = (tracer.operand(n, ref.coords) for n in node.input)
        positive = tracer.fill(second.value) == 0
        if not positive and tracer.fill(first.value) != 0:
            return None
        if not zeroes_empty_rows(tracer, anchor, node, positive=positive):
            guards.append((condition, positive))
        ref = first if positive else second
    if zeroed is not None:
        key = ref.coords[anchor.axis % len(ref.coords)]
        zeroed += [reduced_mask(tracer, *guard, key) or guard for guard in guards]
    return ref


def _behind_infinity(tracer: Tracer, anchor: Anchor, ref: Ref) -> Move | None:
    """Behind Where(weights are infinite, number, x), as nan_to_num leaves it: they never are."""
    index = tracer.index
    node = index.real_maker(ref.value)
    if node is None or node.op_type != "Where" or tracer.fill(node.input[1]) is None:
        return None
    tests = [node.input[0]]
    for name in tests:
        test = index.real_maker(name)
        if test is not None and test.op_type in ("And", "Cast") and len(tests) < _TESTS:
            tests += test.input
        elif test is not None and test.op_type == "IsInf":
            tested = tracer.operand(test.input[0], ref.coords)
            same = _to_weights(tracer, anchor, tested) is not None
            return Move(tracer.operand(node.input[2], ref.coords)) if same else None
    return None
