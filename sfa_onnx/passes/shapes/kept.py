"""How many elements a mask keeps: a size of its own, which only a run shows."""

from __future__ import annotations

import onnx

from sfa_onnx.passes.shapes.asking import Shapes, Sizes
from sfa_onnx.passes.shapes.form import Call, Form
from sfa_onnx.passes.shapes.size import form_of

__all__ = ["counts_kept", "kept_by", "kept_mask", "nonzero"]


def kept_by(mask: str) -> Form:
    """The number of elements that are not zero."""
    return Form.of(Call("kept", (Form.of(mask),)))


def kept_mask(size: int) -> str:
    """The mask whose elements a size counts; "" where it is another size."""
    atom = form_of(size).alone
    if not isinstance(atom, Call) or atom.name != "kept":
        return ""
    return atom.arguments[0].plain or ""


def counts_kept(size: int) -> bool:
    """Whether a size depends on what a mask keeps."""
    return _counts(form_of(size))


def _counts(form: Form) -> bool:
    calls = [atom for _, atoms in form.terms for atom in atoms if isinstance(atom, Call)]
    return any(c.name == "kept" or any(map(_counts, c.arguments)) for c in calls)


def nonzero(sizes: Sizes, node: onnx.NodeProto) -> Shapes:
    """[axes of the mask, elements it keeps]."""
    shape = sizes.look_up(node.input[0])
    return [None if shape is None else (len(shape), sizes.kept(node.input[0]))]
