"""A folder that is written whole or not at all."""

from __future__ import annotations

import ctypes
import os
import shutil
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Final

from sfa_onnx.errors import UsageError
from sfa_onnx.files.writing import check_target

__all__ = ["Staging"]

_HERE: Final = -100  # AT_FDCWD: relative paths start at the current folder
_EXCHANGE: Final = 2  # RENAME_EXCHANGE


class Staging:
    """Files are written beside their place, and moved there when the `with` block ends well.

    Attributes:
        folder: the folder to write to meanwhile; a sibling of the final one, so that relative paths
            are the same.
        model: the file to write the model to meanwhile.
    """

    def __init__(self, folder: Path, model: Path, *, force: bool) -> None:
        """Choose the places.

        Args:
            folder: the final folder.
            model: the final model file, inside the folder or elsewhere.
            force: existing files may be replaced.

        Raises:
            UsageError: something is there already and `force` is not set.
        """
        if folder.is_file():
            raise UsageError(f"{folder} is a file; choose another name for the folder")
        if folder.is_symlink():
            folder = folder.resolve()
        if model.exists() or model.is_symlink():
            model = check_target(model, force=force)
        self._folder, self._model = folder, model
        self.folder, self.model = folder, model

    def __enter__(self) -> Staging:
        parent = self._folder.absolute().parent
        parent.mkdir(parents=True, exist_ok=True)
        self.folder = Path(tempfile.mkdtemp(prefix=f".{self._folder.name}.", dir=parent))
        umask = os.umask(0)
        os.umask(umask)
        self.folder.chmod(0o777 & ~umask)
        if self._folder in self._model.parents:
            self.model = self.folder / self._model.relative_to(self._folder)
        else:
            self.model = self._model.with_name(f".{self.folder.name}.{self._model.name}")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._commit()
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.model.unlink(missing_ok=True)

    def _commit(self) -> None:
        apart = self.folder not in self.model.parents
        if not self._folder.exists():
            self.folder.replace(self._folder)
        else:
            _keep_others(self._folder, self.folder)
            if not _exchange(self.folder, self._folder):
                _move_into(self.folder, self._folder)
        if apart and self.model.exists():  # the model goes last
            self.model.replace(self._model)


def _keep_others(old: Path, new: Path) -> None:
    """Files of the old folder that are not written anew are part of the new one as well."""
    for source in sorted(old.rglob("*")):
        target = new / source.relative_to(old)
        if source.is_dir() and not source.is_symlink():
            target.mkdir(exist_ok=True)
        elif not target.exists() and not target.is_symlink():
            try:
                os.link(source, target, follow_symlinks=False)
            except OSError:  # a file system without hard links
                shutil.copy2(source, target, follow_symlinks=False)


def _exchange(one: Path, other: Path) -> bool:
    """Let two folders change names in one step; False where the system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    done: int = rename(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE)
    return done == 0


def _move_into(source: Path, target: Path) -> None:
    """Replace the files of a folder one by one."""
    for path in sorted(source.rglob("*")):
        place = target / path.relative_to(source)
        if path.is_dir() and not path.is_symlink():
            place.mkdir(exist_ok=True)
        else:
            path.replace(place)
