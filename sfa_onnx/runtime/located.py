"""Models in memory whose weights stay in files of a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import onnxruntime as ort
from onnx import ModelProto

from sfa_onnx.files.external import iter_tensors

__all__ = ["in_folder"]

_FOLDER: Final = "session.model_external_initializers_file_folder_path"
# Before 1.22 a model in memory finds its weights by absolute paths, which later ones reject.
_KNOWS_FOLDER: Final = tuple(map(int, ort.__version__.split(".")[:2])) >= (1, 22)


def in_folder(model: ModelProto, folder: Path, options: ort.SessionOptions) -> ModelProto:
    """The model for a session with these options, whose external data lie in `folder`."""
    if not _KNOWS_FOLDER:
        return _located(model, folder)
    options.add_session_config_entry(_FOLDER, str(folder))
    return model


def _located(model: ModelProto, folder: Path) -> ModelProto:
    """A copy that names its external files by absolute paths."""
    out = ModelProto()
    out.CopyFrom(model)
    for tensor in iter_tensors(out):
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = str(folder / entry.value)
    return out
