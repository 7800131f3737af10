"""Masks and indices whose sizes are read off the scores: read the same sizes off the operands.

A graph often makes its mask in the shape of the scores (Shape, ConstantOfShape ...). The scores go,
so what the replacement still needs of such chains is made again from other tensors' sizes.
"""

from __future__ import annotations

import onnx

from sfa_onnx.files.onnx_attrs import attributes
from sfa_onnx.passes.axes.places import axis_labels
from sfa_onnx.passes.axes.trace import Stop
from sfa_onnx.passes.bind.site import Site
from sfa_onnx.passes.emit.emitter import Emitter
from sfa_onnx.passes.graph.kinds import own_type

__all__ = ["detach"]

_T = onnx.TensorProto
_LIMIT = 4000  # nodes looked at upstream of what a replacement reads


def detach(e: Emitter, site: Site) -> None:
    """Rewrite the replacement's inputs so that none depends on the size of a score tensor."""
    work = _Detach(e, site)
    for value in list(e.used):
        if work.depends(value):
            work.swap(value, work.again(value))
    e.sort()


class _Detach:
    def __init__(self, e: Emitter, site: Site) -> None:
        self.e, self.site, self.index = e, site, site.tracer.index
        self._depends: dict[str, bool] = {}
        self._again: dict[str, str] = {}

    def depends(self, value: str) -> bool:
        """Whether the size of a score tensor decides `value`."""
        stack = [value]
        order: list[str] = []
        while stack and len(self._depends) < _LIMIT:
            name = stack.pop()
            if name in self._depends or name in self.site.score_axes:
                continue
            self._depends[name] = False
            order.append(name)
            node = self.index.maker(name)
            if node is not None and node.op_type not in ("TopK", "MatMul"):
                stack += [n for n in node.input if n]
        changed = True
        while changed:
            changed = False
            for name in reversed(order):
                if not self._depends[name] and self._reads_scores(name):
                    self._depends[name] = changed = True
        return self._depends.get(value, False)

    def _reads_scores(self, name: str) -> bool:
        node = self.index.maker(name)
        if node is None:
            return False
        if node.op_type == "Shape" and node.input[0] in self.site.score_axes:
            return True
        return any(self._depends.get(n, False) for n in node.input)

    def again(self, value: str) -> str:
        """A copy of `value` that does not depend on scores."""
        if not self._depends.get(value, False):
            return value
        if value in self._again:
            return self._again[value]
        node = self.index.maker(value)
        assert node is not None
        if node.op_type == "Shape" and node.input[0] in self.site.score_axes:
            made = self._sizes(node)
        else:
            if len(node.output) != 1:
                raise Stop(f"{node.op_type} reads the size of the scores", value)
            inputs = [self.again(n) if n else "" for n in node.input]
            elem = self.site.tracer.sizes.elem_type(value)
            made = self.e.emit(
                own_type(node), inputs, "again", elem, domain=node.domain, **attributes(node)
            )
        self._again[value] = made
        return made

    def _sizes(self, node: onnx.NodeProto) -> str:
        groups = [axis_labels(c) for c in self.site.score_axes[node.input[0]]]
        if any(g is None for g in groups):
            raise Stop(f"the size of {node.input[0]} cannot be determined", node.input[0])
        a = attributes(node)
        start, end = a.get("start", 0), a.get("end", len(groups))
        return self.e.dims([g or [] for g in groups][start:end])

    def swap(self, old: str, new: str) -> None:
        """Read `new` where the replacement reads `old`."""
        fresh = {o for n in self.e.nodes for o in n.output if n.output[0] in self._again.values()}
        for node in self.e.nodes:
            if node.output[0] in fresh:
                continue
            for i, name in enumerate(node.input):
                if name == old:
                    node.input[i] = new
        self.e.used.pop(old, None)
