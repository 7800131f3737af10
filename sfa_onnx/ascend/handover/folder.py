"""Write everything ATC needs for a model into one folder, and read back what a device answered.

    model.atc.onnx   the ATC flavour (beside external weights, under a name of its own)
    atc.sh           the exact atc call; sources the package, builds the plug-in when needed
    build_om.*       the same through GE's own interface, with caches written in place (CANN 9.0+)
    opp/ plugin/ python/ build_plugin.sh    the plug-in as a vendor package (`package.py`)
    mapping.json     fused node -> replaced nodes
    inputs/ outputs.json run_om.py          to run the .om and compare
    README.md        what is here, and what to do when it fails

No CANN is needed. Where `atc` is on PATH it is run, and its log explained.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from onnx import ModelProto

from sfa_onnx.ascend.cann import DEFAULT_CANN
from sfa_onnx.ascend.cann import cann as cann_line
from sfa_onnx.ascend.flavour.model import AtcModel, convert, from_atc
from sfa_onnx.ascend.flavour.nodes import is_ours
from sfa_onnx.ascend.handover import command as atc_command
from sfa_onnx.ascend.handover import data as handover_data
from sfa_onnx.ascend.handover import log as atc_log
from sfa_onnx.ascend.handover import package
from sfa_onnx.ascend.handover import run_om as handover_run_om
from sfa_onnx.ascend.handover.against import compare_against
from sfa_onnx.ascend.handover.builder import builder_files
from sfa_onnx.ascend.handover.command import bind_dims
from sfa_onnx.ascend.handover.mapping import find_original, mapping
from sfa_onnx.ascend.handover.readme import atc_script, readme
from sfa_onnx.ascend.handover.report import HandoverReport
from sfa_onnx.ascend.handover.scope import cut, parse_scope
from sfa_onnx.ascend.handover.staging import Staging
from sfa_onnx.errors import SfaError, UsageError
from sfa_onnx.files.json_form import parsed
from sfa_onnx.files.model import atomic_write, load_model, save_model
from sfa_onnx.files.weights import external_files
from sfa_onnx.guard.doors import door
from sfa_onnx.passes.shapes.dims import size_of
from sfa_onnx.runtime.feeds.relations import misfit
from sfa_onnx.runtime.portable.restore import restored

__all__ = ["HandoverReport", "compare_against", "write"]

Array = NDArray[Any]
_HANDLED = frozenset({"precision-mode"})  # atc.sh passes must_keep_origin_dtype
_SAMPLE_LIMIT = 64 << 20  # bytes of random inputs written unasked


@door
def write(
    model: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    *,
    soc_version: str,
    cann: str = DEFAULT_CANN,
    binding: str = "kv-quant",
    npu_dtype: str | None = None,
    norms: bool = True,
    dims: Mapping[str, str | int] | None = None,
    paired: bool = False,
    scope: str | None = None,
    inputs: Mapping[str, Array] | None = None,
    before: str | os.PathLike[str] | None = None,
    execute: bool = True,
    force: bool = False,
) -> HandoverReport:
    """Write the hand-over folder of a fused model: all of it, or nothing when anything fails.

    Args:
        model: the fused model's file; weights embedded or external.
        out_dir: the folder to write, created when missing.
        soc_version: the exact chip ("Ascend910B2", "Ascend910_9391").
        cann: the CANN line, one of `CANN_VERSIONS`; the ATC flavour is right for it.
        binding: one of `sfa_onnx.operator.op.CHOICES`.
        npu_dtype: "bf16" or "fp16": cast float32 queries of our operators.
        norms: write root mean square norms as the vendor's fused operators.
        dims: symbolic dim -> number, "a~b" or gears "a,b,c"; dims derived from them ("past + 1")
            follow.
        paired: gears of several dims change together, not each with each.
        scope: "layer:N" or "stage:A-B": convert only that part.
        inputs: arrays to write for the device; random ones when None and small enough.
        before: the model before fusing, for mapping.json; found beside `model` when None.
        execute: run atc when it is there and nothing stands in its way.
        force: overwrite existing files.

    Raises:
        UsageError: a value is not as described, the graph cannot run at the bound dims, or a file
            exists and `force` is not set.
        ModelError, ContractError, WeightsError: there is no ATC form; see `flavour.convert`.
    """
    path, folder = Path(model), Path(out_dir)
    proto = _load(path, folder, scope, force)
    external = bool(external_files(proto))
    command = atc_command.build(
        proto, soc_version=soc_version, dims=dims, paired=paired, external_weights=external
    )
    _must_run(proto, command)
    converted = convert(proto, binding=binding, npu_dtype=npu_dtype, cann=cann, norms=norms)
    _fix(converted, cann, soc_version, path.parent, command.numbers(proto))
    target = _model_path(path, folder, scope, external)
    with Staging(folder, target, force=force) as stage:
        save_model(converted.model, stage.model, source_dir=path.parent, force=force)
        line = command.line(os.path.relpath(target, folder), "model")
        report = HandoverReport(stage.folder, target, soc_version, binding, cann, line)
        report.unbound, report.operators = command.unbound, _own(proto)
        report.notes, report.renamed = [*converted.notes, *command.notes], converted.renamed
        _write_files(report, command, converted, path, before, force)
        _write_inputs(report, converted.model, inputs, command.numbers(proto))
        _check(report, converted.model, command.numbers(proto))
    report.folder = folder
    if execute:
        _run(report)
    return report


def _own(model: ModelProto) -> int:
    """How many operators of ours the model holds."""
    return sum(is_ours(node) for node in model.graph.node)


def _must_run(model: ModelProto, command: atc_command.AtcCommand) -> None:
    """Refuse sizes at which the graph stops, before anything is written.

    Raises:
        UsageError: naming the node.
    """
    for sizes in command.sizes:
        if reason := misfit(model, sizes):
            told = ", ".join(f"{name}={size}" for name, size in sizes.items())
            raise UsageError(f"--dim: the graph cannot run at {told}: {reason}")


def _load(path: Path, folder: Path, scope: str | None, force: bool) -> ModelProto:
    if (folder / "atc.sh").exists() and not force:
        raise UsageError(f"{folder}: there is a hand-over in it already; use --force to replace it")
    proto, _ = restored(load_model(path))
    return proto if scope is None else cut(proto, parse_scope(scope))


def _run(report: HandoverReport) -> None:
    """Run atc where it is installed, unless its failure is known beforehand."""
    if not shutil.which("atc"):
        return
    if report.errors or report.unbound:
        report.notes.append("atc is here but was not run: see the errors and open dims")
        return
    report.ran = atc_log.run(report.folder)


def _write_files(
    report: HandoverReport,
    command: atc_command.AtcCommand,
    converted: AtcModel,
    path: Path,
    before: str | os.PathLike[str] | None,
    force: bool,
) -> None:
    """The package, the scripts, the mapping."""
    folder, target = report.folder, report.model
    parcel = package.write(folder, force=force)
    report.plugin_built = parcel.built
    report.notes += parcel.notes
    report.files = list(parcel.files)
    where = os.path.relpath(target, folder)
    texts = {
        "atc.sh": atc_script(command, where, package.VENDOR),
        "README.md": readme(report, target.name),
        "run_om.py": Path(handover_run_om.__file__).read_text(encoding="utf-8"),
        "mapping.json": _mapping(converted, path, before, target.name),
    }
    if cann_line(report.cann).reuses_inputs:
        texts |= builder_files(converted.model, command, where)
    for name, text in texts.items():
        atomic_write(folder / name, text.encode(), force=force)
        report.files.append(name)
    (folder / "atc.sh").chmod(0o755)
    handover_data.write_output_names(converted.model, folder / "outputs.json")
    report.files.append("outputs.json")


def _fix(
    converted: AtcModel, cann: str, soc_version: str, folder: Path, dims: Mapping[str, int]
) -> None:
    """What `check` can repair mechanically; each change was tried in onnxruntime, bit for bit.

    At the bound dims, which atc compiles for: much that is computed from them is constant then.
    """
    from sfa_onnx.ascend import checks

    bound = bind_dims(converted.model, dims)
    found = checks.check(bound, cann=cann, soc_version=soc_version, base_dir=folder)
    if not found.fixable:
        return
    fixed, lines = checks.fix(bound, found)
    if not lines:
        return
    converted.model = fixed
    converted.notes += [f"fixed: {line}" for line in lines]
    if dims:
        told = ", ".join(f"{name}={size}" for name, size in dims.items())
        converted.notes.append(f"the file is for {told} only")


def _model_path(path: Path, folder: Path, scope: str | None, external: bool) -> Path:
    """Beside the weights when they are files (the parser looks there), else in the folder.

    Beside the weights several hand-overs of one model meet (bf16 and fp16, two CANN lines), so
    each has a name of its own; what a folder wrote before it writes again.
    """
    if not external:
        return folder / "model.atc.onnx"
    stem = path.name.removesuffix(".onnx").removesuffix(".sfa")
    part = "" if scope is None else "." + scope.replace(":", "")
    label = re.sub(r"[^\w-]+", "-", folder.resolve().name).strip("-") or "handover"
    names = itertools.chain(
        (f"{stem}{part}.atc.onnx", f"{stem}{part}.{label}.atc.onnx"),
        (f"{stem}{part}.{label}-{n}.atc.onnx" for n in itertools.count(2)),
    )
    mine = _written_before(folder)
    return next(
        file
        for file in (path.parent / name for name in names)
        if file.name == mine or not file.exists()
    )


def _written_before(folder: Path) -> str:
    """The model file that this folder's hand-over speaks of; "" when there is none yet."""
    try:
        known = parsed((folder / "mapping.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    return str(known.get("model", "")) if isinstance(known, dict) else ""


def _mapping(
    converted: AtcModel, path: Path, before: str | os.PathLike[str] | None, name: str
) -> str:
    original = Path(before) if before is not None else find_original(path)
    text = mapping(converted.model, converted.renamed, original, name)
    return json.dumps(text, indent=2) + "\n"


def _write_inputs(
    report: HandoverReport,
    model: ModelProto,
    inputs: Mapping[str, Array] | None,
    dims: Mapping[str, int],
) -> None:
    folder = report.folder / "inputs"
    if inputs is None:
        inputs = _sample(report, model, dims)
    if inputs is not None:
        written = handover_data.write_inputs(model, inputs, folder)
        report.files += [str(p.relative_to(report.folder)) for p in written]


def _all_bound(model: ModelProto, sizes: Mapping[str, int]) -> bool:
    """Whether every dim of every input is a number."""
    dims = [d for v in model.graph.input for d in v.type.tensor_type.shape.dim]
    return all(
        (d.HasField("dim_value") and d.dim_value >= 0) or size_of(d.dim_param, sizes) for d in dims
    )


def _sample(
    report: HandoverReport, model: ModelProto, dims: Mapping[str, int]
) -> Mapping[str, Array] | None:
    from sfa_onnx.runtime.feeds.draw import random_feeds

    sizes = {name: int(value) for name, value in dims.items()}
    count = 0
    for value in model.graph.input:
        product = 8
        for dim in value.type.tensor_type.shape.dim:
            product *= dim.dim_value or size_of(dim.dim_param, sizes) or 1
        count += product
    if report.unbound or not _all_bound(model, sizes) or count > _SAMPLE_LIMIT:
        report.notes.append("inputs/ not written: give an .npz of real inputs, or bind every dim")
        return None
    try:
        return random_feeds(from_atc(model), seed=0, sizes=sizes)  # it knows canonical nodes
    except SfaError as error:
        report.notes.append(f"inputs/ not written: {error}")
        return None


def _check(report: HandoverReport, model: ModelProto, dims: Mapping[str, int]) -> None:
    from sfa_onnx.ascend import checks
    from sfa_onnx.ascend.checks.finding import leading

    found = checks.check(
        bind_dims(model, dims),
        cann=report.cann,
        soc_version=report.soc_version,
        base_dir=report.model.parent,
    )
    report.engines = found.summary
    for finding in leading(found.findings):
        if finding.rule in _HANDLED:
            continue
        where = f" at {finding.node}" if finding.node else ""
        code = f" [{finding.code}]" if finding.code else ""
        text = f"{finding.rule}{where}: {finding.message}{code}"
        if finding.severity == "error":
            report.errors.append(text)
        elif finding.severity == "warning":
            report.warnings.append(text)
        elif finding.severity == "unknown":
            report.unknown.append(text)
