"""What `fuse` is asked for: legal values, expectations, and outputs that overwrite nothing."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import onnx

from sfa_onnx.errors import UsageError, VerificationError
from sfa_onnx.files.weights import external_files
from sfa_onnx.operator.op import SPARSE_FLASH_ATTENTION, SPARSE_FLASH_ATTENTION_ANTIQUANT
from sfa_onnx.passes.scopes.splice import count_nodes
from sfa_onnx.report import FuseReport

__all__ = ["check_options", "convert_cache", "expect", "spare_weights", "worth_writing"]


def check_options(target: str, kv_cache: str, cost: str, portable: bool) -> None:
    """Refuse values that no option takes.

    Raises:
        UsageError: as it says.
    """
    for name, value, legal in (
        ("target", target, ("any", "ascend", "cpu")),
        ("kv_cache", kv_cache, ("keep", "int8", "packed-int8", "paged-int8", "paged")),
        ("cost", cost, ("any", "not-worse")),
    ):
        if value not in legal:
            raise UsageError(f"{name}={value!r}: expected one of {', '.join(legal)}")
    if portable and kv_cache != "keep":
        raise UsageError("portable=True cannot be combined with an int8 kv_cache yet")


def expect(report: FuseReport, count: int | str | None, plan: Any) -> None:
    """Fail loudly when fewer or more sites fused than the caller counts on.

    Raises:
        VerificationError: the count or the plan was not met.
    """
    fused = len(report.fused)
    refused = "; ".join(f"{s.site_id}: {s.reason}" for s in report.refused[:5])
    met = fused > 0 if count == "some" else count in (None, fused)
    if not met:
        raise VerificationError(
            f"{fused} sites were fused, {count} were expected."
            + (f" Refused: {refused}" if refused else " No other candidate was found.")
        )
    left = [*report.refused, *(s for s in report.selections if s.status == "refused")]
    planned = [s for s in left if s.site_id in report.planned]
    if plan is not None and planned:
        reasons = "; ".join(f"{s.site_id}: {s.reason}" for s in planned[:5])
        raise VerificationError(f"{plan}: {len(planned)} sites of the plan do not fuse. {reasons}")


def spare_weights(
    model: onnx.ModelProto, folder: Path | None, output: str | os.PathLike[str]
) -> None:
    """Refuse an output that is a weights file of the model.

    Args:
        model: names its weights files.
        folder: where these lie; None: beside the output.
        output: the file that is to be written.

    Raises:
        UsageError: it is one of them.
    """
    base = Path(output).parent if folder is None else folder
    target = Path(output).resolve()
    for location in external_files(model):
        if (base / location).resolve() == target:
            raise UsageError(f"{output} is a weights file of this model; choose another name")


def worth_writing(report: FuseReport, output: Any, kv_cache: str, portable: bool) -> bool:
    """Whether a file of the result is of use: not where it would be a copy of the input.

    Says so in the report's notes where an output was asked for.
    """
    if report.fused or report.indexers or kv_cache != "keep" or portable:
        return True
    if output is not None:
        report.notes.append("nothing was fused, so nothing was written")
    return False


def convert_cache(report: FuseReport, form: str) -> None:
    """Rewrite float caches to int8 with the converter of `sfa_onnx.kv_convert`.

    The report's sites then name the operators that the file holds.
    """
    from sfa_onnx.kv_convert import convert

    converted = convert(report.model, to=form)
    report.model = converted.model
    report.nodes_after = count_nodes(converted.model.graph)
    report.notes += converted.notes
    report.changed_inputs += [*converted.removed_inputs, *converted.added_inputs]
    report.changed_outputs += [*converted.removed_outputs, *converted.added_outputs]
    for site in report.fused:
        if not site.scope and site.op_type == SPARSE_FLASH_ATTENTION.name:
            site.op_type = SPARSE_FLASH_ATTENTION_ANTIQUANT.name
