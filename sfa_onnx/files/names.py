"""Names that are not UTF-8: onnxruntime loads them, Python's protobuf hands them out as bytes.

They are written escaped once, when the model is opened, so that nobody meets bytes later.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message, message_factory
from onnx import ModelProto

__all__ = ["escape_names", "is_utf8"]


@functools.cache
def _strict_model() -> Any:
    """The class of ModelProto whose parser rejects strings that are not UTF-8, as proto3 asks.

    The same messages are declared again under the rules of proto3, so the check runs at the speed
    of the parser: no walk over a million names in Python.
    """
    file = descriptor_pb2.FileDescriptorProto.FromString(ModelProto.DESCRIPTOR.file.serialized_pb)
    file.name, file.syntax = "sfa_onnx/strict_onnx.proto", "proto3"
    file.ClearField("edition")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(
        pool.FindMessageTypeByName(ModelProto.DESCRIPTOR.full_name)
    )


def is_utf8(data: bytes) -> bool:
    """Whether every string of a serialised model is UTF-8."""
    if data.isascii():
        return True
    try:
        _strict_model().FromString(data)
    except message.DecodeError:
        return False
    return True


def escape_names(model: ModelProto) -> list[str]:
    r"""Write strings that are not UTF-8 escaped (``\xe1`` for a stray byte), in place.

    Returns:
        The new spellings, in the order of the file.
    """
    found: list[str] = []
    for part in _messages(model):
        for field, value in part.ListFields():
            if field.type != field.TYPE_STRING:
                continue
            if isinstance(value, bytes):
                setattr(part, field.name, _spelled(value, found))
            elif not isinstance(value, str):
                texts = list(value)
                if any(isinstance(text, bytes) for text in texts):
                    new = [_spelled(t, found) if isinstance(t, bytes) else t for t in texts]
                    part.ClearField(field.name)
                    getattr(part, field.name).extend(new)
    return found


def _spelled(raw: bytes, found: list[str]) -> str:
    text = raw.decode("utf-8", "backslashreplace")
    found.append(text)
    return text


def _messages(root: Any) -> Iterator[Any]:
    """A message and all messages inside it."""
    stack: list[Any] = [root]
    while stack:
        part = stack.pop()
        yield part
        for field, value in part.ListFields():
            if field.type == field.TYPE_MESSAGE:
                stack += [value] if isinstance(value, message.Message) else list(value)
