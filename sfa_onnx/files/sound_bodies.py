"""Graphs that nodes hold: as many inputs and outputs as the node gives them and hands out."""

from __future__ import annotations

from collections.abc import Iterator

from onnx import AttributeProto, NodeProto

__all__ = ["body_problems"]

_BARE_SCAN = 9  # the opset from which Scan has no lengths of sequences among its inputs


def body_problems(node: NodeProto, opset: int) -> Iterator[str]:
    """What is wrong with the bodies of a standard If, Loop or Scan, as "gives 1 outputs, ...".

    Args:
        node: of a standard operator.
        opset: that of its scope.
    """
    expected = _counts(node, opset)
    if expected is None:
        return
    for attribute in node.attribute:
        if attribute.type != AttributeProto.GRAPH:
            continue
        body = attribute.g
        given = {"inputs": len(body.input), "outputs": len(body.output)}
        for kind, want in zip(given, expected, strict=True):
            if given[kind] != want:
                yield (
                    f"holds the graph {attribute.name!r} of {given[kind]} {kind}, expected {want}"
                    " by its own"
                )


def _counts(node: NodeProto, opset: int) -> tuple[int, int] | None:
    """Inputs and outputs of its bodies; None of operators that say nothing about them."""
    if node.op_type == "If":
        return 0, len(node.output)
    if node.op_type == "Loop":  # a number and a condition on both sides; the condition goes on
        return len(node.input), len(node.output) + 1
    if node.op_type == "Scan":
        return len(node.input) - (opset < _BARE_SCAN), len(node.output)
    return None
