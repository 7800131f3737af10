"""`fix`: apply what is mechanical among the findings, each change tried in onnxruntime first."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto

from sfa_onnx.ascend.checks.facts import INTERNAL_OPS
from sfa_onnx.ascend.checks.finding import CheckReport, Finding
from sfa_onnx.ascend.checks.fold import provable
from sfa_onnx.ascend.checks.norm_trial import TOLERANCE, compare_norms
from sfa_onnx.ascend.checks.rewrites import NODE_RULES, constant_k
from sfa_onnx.ascend.checks.trial import compare
from sfa_onnx.ascend.checks.view import ModelView
from sfa_onnx.ascend.flavour import form
from sfa_onnx.ascend.flavour.indices import is_non_negative
from sfa_onnx.ascend.flavour.reductions import readable_reductions
from sfa_onnx.ascend.flavour.scatters import readable_scatters
from sfa_onnx.ascend.flavour.scope import Names, Rule, Scope, apply
from sfa_onnx.errors import ModelError, SfaError
from sfa_onnx.files.empty_views import settled
from sfa_onnx.files.model import load_model, save_model
from sfa_onnx.files.onnx_attrs import attribute
from sfa_onnx.guard.doors import door

__all__ = ["FixResult", "fix", "fix_file"]

# Findings about names and where bytes lie, not about what is computed.
_FORM_RULES = frozenset((
    *("duplicate-name", "empty-output", "external-key", "external-in-branch"),
    *("reshape-open-empty", "sparse-initializer"),
))  # fmt: skip
# Tried before the others: what takes a node away spares it other repairs.
_FIRST = frozenset(("scatter-mask",))


@dataclass
class FixResult:
    """What was changed (with its proof), and what was not and why."""

    model: ModelProto
    applied: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    path: Path | None = None


@door
def fix(model: ModelProto, report: CheckReport) -> tuple[ModelProto, list[str]]:
    """Apply the fixable findings of `report` to a copy of `model`.

    Every rewritten node is run beside its replacement in onnxruntime and must agree bit for bit;
    what does not, or cannot be run, is left as it was (see `apply_fixes` for the reasons).

    Returns:
        The new model and one line per change.
    """
    result = apply_fixes(model, report)
    return result.model, result.applied


@door
def fix_file(
    path: str | Path,
    report: CheckReport,
    output: str | Path,
    *,
    force: bool = False,
    model: ModelProto | None = None,
) -> FixResult:
    """`fix` from file to file; external weights stay where they are.

    Args:
        path: the file.
        report: what `check` said of it.
        output: where the result goes.
        force: overwrite `output`.
        model: the file's model where `report` is of a changed one (its dims bound).

    Raises:
        UsageError: no such file, or `output` exists and `force` is not set.
        WeightsError: the weights would not be found beside the output.
    """
    result = apply_fixes(load_model(path) if model is None else model, report)
    source = Path(path).parent
    result.path = save_model(result.model, output, source_dir=source, force=force)
    return result


@door
def apply_fixes(model: ModelProto, report: CheckReport) -> FixResult:
    """As `fix`, with the reasons of what was skipped."""
    work = ModelProto()
    work.CopyFrom(model)
    result = FixResult(work)
    wanted = {f.rule for f in report.fixable}
    if not wanted:
        return result
    _node_rules(result, report, wanted - _FORM_RULES)
    _form_rules(result, wanted & _FORM_RULES)
    return result


def _node_rules(result: FixResult, report: CheckReport, wanted: set[str]) -> None:
    if not wanted:
        return
    model = result.model
    view = ModelView(model)
    targets = _targets(view, [f for f in report.fixable if f.rule in wanted])
    names, facts, opset = Names(model), view.facts(), view.opset
    for rule_id in sorted(wanted, key=lambda r: (r not in _FIRST, r)):
        outputs = targets[rule_id]
        proven: dict[str, int] = {}
        if rule_id == "topk-computed-k":
            proven = _proven(view, outputs)
            rule: Rule = constant_k(proven)
        elif rule_id in ("reduce-axes", "reduce-no-axes"):
            rule = readable_reductions(report.cann)
        elif rule_id == "scatterelements-reduction":
            rule = readable_scatters(report.cann)
        else:
            rule = NODE_RULES[rule_id]
        apply(model, [_Tried(rule, rule_id, outputs, proven, result)], facts, names, opset)


def _targets(view: ModelView, findings: Sequence[Finding]) -> dict[str, dict[str, str]]:
    """Rule -> outputs of the nodes concerned, known by them across rewrites, and types."""
    outputs: dict[str, dict[str, str]] = {}
    for scope, i, node in view.nodes():
        name = f"{scope.path}/{scope.names[i]}" if scope.path else scope.names[i]
        outputs.setdefault(name, {}).update((o, node.op_type) for o in node.output if o)
    targets: dict[str, dict[str, str]] = {}
    for found in findings:
        for name in found.nodes or (found.node,):
            targets.setdefault(found.rule, {}).update(outputs.get(name, {}))
    return targets


def _proven(view: ModelView, outputs: Container[str]) -> dict[str, int]:
    proven = {}
    for scope, _, node in view.nodes():
        key = next((o for o in node.output if o), "")
        if key in outputs and node.op_type == "TopK":
            value = provable(view, scope, node.input[1])
            if value is not None and value.size == 1:
                proven[key] = int(value.reshape(-1)[0])
    return proven


class _Tried:
    """A rule that is applied to the nodes concerned only, and only where the trial agrees."""

    def __init__(
        self,
        rule: Rule,
        rule_id: str,
        outputs: dict[str, str],
        proven: dict[str, int],
        to: FixResult,
    ):
        self._rule, self._id, self._outputs, self._proven, self._to = (
            rule,
            rule_id,
            outputs,
            proven,
            to,
        )

    def __call__(self, scope: Scope, node: NodeProto) -> Sequence[NodeProto] | None:
        """The replacement, or None after writing down why there is none."""
        first = next((o for o in node.output if o), "")
        if first not in self._outputs or node.op_type in INTERNAL_OPS - {"Constant"}:
            return None
        if node.op_type != self._outputs[first]:
            return None  # another rule has put something else in its place
        label, kept = node.name or first, len(scope.graph.initializer)
        try:
            new = self._rule(scope, node)
        except (ModelError, IndexError, ValueError) as error:
            self._to.skipped.append(f"{self._id}: {label}: {error}")
            return None
        if new is None:
            self._to.skipped.append(f"{self._id}: {label}: not mechanical here")
            return None
        reason, proof = self._judge(scope, node, new)
        if reason:
            del scope.graph.initializer[kept:]
            self._to.skipped.append(f"{self._id}: {label}: {reason}")
            return None
        self._to.applied.append(
            f"{self._id}: {node.op_type} {label} -> {', '.join(n.op_type for n in new)} ({proof})"
        )
        return new

    def _judge(self, scope: Scope, node: NodeProto, new: Sequence[NodeProto]) -> tuple[str, str]:
        """Why the replacement is not taken, "" if it is; and what shows that it may be."""
        if self._id == "norm-epsilon":
            return compare_norms(scope, node, new), f"within {TOLERANCE:g} in float64"
        first = next((o for o in node.output if o), "")
        loose = self._id == "topk-unsorted"  # any order of the old node is as good
        reason = self._same_constant(node, new)
        if reason != "same":
            reason = reason or compare(
                scope, node, new, self._forced(scope, node, first), loose=loose
            )
        open_order = ", up to the order it leaves open" * loose
        return "" if reason == "same" else reason, f"equal bit for bit in a trial run{open_order}"

    def _forced(self, scope: Scope, node: NodeProto, first: str) -> dict[str, np.ndarray[Any, Any]]:
        """Inputs of the trial that are not free: a proven k; one value, at slots that may meet."""
        if first in self._proven:
            return {node.input[1]: np.asarray([self._proven[first]])}
        if self._id != "scatter-mask":
            return {}
        dims = [d or 0 for d in scope.dims(node.input[1]) or ()]
        kinds = [onnx.helper.tensor_dtype_to_np_dtype(scope.dtype(n)) for n in node.input[1:]]
        size = (scope.dims(node.input[0]) or ())[int(attribute(node, "axis", 0))] or 1
        low = 0 if is_non_negative(scope, node.input[1]) else -size
        slots = np.random.default_rng(len(dims)).integers(low, size, dims).astype(kinds[0])
        return {node.input[1]: slots, node.input[2]: np.full(dims, 1, kinds[1])}

    def _same_constant(self, node: NodeProto, new: Sequence[NodeProto]) -> str:
        """Constants need no trial: their tensors are compared."""
        if node.op_type != "Constant" or len(new) != 1:
            return ""
        given = onnx.helper.get_attribute_value(node.attribute[0])
        made = onnx.numpy_helper.to_array(new[0].attribute[0].t)
        if node.attribute[0].name.startswith(("value_float", "value_int")):
            return "same" if np.array_equal(np.asarray(given, made.dtype), made) else "differs"
        return "same"


def _form_rules(result: FixResult, wanted: set[str]) -> None:
    if "reshape-open-empty" in wanted:
        result.model, lines = settled(result.model)
        result.applied += [f"reshape-open-empty: {line}" for line in lines]
    model, names = result.model, Names(result.model)
    if "empty-output" in wanted:
        count = form.name_outputs(model.graph, names)
        result.applied.append(f"empty-output: {count} unnamed outputs dropped or named")
    if wanted & {"external-in-branch", "sparse-initializer"}:
        count = form.lift_initializers(model, names)
        result.applied.append(f"initializers: {count} made dense or moved to the main graph")
    if "external-key" in wanted:
        try:
            count = form.clean_external_data(model)
            result.applied.append(f"external-key: {count} tensors keep location, offset, length")
        except SfaError as error:
            result.skipped.append(f"external-key: {error}")
    if "duplicate-name" in wanted:
        for change in form.name_nodes(model.graph, names):
            result.applied.append(f"duplicate-name: {change}")
