"""What every rule is given, and small helpers to write findings with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property

import onnx

from sfa_onnx.ascend.cann import Cann
from sfa_onnx.ascend.checks.facts import Registration, registration
from sfa_onnx.ascend.checks.plugin import Plugin
from sfa_onnx.ascend.checks.view import ModelView, Scope
from sfa_onnx.ascend.flavour.scope import Facts, Names
from sfa_onnx.ascend.flavour.scope import Scope as RewriteScope

__all__ = ["Context", "Node"]


@dataclass(frozen=True, eq=False)
class Node:
    """A node where it stands, with the key the parser looks up.

    `found` False: the parser stops because it finds no opset version for the node's domain.
    `version` is then the one it would find in the ATC flavour, so that other rules can go on.
    """

    scope: Scope
    index: int
    proto: onnx.NodeProto
    domain: str = "ai.onnx"
    version: int | None = None
    found: bool = True

    @property
    def name(self) -> str:
        """The name the parser gives, with the path of its branch in front."""
        own = self.scope.names[self.index]
        return f"{self.scope.path}/{own}" if self.scope.path else own

    @cached_property
    def op_type(self) -> str:
        """ONNX op type."""
        return self.proto.op_type

    @property
    def key(self) -> str:
        """`domain::version::OpType`."""
        return f"{self.domain}::{self.version}::{self.op_type}"


@dataclass(eq=False)
class Context:
    """A model under check: the release, the plug-ins, the SoC."""

    view: ModelView
    cann: Cann
    plugins: tuple[Plugin, ...]
    soc_version: str = ""

    def __post_init__(self) -> None:
        self._by_key = {(d, v, p.op_type): p for p in self.plugins for d, v in p.keys}
        self._nodes: list[Node] | None = None
        self._by_scope: dict[Scope, list[Node]] = {}
        self._rewrite_scopes: dict[Scope, RewriteScope] = {}
        self._merged = {d or "ai.onnx": v for d, v in self.view.imports.items()}

    def nodes(self) -> list[Node]:
        """Every node the parser meets, root first."""
        if self._nodes is None:
            self._nodes = [self._node(s, i, n) for s, i, n in self.view.nodes()]
        return self._nodes

    def nodes_of(self, scope: Scope) -> Iterator[Node]:
        """The nodes of one scope."""
        if not self._by_scope:
            for node in self.nodes():
                self._by_scope.setdefault(node.scope, []).append(node)
        return iter(self._by_scope.get(scope, ()))

    def takes_as_is(self, node: Node) -> bool:
        """Whether the parser gets this node as it stands, not its ATC form."""
        atc = node.proto.domain in ("", "ai.onnx")
        return atc or self.cann.many_domains or len(self.view.imports) == 1

    def well_formed(self, node: Node) -> bool:
        """Whether a node has the inputs and outputs its op asks for.

        Where no counts are known (another domain, an opset without the op), one input is enough.
        """
        counts = _counts(node.op_type, node.version or 0) if node.domain == "ai.onnx" else None
        if counts is None:
            return node.domain != "ai.onnx" or bool(node.proto.input)
        least, most, least_out = counts
        given = len(node.proto.input)
        return least <= given <= most and len(node.proto.output) >= least_out

    def rewrite_scope(self, scope: Scope) -> RewriteScope:
        """The scope as the rewriting rules of the ATC flavour see it (for asking, not writing)."""
        if scope not in self._rewrite_scopes:
            outer = None if scope.parent is None else self.rewrite_scope(scope.parent)
            made = RewriteScope(scope.graph, self._names, self.facts, self.view.opset, outer)
            self._rewrite_scopes[scope] = made
        return self._rewrite_scopes[scope]

    @cached_property
    def _names(self) -> Names:
        return Names(self.view.model)

    @cached_property
    def facts(self) -> Facts:
        """Dtypes and dims of all values, in the form the rewriting rules want."""
        return self.view.facts()

    def _node(self, scope: Scope, index: int, proto: onnx.NodeProto) -> Node:
        spelled, imports = proto.domain, self.view.imports
        domain = spelled or "ai.onnx"
        merged = self._merged.get(domain)
        if self.cann.many_domains:
            return Node(scope, index, proto, domain, merged, merged is not None)
        if not spelled and len(imports) == 1:
            only, version = next(iter(imports.items()))
            return Node(scope, index, proto, only or "ai.onnx", version)
        return Node(scope, index, proto, domain, merged, bool(spelled) and spelled in imports)

    def plugin(self, node: Node) -> Plugin | None:
        """The user plug-in that takes the node; built-in plug-ins come after."""
        if node.version is None:
            return None
        return self._by_key.get((node.domain, node.version, node.op_type))

    def registration(self, node: Node) -> Registration:
        """Whether anything parses the node. A user's plug-in hides a built-in one of its key."""
        plugin = self.plugin(node)
        if plugin is not None:
            return Registration(True, (plugin.ge_type,) if plugin.ge_type else ())
        if node.version is None:
            return Registration(False)
        return registration(self.cann, node.domain, node.version, node.op_type)

    def standard(self, node: Node) -> bool:
        """Whether the node is a standard op, of whatever opset, that no user's plug-in takes."""
        return node.domain == "ai.onnx" and self.plugin(node) is None

    def builtin(self, node: Node) -> bool:
        """Whether CANN's own plug-in of a standard op takes the node."""
        return self.standard(node) and self.registration(node).known is not False


@cache
def _counts(op_type: str, version: int) -> tuple[int, int, int] | None:
    if not onnx.defs.has(op_type, version, ""):
        return None
    schema = onnx.defs.get_schema(op_type, version, "")
    return schema.min_input, schema.max_input, schema.min_output
