"""A new file of weights beside a model that is about to be written: streamed, then put in place."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Final

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from sfa_onnx.errors import UsageError
from sfa_onnx.files.writing import free_name, open_mode

__all__ = ["WeightsFile", "digest_of", "inline_tensor"]

_INLINE: Final = 1024  # bytes of a tensor that is kept in the model itself, as onnx.save does
_PAGE: Final = 4096  # offsets are multiples of it, so that runtimes can map the tensors
_CHUNK: Final = 1 << 24  # bytes that are made contiguous at a time


class WeightsFile:
    """Collects tensors in a temporary file, which `commit` renames; leaving without it removes it.

    The file is made with the first tensor that needs it, and is named after the model:
    `model.sfa.onnx` -> `model.sfa.absorbed.bin`, with a number where that is there already.

    Attributes:
        path: what the file will be called.
        bytes_written: bytes of tensors in it.
        kept: a file of that name from before: it stays, for the model that reads it.
    """

    def __init__(self, model: Path, *, force: bool = False) -> None:
        """Prepare a file for the model that will be written as `model`.

        Raises:
            UsageError: the file exists and `force` is not set.
        """
        self.path = model.with_name(model.stem + ".absorbed.bin")
        self.bytes_written = 0
        self._stream: IO[bytes] | None = None
        self._temporary = Path()
        self.kept: Path | None = None
        if self.path.exists() or self.path.is_symlink():
            if not force:
                raise UsageError(f"{self.path} exists already; pass force (--force)")
            self.kept, self.path = self.path, free_name(self.path)

    def __enter__(self) -> WeightsFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._stream is not None:
            self._stream.close()
            self._temporary.unlink(missing_ok=True)
            self._stream = None

    def add(self, name: str, array: np.ndarray) -> TensorProto:
        """Write `array` and return an initializer that points to it (or holds it, when tiny).

        Args:
            name: of the initializer.
            array: any strides; it is made contiguous piece by piece.
        """
        if array.nbytes < _INLINE:
            return inline_tensor(name, array)
        stream = self._open()
        start = -(-stream.tell() // _PAGE) * _PAGE
        stream.seek(start)
        for piece in _pieces(array):
            stream.write(piece)
        self.bytes_written += array.nbytes
        tensor = TensorProto(
            name=name,
            data_type=helper.np_dtype_to_tensor_dtype(array.dtype),
            dims=array.shape,
            data_location=TensorProto.EXTERNAL,
        )
        where = {"location": self.path.name, "offset": start, "length": array.nbytes}
        for key, value in where.items():
            tensor.external_data.add(key=key, value=str(value))
        return tensor

    def commit(self) -> None:
        """Put the file in its place, if anything was written."""
        if self._stream is None:
            return
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
        self._temporary.chmod(open_mode())
        try:
            os.link(self._temporary, self.path)  # unlike a rename, never over another writer's
        except FileExistsError as error:
            raise UsageError(
                f"{self.path} was made by somebody else in the meantime; run again"
            ) from error
        except OSError:  # a file system without hard links
            self._temporary.replace(self.path)
        self._temporary.unlink(missing_ok=True)
        self._stream = None

    def _open(self) -> IO[bytes]:
        if self._stream is None:
            folder = self.path.parent
            if not folder.is_dir():
                raise UsageError(f"{self.path}: the folder {folder} does not exist; create it")
            handle, name = tempfile.mkstemp(prefix=f".{self.path.name}.", suffix=".tmp", dir=folder)
            self._stream, self._temporary = os.fdopen(handle, "wb"), Path(name)
        return self._stream


def inline_tensor(name: str, array: np.ndarray) -> TensorProto:
    """An initializer that holds `array` itself."""
    return numpy_helper.from_array(np.ascontiguousarray(array), name)


def digest_of(array: np.ndarray) -> str:
    """Hash of a tensor's bytes as they are stored."""
    state = hashlib.blake2b(digest_size=16)
    for piece in _pieces(array):
        state.update(piece)
    return state.hexdigest()


def _pieces(array: np.ndarray) -> Iterator[bytes]:
    """The bytes of `array` in row-major order, some rows at a time."""
    rows = array.reshape(1) if array.ndim == 0 else array
    step = max(1, _CHUNK * len(rows) // max(1, rows.nbytes))
    for first in range(0, len(rows), step):
        yield rows[first : first + step].tobytes()
