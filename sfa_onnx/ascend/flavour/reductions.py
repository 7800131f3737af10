"""Reduce operators in a form that the plug-ins of a CANN line, or of all lines, read as meant.

Which plug-in reads axes where differs per operator, opset and line (`sfa_onnx.ascend.reductions`).
`ReduceSum` with listed axes is right everywhere: means, norms and logarithms of sums are written
with it. Maxima and minima that a line cannot read become TopK with k = 1, small products a chain of
Mul. `best_opset` says which opset lets most of them stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import onnx
from onnx import GraphProto, NodeProto, TensorProto

from sfa_onnx.ascend.cann import CANN_VERSIONS
from sfa_onnx.ascend.flavour.scope import Rule, Scope, inner_graphs
from sfa_onnx.ascend.reductions import REDUCTIONS, Form, Reading, reading
from sfa_onnx.errors import ModelError
from sfa_onnx.files.onnx_attrs import attribute, find_attribute

__all__ = ["best_opset", "form_of", "readable_reductions"]

_T = TensorProto
_NARROW: Final = (_T.FLOAT16, _T.BFLOAT16)
_FLOATS: Final = (_T.FLOAT, _T.DOUBLE, *_NARROW)
# What TopK is asked in, for types that not every implementation of it takes; all exact.
_TOP_K_TYPES: Final[dict[int, int]] = {
    **dict.fromkeys(_NARROW, _T.FLOAT),
    **dict.fromkeys((_T.BOOL, _T.INT8, _T.UINT8, _T.INT16, _T.UINT16), _T.INT32),
    **dict.fromkeys((_T.UINT32, _T.UINT64), _T.INT64),
}
_ALONE: Final = {"SumSquare": "Mul", "LogSum": "Log", "L1": "Abs", "L2": "Abs"}  # of one element
_LONGEST_PRODUCT: Final = 64  # factors written out one by one
_LOWEST: Final = float(np.finfo(np.float32).min)


def form_of(scope: Scope, node: NodeProto) -> Form:
    """Where a Reduce node has its axes; an empty list counts as none."""
    listed = find_attribute(node, "axes")
    if listed is not None and len(listed.ints):
        return "attribute"
    if len(node.input) > 1 and node.input[1]:
        known = scope.array(node.input[1])
        if known is None or known.size:
            return "input"
    return "noop" if int(attribute(node, "noop_with_empty_axes", 0)) else "none"


def readable_reductions(line: str | None) -> Rule:
    """The rule that rewrites what `line` (None: any line) does not read as the file means it."""
    lines = CANN_VERSIONS if line is None else (line,)

    def rule(scope: Scope, node: NodeProto) -> Sequence[NodeProto] | None:
        if node.op_type not in REDUCTIONS or node.domain:
            return None
        form = form_of(scope, node)
        if form == "noop":  # what is computed beside the sum stays
            alone = _ALONE.get(node.op_type.removeprefix("Reduce"), "Identity")
            return [scope.replace(node, alone, [node.input[0]] * (2 if alone == "Mul" else 1))]
        made = _Reduction(scope, node, form).rewritten(lines)
        return made or None

    return rule


@dataclass
class _Axes:
    """`known` axes, or the name of the value that holds them, or neither: all of unknown rank."""

    known: tuple[int, ...] | None = None
    value: str = ""


class _Reduction:
    """Builds the nodes that stand for one Reduce node."""

    def __init__(self, scope: Scope, node: NodeProto, form: Form):
        self.scope, self.node, self.form = scope, node, form
        self.x, self.label = node.input[0], node.name or node.op_type
        self.dtype, self.keep = scope.dtype(node.input[0]), int(attribute(node, "keepdims", 1))
        self.made: list[NodeProto] = []

    def rewritten(self, lines: Sequence[str]) -> list[NodeProto]:
        """The new nodes, the last one with the old one's name and outputs; empty: none needed."""
        kind = self.node.op_type.removeprefix("Reduce")
        axes = self._axes()
        if kind in ("L1", "L2", "LogSum", "SumSquare"):
            return self._by_sum(kind, axes)
        form: Form = "input" if self.scope.opset >= (13 if kind == "Sum" else 18) else "attribute"
        lost = any(
            reading(self.node.op_type, self.scope.opset, form, line) is not Reading.RIGHT
            for line in lines
        )
        if not lost and self.form == form:
            return []
        if kind == "Mean":
            return self._mean(axes)
        if not lost:
            return self._explicit(axes)
        if kind == "LogSumExp":
            return self._log_sum_exp(axes, lines)
        return self._product(axes) if kind == "Prod" else self._extreme(axes, kind == "Max")

    def _axes(self) -> _Axes:
        if self.form == "attribute":
            return _Axes(tuple(int(a) for a in attribute(self.node, "axes", ())))
        if self.form == "input":
            known = self.scope.array(self.node.input[1])
            if known is None:
                return _Axes(value=self.node.input[1])
            return _Axes(tuple(int(a) for a in known.ravel()))
        rank = self.scope.rank(self.x)
        return _Axes(None if rank is None else tuple(range(rank)))

    def _add(self, op_type: str, inputs: Sequence[str], part: str, **attributes: Any) -> str:
        dtype = attributes.pop("dtype", self.dtype)
        made = self.scope.node(
            op_type, inputs, f"{self.label}/{part}", dtype=dtype, dims=None, **attributes
        )
        self.made.append(made)
        return str(made.output[0])

    def _close(self, op_type: str, inputs: Sequence[str], **attributes: Any) -> list[NodeProto]:
        return [*self.made, self.scope.replace(self.node, op_type, inputs, **attributes)]

    def _constant(self, value: Any, part: str, dtype: int) -> str:
        """A constant of any float or integer type; bfloat16 by way of a Cast."""
        if dtype == _T.BFLOAT16:
            name = self.scope.constant(value, f"{self.label}/{part}", np.float32)
            return self._add("Cast", [name], f"{part}_cast", dtype=dtype, to=dtype)
        kind = onnx.helper.tensor_dtype_to_np_dtype(dtype or _T.FLOAT)
        return self.scope.constant(value, f"{self.label}/{part}", kind.type)

    # -- axes ----------------------------------------------------------------------------------

    def _flat(self, x: str) -> str:
        """All of a value of unknown rank as one axis."""
        minus = self.scope.constant([-1], f"{self.label}/flat_shape")
        return self._add("Reshape", [x, minus], "flat")

    def _reduce(self, kind: str, x: str, axes: _Axes, part: str, dtype: int = 0) -> str:
        """A reduction of `x` over `axes` in the form of this opset; keeps dims as the node does."""
        flat = axes.known is None and not axes.value
        known = (0,) if flat else axes.known
        source, keep = (self._flat(x), 0) if flat else (x, self.keep)
        if known == ():  # of a scalar: nothing to reduce
            return x
        inputs: list[str] = [source]
        attributes: dict[str, Any] = {"keepdims": keep}
        if self.scope.opset >= (13 if kind == "Sum" else 18):
            inputs.append(axes.value or self._listed(known or ()))
        else:
            attributes |= {"axes": list(self._known(axes) if axes.value else known or ())}
        made = self._add(f"Reduce{kind}", inputs, part, dtype=dtype or self.dtype, **attributes)
        return self._ones(x, made) if flat and self.keep else made

    def _listed(self, axes: tuple[int, ...]) -> str:
        return self.scope.constant(axes, f"{self.label}/axes")

    def _ones(self, x: str, scalar: str) -> str:
        """A scalar with as many axes of size 1 as `x` has."""
        shape = self._add("Shape", [x], "shape", dtype=_T.INT64)
        rank = self._add("Shape", [shape], "rank", dtype=_T.INT64)
        one = onnx.numpy_helper.from_array(np.array([1], np.int64))
        ones = self._add("ConstantOfShape", [rank], "ones", dtype=_T.INT64, value=one)
        return self._add("Reshape", [scalar, ones], "kept")

    def _explicit(self, axes: _Axes) -> list[NodeProto]:
        """The same reduction with its axes listed."""
        total = self._reduce(self.node.op_type.removeprefix("Reduce"), self.x, axes, "reduced")
        return self._rename(total)

    def _rename(self, name: str) -> list[NodeProto]:
        """The node that makes `name` takes the old node's name and output."""
        if not self.made or self.made[-1].output[0] != name:
            return self._close("Identity", [name])
        last = self.made[-1]
        last.name, last.output[0] = self.node.name, self.node.output[0]
        return self.made

    # -- sums ----------------------------------------------------------------------------------

    def _by_sum(self, kind: str, axes: _Axes) -> list[NodeProto]:
        """L1, L2, SumSquare, LogSum: no plug-in was seen for most opsets; ReduceSum is safe."""
        part = self.x
        if kind == "L1":
            part = self._add("Abs", [part], "abs")
        elif kind in ("L2", "SumSquare"):
            part = self._add("Mul", [part, part], "square")
        total = self._reduce("Sum", part, axes, "sum")
        after = {"L2": "Sqrt", "LogSum": "Log"}.get(kind)
        return self._rename(total) if after is None else self._close(after, [total])

    def _mean(self, axes: _Axes) -> list[NodeProto]:
        """The sum divided by the number of terms; 16-bit floats are summed in float32."""
        x, own = self.x, self.dtype
        if own in _NARROW:
            x = self._add("Cast", [x], "wide", dtype=_T.FLOAT, to=_T.FLOAT)
            self.dtype = _T.FLOAT
        total = self._reduce("Sum", x, axes, "sum")
        count = self._static_count(axes)
        if count is None:
            op_type, inputs = "Div", [total, self._open_count(axes, total)]
        elif self.dtype in _FLOATS and count & (count - 1) == 0:
            op_type, inputs = "Mul", [total, self._constant(1 / count, "factor", self.dtype)]
        else:
            op_type, inputs = "Div", [total, self._constant(count, "count", self.dtype)]
        if own == self.dtype:
            return self._close(op_type, inputs)
        return self._close("Cast", [self._add(op_type, inputs, "mean")], to=own)

    def _static_count(self, axes: _Axes) -> int | None:
        dims = self.scope.dims(self.x)
        if axes.known is None or dims is None:
            return None
        if any(not -len(dims) <= a < len(dims) for a in axes.known):
            raise ModelError(f"node {self.label!r}: axes {list(axes.known)} of rank {len(dims)}")
        sizes = [dims[a] for a in axes.known]
        count = math.prod(s for s in sizes if s is not None)
        return count if count > 0 and None not in sizes else None

    def _open_count(self, axes: _Axes, total: str) -> str:
        """The number of terms where dims are open: from the shape, as the sum's type."""
        if axes.known is not None:
            shape = self._add("Shape", [self.x], "shape", dtype=_T.INT64)
            count = ""
            for axis in axes.known:
                at = self.scope.constant(axis, f"{self.label}/axis")
                size = self._add("Gather", [shape, at], "size", dtype=_T.INT64, axis=0)
                count = self._add("Mul", [count, size], "count", dtype=_T.INT64) if count else size
        else:
            whole = self._add("Size", [self.x], "size", dtype=_T.INT64)
            kept = self._add("Size", [total], "kept_size", dtype=_T.INT64)
            one = self.scope.constant(1, f"{self.label}/one")
            least = self._add("Max", [kept, one], "kept_or_one", dtype=_T.INT64)
            count = self._add("Div", [whole, least], "count", dtype=_T.INT64)
        to = self.dtype or _T.FLOAT
        return self._add("Cast", [count], "count_cast", dtype=to, to=to)

    # -- what a line cannot read ---------------------------------------------------------------

    def _known(self, axes: _Axes) -> tuple[int, ...]:
        """The axes counted from the front, in order.

        Raises:
            ModelError: they, or the rank, are known at run time only.
        """
        rank = self.scope.rank(self.x)
        if axes.known is None or rank is None:
            raise ModelError(
                f"node {self.label!r}: {self.node.op_type} over axes or a rank known only at run"
                " time; the plug-ins of this CANN line lose its axes. Export with static rank"
            )
        return tuple(sorted({a % rank for a in axes.known}))

    def _extreme(self, axes: _Axes, largest: bool) -> list[NodeProto]:
        """ReduceMax, ReduceMin as TopK with k = 1, axis by axis."""
        x, wanted = self.x, self._known(axes)
        own, wide = self.dtype, _TOP_K_TYPES.get(self.dtype, self.dtype)
        if wide != own:
            x = self._add("Cast", [x], "wide", dtype=wide, to=wide)
        one = self.scope.constant([1], f"{self.label}/one")
        for axis in wanted:
            node = self.scope.node(
                "TopK", [x, one], f"{self.label}/first", axis=axis, largest=int(largest), sorted=1
            )
            node.output.append(self.scope.value(f"{self.label}/first_at", _T.INT64))
            self.made.append(node)
            x = node.output[0]
        x = self._squeezed(x, wanted)
        return self._rename(x) if wide == own else self._close("Cast", [x], to=own)

    def _squeezed(self, x: str, axes: tuple[int, ...]) -> str:
        if self.keep or not axes:
            return x
        if self.scope.opset < 13:
            return self._add("Squeeze", [x], "squeezed", axes=list(axes))
        return self._add("Squeeze", [x, self._listed(axes)], "squeezed")

    def _product(self, axes: _Axes) -> list[NodeProto]:
        """ReduceProd written out as a chain of Mul."""
        x, wanted = self.x, self._known(axes)
        count = self._static_count(_Axes(wanted))
        if count is None or count > _LONGEST_PRODUCT:
            raise ModelError(
                f"node {self.label!r}: ReduceProd over more than {_LONGEST_PRODUCT} or an open"
                " number of elements; the plug-ins of this CANN line lose its axes. Export without"
                f" it, or for CANN {CANN_VERSIONS[-2]} or later"
            )
        dims = self.scope.dims(self.x) or ()
        for axis in wanted:
            parts = [
                self._add("Gather", [x, self._pick(i)], "factor", axis=axis)
                for i in range(int(dims[axis] or 0))
            ]
            x = parts[0]
            for other in parts[1:]:
                x = self._add("Mul", [x, other], "product")
        return self._rename(self._squeezed(x, wanted))

    def _pick(self, index: int) -> str:
        return self.scope.constant([index], f"{self.label}/at")

    def _log_sum_exp(self, axes: _Axes, lines: Sequence[str]) -> list[NodeProto]:
        """ReduceLogSumExp in steps: the maximum (kept finite) out, exponentials, sum, logarithm."""
        wanted = self._known(axes)
        keep, self.keep = self.keep, 1
        inner = self.scope.node(
            "ReduceMax", [self.x], f"{self.label}/max", dtype=self.dtype, keepdims=1
        )
        form: Form = "attribute" if self.scope.opset < 18 else "input"
        if form == "attribute":
            inner.attribute.append(onnx.helper.make_attribute("axes", list(axes.known or ())))
        else:
            inner.input.append(self._listed(axes.known or ()))
        tops = _Reduction(self.scope, inner, form).rewritten(lines) or [inner]
        self.made += tops
        low = self._constant(_lowest(self.dtype), "lowest", self.dtype)
        high = self._constant(-_lowest(self.dtype), "highest", self.dtype)
        above = self._add("Max", [tops[-1].output[0], low], "above")
        finite = self._add("Min", [above, high], "finite_max")
        less = self._add("Sub", [self.x, finite], "shifted")
        total = self._reduce("Sum", self._add("Exp", [less], "exp"), axes, "sum")
        logs = self._add("Log", [total], "log")
        self.keep = keep
        result = self._add("Add", [logs, finite], "log_sum")
        return self._rename(self._squeezed(result, wanted))


def _lowest(dtype: int) -> float:
    if dtype in (_T.FLOAT, _T.BFLOAT16):
        return _LOWEST if dtype == _T.FLOAT else -3.3895313892515355e38
    kind = onnx.helper.tensor_dtype_to_np_dtype(dtype or _T.FLOAT)
    return float(np.finfo(kind).min)


# -- the opset ---------------------------------------------------------------------------------

# Between 13 and 18 these changed what they compute, not only their types or spelling.
_CHANGED: Final = frozenset(("BatchNormalization", "Resize", "RoiAlign", "Upsample"))


def best_opset(graph: GraphProto, line: str | None, opset: int) -> int:
    """17 or 18 where the plug-ins of `line` read the graph's reductions there; else `opset`.

    Up to 9.0 they read the axes of maxima as an attribute (opset 17), from 9.1 on as an input
    (opset 18); those of ReduceLogSumExp only as an input.
    """
    if line is None or not 13 <= opset <= 18:
        return opset
    kinds = {n.op_type for n in _nodes(graph) if n.op_type in REDUCTIONS and not n.domain}
    lost: dict[int, int] = {}
    for at in (17, 18):
        form: Form = "attribute" if at == 17 else "input"
        costly = (k for k in kinds if k in ("ReduceMax", "ReduceMin", "ReduceProd"))
        bad = [reading(k, at, form, line) is not Reading.RIGHT for k in costly]
        if "ReduceLogSumExp" in kinds:
            bad.append(reading("ReduceLogSumExp", at, form, line) is not Reading.RIGHT)
        lost[at] = sum(bad)
    here = 18 if opset == 18 else 17
    other = 35 - here
    if lost[other] >= lost[here] or not all(_may_move(n, opset, other) for n in _nodes(graph)):
        return opset
    for node in _nodes(graph):
        if node.op_type == "Split" and other == 18 and len(node.input) < 2:
            node.attribute.append(onnx.helper.make_attribute("num_outputs", len(node.output)))
    return other


def _nodes(graph: GraphProto) -> Iterator[NodeProto]:
    for node in graph.node:
        yield node
        for inner in inner_graphs(node):
            yield from _nodes(inner)


def _may_move(node: NodeProto, source: int, target: int) -> bool:
    """Whether a node means the same at both opsets, up to what the repairs rewrite."""
    if node.domain or node.op_type in REDUCTIONS or not onnx.defs.has(node.op_type):
        return True
    if not onnx.defs.has(node.op_type, min(source, target), ""):
        return False
    versions = {onnx.defs.get_schema(node.op_type, at, "").since_version for at in (source, target)}
    if len(versions) == 1:
        return True
    if node.op_type in _CHANGED:
        return False
    if target > source or node.op_type == "Split":
        return True
    if node.op_type.startswith("Scatter"):
        return str(attribute(node, "reduction", "none")) not in ("max", "min")
    return node.op_type == "Pad" and len(node.input) < 4
