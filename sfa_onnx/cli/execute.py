"""Verbs that execute models in onnxruntime: compare, run."""

from __future__ import annotations

import argparse
import zlib
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from sfa_onnx.cli import show, show_compare
from sfa_onnx.cli.console import Console
from sfa_onnx.errors import UsageError
from sfa_onnx.files.model import load_model
from sfa_onnx.files.writing import check_outputs
from sfa_onnx.fusion_options import spare_weights
from sfa_onnx.operator.contract import Rounding

__all__ = ["add_verbs", "load_inputs"]

NOT_MET = 3
ROUNDINGS: tuple[Rounding, ...] = ("exact", "npu")
_ROUNDS = "npu: round dequantised values as CANN's kernels do"


def add_verbs(verbs: Any, common: argparse.ArgumentParser) -> None:
    """Add this module's sub-parsers."""
    compare = verbs.add_parser("compare", parents=[common], help="is the fused model the same?")
    compare.add_argument("before", type=Path, help="the original model")
    compare.add_argument("after", type=Path, nargs="?", help="the fused model")
    compare.add_argument("--against", type=Path, metavar="DIR", help="outputs of an .om run")
    compare.add_argument("--inputs", type=Path, help="inputs.npz (default: realistic random ones)")
    compare.add_argument("--atol", type=float, help="absolute tolerance")
    compare.add_argument("--rtol", type=float, help="relative tolerance")
    compare.add_argument("--seed", type=int, default=0, help="seed of random inputs")
    compare.add_argument("--rounding", choices=ROUNDINGS, help=f"{_ROUNDS} (--against: npu)")
    compare.add_argument("--report", type=Path, help="write a page about it (.html or .md)")
    compare.add_argument("--force", action="store_true", help="overwrite the report")
    compare.set_defaults(action=_compare)
    run = verbs.add_parser("run", parents=[common], help="run a model with our operators")
    run.add_argument("model", type=Path, help="the ONNX model")
    run.add_argument("--inputs", type=Path, help="inputs.npz (default: realistic random ones)")
    run.add_argument("-o", "--output", type=Path, help="write the outputs to this .npz")
    run.add_argument("--repeat", type=int, default=0, metavar="N", help="time N further runs")
    run.add_argument("--seed", type=int, default=0, help="seed of random inputs")
    run.add_argument("--rounding", choices=ROUNDINGS, default="exact", help=_ROUNDS)
    run.add_argument("--force", action="store_true", help="overwrite the output")
    run.set_defaults(action=_run)


def load_inputs(path: Path | None) -> dict[str, np.ndarray] | None:
    """The arrays of an .npz, by name."""
    if path is None:
        return None
    if not path.is_file():
        raise UsageError(f"{path}: no such file; --inputs takes an .npz with one array per input")
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (ValueError, OSError, EOFError, KeyError, BadZipFile, zlib.error) as error:
        raise UsageError(f"{path}: not an .npz of plain arrays ({error or 'empty'})") from error


def _compare(args: argparse.Namespace, console: Console) -> int:
    if (args.after is None) == (args.against is None):
        raise UsageError("compare: give a second model, or --against DIR with outputs of a device")
    inputs = load_inputs(args.inputs)
    if args.against is not None:
        from sfa_onnx.ascend.handover.folder import compare_against

        rounding: Rounding = args.rounding or "npu"
        report = compare_against(
            args.before, args.against, atol=args.atol, rtol=args.rtol, rounding=rounding
        )
    else:
        from sfa_onnx.runtime.compare.run import compare

        with console.progress("compare"):
            report = compare(
                args.before,
                args.after,
                inputs=inputs,
                atol=args.atol,
                rtol=args.rtol,
                seed=args.seed,
                rounding=args.rounding or "exact",
            )
    show_compare.compare_report(console, report)
    if args.report:
        from sfa_onnx.pages import write_comparison

        write_comparison(report, args.report, force=args.force)
        console.say("report written to [bold]{}[/bold]", args.report)
    console.result("compare", report)
    return 0 if report.passed else NOT_MET


def _run(args: argparse.Namespace, console: Console) -> int:
    from sfa_onnx.runtime.execute import run_file
    from sfa_onnx.runtime.feeds.draw import random_feeds

    inputs = {"the model": args.model, "the inputs": args.inputs}
    check_outputs({"the outputs": args.output}, inputs, force=args.force)
    if args.output:
        spare_weights(load_model(args.model), args.model.parent, args.output)
    feeds = random_feeds(args.model, args.seed, load_inputs(args.inputs))
    outputs, timing, note = run_file(args.model, feeds, rounding=args.rounding, repeat=args.repeat)
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
