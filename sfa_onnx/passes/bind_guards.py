"""Guards that zero the weights of a row without keys, as the operator does by itself."""

from __future__ import annotations

import onnx

from sfa_onnx.onnx_attrs import attributes
from sfa_onnx.passes.axes_trace import Tracer
from sfa_onnx.passes.bind_mask import is_hidden
from sfa_onnx.passes.bind_site import Anchor
from sfa_onnx.passes.index import GraphIndex

__all__ = ["zeroes_empty_rows"]

_COPIES = frozenset(("Cast", "Identity"))


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


def _through(index: GraphIndex, value: str, truth: bool) -> tuple[onnx.NodeProto | None, bool]:
    """The node behind casts and negations, and what it must say for `value` to be `truth`."""
    node = index.node_of(value)
    while node is not None and node.op_type in (*_COPIES, "Not"):
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


def _along_keys(tracer: Tracer, anchor: Anchor, node: onnx.NodeProto) -> bool:
    """Whether it reduces the axis of the softmax alone, and keeps it."""
    shape, a = tracer.shape(node.input[0]), attributes(node)
    axes = tracer.sizes.value(node.input[1]) if len(node.input) > 1 else a.get("axes")
    if axes is None or shape != tracer.shape(anchor.scores) or not a.get("keepdims", 1):
        return False
    rank = len(shape)
    return [int(x) % rank for x in axes] == [anchor.axis % rank]
