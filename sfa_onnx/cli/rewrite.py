"""Verbs that read or rewrite a model: inspect, fuse, unfuse, kv-cache."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sfa_onnx.cli import show, show_ascend
from sfa_onnx.cli.console import Console, count
from sfa_onnx.cli.outputs import spare

__all__ = ["fuse", "inspect", "kv_cache", "unfuse"]


def _output(args: argparse.Namespace) -> Path:
    given: Path | None = args.output
    source: Path = args.model
    return given or source.with_name(source.stem + args.suffix)


def inspect(args: argparse.Namespace, console: Console) -> int:
    """What is inside, and what would fuse."""
    from sfa_onnx.passes import plan as plans
    from sfa_onnx.summary import summarise

    spare({"the plan": args.plan}, {"the model": args.model}, models=[args.model], force=args.force)
    summary = summarise(args.model)
    show.summary(console, args.model, summary)
    how = {"verify": not args.no_verify, "assume": args.assume, "trace": args.trace}
    how["indexer"] = not args.no_indexer
    report = _run_fuse(args, console, output=None, **how)
    every = [*report.sites, *report.selections]
    sites = show.pick_sites(every if args.site is not None else report.sites, args.site)
    show.sites(console, sites, explain=args.explain or args.trace or args.site is not None)
    chosen = report.selections if args.site is None else []
    show.selections(console, chosen, explain=args.explain or args.trace)
    if args.plan:
        plans.write_plan(report, args.plan, force=args.force)
        console.say("plan written to {}: edit it, then [bold]fuse --plan[/bold]", args.plan)
    estimate = _estimate(args, console, report) if args.estimate else None
    found = {"summary": summary, "sites": sites, "selections": chosen, "estimate": estimate}
    console.result("inspect", found)
    return 0


def _estimate(args: argparse.Namespace, console: Console, report: Any) -> Any:
    from sfa_onnx.ascend.estimate import estimate
    from sfa_onnx.files.model import load_model

    before = load_model(args.model)
    result = estimate(report.model, soc_version=args.soc_version, before=before)
    show_ascend.estimate_report(console, result)
    return result


def _run_fuse(args: argparse.Namespace, console: Console, **kw: Any) -> Any:
    import sfa_onnx

    with console.progress(args.verb) as progress:
        return sfa_onnx.fuse(args.model, progress=progress, **kw)


def fuse(args: argparse.Namespace, console: Console) -> int:
    """Put the fused operators in place."""
    output = None if args.dry_run else _output(args)
    page = None if args.dry_run else args.report
    if page is not None:
        spare(
            {"the output": output, "the certificate": args.certificate, "the report": page},
            {"the model": args.model, "the plan": args.plan},
            models=[args.model],
            force=args.force,
            replaceable=["the output"],
        )
    report = _run_fuse(
        args,
        console,
        output=output,
        target=args.target,
        kv_cache=args.kv_cache,
        verify=not args.no_verify,
        expect_sites=args.expect_sites,
        portable=args.portable,
        plan=args.plan,
        certificate=None if args.dry_run else args.certificate,
        weights=args.weights,
        force=args.force,
        cost=args.cost,
        assume=args.assume,
        indexer=not args.no_indexer,
        materialize_absorbed=args.materialize_absorbed and not args.dry_run,
    )
    show.fuse_report(console, args.model, report)
    if page is not None:
        from sfa_onnx.pages import write_fusion

        write_fusion(report, page, args.model, force=args.force)
        console.say("report written to [bold]{}[/bold]", page)
    console.result("fuse", report)
    return 0


def unfuse(args: argparse.Namespace, console: Console) -> int:
    """Back to standard operators."""
    import sfa_onnx

    output = _output(args)
    with console.progress("unfuse"):
        report = sfa_onnx.unfuse(args.model, output, rounding=args.rounding, force=args.force)
    replaced = count(len(report.sites), "fused operator")
    console.say("{} replaced by standard ones, written: [bold]{}[/bold]", replaced, output)
    console.result("unfuse", report)
    return 0


def kv_cache(args: argparse.Namespace, console: Console) -> int:
    """Float caches to int8 ones."""
    from sfa_onnx.kv_convert import convert

    output = _output(args)
    model = _with_sites(args, console)
    how = {"to": args.to, "block_size": args.block_size, "force": args.force}
    how["index_cache"] = args.index_cache
    with console.progress("kv-cache"):
        report = convert(model, output, **how)
    show.kv_report(console, report)
    console.say("written: [bold]{}[/bold]", output)
    console.result("kv-cache", report)
    return 0


def _with_sites(args: argparse.Namespace, console: Console) -> Any:
    """The model as it is when it was fused already, else fused here."""
    from sfa_onnx.files.model import load_model
    from sfa_onnx.kv_convert import float_sites
    from sfa_onnx.kv_convert.interface import read_interface

    model = load_model(args.model)
    if float_sites(model.graph) or read_interface(model) is not None:
        return args.model
    report = _run_fuse(args, console, output=None)
    show.fuse_report(console, args.model, report)
    return report.model
