"""Guards that zero the weights or the result of a row without keys, as the operator does itself."""

from __future__ import annotations

import onnx

from sfa_onnx.files.onnx_attrs import attributes
from sfa_onnx.passes.axes.expr import Expr
from sfa_onnx.passes.axes.trace import Move, Ref, Tracer
from sfa_onnx.passes.bind.flags import binary
from sfa_onnx.passes.bind.mask import is_hidden
from sfa_onnx.passes.bind.site import Anchor
from sfa_onnx.passes.graph.index import GraphIndex

__all__ = ["guarded", "reduced_mask", "zeroes_empty_rows", "zeroing"]

_COPIES = frozenset(("Cast", "Identity"))
_VIEWS = frozenset(("Expand", "Reshape", "Squeeze", "Unsqueeze"))
_ANY = {
    ("Greater", 0.0): True,
    ("GreaterOrEqual", 1.0): True,
} | {
    ("Equal", 0.0): False,
    ("Less", 1.0): False,
    ("LessOrEqual", 0.0): False,
}  # what a comparison of a count says when it holds: whether there is any
_TOTALS = frozenset(("ReduceLogSumExp", "ReduceMax"))  # -inf exactly where all scores are


def zeroes_empty_rows(
    tracer: Tracer, anchor: Anchor, node: onnx.NodeProto, *, positive: bool
) -> bool:
    """Whether a Where behind the softmax gives 0 in exactly the rows whose scores are all -inf.

    It is spelt all(scores == -inf), any(scores != -inf) or max(scores) == -inf.

    Args:
        tracer: of the site.
        anchor: the softmax.
        node: `Where(condition, ...)`, one branch of which is 0.
        positive: whether the weights are kept where the condition holds.
    """
    if tracer.shape(node.output[0]) != tracer.shape(anchor.weights):
        return False
    test, empty = _through(tracer.index, node.input[0], not positive)
    if test is None:
        return False
    if test.op_type in ("Equal", "IsInf", "LessOrEqual"):  # of the largest score
        tested, empty = _hidden_where(tracer, test, empty)
        top, _ = _through(tracer.index, tested, True)
        scores = top.input[0] if top is not None and top.op_type == "ReduceMax" else ""
    else:
        top = test
        inner, hidden = _through(tracer.index, test.input[0], empty)
        wanted = {"ReduceMin": True, "ReduceMax": False}.get(test.op_type)
        if inner is None or wanted is not empty:
            return False
        scores, empty = _hidden_where(tracer, inner, hidden)
    if not empty or top is None or not _along_keys(tracer, anchor, top):
        return False
    return bool(scores) and _behind(tracer.index, scores) == _behind(tracer.index, anchor.scores)


def reduced_mask(
    tracer: Tracer, condition: Ref, positive: bool, key: Expr
) -> tuple[Ref, bool] | None:
    """(mask at `key`, which of its values shows) of weights that are kept where any key is shown.

    The condition is any(shown), not all(hidden), or a count of either; None: nothing of the kind.
    """
    ref, keeps = condition, positive
    for _ in range(16):
        node = tracer.index.node_of(ref.value)
        if node is None:
            return None
        if node.op_type in ("ReduceMin", "ReduceMax", "ReduceSum"):
            if keeps == (node.op_type == "ReduceMin"):
                return None
            inner = _before(tracer, node, ref, key)
            return None if inner is None else (inner, keeps)
        if node.op_type in ("Not", *_COPIES):
            keeps = keeps != (node.op_type == "Not")
            ref = Ref(node.input[0], ref.coords)
        elif len(node.input) == 2 and (limit := tracer.fill(node.input[1])) is not None:
            some = _ANY.get((node.op_type, limit))
            if some is not None:
                keeps = keeps == some
                ref = tracer.operand(node.input[0], ref.coords)
                continue
            if not isinstance(step := tracer.step(ref), Move):
                return None
            ref = step.ref
        elif isinstance(step := tracer.step(ref), Move):
            ref = step.ref
        else:
            return None
    return None


def _before(tracer: Tracer, node: onnx.NodeProto, ref: Ref, key: Expr) -> Ref | None:
    """The element of the flags that were reduced, at `key` on their reduced axis."""
    source, a = node.input[0], attributes(node)
    axes = tracer.sizes.value(node.input[1]) if len(node.input) > 1 else a.get("axes")
    is_bool = tracer.sizes.elem_type(source) == onnx.TensorProto.BOOL
    if axes is None or len(list(axes)) != 1 or not (is_bool or binary(tracer, source)):
        return None
    axis = int(next(iter(axes))) % len(tracer.shape(source))
    rest = ref.coords[:axis] + ref.coords[axis + (1 if a.get("keepdims", 1) else 0) :]
    return Ref(source, (*rest[:axis], key, *rest[axis:]))


def guarded(tracer: Tracer, anchor: Anchor, node: onnx.NodeProto) -> str:
    """The result that a guard gives 0 in rows without keys; "" where `node` is none.

    It is Where(log-sum-exp == -inf, 0, result), or what boolean assignment exports to.
    """
    guard, index = zeroing(tracer, node), tracer.index
    if guard is None:
        return ""
    kept, condition, empty = guard
    test, truth = _through(index, condition, empty, _VIEWS)
    if test is None or test.op_type not in ("Equal", "IsInf", "LessOrEqual"):
        return ""
    tested, truth = _hidden_where(tracer, test, truth)
    total, _ = _through(index, tested, True, _VIEWS) if tested else (None, True)
    if not truth or total is None or total.op_type not in _TOTALS:
        return ""
    own = _behind(index, total.input[0]) == _behind(index, anchor.scores)
    return kept if own and _along_keys(tracer, anchor, total, kept=False) else ""


def zeroing(tracer: Tracer, node: onnx.NodeProto) -> tuple[str, str, bool] | None:
    """(x, condition, which of its values gives 0) of a node that makes x, or 0."""
    found = None
    if node.op_type == "Where":
        branches = {True: node.input[1], False: node.input[2]}
        zero = next((t for t, n in branches.items() if tracer.fill(n) == 0), None)
        found = None if zero is None else (branches[not zero], node.input[0], zero)
    elif node.op_type == "ScatterND" and tracer.fill(node.input[2]) == 0:
        chain = tracer.index.real_maker(node.input[1])
        nonzero = (
            tracer.index.real_maker(chain.input[0]) if chain is not None and chain.input else None
        )
        if nonzero is not None and nonzero.op_type == "NonZero":
            found = (node.input[0], nonzero.input[0], True)
    if found is None or tracer.shape(found[0]) != tracer.shape(node.output[0]):
        return None
    return found


def _through(
    index: GraphIndex, value: str, truth: bool, views: frozenset[str] = frozenset()
) -> tuple[onnx.NodeProto | None, bool]:
    """The node behind casts and negations, and what it must say for `value` to be `truth`."""
    node = index.node_of(value)
    while node is not None and node.op_type in (*_COPIES, *views, "Not"):
        truth = truth != (node.op_type == "Not")
        node = index.node_of(node.input[0])
    return node, truth


def _behind(index: GraphIndex, value: str) -> str:
    node = index.node_of(value)
    while node is not None and node.op_type in _COPIES:
        value = node.input[0]
        node = index.node_of(value)
    return value


def _hidden_where(tracer: Tracer, node: onnx.NodeProto, truth: bool) -> tuple[str, bool]:
    """(the tested value, whether it is hidden where `node` says `truth`); "" when unknown."""
    if node.op_type == "IsInf":
        a = attributes(node)
        return (node.input[0], truth) if not a.get("detect_positive", 1) else ("", False)
    if node.op_type not in ("Equal", "LessOrEqual"):
        return "", False
    return (node.input[0], truth) if is_hidden(tracer, node.input[1]) else ("", False)


def _along_keys(tracer: Tracer, anchor: Anchor, node: onnx.NodeProto, *, kept: bool = True) -> bool:
    """Whether it reduces the axis of the softmax alone, and (where `kept`) keeps it."""
    shape, a = tracer.shape(node.input[0]), attributes(node)
    axes = tracer.sizes.value(node.input[1]) if len(node.input) > 1 else a.get("axes")
    if axes is None or shape != tracer.shape(anchor.scores) or (kept and not a.get("keepdims", 1)):
        return False
    rank = len(shape)
    return [int(x) % rank for x in axes] == [anchor.axis % rank]
