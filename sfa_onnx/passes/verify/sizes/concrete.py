"""Concrete sizes for a site: what the file declares, and choices for what it leaves open.

Sizes are chosen per symbol of the graph's inputs, and every operand's shape follows by evaluating
the graph's own shape rules, so that inner values ("past + 1") fit what feeds them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from sfa_onnx.passes.candidate import Candidate, Operand, Refusal, Role
from sfa_onnx.passes.graph.index import GraphIndex
from sfa_onnx.passes.shapes.concrete import Concrete, SizesMeetError
from sfa_onnx.passes.shapes.form import Form
from sfa_onnx.passes.shapes.size import form_of
from sfa_onnx.passes.verify.effort import Effort
from sfa_onnx.passes.verify.extract import UnverifiableError
from sfa_onnx.passes.verify.sizes.choices import (
    BASES,
    DEFAULTS,
    OPENED,
    OPENED_EFFORT,
    OPENED_OTHERS,
    OTHERS,
)
from sfa_onnx.passes.verify.sizes.dims import Dims
from sfa_onnx.passes.verify.sizes.equal import Shapes, operand_shapes, settled
from sfa_onnx.passes.verify.sizes.forms import Family
from sfa_onnx.passes.verify.sizes.roles import KEYS, find_roles, ragged
from sfa_onnx.passes.verify.sizes.turns import turns

__all__ = ["Sizer"]

_Key = tuple[tuple[str, int], ...]  # sizes of the symbols

MEMORY_LIMIT = 2_000_000_000  # bytes of one run in float64
_LONG = 64  # of an axis whose end alone is read
_WORK_MAX = 250_000  # query rows * keys of another size
_ORDER = ("pages", "M", "slots", "S2", "K", "T", "S1", "B", "T2", "N1", "width")


class Sizer:
    """Shapes of a candidate's operands under any choice of the graph's symbols.

    Attributes:
        unturned: differences of sizes that could not be probed on both sides of 0.
    """

    def __init__(
        self,
        index: GraphIndex,
        candidate: Candidate,
        layout_kv: str,
        family: Family | None = None,
    ) -> None:
        self._index = index
        self._candidate = candidate
        self._layout_kv = layout_kv
        self._family = family
        self._ragged = ragged(candidate)
        self._sizes, free = settled(index, candidate)
        self._derived = {s: form_of(n) for s, n in self._sizes.symbols.items() if s not in free}
        self._primes = {s: int(self._sizes.symbols[s]) for s in free}
        self._efforts: list[Effort] = []  # per choice
        self._evaluated: dict[_Key, Shapes] = {}
        self._known: dict[_Key, Effort] = {}
        self._unlimited, self._unsized = False, 1
        self.unturned: list[str] = []
        self._roles = find_roles(self._evaluate, self._primes, candidate, layout_kv)
        self._decided = {s for s, r in self._roles.items() if r & {"S1", "S2", "K", "T", "T2"}}

    def bases(self) -> list[tuple[Shapes, Dims]]:
        """Sizes to start from, the most informative first.

        Raises:
            UnverifiableError: no choice gives shapes that fit the operator.
        """
        lines = BASES if self._family is None else OPENED
        found = [s for wanted in lines if (s := self.choose(wanted)) is not None]
        if not found:  # x[-8:] of an axis that sizes no operand takes 8 of it
            self._unsized = _LONG
            found = [s for wanted in lines if (s := self.choose(wanted)) is not None]
        if (
            not found and self._family is None
        ):  # a fixed top-k that is larger than all of these lengths
            slots = self.dims(self._evaluate(self._primes)).slots
            roomy = ({"B": b, "S1": 1, "S2": slots + 9, "K": slots} for b in (2, 1))
            found = [s for wanted in roomy if (s := self.choose(wanted)) is not None]
        if not found:
            raise UnverifiableError(self._no_sizes())
        return _distinct(found)

    def _no_sizes(self) -> Refusal:
        """Why there is nothing to start from."""
        where = self._candidate.outputs[0]
        least = min((e.bytes for e in self._efforts), default=0)
        if least > MEMORY_LIMIT:
            return Refusal(
                "not verifiable within budget: one run in float64 needs"
                f" {least / 1e9:.1f} GB at the sizes that the file fixes",
                where,
                "export with dynamic shapes: the site is then verified at small sizes",
            )
        shapes = self._evaluate(self._primes)
        return Refusal(f"the sizes of the site contradict each other: {shapes}", where)

    def others(self, constants: Iterable[int]) -> list[tuple[Shapes, Dims]]:
        """Sizes around K and around every integer constant of the region."""
        if self._family is not None:
            return self._opened_others(self._family)
        straddled = [n for c in sorted(set(constants)) for n in (c, 2 * c + 1)]
        wanted = [*OTHERS, *({**BASES[0], "S2": n, "K": n} for n in straddled)]
        found = [s for w in wanted if (s := self.choose(w)) is not None]
        found += [s for c in sorted(set(constants)) if (s := self._of_length(c - 1)) is not None]
        few = [s for s in found if s[1].count * s[1].capacity <= _WORK_MAX]
        return _distinct([*few, *self._turned()])

    def _of_length(self, keys: int) -> tuple[Shapes, Dims] | None:
        """Sizes with so many keys, where the axes in front of the new tokens allow it."""
        wanted = {**BASES[0], "S1": 1, "S2": keys, "K": max(keys, 1)}
        if keys < 1 or (choice := self.choose(wanted)) is None:
            return None
        past = 2 * keys - choice[1].capacity
        if past == keys:
            return choice
        return self.choose({**wanted, "S2": past}) if past >= 1 else None

    def _turned(self) -> Iterator[tuple[Shapes, Dims]]:
        """Sizes on both sides of where a Min or Max turns, and where it does; see `unturned`."""
        self.unturned = []
        for turn in turns(self._index, self._sizes, self._candidate):
            for target in (-1, 0, 1):
                symbols = self._reaching(turn, target)
                choice = self._at(symbols) if symbols is not None else None
                if choice is not None and self._efforts[-1].seconds <= OPENED_EFFORT:
                    yield choice
                elif symbols is not None and str(turn) not in self.unturned:
                    self.unturned.append(str(turn))

    def _reaching(self, turn: Form, target: int) -> dict[str, int] | None:
        """Symbols at which a difference of sizes is `target`, from few queries."""
        symbols = self._symbols({**BASES[0], "B": 2, "S1": 2})
        lone = [(c, a[0]) for c, a in turn.terms if len(a) == 1 and isinstance(a[0], str)]
        lone.sort(key=lambda t: "S2" not in self._roles.get(t[1], ()))
        for c, symbol in lone:
            size = symbols[symbol] + c * (target - turn(symbols))
            if abs(c) == 1 and size >= 1:
                return {**symbols, symbol: size}
        return None

    def _opened_others(self, family: Family) -> list[tuple[Shapes, Dims]]:
        """Sizes on either side of what was opened, and of every number that is no size.

        Raises:
            UnverifiableError: both sides of a number cannot be reached.
        """
        found = []
        for wanted in OPENED_OTHERS:
            choice = self.choose(wanted)
            if choice is not None and self._efforts[-1].seconds <= OPENED_EFFORT:
                found.append(choice)
        for rule in sorted(family.rules):
            for symbol, size in family.sizes.items():
                roles = self._roles.get(symbol, set()) & {"S1", "S2", "K", "T", "T2", "M"}
                if size > rule and roles:
                    found += self._sides(rule, roles)
        return _distinct(found)

    def _sides(self, rule: int, roles: set[str]) -> list[tuple[Shapes, Dims]]:
        """Sizes of one axis up to `rule` and beyond it, the other axes as short as they may be.

        Raises:
            UnverifiableError: no choice beyond it fits.
        """
        found = []
        for size in (rule, rule + 1, 2 * rule + 1):
            longer = {k: size + n for n, k in enumerate(("S2", "T2"), 1)}
            wanted = {**OPENED[0], "B": 1, **(longer if roles & {"S1", "K", "T"} else {})}
            lines = ({**wanted, **dict.fromkeys(roles, size)}, {**OPENED[1], "B": 1, "S2": size})
            for line in lines if "S2" in roles else lines[:1]:
                if (choice := self.choose(line)) is not None:
                    found.append((size, choice))
                    break
        if not any(size > rule for size, _ in found):
            raise UnverifiableError(self._no_side(rule))
        return [choice for _, choice in found]

    def _no_side(self, rule: int) -> Refusal:
        return Refusal(
            f"not verifiable within budget: the constant {rule} is no size of the site, and sizes"
            " beyond it take too much memory",
            self._candidate.outputs[0],
            "export with dynamic shapes, and without fixed positions",
        )

    def smallest(self) -> tuple[Shapes, Dims]:
        """The first sizes, whatever a run at them takes.

        Raises:
            UnverifiableError: no choice gives shapes that fit the operator.
        """
        self._unlimited = True
        try:
            return self.bases()[0]
        finally:
            self._unlimited = False

    def concrete(self, shapes: Shapes) -> Concrete:
        """The graph at the sizes that give the operands these shapes."""
        keys = (key for key, found in self._evaluated.items() if found == shapes)
        return Concrete(self._index, self._all(dict(next(keys))))

    def least(self) -> Effort:
        """What one run at the least of the first sizes takes.

        Raises:
            UnverifiableError: no choice gives shapes that fit the operator.
        """
        self._efforts.clear()
        self.smallest()
        return min(self._efforts, key=lambda e: e.seconds)

    def choose(self, wanted: Mapping[str, int]) -> tuple[Shapes, Dims] | None:
        """Shapes for wanted sizes of axes; None where the graph or the operator forbids them."""
        return self._at(self._symbols(wanted))

    def _symbols(self, wanted: Mapping[str, int]) -> dict[str, int]:
        """The open symbols for wanted sizes of axes."""
        sizes = {**DEFAULTS, **wanted}
        sizes["S1"] = min(sizes["S1"], sizes["S2"])
        symbols = dict.fromkeys(self._primes, self._unsized)  # what sizes no operand
        for symbol, roles in self._roles.items():
            role = next((r for r in _ORDER if r in roles), None)
            if "S1" in roles and "S2" in roles:  # prefill: queries and keys grow together
                role = "S1" if self._offset("S2") else "S2"
            symbols[symbol] = sizes.get(role or "", 5)
        return symbols

    def _at(self, symbols: dict[str, int]) -> tuple[Shapes, Dims] | None:
        """Shapes where the open symbols have these sizes; None where something forbids them."""
        if self._family is not None and not self._family.admits(symbols, self._decided):
            return None
        try:
            shapes = self._evaluate(symbols)
        except SizesMeetError:
            return None
        dims = self.dims(shapes)
        domain = _operand(self._candidate, Role.INDICES).domain
        crowded = dims.slots > dims.capacity
        if crowded and domain.distinct and not domain.negative_allowed:
            free = [s for s, roles in self._roles.items() if roles == {"K"}]
            if not free:
                return None
            symbols = {**symbols, **dict.fromkeys(free, dims.capacity)}
            shapes = self._evaluate(symbols)
            dims = self.dims(shapes)
        if dims.batches < 1:  # an axis of the keys that something else sizes
            return None
        if self._ragged and dims.count < dims.batches:  # every sequence has a query
            return None
        key = tuple(sorted(symbols.items()))
        if key not in self._known:
            try:
                effort = Effort.of(self._index, self._candidate, self._all(symbols))
            except SizesMeetError:  # a table of the file is shorter than this
                return None
            self._known[key] = effort
        self._efforts.append(self._known[key])
        if not self._unlimited and self._efforts[-1].bytes > MEMORY_LIMIT:
            return None
        return shapes, dims

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
        batches = [operand.axes[i] for i in axes if operand.axes[i].split("_")[0] == "B"]
        if len(batches) > 1:
            raise UnverifiableError(_several_batches(operand, batches))
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

    def _all(self, symbols: Mapping[str, int]) -> dict[str, int]:
        """The sizes of all symbols: those that are open, and what follows from them."""
        try:
            return {**symbols, **{s: max(form(symbols), 0) for s, form in self._derived.items()}}
        except KeyError as error:  # sizes that contradict: one derives from what nothing gives
            reason = f"a size of the site depends on {error}, which nothing gives"
            raise UnverifiableError(Refusal(reason, self._candidate.outputs[0])) from error

    def _evaluate(self, symbols: Mapping[str, int]) -> Shapes:
        """Shape of every operand when the open symbols have these sizes.

        Raises:
            SizesMeetError: the graph cannot run at them.
        """
        key = tuple(sorted(symbols.items()))
        if key not in self._evaluated:
            sizes = Concrete(self._index, self._all(symbols))
            found = operand_shapes(sizes, self._candidate)
            self._evaluated[key] = found
        return self._evaluated[key]


def _several_batches(operand: Operand, batches: list[str]) -> Refusal:
    """Rows beyond the first few could not be drawn, so the site would be judged by these alone."""
    return Refusal(
        f"the keys {operand.value} have {len(batches)} batch axes ({', '.join(batches)})",
        operand.value,
        "merge them into one in front of the attention",
    )


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
