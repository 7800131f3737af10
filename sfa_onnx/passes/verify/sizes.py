"""Concrete sizes for a site: what the file declares, and choices for what it leaves open.

Sizes are chosen per symbol of the graph's inputs, and every operand's shape follows by evaluating
the graph's own shape rules, so that inner values ("past + 1") fit what feeds them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper, numpy_helper

from sfa_onnx.passes.candidate import Candidate, Operand, Refusal, Role
from sfa_onnx.passes.index import GraphIndex
from sfa_onnx.passes.shapes import Concrete
from sfa_onnx.passes.verify.extract import UnverifiableError

__all__ = ["KEYS", "Dims", "Sizer", "canonical_shapes", "integer_constants", "operand_shapes"]

KEYS = (Role.LATENT, Role.LATENT_INT8, Role.PACKED, Role.SCALE, Role.KEY_ROPE)
Shapes = dict[str, tuple[int, ...]]
_Key = tuple[tuple[str, int], ...]  # sizes of the symbols

# Wanted sizes, tried in this order until the original graph runs.
_BASES: tuple[dict[str, int], ...] = (
    {"B": 3, "S1": 3, "S2": 17, "K": 6},
    {"B": 1, "S1": 3, "S2": 17, "K": 6},
    {"B": 3, "S1": 1, "S2": 17, "K": 6},
    {"B": 1, "S1": 1, "S2": 17, "K": 6},
    {"B": 2, "S1": 2, "S2": 64, "K": 16},
    {"B": 1, "S1": 1, "S2": 640, "K": 16},
)
_OTHERS: tuple[dict[str, int], ...] = (
    {"B": 1, "S1": 1, "S2": 8, "K": 8},
    {"B": 2, "S1": 5, "S2": 9, "K": 6},
    {"B": 4, "S1": 2, "S2": 7, "K": 12},
    {"B": 2, "S1": 4, "S2": 64, "K": 33},
)
_DEFAULTS = {"N1": 3, "T": 7, "T2": 23, "M": 3, "pages": 14, "slots": 4, "width": 16}
MEMORY_LIMIT = 2_000_000_000  # bytes of one run in float64
_WORK_MAX = 250_000  # query rows * keys of another size
_CONSTANT_MAX = 600  # integer constants up to this size are straddled by S2
_ORDER = ("pages", "M", "slots", "S2", "K", "T", "S1", "B", "T2", "N1", "width")


@dataclass(frozen=True)
class Dims:
    """What the shapes of indices, keys and tables say.

    Attributes:
        batches: B.
        rows: shape of the indices without their last axis.
        batch_axis: axis of `rows` that runs over batches; None when there is one batch.
        slots: K.
        capacity: S2, key slots per sequence (TND keys: all keys together).
        keys: axes that number key rows: (B, S2), (T2,) or (pages, page size).
        swapped: keys lie as [S2, B, ...].
    """

    batches: int
    rows: tuple[int, ...]
    batch_axis: int | None
    slots: int
    capacity: int
    keys: tuple[int, ...]
    swapped: bool = False

    @property
    def count(self) -> int:
        """Number of query rows."""
        return int(np.prod(self.rows, dtype=np.int64))

    def named(self) -> dict[str, int]:
        """The sizes for the record."""
        return {
            "B": self.batches,
            "S1": self.count // max(self.batches, 1),
            "S2": self.capacity,
            "K": self.slots,
        }


class Sizer:
    """Shapes of a candidate's operands under any choice of the graph's symbols."""

    def __init__(self, index: GraphIndex, candidate: Candidate, layout_kv: str) -> None:
        self._index = index
        self._candidate = candidate
        self._layout_kv = layout_kv
        self._ragged = any(  # sequences of queries follow each other along one axis
            o.domain.cumulative for o in candidate.operands if o.role is Role.LENGTHS_QUERY
        )
        base = Concrete(index)
        self._primes = dict(base.symbols)
        self._too_big: list[int] = []
        self._evaluated: dict[_Key, Shapes] = {}
        self._peaks: dict[_Key, int] = {}
        self._roles = self._find_roles(self._evaluate(self._primes))

    def bases(self) -> list[tuple[Shapes, Dims]]:
        """Sizes to start from, most telling first.

        Raises:
            UnverifiableError: no choice gives shapes that fit the operator.
        """
        found = [s for wanted in _BASES if (s := self.choose(wanted)) is not None]
        if not found:  # a fixed top-k that is larger than all of these lengths
            slots = self.dims(self._evaluate(self._primes)).slots
            roomy = ({"B": b, "S1": 1, "S2": slots + 9, "K": slots} for b in (2, 1))
            found = [s for wanted in roomy if (s := self.choose(wanted)) is not None]
        if not found:
            raise UnverifiableError(self._no_sizes())
        return _distinct(found)

    def _no_sizes(self) -> Refusal:
        """Why there is nothing to start from."""
        where = self._candidate.outputs[0]
        if self._too_big:
            return Refusal(
                "not verifiable within budget: one run in float64 needs"
                f" {min(self._too_big) / 1e9:.1f} GB at the sizes that the file fixes",
                where,
                "export with dynamic shapes: the site is then verified at small sizes",
            )
        shapes = self._evaluate(self._primes)
        return Refusal(f"the sizes of the site contradict each other: {shapes}", where)

    def others(self, constants: Iterable[int]) -> list[tuple[Shapes, Dims]]:
        """Sizes around K and around every integer constant of the region."""
        straddled = [n for c in sorted(set(constants)) for n in (c, 2 * c + 1)]
        wanted = [*_OTHERS, *({**_BASES[0], "S2": n, "K": n} for n in straddled)]
        found = (s for w in wanted if (s := self.choose(w)) is not None)
        return _distinct(s for s in found if s[1].count * s[1].capacity <= _WORK_MAX)

    def choose(self, wanted: Mapping[str, int]) -> tuple[Shapes, Dims] | None:
        """Shapes for wanted sizes of axes; None where the operator's domain forbids them."""
        sizes = {**_DEFAULTS, **wanted}
        sizes["S1"] = min(sizes["S1"], sizes["S2"])
        symbols = dict(self._primes)
        for symbol, roles in self._roles.items():
            role = next((r for r in _ORDER if r in roles), None)
            if "S1" in roles and "S2" in roles:  # prefill: queries and keys grow together
                role = "S1" if self._offset("S2") else "S2"
            symbols[symbol] = sizes.get(role or "", 5)
        shapes = self._evaluate(symbols)
        dims = self.dims(shapes)
        domain = _operand(self._candidate, Role.INDICES).domain
        crowded = dims.slots > dims.capacity
        if crowded and domain.distinct and not domain.negative_allowed:
            free = [s for s, roles in self._roles.items() if roles == {"K"}]
            if not free:
                return None
            symbols.update(dict.fromkeys(free, dims.capacity))
            shapes = self._evaluate(symbols)
            dims = self.dims(shapes)
        if self._ragged and dims.count < dims.batches:  # every sequence has a query
            return None
        if (needed := self._bytes(symbols)) > MEMORY_LIMIT:
            self._too_big.append(needed)
            return None
        return shapes, dims

    def _bytes(self, symbols: Mapping[str, int]) -> int:
        """Peak memory of one run in float64: a value lives until its last reader in the site."""
        key = tuple(sorted(symbols.items()))
        if key in self._peaks:
            return self._peaks[key]
        concrete = Concrete(self._index, symbols)
        order = sorted({*self._candidate.nodes, *self._candidate.support})
        last = {v: i for i in order for v in self._index.nodes[i].input if v}
        live: dict[str, int] = {}
        peak = 0
        for i in order:
            for name in self._index.nodes[i].output:
                shape = concrete.shape(name) if name else None
                live[name] = 8 * math.prod(shape) if shape is not None else 0
            peak = max(peak, sum(live.values()))
            for name in [n for n in live if last.get(n, i) <= i]:
                del live[name]
        self._peaks[key] = peak
        return peak

    def _offset(self, role: str) -> bool:
        """Whether another symbol alone also grows `role` (a cache in front of the new tokens)."""
        return any(role in roles and "S1" not in roles for roles in self._roles.values())

    def dims(self, shapes: Shapes) -> Dims:
        """Read the axes off the shapes."""
        indices = shapes[_operand(self._candidate, Role.INDICES).value]
        keys, swapped = self._keys(shapes)
        table = _first(self._candidate, Role.BLOCK_TABLE)
        if table is not None and len(keys) == 1:
            raise UnverifiableError(self._no_starts(table))
        if table is not None:
            mapped = shapes[table.value]
            batches = int(np.prod(mapped[:-1], dtype=np.int64))
            capacity = mapped[-1] * keys[-1]
        elif self._layout_kv == "TND":
            batches, capacity = self._packed_batches(shapes), keys[-1]
        else:
            batches = keys[0] if len(keys) > 1 else 1
            high = _operand(self._candidate, Role.INDICES).domain.high
            capacity = min(keys[-1], high) if isinstance(high, int) else keys[-1]
        rows = indices[:-1]
        axis = self._batch_axis(rows, batches)
        return Dims(batches, rows, axis, indices[-1], capacity, keys, swapped)

    def _no_starts(self, table: Operand) -> Refusal:
        return Refusal(
            f"keys of several sequences lie on one axis and {table.value!r} says where each begins"
            " in a way that cannot be drawn",
            table.value,
            "give the ends of the sequences as prefix sums, and begin at cat([0, ends[:-1]])",
        )

    def _packed_batches(self, shapes: Shapes) -> int:
        """Number of sequences in packed (TND) inputs: entries of the prefix sums."""
        for role in (Role.LENGTHS_QUERY, Role.LENGTHS_KV):
            operand = _first(self._candidate, role)
            if operand is not None:
                entries = int(np.prod(shapes[operand.value], dtype=np.int64))
                return entries - (operand.axes == ("B+1",))
        return 1

    def _keys(self, shapes: Shapes) -> tuple[tuple[int, ...], bool]:
        """Axes of the key rows, broadcast axes left out."""
        operand = _operand(self._candidate, *KEYS)
        shape = shapes[operand.value]
        axes = [i for i in range(len(shape) - 1) if operand.axes[i] != "1"]
        while len(axes) > 2 and any(shape[i] == 1 for i in axes):
            axes.remove(next(i for i in reversed(axes) if shape[i] == 1))
        axes = axes[:2]
        labels = [operand.axes[i].partition("_of_")[0] for i in axes]
        sizes = tuple(shape[i] for i in axes)
        swapped = labels == ["S2", "B"]
        if self._layout_kv == "TND":
            return (int(np.prod(sizes, dtype=np.int64)),), False
        return (sizes[::-1], True) if swapped else (sizes, False)

    def _batch_axis(self, rows: tuple[int, ...], batches: int) -> int | None:
        labels = _operand(self._candidate, Role.INDICES).axes
        if batches == 1:
            return None
        fitting = [i for i, n in enumerate(rows) if n == batches]
        named = [i for i in fitting if labels[i] == "B"]
        return next(iter((*named, *fitting)), None)

    def _evaluate(self, symbols: Mapping[str, int]) -> Shapes:
        """Shape of every operand when the symbols have these sizes."""
        key = tuple(sorted(symbols.items()))
        if key not in self._evaluated:
            found = operand_shapes(Concrete(self._index, symbols), self._candidate)
            self._evaluated[key] = found
        return self._evaluated[key]

    def _find_roles(self, base: Shapes) -> dict[str, set[str]]:
        """Symbol -> what it sizes, found by changing one symbol at a time."""
        found: dict[str, set[str]] = {}
        used: dict[tuple[str, int], int] = {}  # (operand, merged axis) -> symbols seen so far
        for symbol, size in self._primes.items():
            changed = self._evaluate({**self._primes, symbol: size + 4})
            roles: set[str] = set()
            for operand in self._candidate.operands:
                before, after = base[operand.value], changed[operand.value]
                for axis, (a, b) in enumerate(zip(before, after, strict=True)):
                    if a != b:
                        place = (operand.value, axis)
                        roles.add(self._role(operand, axis, used.get(place, 0)))
                        used[place] = used.get(place, 0) + 1
            if roles:
                found[symbol] = roles - {""} or {"other"}
        return found

    def _role(self, operand: Operand, axis: int, nth: int = 0) -> str:
        """What an axis of an operand sizes, by the operand's role and the axis' place.

        `nth` counts the symbols that size a merged axis ("B*S1"), in the order of the inputs.
        """
        rank = len(operand.axes)
        if operand.role is Role.INDICES:
            if axis == rank - 1:
                return "K"
            first = 0 if operand.axes[0] != "1" else 1
            several = sum(a != "1" for a in operand.axes[:-1]) > 1
            if (
                self._layout_kv == "TND"
                or self._ragged
                or (not several and operand.axes[axis] == "T")
            ):
                return "T"
            return "B" if axis == first and several else "S1"
        if operand.role in KEYS:
            return self._key_role(operand, axis, rank)
        if operand.role is Role.BLOCK_TABLE:
            return "M" if axis == rank - 1 else "B"
        if operand.role in (Role.LENGTHS_KV, Role.LENGTHS_QUERY):
            return "B"
        parts = operand.axes[axis].split("*")
        label = parts[min(nth, len(parts) - 1)]
        return label if label in ("B", "S1", "S2", "K", "N1", "T", "M") else ""

    def _key_role(self, operand: Operand, axis: int, rank: int) -> str:
        if axis == rank - 1:
            return "width"
        if _first(self._candidate, Role.BLOCK_TABLE) is not None:
            return "pages" if axis == 0 else "slots"
        if self._layout_kv == "TND":
            return "T2"
        axes = [i for i in range(rank - 1) if operand.axes[i] != "1"]
        if [operand.axes[i].partition("_of_")[0] for i in axes[:2]] == ["S2", "B"]:
            return "S2" if axis == axes[0] else "B"
        return "S2" if axis == axes[min(1, len(axes) - 1)] else "B"


def operand_shapes(concrete: Concrete, candidate: Candidate) -> Shapes:
    """Shape of every operand at the sizes of `concrete`.

    Raises:
        UnverifiableError: a shape cannot be told.
    """
    shapes: Shapes = {}
    for operand in candidate.operands:
        shape = concrete.shape(operand.value)
        if shape is None or len(shape) != len(operand.axes):
            raise UnverifiableError(
                Refusal(
                    f"the shape of {operand.value!r} cannot be told without running the model",
                    operand.value,
                    "export with shapes, or run onnx.shape_inference on the file first",
                )
            )
        shapes[operand.value] = shape
    return shapes


def canonical_shapes(concrete: Concrete, candidate: Candidate) -> list[tuple[int, ...]]:
    """Operand shapes with symbols numbered by appearance: equal for equal sites."""
    symbols = set(concrete.symbols.values())
    seen: dict[int, int] = {}
    return [
        tuple(seen.setdefault(n, -1 - len(seen)) if n in symbols else n for n in shape)
        for shape in operand_shapes(concrete, candidate).values()
    ]


def integer_constants(region: onnx.ModelProto) -> set[int]:
    """Small positive integers that a region's constants mention."""
    graph = region.graph
    arrays = [numpy_helper.to_array(t) for t in graph.initializer]
    for attribute in (a for n in graph.node if n.op_type == "Constant" for a in n.attribute):
        value = helper.get_attribute_value(attribute)
        is_tensor = attribute.type == onnx.AttributeProto.TENSOR
        arrays.append(numpy_helper.to_array(value) if is_tensor else np.asarray(value))
    found: set[int] = set()
    for array in arrays:
        if array.dtype.kind in "iu" and array.size <= 8:
            found |= {int(v) for v in array.reshape(-1) if 2 <= v <= _CONSTANT_MAX}
    return found


def _first(candidate: Candidate, *roles: Role) -> Operand | None:
    return next((o for o in candidate.operands if o.role in roles), None)


def _operand(candidate: Candidate, *roles: Role) -> Operand:
    """The operand with one of these roles.

    Raises:
        UnverifiableError: the candidate has none.
    """
    found = _first(candidate, *roles)
    if found is None:
        names = " or ".join(str(r) for r in roles)
        raise UnverifiableError(
            Refusal(f"the site has no operand that is {names}", candidate.outputs[0])
        )
    return found


def _distinct(choices: Iterable[tuple[Shapes, Dims]]) -> list[tuple[Shapes, Dims]]:
    found: list[tuple[Shapes, Dims]] = []
    for choice in choices:
        if choice not in found:
            found.append(choice)
    return found
