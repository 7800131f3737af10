"""A program of somebody else's that uses this package: it must type-check under --strict."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import sfa_onnx
from sfa_onnx import FuseReport, SiteReport, runtime
from sfa_onnx.errors import SfaError, VerificationError
from sfa_onnx.kv_convert import KvReport, convert
from sfa_onnx.runtime.compare import compare


def fused(model: Path, output: Path) -> list[SiteReport]:
    """The sites of a model, fused."""
    try:
        report: FuseReport = sfa_onnx.fuse(model, output, expect_sites="some", kv_cache="keep")
    except VerificationError as error:
        raise SystemExit(str(error)) from error
    return report.fused


def told(site: SiteReport) -> str:
    """One line about a site."""
    errors = [probe.error for probe in site.record.probes] if site.record else []
    return f"{site.site_id} ({site.layer}): {site.op_type}, {max(errors, default=0.0):.1e}"


def packed(model: Path, output: Path) -> int:
    """Bytes per cached token afterwards."""
    report: KvReport = convert(model, output, to="packed-int8")
    return report.bytes_per_token_after


def run(model: Path, feeds: dict[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
    """The outputs in float32."""
    session = runtime.session(model)
    return {n: np.asarray(a, np.float32) for n, a in runtime.run(session, feeds).items()}


def same(before: Path, after: Path) -> bool:
    """Whether two models agree; also where they cannot be compared."""
    try:
        return compare(before, after).passed
    except SfaError:
        return False
