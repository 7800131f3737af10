"""Fields of many messages at once, as arrays.

Asking 130,000 nodes one after the other for their fields takes a second, nearly all of it spent on
protobuf's Python objects. Here their bytes are read instead, one field of every message at a time:
a node has seldom more than ten fields, so that is ten steps for all nodes together.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from google.protobuf import descriptor_pb2
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

__all__ = ["Column", "Fields", "loop", "varints", "wires"]

Numbers = np.ndarray[Any, np.dtype[np.int64]]
Words = np.ndarray[Any, np.dtype[np.uint64]]
_Rows = tuple[Numbers, Numbers, Numbers, Numbers, Numbers]  # owner, number, begin, end, value

_FEW: Final = 32  # messages for which arrays are slower than a loop
_VARINT, _FIXED64, _TEXT, _FIXED32 = 0, 1, 2, 5
_LONGEST: Final = 10  # bytes of a varint
_WORD: Final = 8  # bytes
_ANY: Final = -1
_KNOWN: Final = (_TEXT, _VARINT, _FIXED64, _FIXED32)
_WIRES: Final = {
    **dict.fromkeys((FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES), _TEXT),
    FieldDescriptor.TYPE_MESSAGE: _TEXT,
    FieldDescriptor.TYPE_FLOAT: _FIXED32,
    FieldDescriptor.TYPE_DOUBLE: _FIXED64,
}
_MASKS: Final = np.array([(1 << 8 * size) - 1 for size in range(_WORD + 1)], np.uint64)


@dataclass(frozen=True)
class Column:
    """One field of all messages, in their order: an entry for each time that it occurs.

    Attributes:
        owner: the number of the message, int64 [F].
        begin: where the content begins in the bytes, int64 [F].
        end: where it ends, int64 [F].
        value: of whole numbers (modulo 2^64, as int64), and the length of others, int64 [F].
    """

    owner: Numbers
    begin: Numbers
    end: Numbers
    value: Numbers

    def counts(self, messages: int) -> Numbers:
        """How often each message has the field, int64 [messages]."""
        return np.bincount(self.owner, minlength=messages)


class Fields:
    """Where the fields of messages lie in their bytes.

    Attributes:
        data: bytes that hold all messages.
        starts: where each message begins, int64 [M].
    """

    def __init__(self, data: bytes, starts: Numbers, rows: list[_Rows]) -> None:
        """As `of` and `within` make it."""
        self.data, self.starts, self._rows = data, starts, rows

    @classmethod
    def of(cls, kind: type[Message], messages: Iterable[bytes]) -> Fields | None:
        """Read messages of a kind; None where they are not written as protobuf writes them."""
        parts = list(messages)
        ends = np.cumsum(np.fromiter(map(len, parts), np.int64, len(parts)))
        starts = np.concatenate(([0], ends[:-1])) if parts else ends
        return cls.within(kind, b"".join(parts), starts, ends)

    @classmethod
    def within(
        cls, kind: type[Message], data: bytes, starts: Numbers, ends: Numbers
    ) -> Fields | None:
        """As `of`, of messages that lie at `starts` to `ends` (int64 [M]) in some bytes."""
        found: list[_Rows] = []
        usual_wires = wires(kind)
        left = _steps(np.frombuffer(data, np.uint8), starts, ends, usual_wires, found)
        few = [
            row for message in zip(*left, strict=True) for row in loop(data, *message, usual_wires)
        ]
        if few:
            found.append(tuple(np.array(few, np.int64).T))
        usual = all((number > 0).all() for _, number, *_ in found)
        return cls(data, starts, found) if usual else None

    def column(self, number: int) -> Column:
        """The field of a number."""
        rows: list[list[Numbers]] = [[np.zeros(0, np.int64)] * 4]
        for owner, numbers, *rest in self._rows:
            at = np.flatnonzero(numbers == number)
            rows.append([c[at] for c in (owner, *rest)])
        columns = [np.concatenate(parts) for parts in zip(*rows, strict=True)]
        order = np.argsort(columns[0], kind="stable")  # what one message has stays in its order
        return Column(*(c[order] for c in columns))

    def texts(self, begin: Numbers, end: Numbers) -> list[bytes]:
        """The bytes from each `begin` to each `end`."""
        data = self.data
        return [data[b:e] for b, e in zip(begin.tolist(), end.tolist(), strict=True)]

    def words(self, begin: Numbers, size: Numbers) -> Words:
        """Up to eight bytes from each `begin` on as one number, uint64 [F]; zeros behind `size`."""
        data = self.data if len(self.data) >= _WORD else self.data + bytes(_WORD)
        last = len(data) - _WORD
        every: Any = np.ndarray((last + 1,), "<u8", data, strides=(1,))
        kept: Words = every[np.minimum(begin, last)]
        if (late := np.flatnonzero(begin > last)).size:
            kept[late] >>= (8 * np.minimum(begin[late] - last, _WORD - 1)).astype(np.uint64)
        return kept & _MASKS[np.clip(size, 0, _WORD)]


def wires(kind: type[Message]) -> Numbers:
    """How protobuf writes each field of a message, by its number; `_ANY` for what it has not."""
    return _wires_of(kind.DESCRIPTOR)


@functools.cache
def _wires_of(message: Descriptor) -> Numbers:
    described = descriptor_pb2.DescriptorProto()
    message.CopyToProto(described)
    found = np.full(1 << 5, _ANY, np.int64)
    for field in described.field:
        found[field.number] = _TEXT if field.options.packed else _WIRES.get(field.type, _VARINT)
    return found


def _steps(
    data: np.ndarray[Any, Any],
    starts: Numbers,
    ends: Numbers,
    wires: Numbers,
    found: list[_Rows],
) -> tuple[list[int], list[int], list[int], list[int]]:
    """One field of every message at a time.

    Returns:
        Of the messages left over: number, position, end, number of the last field; a number of -1
        is that of a field which protobuf does not write, or not there.
    """
    owner, at, end, last = np.arange(len(starts)), starts, ends, np.zeros(len(starts), np.int64)
    while True:
        if not (more := at < end).all():
            owner, at, end, last = owner[more], at[more], end[more], last[more]
        if len(owner) <= _FEW:
            return owner.tolist(), at.tolist(), end.tolist(), last.tolist()
        tag, begin = varints(data, at)
        wire = tag & 7
        value, behind = varints(data, begin)
        text, whole = wire == _TEXT, wire == _VARINT
        begin = np.where(text, behind, begin)
        stop = behind + np.where(text, value, 0)
        if not (text | whole).all():
            fixed = (wire == _FIXED64) | (wire == _FIXED32)
            stop = np.where(fixed, begin + np.where(wire == _FIXED64, 8, 4), stop)
            tag = np.where(text | whole | fixed, tag, -_WORD)
        number = tag >> 3
        usual = wires[np.minimum(number, len(wires) - 1)]
        number[(usual != wire) & (usual != _ANY)] = -1
        number[number < last] = -1
        found.append((owner, number, begin, stop, value))
        at, last = np.where(number < 0, end, stop), number


def varints(data: np.ndarray[Any, Any], at: Numbers) -> tuple[Numbers, Numbers]:
    """The numbers that are written at some places, and where each ends."""
    value: Numbers = data[at].astype(np.int64)
    end = at + 1
    left = np.flatnonzero(value > 127)
    value[left] &= 127
    for place in range(1, _LONGEST):
        if not len(left):
            break
        byte = data[end[left]].astype(np.int64)
        value[left] |= (byte & 127) << 7 * place
        end[left] += 1
        left = left[byte > 127]
    return value, end


def loop(
    data: bytes, owner: int, at: int, end: int, last: int, wires: Numbers
) -> Iterator[tuple[int, ...]]:
    """The fields of one message, as (owner, number, begin, end, value)."""
    while at < end:
        tag, begin = _varint(data, at)
        wire, value = tag & 7, 0
        usual = wires[min(tag >> 3, len(wires) - 1)]
        if tag >> 3 < last or wire not in _KNOWN or usual not in (_ANY, wire):
            yield owner, -1, begin, end, 0
            return
        if wire == _TEXT:
            value, begin = _varint(data, begin)
            at = begin + value
        elif wire == _VARINT:
            value, at = _varint(data, begin)
        else:
            at = begin + (8 if wire == _FIXED64 else 4)
        last = tag >> 3
        yield owner, last, begin, at, value


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value, shift = data[at] & 127, 0
    while data[at] > 127:
        at += 1
        shift += 7
        value |= (data[at] & 127) << shift
    return value - (1 << 64) if value >> 63 else value, at + 1
