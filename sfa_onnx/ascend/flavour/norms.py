"""Root mean square norms -> the vendor's fused operators, with which CANN parses ONNX files.

CANN has parser plug-ins for `NPURmsNorm(x, gamma)` and `NPUAddRmsNorm(x1, x2, gamma)` on all lines
known here (read in the sources of 8.5.0 to 9.2.0-beta.2). They never read the file's epsilon: the
GE node always gets 1e-6. Another epsilon is reached by scaling x, which a norm undoes:
x c / sqrt(mean(x^2 c^2) + 1e-6) = x / sqrt(mean(x^2) + 1e-6 / c^2).

Every match is evaluated node by node in float64 against the operator's formula before it is taken.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto

from sfa_onnx.ascend.flavour.norm_match import PLUGIN_EPSILON, Norm, match, same_epsilon
from sfa_onnx.ascend.flavour.scope import Facts, Names, Scope, scopes
from sfa_onnx.files.onnx_attrs import attribute

if TYPE_CHECKING:
    from sfa_onnx.ascend.checks.view import ModelView

__all__ = ["ADD_RMS_NORM", "RMS_NORM", "fuse_norms", "readable_norms"]

RMS_NORM: Final = "NPURmsNorm"
ADD_RMS_NORM: Final = "NPUAddRmsNorm"
_T = TensorProto


def fuse_norms(model: ModelProto, names: Names, facts: Facts, opset: int) -> list[str]:
    """Fuse every norm that can be, in place; returns one note per kind.

    Nodes that only the norm needed go; a residual sum in front is taken into `NPUAddRmsNorm`.
    """
    from sfa_onnx.ascend.checks.view import ModelView  # the checks import this module

    counts = {RMS_NORM: 0, ADD_RMS_NORM: 0}
    left: list[str] = []
    view = ModelView(model)
    for scope in list(scopes(model.graph, names, facts, opset)):
        fusions: list[_Fusion] = []
        for node in scope.graph.node:
            found = match(scope, node)
            if isinstance(found, str):
                left.append(f"{node.name}: {found}")
            elif found is not None:
                fusions.append(_Fusion(scope, node, found, view if scope.parent is None else None))
        if fusions:
            _apply(scope, fusions, counts)
    notes = [f"{n} norm{'s' * (n != 1)} fused to {kind}" for kind, n in counts.items() if n]
    return [*notes, *(f"norm kept as it is: {text}" for text in left)]


def _apply(scope: Scope, fusions: Sequence[_Fusion], counts: dict[str, int]) -> None:
    """Put all fused nodes of one graph in, at the place of the sum or of the norm's last node."""
    made: dict[int, list[NodeProto]] = {}  # id of the node at whose place they come
    gone: list[NodeProto] = [f.anchor for f in fusions]  # held, so that ids stay theirs
    for fusion in fusions:
        add = fusion.residual()
        if add is None or id(add) in made:
            made[id(fusion.anchor)] = fusion.nodes()
            counts[RMS_NORM] += 1
        else:
            made[id(add)] = [fusion.added(add)]
            gone.append(add)
            counts[ADD_RMS_NORM] += 1
    removed = {id(n) for n in gone}
    kept: list[NodeProto] = []
    for node in scope.graph.node:
        kept += made.get(id(node), [] if id(node) in removed else [node])
    _declare(scope, kept)
    kept = _needed(scope, kept, [n for f in fusions for n in f.norm.nodes])
    del scope.graph.node[:]
    scope.graph.node.extend(kept)
    scope.changed()


def _declare(scope: Scope, nodes: Sequence[NodeProto]) -> None:
    """Write down the shapes of fused results: onnx's own inference does not know the operators."""
    graph = scope.graph
    known = {v.name for v in (*graph.value_info, *graph.output, *graph.input)}
    for node in nodes:
        for name in node.output if node.domain == "npu" else ():
            dims, dtype = scope.dims(name), scope.dtype(name)
            if name and name not in known and dtype and dims is not None:
                graph.value_info.append(onnx.helper.make_tensor_value_info(name, dtype, dims))


@dataclass
class _Fusion:
    """One norm: `anchor` made the result."""

    scope: Scope
    anchor: NodeProto
    norm: Norm
    view: ModelView | None = None  # knows symbolic dims, which are equal when they are one symbol

    def nodes(self) -> list[NodeProto]:
        """NPURmsNorm, with x scaled in float32 where the plug-in's epsilon is not the file's."""
        norm, scope, label = self.norm, self.scope, self.anchor.name
        output = self.anchor.output[0]
        if norm.exact_epsilon:
            return [_fused(scope, RMS_NORM, [norm.x, norm.gamma], [output], label)]
        nodes, x = _scaled(scope, norm.x, norm.epsilon, label)
        gamma = norm.gamma
        if scope.dtype(gamma) != _T.FLOAT:
            nodes.append(scope.node("Cast", [gamma], f"{label}/gamma", dtype=_T.FLOAT, to=_T.FLOAT))
            gamma = nodes[-1].output[0]
        if norm.dtype == _T.FLOAT:
            return [*nodes, _fused(scope, RMS_NORM, [x, gamma], [output], label)]
        wide = scope.value(f"{label}/wide", _T.FLOAT, scope.dims(output))
        inner = _fused(scope, RMS_NORM, [x, gamma], [wide], scope.names.fresh(f"{label}/norm"))
        return [*nodes, inner, scope.replace(self.anchor, "Cast", [wide], to=norm.dtype)]

    def residual(self) -> NodeProto | None:
        """The sum in front, where it is one of two equal shapes and nothing else is in the way."""
        norm, scope = self.norm, self.scope
        if not norm.exact_epsilon or scope.dtype(norm.gamma) != norm.dtype:
            return None
        add = scope.made_here(norm.x)
        if add is None or add.op_type != "Add" or add.domain or len(add.input) != 2:
            return None
        same = self._same_shape(*add.input)
        types = {scope.dtype(name) for name in add.input}
        given = {t.name for t in scope.graph.initializer} | {v.name for v in scope.graph.input}
        return add if same and types == {norm.dtype} and norm.gamma in given else None

    def _same_shape(self, left: str, right: str) -> bool:
        """Whether two values have one shape for sure: the operator does not broadcast."""
        dims: list[Sequence[int | str | None] | None] = [
            self.scope.dims(left),
            self.scope.dims(right),
        ]
        if self.view is not None:
            dims = [self.view.shape(self.view.root, name) for name in (left, right)]
        return dims[0] is not None and None not in dims[0] and dims[0] == dims[1]

    def added(self, add: NodeProto) -> NodeProto:
        """NPUAddRmsNorm in the place of the sum; the sum stays, as its third output."""
        inputs = [*add.input, self.norm.gamma]
        rstd = self.scope.value(f"{self.anchor.name}/rstd", _T.FLOAT)
        outputs = [self.anchor.output[0], rstd, add.output[0]]
        return _vendor(ADD_RMS_NORM, inputs, outputs, self.anchor.name)


def _vendor(op_type: str, inputs: Sequence[str], outputs: Sequence[str], name: str) -> NodeProto:
    return NodeProto(op_type=op_type, domain="npu", name=name, input=inputs, output=outputs)


def _fused(
    scope: Scope, op_type: str, inputs: Sequence[str], outputs: Sequence[str], name: str
) -> NodeProto:
    rstd = scope.value(f"{name}/rstd", _T.FLOAT)
    return _vendor(op_type, inputs, [*outputs, rstd], name)


def _scaled(scope: Scope, x: str, epsilon: float, label: str) -> tuple[list[NodeProto], str]:
    """X in float32 times sqrt(1e-6 / epsilon)."""
    nodes, dims = [], scope.dims(x)
    if scope.dtype(x) != _T.FLOAT:
        nodes.append(
            scope.node("Cast", [x], f"{label}/float", dtype=_T.FLOAT, dims=dims, to=_T.FLOAT)
        )
        x = nodes[-1].output[0]
    factor = scope.constant(math.sqrt(PLUGIN_EPSILON / epsilon), f"{label}/scale", np.float32)
    nodes.append(scope.node("Mul", [x, factor], f"{label}/scaled", dtype=_T.FLOAT, dims=dims))
    return nodes, nodes[-1].output[0]


def _needed(scope: Scope, nodes: list[NodeProto], norm: list[NodeProto]) -> list[NodeProto]:
    """The nodes without those of the old norm that nobody reads any more."""
    mine = {id(n) for n in norm}
    while True:
        read = {name for n in nodes for name in n.input} | _read_below(nodes)
        read |= {o.name for o in scope.graph.output}
        kept = [n for n in nodes if id(n) not in mine or read & set(n.output)]
        if len(kept) == len(nodes):
            return kept
        nodes = kept


def _read_below(nodes: Sequence[NodeProto]) -> set[str]:
    from sfa_onnx.ascend.flavour.scope import inner_graphs

    read: set[str] = set()
    stack: list[GraphProto] = [g for n in nodes for g in inner_graphs(n)]
    while stack:
        graph = stack.pop()
        read |= {name for n in graph.node for name in n.input}
        read |= {o.name for o in graph.output}
        stack += [g for n in graph.node for g in inner_graphs(n)]
    return read


def readable_norms(scope: Scope, node: NodeProto) -> Sequence[NodeProto] | None:
    """Vendor norms whose epsilon CANN's plug-ins would not read, with x scaled instead."""
    if node.op_type not in (RMS_NORM, ADD_RMS_NORM) or node.domain not in ("", "npu"):
        return None
    epsilon = float(attribute(node, "epsilon", PLUGIN_EPSILON))
    if same_epsilon(epsilon) or epsilon <= 0:
        return None
    label, x, nodes = node.name, node.input[0], []
    dtype, outputs = scope.dtype(x), [*node.output, "", ""]
    if node.op_type == ADD_RMS_NORM:
        total = outputs[2]
        nodes.append(
            scope.node("Add", node.input[:2], f"{label}/sum", dtype=dtype, dims=scope.dims(x),
                       outputs=[total] if total else ())
        )  # fmt: skip
        x = nodes[0].output[0]
    norm = Norm(x, node.input[-1], epsilon, dtype, [])
    anchor = NodeProto(name=label, output=outputs[:1])
    nodes += _Fusion(scope, anchor, norm).nodes()
    return [*nodes, *_unscaled(scope, nodes, outputs[1], label, epsilon)]


def _unscaled(
    scope: Scope, nodes: Sequence[NodeProto], rstd: str, label: str, epsilon: float
) -> list[NodeProto]:
    """1 / sqrt(mean(x^2) + epsilon) out of that of the scaled x, where the file names it."""
    if not rstd:
        return []
    inner = next(n for n in nodes if n.op_type == RMS_NORM)
    factor = scope.constant(math.sqrt(PLUGIN_EPSILON / epsilon), f"{label}/scale", np.float32)
    return [scope.node("Mul", [inner.output[1], factor], f"{label}/unscaled", dtype=_T.FLOAT,
                       outputs=[rstd])]  # fmt: skip
