"""Verbs that read or rewrite a model: inspect, fuse, unfuse, kv-cache."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sfa_onnx.cli import show, show_ascend
from sfa_onnx.cli.console import Console
from sfa_onnx.files.writing import check_outputs
from sfa_onnx.fusion_options import spare_weights

__all__ = ["add_verbs"]

CACHE_FORMS = ("int8", "packed-int8", "paged-int8")


def add_verbs(verbs: Any, common: argparse.ArgumentParser) -> None:
    """Add this module's sub-parsers."""
    _add_inspect(verbs, common)
    _add_fuse(verbs, common)
    unfuse = verbs.add_parser("unfuse", parents=[common], help="back to standard operators")
    _io(unfuse, ".unfused.onnx")
    unfuse.add_argument("--rounding", choices=("exact", "npu"), default="exact")
    unfuse.set_defaults(action=_unfuse)
    cache = verbs.add_parser("kv-cache", parents=[common], help="convert float caches to int8")
    _io(cache, ".int8.onnx")
    cache.add_argument("--to", choices=CACHE_FORMS, required=True, help="the cache form to make")
    cache.add_argument("--block-size", type=int, default=128, help="tokens per page (paged-int8)")
    cache.set_defaults(action=_kv_cache)


def _io(parser: argparse.ArgumentParser, suffix: str) -> None:
    parser.add_argument("model", type=Path, help="the ONNX model")
    parser.add_argument("-o", "--output", type=Path, help=f"default: beside the input, *{suffix}")
    parser.add_argument("--force", action="store_true", help="overwrite the output")
    parser.set_defaults(suffix=suffix)


def _output(args: argparse.Namespace) -> Path:
    given: Path | None = args.output
    source: Path = args.model
    return given or source.with_name(source.stem + args.suffix)


def _add_inspect(verbs: Any, common: argparse.ArgumentParser) -> None:
    parser = verbs.add_parser(
        "inspect", parents=[common], help="what is inside, and what would fuse"
    )
    parser.add_argument("model", type=Path, help="the ONNX model")
    parser.add_argument("--explain", action="store_true", help="how far each refused site got")
    parser.add_argument(
        "--trace", action="store_true", help="with --explain: normal forms, and what led to them"
    )
    parser.add_argument("--site", metavar="ID", help="explain this site only (id or number)")
    parser.add_argument("--plan", type=Path, help="write an editable plan of the sites (YAML)")
    _add_assume(parser)
    parser.add_argument("--no-verify", action="store_true", help="find and bind only (quick)")
    parser.add_argument("--estimate", action="store_true", help="roofline model per site")
    parser.add_argument("--soc-version", default="Ascend910B2", help="chip for --estimate")
    parser.add_argument("--force", action="store_true", help="overwrite the plan file")
    parser.set_defaults(action=_inspect)


def _add_fuse(verbs: Any, common: argparse.ArgumentParser) -> None:
    parser = verbs.add_parser("fuse", parents=[common], help="put the fused operator in place")
    _io(parser, ".sfa.onnx")
    parser.add_argument("--target", choices=("any", "cpu", "ascend"), default="any")
    parser.add_argument("--kv-cache", choices=("keep", *CACHE_FORMS), default="keep")
    parser.add_argument("--plan", type=Path, help="fuse exactly the sites of this plan")
    parser.add_argument("--expect-sites", type=int, metavar="N", help="exit 3 unless N sites fuse")
    parser.add_argument("--cost", choices=("any", "not-worse"), default="any")
    parser.add_argument("--portable", action="store_true", help="ship a standard-operator body")
    parser.add_argument("--certificate", type=Path, help="write the proof of innocence (JSON)")
    parser.add_argument("--report", type=Path, help="write a page about it (.html or .md)")
    parser.add_argument("--weights", choices=("copy",), help="copy weights to the output's folder")
    parser.add_argument(
        "--materialize-absorbed",
        action="store_true",
        help="write W_UK and W_UV of absorbed sites as weights of their own (reads the weights)",
    )
    _add_assume(parser)
    parser.add_argument("--no-verify", action="store_true", help="skip execution in float64")
    parser.add_argument("--dry-run", action="store_true", help="report only, write nothing")
    parser.set_defaults(action=_fuse)


def _add_assume(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--assume",
        action="append",
        default=[],
        metavar="two-valued:NAME",
        help="assert that the float input NAME holds 0 and -1e4 or less only: a mask, no bias",
    )


def _inspect(args: argparse.Namespace, console: Console) -> int:
    from sfa_onnx.passes import plan as plans
    from sfa_onnx.summary import summarise

    check_outputs({"the plan": args.plan}, {"the model": args.model}, force=args.force)
    summary = summarise(args.model)
    show.summary(console, args.model, summary)
    how = {"verify": not args.no_verify, "assume": args.assume, "trace": args.trace}
    report = _run_fuse(args, console, output=None, **how)
    sites = show.pick_sites(report.sites, args.site)
    show.sites(console, sites, explain=args.explain or args.trace or args.site is not None)
    if args.plan:
        spare_weights(report.model, args.model.parent, args.plan)
        plans.write_plan(report, args.plan, force=args.force)
        console.say("plan written to {}: edit it, then [bold]fuse --plan[/bold]", args.plan)
    estimate = _estimate(args, console, report) if args.estimate else None
    console.result("inspect", {"summary": summary, "sites": sites, "estimate": estimate})
    return 0


def _estimate(args: argparse.Namespace, console: Console, report: Any) -> Any:
    from sfa_onnx.ascend.estimate import estimate
    from sfa_onnx.files.model import load_model

    before = load_model(args.model)
    result = estimate(report.model, soc_version=args.soc_version, before=before)
    show_ascend.estimate_report(console, result)
    return result


def _run_fuse(args: argparse.Namespace, console: Console, **kw: Any) -> Any:
    from sfa_onnx import fuse

    with console.progress("fuse") as progress:
        return fuse(args.model, progress=progress, **kw)


def _fuse(args: argparse.Namespace, console: Console) -> int:
    output = None if args.dry_run else _output(args)
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
        materialize_absorbed=args.materialize_absorbed and not args.dry_run,
    )
    show.fuse_report(console, args.model, report)
    if args.report and not args.dry_run:
        from sfa_onnx.pages import write_fusion

        write_fusion(report, args.report, args.model, force=args.force)
        console.say("report written to [bold]{}[/bold]", args.report)
    console.result("fuse", report)
    return 0


def _unfuse(args: argparse.Namespace, console: Console) -> int:
    from sfa_onnx.unfusion import unfuse

    output = _output(args)
    report = unfuse(args.model, output, rounding=args.rounding, force=args.force)
    count = len(report.sites)
    console.say(
        "{} fused operator{} back to standard: {}", count, "s" if count != 1 else "", output
    )
    console.result("unfuse", report)
    return 0


def _kv_cache(args: argparse.Namespace, console: Console) -> int:
    from sfa_onnx.kv_convert import convert

    output = _output(args)
    report = convert(
        _with_sites(args, console), output, to=args.to, block_size=args.block_size, force=args.force
    )
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
