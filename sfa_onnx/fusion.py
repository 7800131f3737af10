"""`sfa_onnx.fuse`: find, bind, verify and splice, over one model."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import onnx

from sfa_onnx.files.model import paused_gc, save_model
from sfa_onnx.files.weights_file import WeightsFile
from sfa_onnx.files.writing import check_outputs
from sfa_onnx.fusion_options import (
    check_options,
    convert_cache,
    expect,
    spare_weights,
    worth_writing,
)
from sfa_onnx.fusion_run import Progress, Run, silent
from sfa_onnx.guard.doors import door
from sfa_onnx.passes import certificate as certificates
from sfa_onnx.passes import plan as plans
from sfa_onnx.report import FuseReport
from sfa_onnx.runtime.portable.restore import refuse_proof

__all__ = ["fuse"]

Target = Literal["any", "ascend", "cpu"]
CacheForm = Literal["keep", "int8", "packed-int8", "paged-int8", "paged"]


@door
def fuse(
    model: str | os.PathLike[str] | onnx.ModelProto,
    output: str | os.PathLike[str] | None = None,
    *,
    target: Target = "any",
    kv_cache: CacheForm = "keep",
    verify: bool = True,
    expect_sites: int | Literal["some"] | None = None,
    portable: bool = False,
    plan: str | os.PathLike[str] | None = None,
    certificate: str | os.PathLike[str] | None = None,
    weights: Literal["copy"] | None = None,
    force: bool = False,
    cost: Literal["any", "not-worse"] = "any",
    materialize_absorbed: bool = False,
    assume: Sequence[str] = (),
    indexer: bool = True,
    trace: bool = False,
    progress: Progress | None = None,
) -> FuseReport:
    """Put the fused sparse-attention operators in place of the sub-graphs that spell them.

    A site is replaced only when it was verified to *be* the operator; every other candidate is
    listed with the reason. Nodes outside the sites stay byte for byte; weights are read by
    `materialize_absorbed` only.

    Args:
        model: a path, or a `ModelProto` (which is not changed).
        output: where to write the fused model; None: only return it. Nothing is written when
            nothing was fused and no other form was asked for.
        target: "ascend" refuses sites that the NPU kernel rejects; "any" and "cpu" report that.
        kv_cache: "keep", or the int8 form that `sfa_onnx.kv_convert` rewrites float caches to.
        verify: False skips execution in float64; the records say so.
        expect_sites: raise unless exactly this many sites are fused, or "some": at least one.
        portable: ship the fused operators' bodies of standard operators with the model.
        plan: a plan file written by `inspect --plan`; exactly its sites are fused.
        certificate: write the proof of what changed and what did not (JSON).
        weights: "copy" copies external weights when `output` lies in another folder.
        force: overwrite existing files.
        cost: "not-worse" refuses sites whose estimated CPU time grows.
        materialize_absorbed: write W_UK and W_UV of absorbed sites as initializers of their own
            (beside `output` when the weight lies outside the model), for compilers that do not
            fold views of constants; an Einsum with one beside a site becomes a MatMul over heads.
        assume: what no file can carry, asserted by the caller: "two-valued:NAME" says that the
            float input NAME holds 0 and numbers of -1e4 or less (-inf) only, so it is a mask and
            no bias; "zero-one:NAME" that an input, float or integer, holds 0 and 1 only, as
            (1 - mask) * low expects; "not-negative:NAME" that a float input, which scales an
            indexer's keys behind its relu, holds no negative number. A plan may hold such entries
            too. They stand in record, report and certificate.
        indexer: put `NPULightningIndexer` in place of lightning indexers as well; False leaves
            selections alone. `expect_sites` counts attention only.
        trace: give each site's normal form and the identities that led to it (`SiteReport.terms`).
        progress: called with (stage, fraction done).

    Returns:
        The fused model and a report of every candidate.

    Raises:
        UsageError: an option makes no sense, or a file exists already.
        ModelError: the model cannot be read or written.
        VerificationError: `expect_sites` or the plan was not met; nothing is written.
    """
    check_options(target, kv_cache, cost, portable)
    check_outputs(
        {"the output": output, "the certificate": certificate},
        {"the model": None if isinstance(model, onnx.ModelProto) else model, "the plan": plan},
        force=force,
        replaceable=("the output",),
    )
    run = Run(verify, target, cost, progress or silent, assume=tuple(assume), trace=trace)
    run.indexer = indexer
    with contextlib.ExitStack() as stack:
        if materialize_absorbed:
            where = None if output is None else WeightsFile(Path(output), force=force)
            run.materialize = True
            run.file = where if where is None else stack.enter_context(where)
        with paused_gc():
            report = run.fuse(model, None if plan is None else plans.read_plan(plan))
        expect(report, expect_sites, plan)
        _change_form(run, report, kv_cache, portable)
        write_proof: Callable[[], object] = _no_proof
        if not worth_writing(report, output, kv_cache, portable):
            return report
        if certificate is not None:
            refuse_proof(run.restored)
            spare_weights(report.model, run.source_dir, certificate)
            with run.stage("certificate"):
                proof = certificates.make_certificate(report, run.before)
            write_proof = functools.partial(
                certificates.write_certificate, proof, certificate, force=force
            )
        if output is None:
            write_proof()
        else:
            with run.stage("save"):
                report.path = save_model(
                    report.model,
                    output,
                    source_dir=run.source_dir,
                    force=force,
                    weights=weights,
                    fresh=run.file,
                    keep_locations=certificate is not None,
                    before_model=write_proof,
                )
    return report


def _no_proof() -> None:
    """No certificate was asked for."""


def _change_form(run: Run, report: FuseReport, kv_cache: str, portable: bool) -> None:
    """Int8 caches, or bodies of standard operators, where they are asked for."""
    if kv_cache != "keep":
        with run.stage("kv-cache"):
            convert_cache(report, kv_cache)
    if portable:
        from sfa_onnx.runtime.portable.model import make_portable

        with run.stage("portable"):
            report.model = make_portable(report.model)
