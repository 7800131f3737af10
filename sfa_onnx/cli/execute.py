"""Verbs that execute models in onnxruntime: compare, run."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from sfa_onnx.cli import show, show_compare
from sfa_onnx.cli.console import Console
from sfa_onnx.cli.outputs import spare
from sfa_onnx.errors import UsageError
from sfa_onnx.operator.contract import Rounding

__all__ = ["compare", "load_inputs", "run"]

NOT_MET = 3


def load_inputs(path: Path | None) -> dict[str, np.ndarray] | None:
    """The arrays of an .npz, by name."""
    if path is None:
        return None
    if not path.is_file():
        raise UsageError(f"{path}: no such file; --inputs takes an .npz with one array per input")
    from sfa_onnx.files.arrays import stored_arrays

    return stored_arrays(path)


def compare(args: argparse.Namespace, console: Console) -> int:
    """Two models, or a model and the outputs of a device."""
    if (args.after is None) == (args.against is None):
        raise UsageError("compare: give a second model, or --against DIR with outputs of a device")
    read = {"the first model": args.before, "the second model": args.after}
    spare(
        {"the report": args.report},
        read | {"the inputs": args.inputs},
        models=read.values(),
        force=args.force,
    )
    inputs = load_inputs(args.inputs)
    if args.against is not None:
        from sfa_onnx.ascend.handover.folder import compare_against

        rounding: Rounding = args.rounding or "npu"
        with console.progress("compare"):
            report = compare_against(
                args.before, args.against, atol=args.atol, rtol=args.rtol, rounding=rounding
            )
    else:
        from sfa_onnx.runtime.compare import run as comparing

        with console.progress("compare") as progress:
            report = comparing.compare(
                args.before,
                args.after,
                inputs=inputs,
                atol=args.atol,
                rtol=args.rtol,
                seed=args.seed,
                rounding=args.rounding or "exact",
                progress=progress,
            )
    show_compare.compare_report(console, report)
    if args.report:
        from sfa_onnx.pages import write_comparison

        write_comparison(report, args.report, force=args.force)
        console.say("report written to [bold]{}[/bold]", args.report)
    console.result("compare", report)
    return 0 if report.passed else NOT_MET


def run(args: argparse.Namespace, console: Console) -> int:
    """One run, and its outputs."""
    from sfa_onnx.runtime.execute import run_file
    from sfa_onnx.runtime.feeds.draw import random_feeds

    inputs = {"the model": args.model, "the inputs": args.inputs}
    spare({"the outputs": args.output}, inputs, models=[args.model], force=args.force)
    with console.progress("run") as progress:
        progress("inputs", 0.0)
        feeds = random_feeds(args.model, args.seed, load_inputs(args.inputs))
        progress("model", 0.2)
        how = {"rounding": args.rounding, "repeat": args.repeat}
        outputs, timing, note = run_file(args.model, feeds, **how)
    if console.verbose:
        fed = [(n, f"{v.dtype}{list(v.shape)}", show.spread(v)) for n, v in feeds.items()]
        console.table(("input", "type", "values"), fed)
    rows = [(n, f"{v.dtype}{list(v.shape)}", show.spread(v)) for n, v in outputs.items()]
    console.table(("output", "type", "values"), rows)
    if timing:
        console.say("median {} ms, best {} ms", f"{timing.median_ms:.3f}", f"{timing.best_ms:.3f}")
    if args.output:
        show.save_npz(args.output, outputs, force=args.force)
        console.say("outputs written to {}", args.output)
    if note:
        console.say("note: {}", note)
    told = {"outputs": {r[0]: r[1] for r in rows}, "timing": timing, "note": note}
    console.result("run", told)
    return 0
