"""What is behind a refusal of onnxruntime that the file alone explains, and what to do."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import onnx
import onnxruntime as ort

from sfa_onnx.files.empty_views import label, settled, unsettled
from sfa_onnx.files.model import load_model
from sfa_onnx.runtime.located import in_folder

__all__ = ["mended", "next_step"]

_EMPTY = "Product cannot be 0 in combination with -1"
Model = str | os.PathLike[str] | onnx.ModelProto
_log = logging.getLogger("sfa_onnx")


def mended(
    text: str, model: Model | bytes, options: ort.SessionOptions, notes: list[str] | None
) -> onnx.ModelProto | None:
    """The model with what it left open written out, if that is all onnxruntime minds.

    Args:
        text: onnxruntime's message.
        model: what it refused; not changed.
        options: get the folder of the model's weights.
        notes: takes a line per change; None: a warning is logged.
    """
    if _EMPTY not in text:
        return None
    whole, done = settled(_whole(model))
    if not done:
        return None
    if notes is None:
        _log.warning("%s; `sfa-onnx check --fix` writes it into a file", "; ".join(done))
    else:
        notes += done
    if isinstance(model, onnx.ModelProto | bytes):
        return whole
    return in_folder(whole, Path(model).resolve().parent, options)


def next_step(text: str, model: Model | bytes) -> str:
    """A sentence behind onnxruntime's own message; "" where it says all there is to say.

    Args:
        text: onnxruntime's message.
        model: what it refused; weights need not be there.
    """
    if _EMPTY not in text:
        return ""
    names = ", ".join(map(label, unsettled(_whole(model))))
    return (
        f". {names or 'A Reshape'} asks for -1 beside 0 (allowzero = 1), which ONNX forbids: of a"
        " tensor without elements, as a rope of width 0 is, no size can be inferred, and the sizes"
        " around it do not tell it either. Write it into the node, by Shape of its input or as a"
        " number, or export several tokens"
    )


def _whole(model: Model | bytes) -> onnx.ModelProto:
    return onnx.ModelProto.FromString(model) if isinstance(model, bytes) else load_model(model)
