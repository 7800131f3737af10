"""Nodes that sit on AI CPU for a reason a rewrite can take away, and the rewrites.

TopK that need not be unsorted; masks written by scattering one value, or gathered as bool; integer
division, modulo and running sums in int64 whose numbers fit narrower types.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from onnx import TensorProto

from sfa_onnx.ascend.checks.context import Context, Node
from sfa_onnx.ascend.checks.finding import Finding
from sfa_onnx.ascend.checks.move_rewrites import fits_int32, is_uniform
from sfa_onnx.ascend.checks.support import families
from sfa_onnx.files.onnx_attrs import attribute

__all__ = ["moves"]

_T: Final = TensorProto


def moves(ctx: Context) -> Iterator[Finding]:
    """One finding per node that would leave AI CPU on the chips asked for."""
    if "A2" not in families(ctx.soc_version) and "A3" not in families(ctx.soc_version):
        return
    for node in ctx.nodes():
        if not ctx.standard(node) or not ctx.well_formed(node):
            continue
        scope = ctx.rewrite_scope(node.scope)
        if node.op_type == "TopK" and not attribute(node.proto, "sorted", 1):
            yield _found(
                "topk-unsorted",
                node,
                "TopK with sorted = 0 stays on AI CPU; sorted, with a constant k, it is on AI Core",
                "set sorted = 1: one of the orders the node allows",
            )
        elif node.op_type == "ScatterElements" and is_uniform(scope, node.proto):
            yield _found(
                "scatter-mask",
                node,
                "ScatterElements of one value over static shapes runs on AI CPU (A2, A3)",
                "compare positions (Equal) and choose (Where)",
            )
        elif node.op_type == "GatherElements" and scope.dtype(node.proto.input[0]) == _T.BOOL:
            yield _found(
                "gather-bool",
                node,
                "GatherElements over bool runs on AI CPU (A2, A3); AI Core takes int8",
                "gather int8, with a Cast before and behind",
            )
        elif fits_int32(scope, node.proto):
            yield _found(
                "int64-fits",
                node,
                f"{node.op_type} in int64 runs on AI CPU (A2, A3); its numbers fit int32, which"
                " AI Core takes",
                "compute it in int32, with a Cast before and behind",
            )


def _found(rule: str, node: Node, message: str, hint: str) -> Finding:
    return Finding(rule, "warning", "graph", message, node.name, "", hint, True, "listing")
