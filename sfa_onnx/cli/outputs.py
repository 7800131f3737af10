"""What a verb is about to write is looked at before anything is computed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from sfa_onnx.files.model import load_model
from sfa_onnx.files.writing import check_outputs
from sfa_onnx.fusion_options import spare_weights

__all__ = ["spare"]

_PAGES = (".html", ".md")


def spare(
    outputs: Mapping[str, Path | None],
    inputs: Mapping[str, Path | None],
    *,
    models: Iterable[Path | None] = (),
    force: bool = False,
    replaceable: Iterable[str] = (),
) -> None:
    """Refuse outputs that would overwrite an input, weights of a model, or each other.

    Args:
        outputs: what is written -> where; None: not written. "the report" is a page.
        inputs: what is read -> where.
        models: those inputs whose weights files must stay, too.
        force: existing files that are none of these may be overwritten.
        replaceable: outputs that may take the place of "the model".

    Raises:
        UsageError: an output cannot be written, or is something else too.
        ModelError: a model whose weights must stay is not sound.
    """
    written = {what: path for what, path in outputs.items() if path is not None}
    if not written:
        return
    if (page := written.get("the report")) is not None:
        from sfa_onnx.pages import page_form

        page_form(page)
    check_outputs(written, inputs, force=force, replaceable=replaceable)
    for path in {p for p in models if p is not None and p.is_file()}:
        model = load_model(path)
        for output in written.values():
            spare_weights(model, path.parent, output)
