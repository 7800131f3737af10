"""Emit replacement nodes: bring any traced tensor into the axis order an operator wants."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from sfa_onnx.passes.axes.expr import Expr, Label, Quot, Read, Rem
from sfa_onnx.passes.axes.places import axis_labels, blocks, repeated, single
from sfa_onnx.passes.axes.trace import Causal, Ref, Stop, Tracer
from sfa_onnx.passes.emit.counted import counted, whole
from sfa_onnx.passes.emit.sized import sized
from sfa_onnx.passes.graph.order import in_order
from sfa_onnx.passes.shapes.size import form_of

__all__ = ["Emitter"]

_T = onnx.TensorProto
Group = Sequence[Label]


class Emitter:
    """Collects the nodes of one replacement; every value it makes starts with `stem`.

    Attributes:
        nodes: in order, each after what it reads.
        initializers: the constants they need.
        used: values of the original graph that they read.
    """

    def __init__(self, tracer: Tracer, stem: str) -> None:
        self.tracer = tracer
        self.stem = stem
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.used: dict[str, None] = {}
        self._constants: dict[bytes, str] = {}
        self._made: dict[str, int] = {}  # value -> elem_type
        self._sources: dict[Label, tuple[str, int]] = {}
        self._memo: dict[tuple[Any, ...], str] = {}

    # -- nodes ------------------------------------------------------------------------------------

    def emit(
        self,
        op: str,
        inputs: Sequence[str],
        hint: str,
        elem_type: int,
        *,
        out: str = "",
        **attrs: Any,
    ) -> str:
        """Append a node with one output and return the output's name; equal nodes are made once."""
        domain = attrs.pop("domain", "")
        key = (op, domain, tuple(inputs), repr(sorted(attrs.items())), out)
        if key in self._memo:
            return self._memo[key]
        name = out or f"{self.stem}/{hint}_{len(self.nodes)}"
        node = helper.make_node(
            op, list(inputs), [name], name=f"{self.stem}/{op}_{len(self.nodes)}"
        )
        node.domain = domain
        node.attribute.extend(helper.make_attribute(k, v) for k, v in attrs.items())
        self.nodes.append(node)
        self.used.update((i, None) for i in inputs if i and i not in self._made)
        self._made[name] = elem_type
        self._memo[key] = name
        return name

    def two(
        self, op: str, inputs: Sequence[str], hint: str, types: tuple[int, int], **attrs: Any
    ) -> tuple[str, str]:
        """Append a node with two outputs (TopK)."""
        outputs = {f"{hint}a": types[0], f"{hint}b": types[1]}
        first, second = self.several(op, inputs, outputs, **attrs)
        return first, second

    def several(
        self, op: str, inputs: Sequence[str], outputs: Mapping[str, int], **attrs: Any
    ) -> list[str]:
        """Append a node with one output per entry (hint -> type); return their names."""
        count = len(self.nodes)
        names = [f"{self.stem}/{hint}_{count}" for hint in outputs]
        node = helper.make_node(op, list(inputs), names, name=f"{self.stem}/{op}_{count}")
        node.domain = attrs.pop("domain", "")
        node.attribute.extend(helper.make_attribute(k, v) for k, v in attrs.items())
        self.nodes.append(node)
        self.used.update((i, None) for i in inputs if i and i not in self._made)
        self._made.update(zip(names, outputs.values(), strict=True))
        return names

    def finish(self, value: str, name: str) -> None:
        """Call the last value `name`, which the graph knows; add an Identity if it was not made."""
        if value not in self._made or value in self.initializer_names:
            self.emit("Identity", [value], "out", self.elem_type(value), out=name)
            return
        for node in self.nodes:
            for names in (node.input, node.output):
                for i, old in enumerate(names):
                    if old == value:
                        names[i] = name
        self._made[name] = self._made[value]

    def sort(self) -> None:
        """Order the nodes so that each comes after what it reads."""
        self.nodes = in_order(self.nodes)

    def prune(self, outputs: Iterable[str]) -> None:
        """Drop nodes and constants that `outputs` do not need."""
        needed, kept = set(outputs), []
        for node in reversed(self.nodes):
            if any(o in needed for o in node.output):
                kept.append(node)
                needed.update(node.input)
        self.nodes = kept[::-1]
        self.initializers = [t for t in self.initializers if t.name in needed]
        self.used = {v: None for v in self.used if v in needed}

    @property
    def initializer_names(self) -> set[str]:
        """Names of the constants made here."""
        return {t.name for t in self.initializers}

    def constant(self, array: np.ndarray) -> str:
        """The name of an initializer holding `array`; equal ones are shared."""
        key = array.dtype.str.encode() + str(array.shape).encode() + array.tobytes()
        if key not in self._constants:
            name = f"{self.stem}/const_{len(self.initializers)}"
            self.initializers.append(numpy_helper.from_array(array, name))
            self._constants[key] = name
            self._made[name] = helper.np_dtype_to_tensor_dtype(array.dtype)
        return self._constants[key]

    def ints(self, values: Iterable[int]) -> str:
        """An int64 vector; stops recognition where a number does not fit."""
        return self.constant(whole(list(values), self.stem))

    def elem_type(self, value: str) -> int:
        """The type of a value, made here or not."""
        return self._made.get(value) or self.tracer.sizes.elem_type(value)

    def cast(self, value: str, elem_type: int) -> str:
        """`value` in another type, or itself."""
        if self.elem_type(value) == elem_type:
            return value
        return self.emit("Cast", [value], "cast", elem_type, to=elem_type)

    # -- sizes ------------------------------------------------------------------------------------

    def learn(self, ref: Ref) -> None:
        """Remember where the size of a label can be read off in the graph."""
        shape = self.tracer.made(ref)
        for axis, (coordinate, size) in enumerate(zip(ref.coords, shape, strict=True)):
            labels = single(coordinate)
            if labels is not None and labels.size == size and labels not in self._sources:
                self._sources[labels] = (ref.value, axis)

    def static(self, label: Label) -> bool:
        """Whether the label's size is a number in every run."""
        if label.size == 1:
            return True
        if label not in self._sources:
            return not self.tracer.open(label.size)
        return self.tracer.static(*self._sources[label])

    def size(self, labels: Group) -> str:
        """An int64 [1] tensor with the product of the labels' sizes."""
        fixed = math.prod(x.size for x in labels if self.static(x))
        parts = [self._dim(x) for x in labels if not self.static(x)]
        if fixed != 1 or not parts:
            parts.append(self.ints([fixed]))
        total = parts[0]
        for part in parts[1:]:
            total = self.emit("Mul", [total, part], "size", _T.INT64)
        return total

    def _dim(self, label: Label) -> str:
        if label not in self._sources:
            return sized(self, self.tracer.sizes, form_of(label.size))
        return self.dim_of(*self._sources[label])

    def dim_of(self, value: str, axis: int) -> str:
        """An int64 [1] tensor with one dim of a value."""
        shape = self.emit("Shape", [value], "shape", _T.INT64)
        return self.emit("Gather", [shape, self.ints([axis])], "dim", _T.INT64, axis=0)

    def dims(self, groups: Sequence[Group]) -> str:
        """An int64 vector of sizes, one per group (a constant when all are static)."""
        if all(self.static(x) for g in groups for x in g):
            return self.ints(math.prod(x.size for x in g) for g in groups)
        parts = [self.size(g) for g in groups]
        return self.emit("Concat", parts, "dims", _T.INT64, axis=0)

    # -- views ------------------------------------------------------------------------------------

    def reshape(self, value: str, groups: Sequence[Group], hint: str = "view") -> str:
        """`value` with one axis per group; at most one dynamic size costs nothing."""
        moving = [i for i, g in enumerate(groups) if not all(self.static(x) for x in g)]
        if len(moving) > 1:
            target = self.dims(groups)
        else:
            target = self.ints(
                -1 if i in moving else math.prod(x.size for x in g) for i, g in enumerate(groups)
            )
        return self.emit("Reshape", [value, target], hint, self.elem_type(value))

    def arrange(self, ref: Ref, groups: Sequence[Group], hint: str = "view") -> str:
        """The tensor of `ref` with one axis per group of labels, in that order.

        Labels that the tensor lacks become an axis of size 1 (it is broadcast along them).

        Raises:
            Stop: its elements are not a view of this form.
        """
        if ref.value in self.tracer.joined:
            self._join(ref.value)
        self.learn(ref)
        value, axes = self._cut(ref)
        return self.permute(value, axes, groups, hint)

    def _join(self, value: str) -> None:
        """Make the tensor that chunks make up, once."""
        if value in self._made:
            return
        chunks = self.tracer.joined[value]
        if isinstance(chunks, Causal):
            axes: list[Group] = [*([x] for x in chunks.rows), [chunks.whole]]
            sides = [self.index(chunks.row, axes), self.iota(chunks.whole, axes)]
            self.emit("GreaterOrEqual", sides, "causal", _T.BOOL, out=value)
            return
        parts = []
        for ref, label in chunks.parts:
            groups: list[Group] = [[x] for x in (*chunks.rows, label, *chunks.last)]
            part = self.arrange(ref, groups, "chunk")
            parts.append(self.broadcast(part, groups, ref.labels))
        kind = self.elem_type(parts[0])
        self.emit("Concat", parts, "chunks", kind, out=value, axis=len(chunks.rows))

    def permute(
        self, value: str, axes: Sequence[Group], groups: Sequence[Group], hint: str = "view"
    ) -> str:
        """`value`, whose axes run over `axes`, with one axis per group instead.

        Raises:
            Stop: a label of the tensor is in no group.
        """
        present = [label for axis in axes for label in axis]
        order = [label for g in groups for label in g if label in present]
        if sorted(map(str, present)) != sorted(map(str, order)):
            raise Stop(f"the axes of {value} cannot be brought into order", value)
        target = [[x for x in g if x in present] for g in groups]
        if present != order:
            if any(len(axis) != 1 for axis in axes):
                value = self.reshape(value, [[x] for x in present], hint)
            perm = [present.index(x) for x in order]
            value = self.emit("Transpose", [value], hint, self.elem_type(value), perm=perm)
            axes = [[x] for x in order]
        if [list(a) for a in axes] == target:
            return value
        return self._regroup(value, axes, target, hint)

    def _regroup(
        self, value: str, axes: Sequence[Group], target: Sequence[Group], hint: str
    ) -> str:
        """Same labels in the same order, other axes: Squeeze or Unsqueeze where that is enough."""
        wide = [list(a) for a in axes if a]
        if wide == [list(t) for t in target if t]:
            empty = [i for i, a in enumerate(axes) if not a]
            if empty:
                value = self.emit("Squeeze", [value, self.ints(empty)], hint, self.elem_type(value))
            missing = [i for i, t in enumerate(target) if not t]
            if missing:
                value = self.emit(
                    "Unsqueeze", [value, self.ints(missing)], hint, self.elem_type(value)
                )
            return value
        return self.reshape(value, target, hint)

    def _cut(self, ref: Ref) -> tuple[str, list[list[Label]]]:
        """Slice axes that are only partly covered; the labels of every axis that remains."""
        shape = self.tracer.shape(ref.value)
        value, axes = ref.value, []
        for axis, (coordinate, size) in enumerate(zip(ref.coords, shape, strict=True)):
            labels = axis_labels(coordinate)
            if labels is None and (label := repeated(coordinate)) is not None:
                at = self.index(coordinate, [[label]])
                kind = self.elem_type(value)
                value = self.emit("Gather", [value, at], "repeated", kind, axis=axis)
                axes.append([label])
                continue
            if labels is None:
                return self._cut_strided(ref, shape)
            covered = math.prod(x.size for x in labels)
            if (coordinate.const, covered) != (0, size):
                if not all(self.static(x) for x in labels):
                    self.tracer.unify(covered, size)
                    raise Stop(f"axis {axis} of {ref.value} is cut at a dynamic size", ref.value)
                value = self.slice(value, axis, coordinate.const, coordinate.const + covered)
            axes.append(labels)
        return value, axes

    def _cut_strided(self, ref: Ref, shape: tuple[int, ...]) -> tuple[str, list[list[Label]]]:
        """As `_cut` where an axis holds a part of every block: split it into blocks first.

        An expansion weight [C, N * (nope + v)] read at n * (nope + v) + d is one.
        """
        dims: list[int] = []
        axes: list[list[Label]] = []
        cuts: list[tuple[int, int, int]] = []
        for axis, (coordinate, size) in enumerate(zip(ref.coords, shape, strict=True)):
            nested = blocks(coordinate, size)
            if nested is None or not self.tracer.static(ref.value, axis):
                raise Stop(
                    f"axis {axis} of {ref.value} is read at {coordinate}, which is no view",
                    ref.value,
                )
            for label, length, start in nested:
                if label.size != length:
                    cuts.append((len(dims), start, start + label.size))
                dims.append(length)
                axes.append([label])
        value = self.emit(
            "Reshape", [ref.value, self.ints(dims)], "blocks", self.elem_type(ref.value)
        )
        for axis, start, stop in cuts:
            value = self.slice(value, axis, start, stop)
        return value, axes

    def slice(self, value: str, axis: int, start: int, stop: int) -> str:
        """value[..., start:stop, ...] along `axis`."""
        bounds = [self.ints([start]), self.ints([stop]), self.ints([axis])]
        return self.emit("Slice", [value, *bounds], "slice", self.elem_type(value))

    def broadcast(self, value: str, groups: Sequence[Group], have: Iterable[Label]) -> str:
        """Expand axes of size 1 for labels it does not have."""
        known = set(have)
        if all(x in known or x.size == 1 for g in groups for x in g):
            return value
        if any(0 < len(known & set(g)) < len(g) for g in groups):  # one of the merged labels
            alone: list[Group] = [[x] for g in groups for x in g]
            value = self.reshape(value, [[x for x in g if x in known] for g in alone])
            return self.reshape(self.broadcast(value, alone, have), groups)
        return self.emit("Expand", [value, self.dims(groups)], "wide", self.elem_type(value))

    # -- index arithmetic -------------------------------------------------------------------------

    def index(self, expr: Expr, groups: Sequence[Group]) -> str:
        """An int64 tensor that holds `expr` at every element of `groups` (broadcastable)."""
        parts = []
        for atom, coefficient in expr.terms:
            part = self._atom(atom, groups)
            if coefficient != 1:
                factor = self.constant(np.asarray(coefficient, np.int64))
                part = self.emit("Mul", [part, factor], "index", _T.INT64)
            parts.append(part)
        if expr.const or not parts:
            parts.append(self.constant(np.asarray(expr.const, np.int64)))
        total = parts[0]
        for part in parts[1:]:
            total = self.emit("Add", [total, part], "index", _T.INT64)
        return total

    def _atom(self, atom: Label | Read | Quot | Rem, groups: Sequence[Group]) -> str:
        if isinstance(atom, Read):
            value = self.arrange(Ref(atom.value, atom.coords), groups, "index")
            return self.cast(value, _T.INT64)
        if isinstance(atom, Label):
            return self.iota(atom, groups)
        inner = self.index(atom.expr, groups)
        by = self.constant(np.asarray(atom.by, np.int64))
        op = "Div" if isinstance(atom, Quot) else "Mod"
        return self.emit(op, [inner, by], "index", _T.INT64)

    def iota_of(self, labels: Group, rank: int) -> str:
        """0, 1, 2 ... over merged labels on the first of `rank` axes."""
        if all(self.static(x) for x in labels):
            line = counted(math.prod(x.size for x in labels))
            return self.constant(line.reshape([-1] + [1] * (rank - 1)))
        shape = self.ints([-1] + [1] * (rank - 1))
        return self.emit("Reshape", [self._counted(labels), shape], "iota", _T.INT64)

    def _counted(self, labels: Group) -> str:
        """0, 1, 2 ... over merged labels whose sizes are open, as one axis."""
        zero, one = (self.constant(np.asarray(v, np.int64)) for v in (0, 1))
        stop = self.emit("Squeeze", [self.size(labels)], "stop", _T.INT64)
        return self.emit("Range", [zero, stop, one], "iota", _T.INT64)

    def iota(self, label: Label, groups: Sequence[Group]) -> str:
        """0, 1, 2 ... along the axis of `label`, size 1 elsewhere."""
        shape = [[label] if label in g else [] for g in groups]
        if self.static(label):
            dims = [label.size if s else 1 for s in shape]
            return self.constant(counted(label.size).reshape(dims))
        return self.reshape(self._counted([label]), shape, "iota")
