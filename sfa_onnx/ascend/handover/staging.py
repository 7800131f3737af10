"""A folder that is written whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from types import TracebackType

from sfa_onnx.errors import UsageError

__all__ = ["Staging"]


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
        if model.exists() and not force:
            raise UsageError(f"{model} exists already; use --force to replace it")
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
        if self.model.exists() and self.folder not in self.model.parents:
            self.model.replace(self._model)
        if not self._folder.exists():
            self.folder.replace(self._folder)
            return
        for source in sorted(self.folder.rglob("*")):
            target = self._folder / source.relative_to(self.folder)
            if source.is_dir():
                target.mkdir(exist_ok=True)
            else:
                source.replace(target)
