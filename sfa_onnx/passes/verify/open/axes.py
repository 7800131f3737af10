"""Which axes of a site's operands are long enough to shrink, and what their sizes are called."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from sfa_onnx.passes.candidate import Candidate, Operand, Role
from sfa_onnx.passes.graph.index import GraphIndex
from sfa_onnx.passes.shapes.concrete import Concrete
from sfa_onnx.passes.shapes.form import Form
from sfa_onnx.passes.shapes.size import form_of, is_open
from sfa_onnx.passes.verify.sizes.equal import operand_shapes
from sfa_onnx.passes.verify.sizes.forms import SMALL, Forms
from sfa_onnx.passes.verify.sizes.roles import KEYS

__all__ = ["OpenAxes"]

_OPEN = ("B", "S1", "S2", "K", "T", "T2", "M", "P")  # heads, widths and page sizes stay
_WIDE = (Role.QUERY, Role.QUERY_ROPE, *KEYS)  # their last axis is a width
_TABLES = (Role.INDICES, Role.BLOCK_TABLE)


@dataclass
class OpenAxes:
    """Forms of all operands' dims.

    Attributes:
        forms: the symbols: those that the file leaves open, and new ones for long static axes.
        axes: operand -> form of each dim.
        new: the symbols that the file fixes.
    """

    forms: Forms = field(default_factory=Forms)
    axes: dict[str, tuple[Form, ...]] = field(default_factory=dict)
    new: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, index: GraphIndex, candidate: Candidate, stay: frozenset[int] = frozenset()
    ) -> OpenAxes:
        """Name the sizes of `candidate`; those in `stay` keep their numbers.

        Raises:
            UnverifiableError: an operand's shape is unknown.
        """
        found = cls()
        sizes = Concrete(index)
        shapes = operand_shapes(sizes, candidate)
        own = {size: name for name, size in reversed(sizes.symbols.items())}
        found._name(candidate, shapes, {*own, *stay})
        found.new = tuple(found.forms.sizes)
        found.forms.sizes.update({name: size for size, name in own.items()})
        labels = found._labels(candidate, shapes)
        for operand in candidate.operands:
            found.axes[operand.value] = tuple(
                found._form(index, operand, axis, size, labels)
                for axis, size in enumerate(shapes[operand.value])
            )
        return found

    def _name(
        self, candidate: Candidate, shapes: dict[str, tuple[int, ...]], own: set[int]
    ) -> None:
        """A symbol for every long static axis with one label, and for factors of merged ones."""
        keys: set[int] = set()
        others: set[int] = set()
        labels = self._labels(candidate, shapes)
        for operand in candidate.operands:
            for axis, size in enumerate(shapes[operand.value]):
                if not _opens(operand, axis):
                    continue
                parts = _parts(operand, axis)
                unknown = [p for p in parts if p not in labels]
                if len(parts) > 1 and len(unknown) == 1:
                    size //= math.prod(labels[p] for p in parts if p in labels)
                elif len(parts) > 1 and not unknown:
                    continue
                (keys if "S2" in parts else others).add(size)
        for size in sorted(n for n in keys | others if n > SMALL and n not in own):
            longer = [n for n in keys if 0 < n - size <= SMALL]
            if size not in keys or not longer:  # a past in front of few new tokens has no symbol
                self.forms.symbol(size)

    def _labels(self, candidate: Candidate, shapes: dict[str, tuple[int, ...]]) -> dict[str, int]:
        """Axis label -> its size, from axes with one label."""
        found: dict[str, int] = {k: v for k, v in candidate.sizes.items() if isinstance(v, int)}
        for operand in candidate.operands:
            for axis, size in enumerate(shapes[operand.value]):
                if "*" not in operand.axes[axis] and operand.axes[axis] not in ("", "1"):
                    found[operand.axes[axis]] = size
        return found

    def _form(
        self,
        index: GraphIndex,
        operand: Operand,
        axis: int,
        size: int,
        labels: dict[str, int],
    ) -> Form:
        """The form of one dim; itself where it stays."""
        declared = index.shape(operand.value)
        static = declared is not None and isinstance(declared[axis], int)
        if not static and is_open(size):
            return form_of(size)
        tabled = operand.role in (Role.MASK, Role.SHAPE, Role.LENGTHS_KV, Role.LENGTHS_QUERY)
        if size <= SMALL or not (_opens(operand, axis) or tabled):
            return Form(const=size)
        parts = _parts(operand, axis)
        if len(parts) > 1 and (form := self._product(parts, size, labels)) is not None:
            return form
        if (known := self.forms.known(size)) is not None:
            return known
        near = [d for d in range(1, SMALL + 1) if self.forms.known(size + d) is not None]
        return self._less(size, near[0]) if near else Form(const=size)

    def _less(self, size: int, by: int) -> Form:
        longer = self.forms.known(size + by)
        return Form(longer.terms, -by) if longer is not None else Form(const=size)

    def _product(self, parts: list[str], size: int, labels: dict[str, int]) -> Form | None:
        """A merged axis as the product of its parts."""
        numbers = [labels.get(p) for p in parts]
        if numbers.count(None) == 1:
            rest = math.prod(n for n in numbers if n is not None)
            numbers[numbers.index(None)] = size // rest
        if None in numbers or math.prod(n or 0 for n in numbers) != size:
            return None
        form = Form(const=1)
        for number in numbers:
            form = form.times(self.forms.known(number or 0) or Form(const=number or 0))
        return form


def _parts(operand: Operand, axis: int) -> list[str]:
    return [p.partition("_of_")[0] for p in operand.axes[axis].split("*")]


def _opens(operand: Operand, axis: int) -> bool:
    """Whether an axis runs over queries, keys, entries, batches or pages."""
    last = axis == len(operand.axes) - 1
    if operand.role is Role.EXPANSION or (last and operand.role in _WIDE):
        return False
    if operand.role in _TABLES and operand.axes[axis] in ("", "K"):
        return True
    names = [p.partition("_")[0].partition("-")[0].partition("+")[0] for p in _parts(operand, axis)]
    return any(n in _OPEN for n in names)
