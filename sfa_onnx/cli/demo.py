"""`sfa-onnx demo`: the main job on a small model that ships with the package."""

from __future__ import annotations

import argparse
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from sfa_onnx.cli import show, show_ascend, show_compare
from sfa_onnx.cli.console import Console
from sfa_onnx.errors import VerificationError

__all__ = ["demo"]

SOC = "Ascend910B2"
REPEAT = 20
LONG = 8191  # cached tokens when timing: the longer the context, the more sparsity saves


def demo(args: argparse.Namespace, console: Console) -> int:
    """The road from the demo's model to the hand-over."""
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
        return _tour(args.output, console, kept=True)
    with tempfile.TemporaryDirectory(prefix="sfa-onnx-demo-") as folder:
        code = _tour(Path(folder), console, kept=False)
    console.say("\nthe files are gone again; keep them: [bold]sfa-onnx demo -o tour[/bold]")
    return code


def _tour(folder: Path, console: Console, *, kept: bool) -> int:
    import sfa_onnx
    from sfa_onnx import demo
    from sfa_onnx.kv_convert import convert
    from sfa_onnx.runtime.compare.run import compare
    from sfa_onnx.summary import summarise

    model = demo.materialise(folder)
    console.title("1. inspect: a DeepSeek-V3.2-style decode layer, exported by torch")
    show.summary(console, model, summarise(model))

    console.title("2. fuse: find, bind, verify in float64, splice")
    fused = folder / "decode_layer.sfa.onnx"
    with console.progress("fuse") as progress:
        report = sfa_onnx.fuse(model, fused, force=True, progress=progress)
    show.fuse_report(console, model, report)

    console.title("3. convert the float cache to packed int8 rows")
    int8 = folder / "decode_layer.int8.onnx"
    converted = convert(fused, int8, to="packed-int8", force=True)
    show.kv_report(console, converted)

    console.title("4. compare with the original, in onnxruntime")
    inputs = demo.feeds()
    with console.progress("compare") as progress:
        compared = compare(model, fused, inputs=inputs, progress=progress)
    show_compare.compare_report(console, compared)
    with console.progress("compare") as progress:
        compared_int8 = compare(model, int8, inputs=inputs, progress=progress)
    show_compare.compare_report(console, compared_int8)

    console.title(f"5. time before and after (this machine, one decode token, {LONG + 1} cached)")
    paged = folder / "decode_layer.paged.onnx"
    convert(fused, paged, to="paged-int8", force=True)
    models = {"original": model, "fused": fused, "packed int8": int8}
    times = _times(console, models | {"paged int8, in place": paged})

    console.title(f"6. hand over to Ascend's compiler ({SOC})")
    handed = _hand_over(folder, int8, console, kept)
    console.result(
        "demo",
        {"fuse": report, "kv_cache": converted, "compare": compared, "compare_int8": compared_int8}
        | {"times_ms": times, "atc": handed},
    )
    if not (report.fused and compared.passed and compared_int8.passed):
        raise VerificationError("the demo did not reproduce the original model: please report this")
    return 0


def _times(console: Console, models: dict[str, Path]) -> dict[str, float]:
    from sfa_onnx import demo, runtime
    from sfa_onnx.files.model import load_model
    from sfa_onnx.kv_convert.interface import adapt_feeds, read_interface
    from sfa_onnx.runtime.timing import time_calls, time_session

    inputs = demo.feeds(past_length=LONG)
    times: dict[str, float] = {}
    for name, path in models.items():
        interface = read_interface(load_model(path))
        feeds = adapt_feeds(interface, inputs, new_tokens=1) if interface else inputs
        if interface and interface.form == "paged-int8":
            names = {c.packed_in for c in interface.caches}
            bound = runtime.bind_caches(path, {n: feeds.pop(n) for n in names})
            taken = partial(bound.run, feeds)
            times[name] = time_calls(taken, REPEAT).median_ms
            continue
        times[name] = time_session(runtime.session(path), feeds, REPEAT).median_ms
    first = next(iter(times.values()))
    rows = [(name, f"{ms:.2f}", f"{first / ms:.1f}x") for name, ms in times.items()]
    console.table(("model", "median ms", "speed-up"), rows, right=(1, 2))
    return times


def _hand_over(folder: Path, model: Path, console: Console, kept: bool) -> Any:
    from sfa_onnx.ascend.handover import folder as handover

    report = handover.write(
        model,
        folder / "atc",
        soc_version=SOC,
        binding="kv-quant",
        dims={"batch": "1", "past_len": str(LONG)},
        force=True,
    )
    show_ascend.handover_report(console, report, kept=kept)
    return report
