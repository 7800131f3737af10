"""Sizes for symbolic dims of a model's inputs, such that a call makes sense.

A past must be longer than every selection from it, a batch has more than one member, and a decode
step has few tokens. Names decide where they say something; dynamo's anonymous symbols ("s77") are
told by the inputs and axes they stand at, and by the slots of our operators that they reach.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from typing import Final

from onnx import ValueInfoProto

__all__ = ["Sizes", "is_cache"]

_BATCH: Final = ("b", "bs", "bsz", "n")
_KEYS: Final = ("past", "kv", "cache", "ctx", "context", "total", "key", "history")
_CACHE: Final = ("past", "cache", "packed", "kv", "key", "latent", "k_", "rows", "pool", "buf")
_ANONYMOUS: Final = re.compile(r"(s|u|dim_|unk__)\d+$")
_FEW: Final = 3  # new tokens when there is a past
_BLOCK: Final = 16
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
        selection: int,
        wide: bool = False,
    ) -> None:
        """Choose all sizes.

        Args:
            inputs: the model's inputs.
            known: symbols that are fixed already.
            roles: input -> (slot of our operators that it reaches, that slot's layout).
            selection: the largest number of keys that is selected at once.
            wide: as many new tokens as keys, also where there seems to be a past.
        """
        self.inputs, self.roles = inputs, roles
        self.sizes = dict(known)
        self.keys = min(max(2 * selection, 32), _MOST)
        self.uses: dict[str, list[tuple[str, int]]] = {}
        for name, value in inputs.items():
            for axis, dim in enumerate(value.type.tensor_type.shape.dim):
                if dim.dim_param and dim.dim_param.isidentifier():
                    self.uses.setdefault(dim.dim_param, []).append((name, axis))
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

    def _choose(self, symbol: str) -> int:
        lowered = symbol.lower()
        if _ANONYMOUS.match(lowered):
            return self._by_use(symbol)
        if lowered.startswith("batch") or lowered in _BATCH:
            return 2
        if "block" in lowered or "page" in lowered:
            return 2 + self.keys // _BLOCK
        if self._names_keys(symbol):
            return self.keys
        return self.few if self.has_past else self.keys

    def _by_use(self, symbol: str) -> int:
        for name, axis in self.uses[symbol]:
            slot, layout = self.roles.get(name, ("", ""))
            if slot in ("key", "key_rope") and layout == "PA_BSND" and axis < 2:
                return 2 + self.keys // _BLOCK if axis == 0 else _BLOCK
            if slot in ("key", "key_rope") and axis == (0 if layout == "TND" else 1):
                return self.keys
            if slot == "block_table" and axis == 1:
                return -(-self.keys // _BLOCK)
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
        if text in self.sizes:
            return self.sizes[text]
        try:
            return max(_evaluate(ast.parse(text, mode="eval").body, self.sizes), 0)
        except (SyntaxError, KeyError, TypeError, ValueError):
            return 2

    def past(self) -> int:
        """How many keys a sequence has before the call (or in all, when nothing is cached)."""
        shapes = {n: self.shape(v) for n, v in self.inputs.items()}
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


def _evaluate(node: ast.AST, sizes: Mapping[str, int]) -> int:
    """An integer expression over known symbols."""
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return node.value
    if isinstance(node, ast.Name):
        return sizes[node.id]
    if isinstance(node, ast.BinOp):
        left, right = _evaluate(node.left, sizes), _evaluate(node.right, sizes)
        if isinstance(node.op, ast.FloorDiv) and right:
            return left // right
        return {ast.Add: left + right, ast.Sub: left - right, ast.Mult: left * right}[type(node.op)]
    raise ValueError(f"not an expression of dims: {ast.dump(node)}")
