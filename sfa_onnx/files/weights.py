"""Where external weights may lie: what readers accept, and how a saved model finds them.

The readers' rules were measured with onnx 1.23, onnxruntime 1.32 and onnx-ir 1.1; ATC's column is
read from its source (it joins the model's folder and the location) and was never run here.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import onnx
from onnx import TensorProto

from sfa_onnx.errors import UsageError, WeightsError
from sfa_onnx.files.external import external_range, is_lfs_pointer, iter_tensors
from sfa_onnx.files.writing import atomic_stream, free_name
from sfa_onnx.guard.doors import door

__all__ = ["READERS", "WeightsFinding", "external_files", "place_weights", "weights_findings"]

READERS: Final = ("onnx", "onnxruntime", "onnx-ir", "ATC")
_FICLONE: Final = 0x40049409  # linux/fs.h: share the blocks of a whole file
_CHUNK: Final = 1 << 28
_PIECE: Final = 1 << 24  # bytes that are compared at a time
_HEAD: Final = 64  # bytes that identify a pointer

# layout -> (what it is, who accepts it in the order of READERS, what to do about it)
_LAYOUTS: Final[dict[str, tuple[str, tuple[bool, ...], str]]] = {
    "plain": ("a plain file in the model's folder", (True, True, True, True), ""),
    "hard link": (
        "a file with several hard links",
        (False, True, False, True),
        "replace it by a copy (cp --reflink=auto) or by the only link",
    ),
    "symlink inside": (
        "a symbolic link to a file in the model's folder",
        (False, True, True, True),
        "store the target's own name as the location",
    ),
    "symlink outside": (
        "a symbolic link that leaves the model's folder",
        (False, False, False, True),
        "copy the file into the model's folder",
    ),
    "hub cache": (
        "a Hugging Face snapshot whose blobs lie elsewhere",
        (False, True, False, True),
        "download with local_dir=... to get plain files",
    ),
    "symlinked folder": (
        "a location that passes through a symbolic link to another folder",
        (False, False, False, True),
        "copy the files into the model's folder",
    ),
    "outside": (
        "an absolute location or one that passes through '..'",
        (False, False, False, False),
        "move the weights beside the model and store a plain relative location",
    ),
    "missing": (
        "no file at that location",
        (False, False, False, False),
        "put the weights file back beside the model",
    ),
    "pointer": (
        "a Git LFS pointer, not the weights",
        (False, False, False, False),
        "fetch the file with `git lfs pull`",
    ),
    "too short": (
        "a file that ends before the last tensor does",
        (False, False, False, False),
        "the file is truncated or belongs to another model; copy it again",
    ),
}


@dataclass(frozen=True)
class WeightsFinding:
    """One external file of a model: how it lies there and which readers accept that."""

    location: str
    layout: str
    text: str
    accepted_by: tuple[str, ...]
    rejected_by: tuple[str, ...]
    fix: str
    bytes_needed: int

    @property
    def ok(self) -> bool:
        """Whether every reader accepts it."""
        return not self.rejected_by

    @property
    def readable(self) -> bool:
        """Whether the weights are there at all."""
        return self.layout not in ("missing", "pointer", "too short", "outside")

    @property
    def advice(self) -> str:
        """One line: what lies there, who rejects it, what to do."""
        if self.ok:
            return f"{self.text}: accepted by all readers"
        return f"{self.text}: rejected by {', '.join(self.rejected_by)}; {self.fix}"


def external_files(model: onnx.ModelProto) -> dict[str, int]:
    """External location -> bytes that the model needs of that file."""
    files: dict[str, int] = {}
    for tensor in iter_tensors(model):
        if tensor.data_location == TensorProto.EXTERNAL:
            where = external_range(tensor)
            end = where.offset + (where.length or 0)
            files[where.location] = max(files.get(where.location, 0), end)
    return files


@door
def weights_findings(
    model: onnx.ModelProto, folder: str | os.PathLike[str]
) -> list[WeightsFinding]:
    """How each external file lies relative to the model's folder, and who accepts it."""
    base = Path(folder)
    return [_finding(base, loc, need) for loc, need in sorted(external_files(model).items())]


def _finding(base: Path, location: str, need: int) -> WeightsFinding:
    layout = _layout(base, location, need)
    text, accepts, fix = _LAYOUTS[layout]
    accepted = tuple(r for r, ok in zip(READERS, accepts, strict=True) if ok)
    rejected = tuple(r for r, ok in zip(READERS, accepts, strict=True) if not ok)
    return WeightsFinding(location, layout, text, accepted, rejected, fix, need)


def _layout(base: Path, location: str, need: int) -> str:
    """The key of `_LAYOUTS` that describes this location."""
    pure = Path(location)
    if pure.is_absolute() or ".." in pure.parts:
        return "outside"
    path = base / pure
    if not path.is_file():
        return "missing"
    if path.stat().st_size < need:
        with path.open("rb") as stream:
            return "pointer" if is_lfs_pointer(stream.read(_HEAD)) else "too short"
    if any((base / parent).is_symlink() for parent in pure.parents if parent != Path()):
        return "symlinked folder"
    if path.is_symlink():
        if base.resolve() in path.resolve().parents:
            return "symlink inside"
        hub = base.parent.name == "snapshots" or "snapshots" in base.resolve().parts
        return "hub cache" if hub and path.resolve().parent.name == "blobs" else "symlink outside"
    return "hard link" if path.stat().st_nlink > 1 else "plain"


def place_weights(
    model: onnx.ModelProto,
    source: Path | None,
    target: Path,
    *,
    mode: str | None = None,
    force: bool = False,
    fresh: str = "",
    rename: bool = True,
) -> dict[str, str]:
    """Make sure the external files of `model` lie beside `target`; copy them there when asked.

    `fresh` names a file that is put beside `target` with the model itself. Where a name is taken
    by a file with other content, which an older model may read, the copy gets another name
    (with `rename`).

    Returns:
        location -> the location under which it was copied, where that is another one.

    Raises:
        WeightsError: they do not lie there, and `mode` does not allow to put them there.
        UsageError: `mode` is unknown, or `target` itself is one of the weights files.
    """
    if mode not in (None, "copy"):
        raise UsageError(f"weights={mode!r}: expected None (beside the weights) or 'copy'")
    folder = target.parent
    if target.name in _locations(model):
        raise UsageError(f"{target} is a weights file of this model; choose another output name")
    if source is not None and source.resolve() == folder.resolve():
        return {}
    files = external_files(model)
    files.pop(fresh, None)
    if not files:
        return {}
    if source is None:
        _must_lie_in(files, folder)
        return {}
    if mode is None:
        names = ", ".join(sorted(files)[:3]) + (" ..." if len(files) > 3 else "")
        raise WeightsError(
            f"{target}: this model's weights ({names}) lie in {source}, and onnx, onnxruntime and"
            f" ATC look for them in the model's own folder. Write the output into {source}, or"
            " pass weights='copy' (--weights copy) to copy them"
        )
    renamed: dict[str, str] = {}
    for location in sorted(files):
        copied = _copy(source, folder, location, force=force, rename=rename)
        if copied != location:
            renamed[location] = copied
    return renamed


def _locations(model: onnx.ModelProto) -> set[str]:
    """Files that the main graph's initializers point to (quick: 45,000 of them are common)."""
    return {
        entry.value
        for tensor in model.graph.initializer
        if tensor.data_location == TensorProto.EXTERNAL
        for entry in tensor.external_data
        if entry.key == "location"
    }


def _must_lie_in(files: dict[str, int], folder: Path) -> None:
    """Accept a model of unknown origin only where all of its weights files are."""
    for location, need in sorted(files.items()):
        path = folder / location
        if not path.is_file() or path.stat().st_size < need:
            raise WeightsError(
                f"{folder}: the model was given in memory and its weights file {location!r}"
                f" ({need} bytes) is not in this folder. Pass the model's path instead, or write"
                " the output where the weights are"
            )


def _copy(source: Path, folder: Path, location: str, *, force: bool, rename: bool) -> str:
    """Copy one weights file, atomically, where it is not there yet; the location it got."""
    pure = Path(location)
    if pure.is_absolute() or ".." in pure.parts:
        raise WeightsError(
            f"external location {location!r} leads out of the model's folder and cannot be copied"
            " under that name; move the weights beside the source model first"
        )
    origin, target = source / pure, folder / pure
    if not origin.is_file():
        raise WeightsError(f"{origin}: the weights file does not exist, so it cannot be copied")
    if target.exists() and not force:
        raise UsageError(f"{target} exists already; pass force (--force) to overwrite it")
    if target.is_file() and _same_bytes(origin, target):
        return location
    if target.exists() or target.is_symlink():
        if not rename:
            raise UsageError(
                f"{target} holds other bytes, which another model may read, and a certificate keeps"
                " locations as they are; remove that file, or write into another folder"
            )
        target = free_name(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_stream(target) as writer, origin.open("rb") as reader:
        _clone(reader.fileno(), writer.fileno())
    return str(target.relative_to(folder))


def _same_bytes(one: Path, other: Path) -> bool:
    if one.samefile(other):
        return True
    if one.stat().st_size != other.stat().st_size:
        return False
    with one.open("rb") as first, other.open("rb") as second:
        while part := first.read(_PIECE):
            if part != second.read(_PIECE):
                return False
    return True


def _clone(source: int, target: int) -> None:
    """Copy a file: by reference if possible, else its data extents only (holes stay holes)."""
    with contextlib.suppress(OSError):
        fcntl.ioctl(target, _FICLONE, source)
        return
    size = os.fstat(source).st_size
    os.ftruncate(target, size)
    for start, end in _extents(source, size):
        position = start
        while position < end:
            count = min(_CHUNK, end - position)
            moved = _move(source, target, position, count)
            if moved <= 0:
                raise WeightsError("the weights file shrank while it was copied; nothing written")
            position += moved


def _move(source: int, target: int, position: int, count: int) -> int:
    """Copy up to `count` bytes inside the kernel where that works; else through memory."""
    try:
        return os.copy_file_range(source, target, count, position, position)
    except OSError:
        data = os.pread(source, min(count, 1 << 24), position)
        return os.pwrite(target, data, position)


def _extents(descriptor: int, size: int) -> Iterator[tuple[int, int]]:
    """The byte ranges that hold data; the whole file where the file system does not report them."""
    position = 0
    while position < size:
        try:
            start = os.lseek(descriptor, position, os.SEEK_DATA)
            end = os.lseek(descriptor, start, os.SEEK_HOLE)
        except OSError:
            if position == 0 and not _tells_holes(descriptor):
                yield 0, size
            return
        yield start, end
        position = end


def _tells_holes(descriptor: int) -> bool:
    """Whether the file system supports SEEK_HOLE (an all-hole file then has no data at all)."""
    with contextlib.suppress(OSError):
        os.lseek(descriptor, 0, os.SEEK_HOLE)
        return True
    return False
