"""Would ATC take this model? CANN's parser rules and operator rules, replayed without CANN.

`check` reports, `fix` changes what is mechanical and proves the change in onnxruntime.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Final, Literal

import onnx

from sfa_onnx.ascend.cann import CANN_VERSIONS, DEFAULT_CANN
from sfa_onnx.ascend.cann import cann as _line
from sfa_onnx.ascend.checks.context import Context
from sfa_onnx.ascend.checks.finding import CheckReport, Finding, SupportRow
from sfa_onnx.ascend.checks.fixing import FixResult, apply_fixes, fix, fix_file
from sfa_onnx.ascend.checks.ge_shapes import contradictions
from sfa_onnx.ascend.checks.graph_ops import graph_ops
from sfa_onnx.ascend.checks.graph_rules import custom_op_conflict, graph_rules
from sfa_onnx.ascend.checks.meaning import meaning
from sfa_onnx.ascend.checks.moves import moves
from sfa_onnx.ascend.checks.operators import operators
from sfa_onnx.ascend.checks.parser import replay
from sfa_onnx.ascend.checks.plugin import OWN_PLUGINS, Plugin, parse_plugin
from sfa_onnx.ascend.checks.rules import RULES
from sfa_onnx.ascend.checks.soundness import broken, inferred, open_and_empty
from sfa_onnx.ascend.checks.support import layer_summary, support_findings, support_rows
from sfa_onnx.ascend.checks.view import ModelView, contract_of
from sfa_onnx.files.model import read_model
from sfa_onnx.guard.doors import door
from sfa_onnx.runtime.portable.restore import restored

__all__ = [
    "CANN_VERSIONS",
    "OWN_PLUGINS",
    "RULES",
    "CheckReport",
    "Finding",
    "FixResult",
    "Plugin",
    "SupportRow",
    "apply_fixes",
    "check",
    "fix",
    "fix_file",
    "parse_plugin",
]

_RULES_IN_ORDER: Final = (
    *(custom_op_conflict, replay, meaning, operators),
    *(graph_rules, graph_ops, moves),
)


@door
def check(
    model: onnx.ModelProto | str | Path,
    *,
    cann: str = DEFAULT_CANN,
    soc_version: str | None = None,
    base_dir: str | Path | None = None,
    user_plugins: Iterable[Plugin | str] | None = None,
    strict: bool = False,
) -> CheckReport:
    """Check `model` against the rules of one CANN release.

    Args:
        model: a model, or the path of one (its weights are not read).
        cann: the line, one of `CANN_VERSIONS`.
        soc_version: the chip as ATC spells it ("Ascend910_9391"); None: all families.
        base_dir: where external data lies; the model's directory when `model` is a path.
        user_plugins: parser plug-ins that will be installed: `Plugin`s or keys such as
            "npu::1::MyOp" (see `parse_plugin`); None: ours.
        strict: `CheckReport.passed` then asks for nothing worse than information.

    Raises:
        UsageError: unknown CANN version, SoC or plug-in key, or no such file.
        ModelError: not an ONNX model. One that breaks the format's rules is reported as findings.
    """
    if not isinstance(model, onnx.ModelProto):
        base_dir = Path(model).parent if base_dir is None else base_dir
    model = read_model(model)
    unsound = list(broken(model))
    if not unsound:
        model, _ = restored(model)
    view = ModelView(model, None if base_dir is None else Path(base_dir), infer=not unsound)
    plugins = OWN_PLUGINS if user_plugins is None else tuple(user_plugins)
    parsed = tuple(parse_plugin(p) if isinstance(p, str) else p for p in plugins)
    ctx = Context(view, _line(cann), parsed, soc_version or "")
    support: list[SupportRow] = []
    findings: list[Finding] = [*unsound]
    try:
        support = support_rows(ctx)
        for rules in (
            custom_op_conflict,
            replay,
            meaning,
            operators,
            graph_rules,
            graph_ops,
            moves,
            contradictions,
        ):
            findings += rules(ctx)
        findings += [*support_findings(support), *inferred(ctx.view), *open_and_empty(ctx.view)]
    except Exception:  # rules lean on what a sound model keeps
        if not unsound:
            raise
        findings.append(replace(unsound[-1], message="the rules further on cannot be asked"))
    found = _merged(findings)
    engines = layer_summary(support)
    return CheckReport(cann, ctx.soc_version, _flavour(ctx), found, support, strict, engines)


def _merged(findings: Iterable[Finding]) -> list[Finding]:
    """Equal findings about several nodes become one, at the place of the first."""
    groups: dict[Finding, list[Finding]] = {}
    for found in findings:
        groups.setdefault(replace(found, node="", nodes=()), []).append(found)
    merged = []
    for group in groups.values():
        names = dict.fromkeys(n for f in group for n in (f.nodes or (f.node,)) if n)
        merged.append(replace(group[0], nodes=tuple(names)))
    return merged


def _flavour(ctx: Context) -> Literal["canonical", "atc", "plain"]:
    own = [n.proto for n in ctx.nodes() if contract_of(n.proto) is not None]
    if not own:
        return "plain"
    return "atc" if all(n.domain in ("", "ai.onnx") for n in own) else "canonical"
