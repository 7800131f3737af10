"""Verbs on the way to a device: check, atc, doctor."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import onnx

from sfa_onnx.cli import show, show_ascend
from sfa_onnx.cli.console import Console
from sfa_onnx.cli.execute import load_inputs
from sfa_onnx.errors import UsageError
from sfa_onnx.files.model import load_model

__all__ = ["atc", "check", "doctor"]

NOT_MET = 3


def check(args: argparse.Namespace, console: Console) -> int:
    """Findings for ATC, or whether a certificate holds."""
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
    with console.progress("check"):
        report = checks.check(args.model if bound is None else bound, **options)
    if args.fix:
        output = args.output or args.model.with_name(args.model.stem + ".fixed.onnx")
        with console.progress("check: trying fixes"):
            fixed = checks.fix_file(args.model, report, output, force=args.force, model=bound)
        for line in fixed.applied:
            console.say("fixed: {}", line)
        for line in fixed.skipped:
            console.say("not fixed: {}", line, style="dim")
        console.say("written: [bold]{}[/bold]", output)
        with console.progress("check: once more"):
            report = checks.check(output, **options | {"base_dir": output.parent})
    show_ascend.check_report(console, report, tried=args.fix)
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
    with console.progress("check: hashing"):
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


def atc(args: argparse.Namespace, console: Console) -> int:
    """Write everything ATC needs."""
    from sfa_onnx.ascend.handover import folder as handover

    with console.progress("atc"):
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


def doctor(args: argparse.Namespace, console: Console) -> int:
    """What this machine has."""
    if args.library:
        from sfa_onnx import runtime

        path = runtime.library_path().resolve()
        console.plain(str(path))
        console.result("library", {"path": path})
        return 0
    from sfa_onnx.doctor import examine

    with console.progress("doctor"):
        report = examine(args.model)
    show.doctor_report(console, report)
    console.result("doctor", report)
    return 0 if report.healthy else NOT_MET
