"""The command line: every verb, its arguments, an example and its exit codes.

Nothing heavy is imported here, so that help and completion answer at once; a verb names the
function that carries it out, which `main` loads.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, Final

from sfa_onnx.ascend.cann import CANN_VERSIONS, DEFAULT_CANN
from sfa_onnx.cli import options
from sfa_onnx.cli.options import Help, Verb
from sfa_onnx.operator.op import BINDINGS, CHOICES
from sfa_onnx.version import __version__

__all__ = ["CACHE_FORMS", "SHELLS", "build_parser"]

CACHE_FORMS: Final = ("int8", "packed-int8", "paged-int8", "paged")
_FORMS: Final = (
    "int8: inputs stay float, rows are rounded inside; packed-int8: inputs are int8 rows, one long"
    " cache; paged-int8: the same in pages; paged: float rows in pages"
)
SHELLS: Final = ("bash", "zsh", "fish")
_CHIP = "Ascend910B2"
_EPILOG: Final = """\
example:
  sfa-onnx fuse model.onnx && sfa-onnx compare model.onnx model.sfa.onnx

exit codes: 0 done, 1 error, 2 usage, 3 an expectation or a validation was not met,
130 interrupted. `sfa-onnx VERB --help` explains a verb."""


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(
        prog="sfa-onnx",
        description="DeepSeek sparse attention: exported ONNX -> fused, validated -> Ascend NPU.",
        epilog=_EPILOG,
        formatter_class=Help,
    )
    parser.add_argument("--version", action="version", version=f"sfa-onnx {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    rewriting = (_demo, _inspect, _fuse, _unfuse, _kv_cache)
    for add in (*rewriting, _compare, _run, _check, _atc, _doctor, _completion):
        add(verbs)
    return parser


def _demo(verbs: Any) -> None:
    verb = Verb(
        verbs,
        "demo",
        "the whole road on a small model",
        action="demo:demo",
        what="Take the model that ships with the package through every verb: inspect, fuse, convert"
        " its caches, compare, time, and write what Ascend's compiler needs.",
    )
    verb.add(
        "-o",
        "--output",
        type=Path,
        metavar="DIR",
        help="keep the files in this new folder (default: a temporary one, removed at the end)",
    )
    verb.finish(
        example="sfa-onnx demo -o tour",
        met="the original was not reproduced",
        verbose="list every site, the inputs, and where each operator would run",
    )


def _inspect(verbs: Any) -> None:
    verb = Verb(
        verbs,
        "inspect",
        "what is inside, and what would fuse",
        action="rewrite:inspect",
        what="Show what a model holds, which of its attention would fuse, and why the rest would"
        " not. Writes no model.",
    )
    options.model(verb)
    verb.add("--explain", action="store_true", help="how far recognition of each site got")
    verb.add("--trace", action="store_true", help="normal forms, and which identities led to them")
    verb.add("--site", metavar="ID", help="explain this site only (its name or its number)")
    verb.add("--plan", type=Path, metavar="FILE", help="write an editable plan of the sites (YAML)")
    options.assume(verb)
    options.indexer(verb)
    verb.add("--no-verify", action="store_true", help="find and bind only, without execution")
    verb.add("--estimate", action="store_true", help="a roofline model of each fused site")
    verb.add("--soc-version", default=_CHIP, metavar="CHIP", help="chip of --estimate")
    options.forced(verb, "overwrite the plan file")
    verb.finish(
        example="sfa-onnx inspect model.onnx --explain",
        verbose="list all operators and all weights files, not only the first ones",
    )


def _fuse(verbs: Any) -> None:
    verb = Verb(
        verbs,
        "fuse",
        "put the fused operator in place",
        action="rewrite:fuse",
        what="Replace every verified sparse-attention site by the fused operator. Where nothing"
        " is fused, no file is written.",
    )
    options.files(verb, ".sfa.onnx")
    verb.add(
        "--target",
        choices=("any", "cpu", "ascend"),
        default="any",
        help="ascend: refuse sites that the NPU kernel rejects; others: report them",
    )
    verb.add(
        "--kv-cache",
        choices=("keep", *CACHE_FORMS),
        default="keep",
        help="form of the caches afterwards",
    )
    verb.add("--plan", type=Path, metavar="FILE", help="fuse exactly the sites of this plan")
    verb.add(
        "--expect-sites",
        type=_count,
        metavar="N",
        help="exit 3 unless N sites fuse; `some`: at least one",
    )
    verb.add(
        "--cost",
        choices=("any", "not-worse"),
        default="any",
        help="not-worse: refuse sites whose estimated CPU time grows",
    )
    verb.add(
        "--portable",
        action="store_true",
        help="also write each operator as a function of standard operators, for stock onnxruntime",
    )
    verb.add(
        "--certificate",
        type=Path,
        metavar="FILE",
        help="write a certificate that the rest of the graph is unchanged (JSON)",
    )
    options.reported(verb)
    verb.add("--weights", choices=("copy",), help="copy external weights to the output's folder")
    verb.add(
        "--materialize-absorbed",
        action="store_true",
        help="write W_UK and W_UV of absorbed sites as weights of their own (reads the weights)",
    )
    options.assume(verb)
    options.indexer(verb)
    verb.add("--no-verify", action="store_true", help="skip execution in float64")
    verb.add("--dry-run", action="store_true", help="report only, write nothing")
    verb.finish(
        example="sfa-onnx fuse model.onnx -o model.sfa.onnx --expect-sites 61",
        met="other sites fused than --expect-sites or --plan ask for",
        verbose="list every site with its probes and assumptions",
    )


def _count(text: str) -> int | str:
    """A number of sites, or "some"."""
    return text if text == "some" else int(text)


def _unfuse(verbs: Any) -> None:
    verb = Verb(
        verbs,
        "unfuse",
        "back to standard operators",
        action="rewrite:unfuse",
        what="Write a model in which standard ONNX operators compute what the fused ones do.",
    )
    options.files(verb, ".unfused.onnx")
    options.rounding(verb, "exact")
    verb.finish(example="sfa-onnx unfuse model.sfa.onnx -o model.unfused.onnx")


def _kv_cache(verbs: Any) -> None:
    verb = Verb(
        verbs,
        "kv-cache",
        "convert float caches to int8, or to pages",
        action="rewrite:kv_cache",
        what="Convert the float caches of a fused model to int8 rows, to pages, or to both.",
    )
    options.files(verb, ".int8.onnx")
    verb.add("--to", choices=CACHE_FORMS, required=True, help=_FORMS)
    verb.add("--block-size", type=int, default=128, metavar="N", help="tokens per page")
    verb.add(
        "--index-cache",
        choices=("float", "int8"),
        help="what becomes of an indexer's keys in pages (default: they keep the model's type)",
    )
    verb.finish(example="sfa-onnx kv-cache model.sfa.onnx --to paged-int8 -o model.int8.onnx")


def _compare(verbs: Any) -> None:
    verb = Verb(
        verbs,
        "compare",
        "is the fused model the same?",
        action="execute:compare",
        what="Run the original and the fused or converted model on the same inputs, and compare"
        " each site and the outputs.",
    )
    verb.add("before", type=Path, help="the original model")
    verb.add("after", type=Path, nargs="?", help="the fused or converted model")
    verb.add(
        "--against",
        type=Path,
        metavar="DIR",
        help="outputs of an .om run, in place of a second model",
    )
    options.inputs(verb)
    verb.add(
        "--atol", type=float, metavar="X", help="absolute bound (default: by type and magnitude)"
    )
    verb.add(
        "--rtol", type=float, metavar="X", help="relative bound (default: by type and magnitude)"
    )
    options.seed(verb)
    options.rounding(verb, None, " (default: exact; npu with --against)")
    options.reported(verb)
    options.forced(verb, "overwrite the report")
    verb.finish(
        example="sfa-onnx compare model.onnx model.sfa.onnx --report compare.html",
        met="the models differ, or could not be compared",
        verbose="list the inputs and the bounds of each row",
    )


def _run(verbs: Any) -> None:
    verb = Verb(
        verbs,
        "run",
        "run a model with our operators",
        action="execute:run",
        what="Run a model once in onnxruntime, with the operators of this package.",
    )
    options.model(verb)
    options.inputs(verb)
    verb.add("-o", "--output", type=Path, metavar="NPZ", help="write the outputs to this file")
    verb.add("--repeat", type=int, default=0, metavar="N", help="time N further runs")
    options.seed(verb)
    options.rounding(verb, "exact")
    options.forced(verb)
    verb.finish(
        example="sfa-onnx run model.sfa.onnx --inputs inputs.npz -o outputs.npz",
        verbose="list the inputs",
    )


def _check(verbs: Any) -> None:
    verb = Verb(
        verbs,
        "check",
        "would ATC take it?",
        action="deploy:check",
        what="Say, without CANN, what Ascend's compiler would refuse or misunderstand in a model,"
        " and which engine would take each node.",
    )
    options.model(verb)
    verb.add("--cann", choices=CANN_VERSIONS, default=DEFAULT_CANN, help="CANN line to check for")
    verb.add(
        "--soc-version",
        metavar="CHIP",
        help="exact chip, e.g. Ascend910B2, Ascend910_9391 (default: all that are known)",
    )
    verb.add(
        "--plugin",
        action="append",
        default=[],
        metavar="KEY",
        help="a parser plug-in of yours: npu::1::MyOp, or npu::1::MyOp(1,3) with its input counts",
    )
    verb.add(
        "--dim",
        action="append",
        default=[],
        metavar="NAME=N",
        help="check (and fix) the file for this size of an open dim (repeatable)",
    )
    verb.add("--strict", action="store_true", help="fail on warnings and unknowns too")
    verb.add(
        "--fix",
        action="store_true",
        help="repair what can be repaired exactly; each repair is tried out first",
    )
    verb.add(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        help="where --fix writes (default: beside the input, *.fixed.onnx)",
    )
    verb.add("--certificate", type=Path, metavar="FILE", help="check a certificate instead")
    verb.add("--before", type=Path, metavar="MODEL", help="the original model of --certificate")
    options.forced(verb)
    verb.finish(
        example="sfa-onnx check model.sfa.onnx --cann 9.1 --soc-version Ascend910B2",
        met="ATC would refuse the model, or the certificate does not hold",
        verbose="list where each operator would run",
    )


def _atc(verbs: Any) -> None:
    verb = Verb(
        verbs,
        "atc",
        "hand over to Ascend's compiler",
        action="deploy:atc",
        what="Write a folder with all that Ascend's compiler needs: the model in the form that its"
        " parser reads, the parser plug-in, the exact atc call, inputs. Runs atc where it is"
        " installed.",
    )
    options.model(verb, "the fused ONNX model")
    verb.add(
        "-o", "--output", type=Path, required=True, metavar="DIR", help="folder to write (required)"
    )
    verb.add(
        "--soc-version",
        required=True,
        metavar="CHIP",
        help="exact chip, e.g. Ascend910B2, Ascend910_9391 (required)",
    )
    verb.add("--cann", choices=CANN_VERSIONS, default=DEFAULT_CANN, help="CANN line to write for")
    verb.add(
        "--binding",
        choices=CHOICES,
        default="kv-quant",
        help="operator of int8 sites: "
        + ", ".join(f"{b.name}: {b.ge_type}" for b in BINDINGS if b.name in CHOICES),
    )
    verb.add(
        "--npu-dtype",
        choices=("bf16", "fp16"),
        help="cast queries that are float32, which the NPU kernel does not take",
    )
    verb.add("--plain-norms", action="store_true", help="keep norms as standard operators")
    verb.add(
        "--dim",
        action="append",
        default=[],
        metavar="NAME=N",
        help="bind an open dim: a number, a range a~b, or gears a,b,c (repeatable)",
    )
    verb.add(
        "--pair-gears",
        action="store_true",
        help="gears of several dims change together (default: each with each)",
    )
    verb.add("--inputs", type=Path, metavar="NPZ", help="inputs to write for the device run")
    verb.add("--before", type=Path, metavar="MODEL", help="the original, for the node mapping")
    verb.add("--no-run", action="store_true", help="do not run atc even where it is installed")
    verb.add(
        "--scope",
        metavar="PART",
        help="layer:N or stage:A-B: cut out the part to convert (default: all)",
    )
    options.forced(verb, "overwrite files in the folder")
    verb.finish(
        example="sfa-onnx atc model.int8.onnx --soc-version Ascend910B2 -o handover",
        met="something known stands in the way, or atc failed",
    )


def _doctor(verbs: Any) -> None:
    verb = Verb(
        verbs,
        "doctor",
        "versions, libraries, CANN, weights",
        action="deploy:doctor",
        what="Say which versions are installed, whether the operator library loads, and whether"
        " there is a CANN toolkit.",
    )
    verb.add("model", type=Path, nargs="?", help="also look at this model's weights")
    verb.add(
        "--library", action="store_true", help="print nothing but the path of the operator library"
    )
    verb.finish(
        example="sfa-onnx doctor model.sfa.onnx",
        met="something is missing, or lies where no reader takes it",
    )


def _completion(verbs: Any) -> None:
    verb = Verb(
        verbs,
        "completion",
        "completion of this command in a shell",
        action="completion:completion",
        what="Print a script that completes verbs, options and their values.",
    )
    verb.add("shell", choices=SHELLS, help="the shell to print it for")
    verb.finish(example='eval "$(sfa-onnx completion bash)"')
