"""Arrays that somebody stored in an .npz file: numbers or texts, never pickled objects."""

from __future__ import annotations

import zlib
from pathlib import Path
from tokenize import TokenError
from typing import Any, Final
from zipfile import BadZipFile, ZipFile

import numpy as np

from sfa_onnx.errors import UsageError
from sfa_onnx.guard.budgets import INPUT_BYTES
from sfa_onnx.guard.text import printable

__all__ = ["stored_arrays"]

_UNREADABLE: Final = (
    *(ValueError, OSError, EOFError, KeyError, SyntaxError, TokenError, BadZipFile, zlib.error),
    *(NotImplementedError, RuntimeError, OverflowError),  # packed in another way, or encrypted
)


def stored_arrays(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """The arrays of an .npz file, by name.

    Raises:
        UsageError: the file is none, holds one name twice, or something that is no plain array.
        BudgetError: unpacked it is beyond the budget for inputs.
    """
    try:
        with ZipFile(path) as archive:
            sizes = [entry.file_size for entry in archive.infolist()]
            names = archive.namelist()
        if len(set(names)) < len(names):
            raise UsageError(f"{path}: holds two arrays of one name; store each once")
        INPUT_BYTES.check(sum(sizes), f"unpacking {path}")
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as stored:
            found = {name: stored[name] for name in stored.files}
    except _UNREADABLE as error:
        told = printable(str(error)) or "empty"
        raise UsageError(f"{path}: not an .npz of plain arrays ({told})") from error
    for name, array in found.items():
        if not isinstance(array, np.ndarray) or array.dtype.names is not None:
            kind = "no array" if not isinstance(array, np.ndarray) else "an array of records"
            raise UsageError(printable(f"{path}: {name!r} is {kind}, expected plain numbers"))
    return found
