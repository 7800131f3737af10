"""Which of many names are equal, without a Python object for each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from sfa_onnx.files.fields import Fields, Numbers, Words

__all__ = ["Texts", "alike", "numbered"]

_FEW: Final = 256  # texts for which arrays are slower than a dictionary
_LONG: Final = 128  # bytes of a text that are read word by word
_WORD: Final = 8  # bytes
_FACTOR: Final = np.uint64(0x9E3779B97F4A7C15)  # odd, its bits well mixed
_SHIFT: Final = np.uint64(29)

Texts = tuple[Fields, Numbers, Numbers]  # where they lie, begin int64 [F], size int64 [F]


def numbered(parts: Sequence[Texts]) -> tuple[list[Numbers], int] | None:
    """Give every text a number from 0 on: equal texts have one, others another.

    Returns:
        The numbers of each part, int64 [F] each, and how many there are; None where texts collide
        in the hash that sorts them, which somebody has to want.
    """
    size = np.concatenate([part[2] for part in parts])
    if len(size) <= _FEW:
        kind, count = _looked_up([t for data, at, n in parts for t in data.texts(at, at + n)])
    else:
        words: list[Words] = [size.view(np.uint64)]
        for place in range(0, min(int(size.max()), _LONG), _WORD):
            words.append(
                np.concatenate([data.words(at + place, n - place) for data, at, n in parts])
            )
        if (long := np.flatnonzero(size > _LONG)).size:
            words.append(_rest(parts, long, len(size)))
        found = alike(words)
        if found is None:
            return None
        kind, count = found[1], len(found[0])
    ends = np.cumsum([len(part[2]) for part in parts])
    return np.split(kind, ends[:-1]), count


def alike(words: Sequence[Words]) -> tuple[Numbers, Numbers] | None:
    """Group what is equal in each of some words, uint64 [F].

    They are sorted by a hash, and what the hash holds to be equal is compared.

    Returns:
        One of every kind, int64 [K], and the kind of each, int64 [F]; None where the hash erred.
    """
    mixed = np.zeros(len(words[0]), np.uint64)
    for word in words:
        mixed = (mixed ^ word) * _FACTOR
        mixed ^= mixed >> _SHIFT
    order = np.argsort(mixed)
    ordered = mixed[order]
    fresh = np.ones(len(order), bool)
    fresh[1:] = ordered[1:] != ordered[:-1]
    kind = np.empty(len(order), np.int64)
    kind[order] = np.cumsum(fresh) - 1
    first = order[fresh]
    if any((word[first][kind] != word).any() for word in words):
        return None
    return first, kind


def _looked_up(texts: list[bytes]) -> tuple[Numbers, int]:
    known: dict[bytes, int] = {}
    return np.array([known.setdefault(t, len(known)) for t in texts], np.int64), len(known)


def _rest(parts: Sequence[Texts], long: Numbers, many: int) -> Words:
    """What lies behind the words of long texts, as one word each; zeros for the others."""
    texts: list[bytes] = []
    for data, at, size in parts:
        wanted = size > _LONG
        texts += data.texts((at + _LONG)[wanted], (at + size)[wanted])
    found = np.zeros(many, np.uint64)
    found[long] = _looked_up(texts)[0].view(np.uint64) + np.uint64(1)
    return found
