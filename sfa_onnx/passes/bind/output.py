"""Where the result leaves the attention: behind what reads its inside once more.

Some exporters spell a product as Reshape, MatMul, Reshape and read the target of the last one off
the shape of the weights. Kernels' references zero the rows whose log-sum-exp is -inf. Scores and
weights go, so the result is what comes out of that Reshape or guard.
"""

from __future__ import annotations

from sfa_onnx.passes.axes.trace import Move, Ref, Stop, Tracer
from sfa_onnx.passes.bind.guards import guarded, zeroing
from sfa_onnx.passes.bind.site import Anchor
from sfa_onnx.passes.graph.index import GraphIndex

__all__ = ["at_product", "leaves_at"]

_LIMIT = 64  # values looked at, in each direction
_VIEWS = frozenset(("Reshape", "Squeeze", "Unsqueeze", "Transpose", "Identity"))
_PRODUCTS = frozenset(("MatMul", "Einsum", "Gemm", "FusedMatMul"))


def leaves_at(tracer: Tracer, anchor: Anchor, value: str) -> str:
    """`value`, the weighted sum, or the last view or guard of it that reads scores or weights.

    Nobody else may read what lies in between.
    """
    index = tracer.index
    inner: set[str] | None = None
    last = here = value
    while not index.is_graph_output(here):
        uses = index.uses(here)
        read = [u for u in uses if index.nodes[u[0]].op_type not in ("Shape", "Size")]
        if len(read) != 1:
            break
        user, position = read[0]
        node = index.nodes[user]
        tracer.spend(here)
        if (kept := guarded(tracer, anchor, node)) and node.input[position] == kept:
            last = here = node.output[0]
            continue
        if len(uses) > 1 or position or node.op_type not in _VIEWS:
            break
        here = node.output[0]
        if len(node.input) > 1:
            inner = inner or _inside(index, anchor, value)
            if any(_measures(index, name, inner) for name in node.input[1:]):
                last = here
    return last


def at_product(tracer: Tracer, out: Ref, product: str) -> Ref:
    """The element of `product` that `out`, a view of it, is; guards of empty rows are passed."""
    ref = out
    while ref.value != product:
        node = tracer.index.node_of(ref.value)
        if node is not None and (guard := zeroing(tracer, node)) is not None:
            ref = tracer.operand(guard[0], ref.coords)
            continue
        step = tracer.step(ref)
        if not isinstance(step, Move):
            raise Stop("the result is no view of the weighted sum", out.value)
        ref = step.ref
    return ref


def _inside(index: GraphIndex, anchor: Anchor, value: str) -> set[str]:
    """Scores and weights: from the products of queries and keys to the weighted sum."""
    products: list[str] = []
    seen, todo = {anchor.scores}, [anchor.scores]
    while todo and len(seen) < _LIMIT:
        name = todo.pop()
        node = index.node_of(name)
        if node is None or node.op_type == "TopK":
            continue
        if node.op_type in _PRODUCTS:
            products.append(name)
            continue
        new = [n for n in node.input if n and n not in seen]
        seen.update(new)
        todo += new
    found, todo = {*products, anchor.weights}, [*products, anchor.weights]
    while todo and len(found) < _LIMIT:
        for user, _ in index.uses(todo.pop()):
            node = index.nodes[user]
            if node.op_type not in ("Shape", "Size") and value not in node.output:
                new = [o for o in node.output if o and o not in found]
                found.update(new)
                todo += new
    return found


def _measures(index: GraphIndex, name: str, inner: set[str]) -> bool:
    """Whether a size of an inner value decides `name`."""
    seen, todo = {name}, [name]
    while todo and len(seen) < _LIMIT:
        node = index.node_of(todo.pop())
        if node is None:
            continue
        if node.op_type in ("Shape", "Size"):
            if node.input[0] in inner:
                return True
            continue
        new = [n for n in node.input if n and n not in seen]
        seen.update(new)
        todo += new
    return False
