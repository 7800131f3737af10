"""Values that depend on no graph input: what GE can compute while it compiles."""

from __future__ import annotations

from sfa_onnx.ascend.checks.view import ModelView, Scope, is_external

__all__ = ["constant_values"]


def constant_values(view: ModelView) -> set[tuple[str, str]]:
    """(scope path, name) of every value made of embedded constants and static shapes alone.

    External weights do not count: GE may not fold what it reads from a file.
    """
    found: set[tuple[str, str]] = set()
    for scope in view.scopes:
        for name, tensor in scope.initializers.items():
            if not is_external(tensor):
                found.add((scope.path, name))
        for node in scope.graph.node:
            if node.domain not in ("", "ai.onnx") or node.op_type == "If":
                continue
            if node.op_type in ("Shape", "Size"):
                known = _static(view, scope, node.input[0]) if node.input else False
            else:
                known = all(_known(found, scope, name) for name in node.input if name)
            if known and not node.op_type.startswith(("Random", "Bernoulli", "Multinomial")):
                found.update((scope.path, out) for out in node.output if out)
    return found


def _static(view: ModelView, scope: Scope, name: str) -> bool:
    dims = view.shape(scope, name)
    return dims is not None and all(isinstance(d, int) for d in dims)


def _known(found: set[tuple[str, str]], scope: Scope, name: str) -> bool:
    at: Scope | None = scope
    while at is not None:
        if at.known(name):
            return (at.path, name) in found
        at = at.parent
    return False
