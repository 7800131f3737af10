"""Where the fields of one long message lie in its bytes, without a step of Python for each.

A field begins where the one before it ends, so that somebody has to go through them in turn. Here
many walkers begin at once, all over the message, at places that look like the beginning of a field.
Only the first of them surely is one; the others prove to be when the walker before arrives there.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from sfa_onnx.files.fields import Numbers, varints

__all__ = ["spans"]

_LEAST: Final = 1 << 12  # bytes for one walker
_WALKERS: Final = 4096
_WINDOW: Final = 512  # bytes in which a walker looks for its beginning
_HOPS: Final = 6  # fields in a row that a beginning has to lead to
_TEXT: Final = 2  # the wire type of texts and messages

_Bytes = np.ndarray[Any, np.dtype[np.uint8]]


def spans(
    data: _Bytes, begin: int, end: int, usual: bytes
) -> tuple[Numbers, Numbers, Numbers] | None:
    """The fields of a message, all of which are texts or messages.

    Args:
        data: uint8 [N].
        begin: where the message begins.
        end: where it ends.
        usual: the tags of the fields that it has many of.

    Returns:
        Of each field, in the order of the message: its number, where its content begins, and where
        that ends, int64 [F]; None where there are fields of other kinds.
    """
    walkers = _Walkers(data, _beginnings(data, begin, end, usual), end)
    walkers.go()
    while walkers.join():
        walkers.go()
    return walkers.fields()


class _Walkers:
    """Several walkers, each between its beginning and that of the next."""

    def __init__(self, data: _Bytes, starts: Numbers, end: int) -> None:
        self._data, self._end = data, end
        self._starts, self._at, self._until = starts, starts.copy(), np.append(starts[1:], end)
        self._lost = np.zeros(len(starts), bool)  # at what is no field
        self._right = [*range(len(starts))]  # those that may have begun at a field
        self._rows: list[tuple[Numbers, Numbers, Numbers, Numbers]] = []

    def go(self) -> None:
        """Let each go on until it is where the next began, or beyond."""
        going = np.flatnonzero((self._at < self._until) & ~self._lost)
        while len(going):
            tag, inner, stop = _fields(self._data, self._at[going])
            odd = (tag & 7 != _TEXT) | (tag < 8) | (stop > self._end) | (stop < inner)
            if odd.any():
                self._lost[going[odd]] = True
                going, tag, inner, stop = (c[~odd] for c in (going, tag, inner, stop))
            self._rows.append((going, tag >> 3, inner, stop))
            self._at[going] = stop
            going = going[stop < self._until[going]]

    def join(self) -> bool:
        """Send home those that began at no field: whether somebody has to go on in their place."""
        right = self._right[:1]
        for walker in self._right[1:]:
            before = right[-1]
            if self._at[before] <= self._starts[walker]:
                right.append(walker)  # where it is further, the one before is lost
            else:
                self._until[before] = self._until[walker]
        self._right = right
        return bool(((self._at < self._until) & ~self._lost)[right].any())

    def fields(self) -> tuple[Numbers, Numbers, Numbers] | None:
        """What those saw who began at a field; None where one of them is lost."""
        if self._lost[self._right].any() or not self._rows:
            return None
        walker, *columns = (np.concatenate(column) for column in zip(*self._rows, strict=True))
        seen = np.flatnonzero(np.isin(walker, self._right))
        order = seen[np.argsort(walker[seen].astype(np.uint16), kind="stable")]
        number, begin, end = (column[order] for column in columns)
        return number, begin, end


def _fields(data: _Bytes, at: Numbers) -> tuple[Numbers, Numbers, Numbers]:
    """Tags at some places, where the contents begin and where they end; nonsense behind the end."""
    last = len(data) - 1
    tag, size_at = varints(data, np.minimum(at, last))
    size, inner = varints(data, np.minimum(size_at, last))
    return tag, inner, inner + size


def _beginnings(data: _Bytes, begin: int, end: int, usual: bytes) -> Numbers:
    """Where walkers begin: at the message's own beginning, and at places that look like one."""
    many = min(_WALKERS, (end - begin) // _LEAST)
    grid = begin + np.arange(1, many) * ((end - begin) // max(many, 1))
    tags = np.zeros(256, bool)
    tags[list(usual)] = True
    places = (grid[:, None] + np.arange(_WINDOW)).ravel()
    places = places[places < end]
    places = at = places[tags[data[places]]]
    for _ in range(_HOPS):
        _, inner, stop = _fields(data, at)
        good = (stop < end) & (stop > inner)
        good[good] = tags[data[stop[good]]]
        places, at = places[good], stop[good]
    walker = np.searchsorted(grid, places, side="right")  # windows do not overlap
    first = np.ones(len(places), bool)
    first[1:] = walker[1:] != walker[:-1]
    # The tail of a field may look like fields, too: what comes after several is the next one.
    return np.unique(np.concatenate(([begin], at[first])))
