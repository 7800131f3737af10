"""Files are written whole or not at all, and never over something that is still needed."""

from __future__ import annotations

import contextlib
import itertools
import os
import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO

from sfa_onnx.errors import UsageError

__all__ = [
    "atomic_stream",
    "atomic_write",
    "check_outputs",
    "check_target",
    "free_name",
    "open_mode",
    "place",
]


def check_target(path: Path, *, force: bool = False) -> Path:
    """The regular file that `path` stands for, symbolic links followed; it may be written.

    Raises:
        UsageError: it exists and `force` is not set; it is a folder, a device or a pipe; its
            folder does not exist; its symbolic links lead in a circle.
    """
    if "\0" in str(path):
        raise UsageError(f"{str(path)!r}: no file has such a name; choose another")
    try:
        target = path.resolve() if path.is_symlink() else path
        kind = target.stat().st_mode if target.exists() else None
    except (OSError, RuntimeError) as error:
        raise UsageError(f"{path}: cannot be written to ({error}); choose another name") from error
    if kind is not None and not stat.S_ISREG(kind):
        what = "a folder" if stat.S_ISDIR(kind) else "a device, pipe or socket"
        raise UsageError(
            f"{path}: this is {what}, and only regular files are written; choose another"
        )
    if kind is not None and not force:
        raise UsageError(f"{path} exists already; choose another name or pass force (--force)")
    if not target.parent.is_dir():
        raise UsageError(f"{path}: the folder {target.parent} does not exist; create it first")
    return target


def check_outputs(
    outputs: Mapping[str, str | os.PathLike[str] | None],
    inputs: Mapping[str, str | os.PathLike[str] | None],
    *,
    force: bool = False,
    replaceable: Iterable[str] = (),
) -> None:
    """Refuse outputs that would overwrite an input, a weights file or each other.

    Args:
        outputs: what is written -> where; None: not written.
        inputs: what is read -> where. Names of both are those of the options.
        force: existing files that are none of these may be overwritten.
        replaceable: outputs that may take the place of "the model" they are made from.

    Raises:
        UsageError: an output cannot be written, or is something else too.
    """
    taken = {_identity(Path(p)): what for what, p in inputs.items() if p is not None}
    for what, given in outputs.items():
        if given is None:
            continue
        path = Path(given)
        check_target(path, force=force)
        other = taken.get(_identity(path))
        if other is not None and not (other == "the model" and what in replaceable):
            raise UsageError(f"{path} would be {what} and is {other} already; choose another name")
        taken.setdefault(_identity(path), what)


def _identity(path: Path) -> tuple[int, int] | str:
    """What two spellings, links included, of one file have in common."""
    try:
        found = path.stat()
    except OSError:
        return str(path.resolve())
    return found.st_dev, found.st_ino


def free_name(path: Path) -> Path:
    """`w-2.bin`, `w-3.bin`, ...: the first beside `w.bin` that nothing has."""
    numbers = (path.with_name(f"{path.stem}-{n}{path.suffix}") for n in itertools.count(2))
    return next(p for p in numbers if not p.exists() and not p.is_symlink())


@contextlib.contextmanager
def atomic_stream(path: Path, *, force: bool = False) -> Iterator[IO[bytes]]:
    """A stream whose content becomes `path` when the block ends well, and vanishes otherwise.

    Raises:
        UsageError: as `check_target` says.
    """
    target = check_target(path, force=force)
    handle, name = tempfile.mkstemp(
        prefix=f".{target.name[:80]}.", suffix=".tmp", dir=target.parent
    )
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        place(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def atomic_write(path: Path, data: bytes, *, force: bool = False) -> None:
    """Write `data` to `path` through a temporary file in the same folder and a rename.

    Raises:
        UsageError: as `check_target` says.
    """
    with atomic_stream(path, force=force) as stream:
        stream.write(data)


def place(temporary: Path, target: Path) -> None:
    """Give a finished temporary file its permissions and its name."""
    temporary.chmod(open_mode())
    temporary.replace(target)


def open_mode() -> int:
    """The permissions that a new file gets in this process."""
    umask = os.umask(0)
    os.umask(umask)
    return 0o666 & ~umask
