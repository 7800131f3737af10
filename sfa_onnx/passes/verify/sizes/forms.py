"""Numbers as expressions of sizes: what 4095 may stand for where S2 is 4096."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from sfa_onnx.passes.shapes.form import Form

__all__ = ["SMALL", "Family", "Forms"]

SMALL = 24  # sizes and constants up to here stay as they are
_SENTINEL = 1 << 31  # "to the end", not a size
_FACTORS_MAX = 3
_NEAR = 8  # a number this near a size may be the size and a bit


class Forms:
    """The symbols of a site and what numbers may mean in terms of them.

    Attributes:
        sizes: symbol -> the size that the file fixes.
    """

    def __init__(self) -> None:
        self.sizes: dict[str, int] = {}

    def symbol(self, size: int) -> Form:
        """The symbol of a size; sizes that are equal in the file share one."""
        name = f"size_{size}"
        self.sizes[name] = size
        return Form(((1, (name,)),))

    def known(self, size: int) -> Form | None:
        """The symbol of a size, where there is one."""
        name = f"size_{size}"
        return Form(((1, (name,)),)) if name in self.sizes else None

    def of(self, number: int) -> list[Form]:
        """What a constant may stand for, simplest first; itself where nothing else fits.

        Small numbers, negative ones and "to the end" are themselves.
        """
        if abs(number) <= SMALL or abs(number) >= _SENTINEL:
            return [Form(const=number)]
        if number < 0:
            return [Form().plus(form, -1) for form in self.of(-number)]
        found = [*self._single(number), *self._sums(number), *self._products(number)]
        distinct = list(dict.fromkeys(found))
        return distinct[:8] or [Form(const=number)]

    def _single(self, number: int) -> Iterator[Form]:
        near = sorted(range(-_NEAR, _NEAR + 1), key=abs)
        for offset in near:
            if (form := self.known(number - offset)) is not None:
                yield Form(form.terms, offset)

    def _sums(self, number: int) -> Iterator[Form]:
        """N - m, n + m, and these with one more or less."""
        for (a, n), (b, m) in itertools.permutations(self.sizes.items(), 2):
            if abs(n - m - number) <= 1:
                yield Form(((1, (a,)), (-1, (b,))), number - n + m)
            if a < b and n + m == number:
                yield Form(((1, (a,)), (1, (b,))))

    def _products(self, number: int) -> Iterator[Form]:
        """Coefficient * sizes, the fewest left over first; and one more or less."""
        for offset in (0, -1, 1):
            target = number - offset
            found = []
            for count in range(1, _FACTORS_MAX + 1):
                for symbols in itertools.combinations_with_replacement(self.sizes, count):
                    product = math.prod(self.sizes[s] for s in symbols)
                    if target % product == 0 and (target // product > 1 or count > 1):
                        found.append((target // product, symbols))
            yield from (Form((term,), offset) for term in sorted(found))


@dataclass(frozen=True)
class Family:
    """The sizes at which a site with opened sizes stands for the one in the file.

    Attributes:
        sizes: symbol -> size in the file, for the symbols that were opened.
        values: forms of sizes that stand where positions are computed.
        rules: numbers there that are no sizes.
    """

    sizes: dict[str, int]
    values: frozenset[Form]
    rules: frozenset[int]

    def admits(self, symbols: Mapping[str, int], decided: set[str]) -> bool:
        """Whether chosen sizes lie to each other and to the constants as those of the file do.

        Args:
            symbols: the choice.
            decided: symbols that size queries, keys or the selection.
        """
        forms = [Form(((1, (s,)),)) for s in self.sizes if s in decided]
        forms += [f for f in self.values if f not in forms]
        known = {**symbols, **self.sizes}
        pairs = sorted((abs(f(known)), abs(f(symbols))) for f in forms)
        for (true, chosen), (more, larger) in itertools.pairwise(pairs):
            if (true < more and chosen >= larger) or (true == more and chosen != larger):
                return False
        return True
