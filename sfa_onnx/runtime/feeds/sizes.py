"""Sizes for symbolic dims of a model's inputs, such that a call makes sense.

A past must be longer than every selection from it, a batch has more than one member, and a decode
step has few tokens. Names decide where they say something; dynamo's anonymous symbols ("s77") are
found from the inputs and axes they stand at, and by the slots of our operators that they reach.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Final

from onnx import ValueInfoProto

from sfa_onnx.passes.shapes.dims import size_of

__all__ = ["Sizes", "is_cache"]

_BATCH: Final = ("b", "bs", "bsz", "n")
_KEYS: Final = ("past", "kv", "cache", "ctx", "context", "total", "key", "history")
_CACHE: Final = ("past", "cache", "packed", "kv", "key", "latent", "k_", "rows", "pool", "buf")
_ANONYMOUS: Final = re.compile(r"(s|u|dim_|unk__)\d+$")
_NAME: Final = re.compile(r"[A-Za-z_]\w*")
_FUNCTIONS: Final = ("Min", "Max", "min", "max", "floor")
_FEW: Final = 3  # new tokens when there is a past
_BLOCK: Final = 16
_HEADS: Final = 4
_MOST: Final = 8192


def is_cache(name: str) -> bool:
    """Whether an input's name speaks of keys that were there before the call."""
    return any(word in name.lower() for word in _CACHE)


class Sizes:
    """Every symbol's size, and the shapes that follow."""

    def __init__(
        self,
        inputs: Mapping[str, ValueInfoProto],
        known: Mapping[str, int],
        roles: Mapping[str, tuple[str, str]],
        direct: Collection[str],
        selection: int,
        wide: bool = False,
    ) -> None:
        """Choose all sizes.

        Args:
            inputs: the model's inputs.
            known: symbols that are fixed already.
            roles: input -> (slot of our operators that it reaches, that slot's layout).
            direct: those of them that stand in the slot themselves.
            selection: the largest number of keys that is selected at once.
            wide: as many new tokens as keys, also where there seems to be a past.
        """
        self.inputs, self.roles, self.direct = inputs, roles, direct
        self.sizes = dict(known)
        self.keys = min(max(2 * selection, 32), _MOST)
        self.uses: dict[str, list[tuple[str, int]]] = {}
        for name, value in inputs.items():
            for axis, dim in enumerate(value.type.tensor_type.shape.dim):
                if dim.dim_param and dim.dim_param.isidentifier():
                    self.uses.setdefault(dim.dim_param, []).append((name, axis))
        for value in inputs.values():  # symbols that stand in expressions only
            for dim in value.type.tensor_type.shape.dim:
                for symbol in _NAME.findall(dim.dim_param):
                    if symbol not in _FUNCTIONS:
                        self.uses.setdefault(symbol, [])
        self.few = self.keys if wide else _FEW
        self.has_past = any(self._names_keys(s) for s in self.uses) or any(
            is_cache(n) and len(v.type.tensor_type.shape.dim) > 2 for n, v in inputs.items()
        )
        for symbol in self.uses:
            if symbol not in self.sizes:
                self.sizes[symbol] = self._choose(symbol)

    @staticmethod
    def _names_keys(symbol: str) -> bool:
        return any(word in symbol.lower() for word in _KEYS) or symbol.lower() == "s2"

    def _by_slot(self, symbol: str) -> int | None:
        """The size of a dim of an input that is a slot of our operators as it stands."""
        for name, axis in self.uses[symbol]:
            if name not in self.direct:
                continue
            slot, layout = self.roles[name]
            rank = len(self.inputs[name].type.tensor_type.shape.dim)
            if slot.startswith("actual_seq_lengths") or (slot == "block_table" and axis == 0):
                return 2
            if slot in ("query", "query_rope", "sparse_indices", "weights") and rank > 2:
                lead = (2 * self.few,) if layout == "TND" else (2, self.few)
                heads = 1 if slot == "sparse_indices" else _HEADS
                return lead[axis] if axis < len(lead) else heads
            if slot in ("key", "key_rope", "block_table") and (
                size := self._of_key(slot, axis, layout)
            ):
                return size
        return None

    def _of_key(self, slot: str, axis: int, layout: str) -> int | None:
        """The size of an axis of keys, or of the table that orders their pages."""
        pages = -(-self.keys // _BLOCK)
        if slot == "block_table":
            return pages
        if layout == "PA_BSND":
            return (2 * pages + 2, _BLOCK, 1)[axis] if axis < 3 else None
        if layout == "TND":
            return (2 * self.keys, 1)[axis] if axis < 2 else None
        return (2, self.keys, 1)[axis] if axis < 3 else None

    def _choose(self, symbol: str) -> int:
        lowered = symbol.lower()
        if (size := self._by_slot(symbol)) is not None:
            return size
        if _ANONYMOUS.match(lowered):
            return self._by_use(symbol)
        if lowered.startswith("batch") or lowered in _BATCH:
            return 2
        if "block" in lowered or "page" in lowered:
            return 2 + self.keys // _BLOCK
        if self._names_keys(symbol):
            return self.keys
        if self._leads(symbol):
            return 2
        if any(axis and is_cache(n) and "new" not in n for n, axis in self.uses[symbol]):
            return self.keys
        return self.few if self.has_past else self.keys

    def _leads(self, symbol: str) -> bool:
        """Whether it is always the first of several open axes: a batch, whatever it is called."""
        dims = {n: v.type.tensor_type.shape.dim for n, v in self.inputs.items()}
        beside = any(any(d.dim_param for d in dims[n][1:]) for n, _ in self.uses[symbol])
        return beside and all(axis == 0 for _, axis in self.uses[symbol])

    def _by_use(self, symbol: str) -> int:
        for name, axis in self.uses[symbol]:
            slot, layout = self.roles.get(name, ("", ""))
            if slot in ("key", "key_rope") and layout == "PA_BSND" and axis < 2:
                return self._of_key(slot, axis, layout) or self.keys
            if slot in ("key", "key_rope") and axis == (0 if layout == "TND" else 1):
                return self.keys
        if any(axis == 0 for _, axis in self.uses[symbol]):
            return 2
        ranks = {n: len(v.type.tensor_type.shape.dim) for n, v in self.inputs.items()}
        if any(axis == ranks[n] - 1 and axis > 1 for n, axis in self.uses[symbol]):
            return self.keys  # widths are numbers: an open last axis is one of scores or masks
        if any(is_cache(name) for name, _ in self.uses[symbol]):
            return self.keys
        return self.few if self.has_past else self.keys

    def shape(self, value: ValueInfoProto) -> tuple[int, ...]:
        """The shape of an input; expressions ("past_len + 1") are evaluated."""
        return tuple(
            d.dim_value if d.HasField("dim_value") else self._size(d.dim_param)
            for d in value.type.tensor_type.shape.dim
        )

    def _size(self, text: str) -> int:
        size = size_of(text, self.sizes)
        return 2 if size is None else max(size, 0)

    def past(self, names: Collection[str] | None = None) -> int:
        """How many keys a sequence has before the call (or in all, when nothing is cached).

        Args:
            names: the inputs to look at; None: all.
        """
        shapes = {n: self.shape(v) for n, v in self.inputs.items() if names is None or n in names}
        caches = [s for n, s in shapes.items() if is_cache(n) and len(s) > 2]
        if caches:
            return max(_key_axis(shape) for shape in caches)
        keys = [size for symbol, size in self.sizes.items() if self._names_keys(symbol)]
        wide = [s[1] for s in shapes.values() if len(s) == 3]
        return max(keys or wide or list(self.sizes.values()) or [8])


def _key_axis(shape: tuple[int, ...]) -> int:
    """The key length of a cache [B, S, C], [B, S, 1, C] or [B, N, S, C]."""
    if len(shape) == 3:
        return shape[1]
    return shape[1] if shape[2] == 1 else shape[2]
