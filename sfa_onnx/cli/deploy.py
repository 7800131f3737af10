"""Verbs on the way to a device: check, atc, doctor."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import onnx

from sfa_onnx.ascend.cann import CANN_VERSIONS, DEFAULT_CANN
from sfa_onnx.cli import show, show_ascend
from sfa_onnx.cli.console import Console
from sfa_onnx.cli.execute import load_inputs
from sfa_onnx.errors import UsageError
from sfa_onnx.files.model import load_model

__all__ = ["add_verbs"]

NOT_MET = 3


def add_verbs(verbs: Any, common: argparse.ArgumentParser) -> None:
    """Add this module's sub-parsers."""
    check = verbs.add_parser("check", parents=[common], help="would ATC take it?")
    check.add_argument("model", type=Path, help="the ONNX model")
    check.add_argument(
        "--cann", choices=CANN_VERSIONS, default=DEFAULT_CANN, help="CANN release to check for"
    )
    check.add_argument("--soc-version", help="exact chip, e.g. Ascend910B2, Ascend910_9391")
    check.add_argument(
        "--plugin",
        action="append",
        default=[],
        metavar="KEY",
        help="a parser plug-in of yours: npu::1::MyOp, or npu::1::MyOp(1,3) with its input counts",
    )
    check.add_argument(
        "--dim",
        action="append",
        default=[],
        metavar="NAME=N",
        help="check (and fix) the file for this size of an open dim",
    )
    check.add_argument("--strict", action="store_true", help="fail on warnings and unknowns too")
    check.add_argument("--fix", action="store_true", help="apply mechanical fixes, verified")
    check.add_argument("-o", "--output", type=Path, help="where --fix writes (*.fixed.onnx)")
    check.add_argument("--certificate", type=Path, help="check a fusion certificate instead")
    check.add_argument("--before", type=Path, help="the original model of --certificate")
    check.add_argument("--force", action="store_true", help="overwrite the output")
    check.set_defaults(action=_check)
    _add_atc(verbs, common)
    doctor = verbs.add_parser("doctor", parents=[common], help="versions, libraries, CANN, weights")
    doctor.add_argument("model", type=Path, nargs="?", help="also look at this model's weights")
    doctor.add_argument(
        "--library", action="store_true", help="print the path of the operator library, no more"
    )
    doctor.set_defaults(action=_doctor)


def _add_atc(verbs: Any, common: argparse.ArgumentParser) -> None:
    parser = verbs.add_parser("atc", parents=[common], help="hand over to Ascend's compiler")
    parser.add_argument("model", type=Path, help="the fused ONNX model")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--soc-version", required=True, help="e.g. Ascend910B2, Ascend910_9391")
    parser.add_argument("--cann", choices=CANN_VERSIONS, default=DEFAULT_CANN, help="CANN line")
    parser.add_argument("--binding", choices=("kv-quant", "recipes"), default="kv-quant")
    parser.add_argument("--npu-dtype", choices=("bf16", "fp16"), help="cast float32 queries")
    parser.add_argument(
        "--plain-norms", action="store_true", help="keep norms as standard operators"
    )
    parser.add_argument("--dim", action="append", default=[], metavar="NAME=N", help="bind a dim")
    parser.add_argument(
        "--pair-gears",
        action="store_true",
        help="gears of several dims change together (default: each with each)",
    )
    parser.add_argument("--inputs", type=Path, help="inputs.npz to write for the device run")
    parser.add_argument("--before", type=Path, help="the original, for the node mapping")
    parser.add_argument("--no-run", action="store_true", help="do not run atc even if it is here")
    parser.add_argument("--scope", help="layer:N or stage:A-B: cut out the part to convert")
    parser.add_argument("--force", action="store_true", help="overwrite files in the folder")
    parser.set_defaults(action=_atc)


def _check(args: argparse.Namespace, console: Console) -> int:
    if args.certificate:
        return _check_certificate(args, console)
    from sfa_onnx.ascend import checks

    bound = _bound(args.model, _dims(args.dim)) if args.dim else None
    options: dict[str, Any] = {
        "cann": args.cann,
        "soc_version": args.soc_version,
        "base_dir": args.model.parent,
        "user_plugins": (*checks.OWN_PLUGINS, *args.plugin),
        "strict": args.strict,
    }
    report = checks.check(args.model if bound is None else bound, **options)
    if args.fix:
        output = args.output or args.model.with_name(args.model.stem + ".fixed.onnx")
        fixed = checks.fix_file(args.model, report, output, force=args.force, model=bound)
        for line in fixed.applied:
            console.say("fixed: {}", line)
        for line in fixed.skipped:
            console.say("not fixed: {}", line, style="dim")
        console.say("written: [bold]{}[/bold]", output)
        report = checks.check(output, **options | {"base_dir": output.parent})
    show_ascend.check_report(console, report)
    console.result("check", report)
    return 0 if report.passed else NOT_MET


def _bound(path: Path, dims: dict[str, str]) -> onnx.ModelProto:
    """The model with these dims as numbers.

    Raises:
        UsageError: a dim the model does not have, or a value that is no number.
    """
    from sfa_onnx.ascend.handover.command import bind_dims, free_dims

    model = load_model(path)
    known = free_dims(model)
    for name, value in dims.items():
        if name not in known:
            has = ", ".join(sorted(known)) or "none"
            raise UsageError(f"--dim {name}={value}: the model has no such dim; it has {has}")
        if not value.isdigit() or not int(value):
            raise UsageError(f"--dim {name}={value}: a check is for one size, a number from 1 on")
    return bind_dims(model, dims)


def _check_certificate(args: argparse.Namespace, console: Console) -> int:
    from sfa_onnx.passes.certificate import check_certificate

    if args.before is None:
        raise UsageError("check --certificate needs --before ORIGINAL.onnx besides the fused model")
    result = check_certificate(args.certificate, args.before, args.model)
    console.say(
        "[green]certificate holds[/green]" if result.holds else "[red]it does not hold[/red]"
    )
    for line in result.problems:
        console.say("  {}", line)
    console.result("certificate", result)
    return 0 if result.holds else NOT_MET


def _dims(pairs: list[str]) -> dict[str, str]:
    bound = {}
    for pair in pairs:
        name, sign, value = pair.partition("=")
        if not (name and sign and value):
            raise UsageError(f"--dim {pair}: expected NAME=N, e.g. --dim batch=4")
        bound[name] = value
    return bound


def _atc(args: argparse.Namespace, console: Console) -> int:
    from sfa_onnx.ascend.handover import folder as handover

    report = handover.write(
        args.model,
        args.output,
        soc_version=args.soc_version,
        cann=args.cann,
        binding=args.binding,
        npu_dtype=args.npu_dtype,
        norms=not args.plain_norms,
        dims=_dims(args.dim),
        paired=args.pair_gears,
        scope=args.scope,
        inputs=load_inputs(args.inputs),
        before=args.before,
        execute=not args.no_run,
        force=args.force,
    )
    show_ascend.handover_report(console, report)
    console.result("atc", report)
    return 0 if report.passed else NOT_MET


def _doctor(args: argparse.Namespace, console: Console) -> int:
    if args.library:
        from sfa_onnx import runtime

        path = runtime.library_path().resolve()
        console.plain(str(path))
        console.result("library", {"path": path})
        return 0
    from sfa_onnx.doctor import examine

    report = examine(args.model)
    show.doctor_report(console, report)
    console.result("doctor", report)
    return 0 if report.healthy else NOT_MET
