"""Fields of many messages at once, as columns.

Asking 130,000 nodes one after the other for their fields takes a second, nearly all of it spent on
protobuf's Python objects. Here the same bytes are read as one message whose fields repeat: that
gives each field of all nodes as one list, in which a mark stands at the end of each node.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, Final

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

__all__ = ["Columns", "counts", "rows"]

_AT_ONCE: Final = 8192  # messages that are copied at a time
_F: Final = FieldDescriptor
_AS_NUMBER: Final = (_F.TYPE_INT64, _F.TYPE_INT32, _F.TYPE_ENUM)
_MARK: Final = b"\x01\x00"  # a text, or bytes, of one zero
_LESS_THAN_NONE: Final = b"\xff" * 9 + b"\x01"  # the number -1


class Columns:
    r"""Reads some fields of messages of one type.

    Attributes:
        marks: field -> what ends each message in its column: "\0", b"\0" or -1.
        single: fields that each message must have once; their columns have no marks.
    """

    def __init__(
        self, descriptor: Descriptor, fields: Sequence[str], single: Sequence[str] = ()
    ) -> None:
        """Prepare for messages of a type: `Columns(NodeProto.DESCRIPTOR, ["input", "output"])`.

        Fields may be text, whole numbers, bytes or messages (these come as their bytes).
        """
        self.marks: dict[str, Any] = {}
        self.single = tuple(single)
        self._end = b""
        file = descriptor_pb2.FileDescriptorProto(name="flat.proto", syntax="proto2")
        flat = file.message_type.add(name="Flat")
        for name in (*fields, *single):
            field = descriptor.fields_by_name[name]
            wire, kind, end, mark = _kept_as(field)
            flat.field.add(name=name, number=field.number, type=kind, label=_F.LABEL_REPEATED)
            if name in fields:
                assert field.number < 1 << 4, "one byte of tag"
                self._end += bytes([field.number << 3 | wire]) + end
                self.marks[name] = mark
        pool = descriptor_pool.DescriptorPool()
        pool.Add(file)
        self._flat: Any = message_factory.GetMessageClass(pool.FindMessageTypeByName("Flat"))

    def read(self, messages: Iterable[Message]) -> dict[str, list[Any]] | None:
        """Each field of all messages, each message ended by a mark.

        Returns:
            field -> column; None where a field holds what marks an end, or a single one is missing.
        """
        return self.parse(m.SerializeToString() for m in messages)

    def parse(self, messages: Iterable[bytes]) -> dict[str, list[Any]] | None:
        """As `read`, of messages that were serialised here: each holds a single field once."""
        found: dict[str, list[Any]] = {name: [] for name in (*self.marks, *self.single)}
        count, waiting = 0, iter(messages)
        while part := list(islice(waiting, _AT_ONCE)):
            count += len(part)
            flat = self._flat.FromString(self._end.join((*part, b"")))
            for name, column in found.items():
                column += getattr(flat, name)[:]
        marked = all(found[n].count(mark) == count for n, mark in self.marks.items())
        return found if marked and all(len(found[n]) == count for n in self.single) else None


def _kept_as(field: FieldDescriptor) -> tuple[int, int, bytes, str | bytes | int]:
    """Wire type, type in the flat message, the mark's bytes, the mark."""
    if field.type in _AS_NUMBER:
        return 0, FieldDescriptor.TYPE_INT64, _LESS_THAN_NONE, -1
    if field.type == FieldDescriptor.TYPE_STRING:
        return 2, FieldDescriptor.TYPE_STRING, _MARK, "\0"
    return 2, FieldDescriptor.TYPE_BYTES, _MARK, b"\0"


def counts(column: list[Any], mark: Any) -> list[int]:
    """How many entries each message has in a column."""
    marks = column.count(mark)
    if 2 * marks == len(column) and column[1::2].count(mark) == marks:
        return [1] * marks  # each mark follows an entry, which is no mark: all have been counted
    ends = [at for at, entry in enumerate(column) if entry == mark]
    return [end - begin - 1 for begin, end in zip([-1, *ends], ends, strict=False)]


def rows(column: list[Any], sizes: Iterable[int]) -> Iterator[list[Any]]:
    """The entries of each message of a column, by `counts` of it."""
    begin = 0
    for size in sizes:
        yield column[begin : begin + size]
        begin += size + 1
