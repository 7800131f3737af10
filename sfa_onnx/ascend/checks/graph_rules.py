"""Beyond the parser: the interface, precision, memory, and the documented conflict on A3."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import onnx

from sfa_onnx.ascend.checks.context import Context
from sfa_onnx.ascend.checks.finding import Finding, Severity
from sfa_onnx.ascend.checks.tensors import nbytes
from sfa_onnx.ascend.checks.view import contract_of
from sfa_onnx.ascend.chips import chip_of, family_of

__all__ = ["custom_op_conflict", "graph_rules"]

_T = onnx.TensorProto
_DOCUMENTED_INPUTS: Final = frozenset((_T.FLOAT, _T.FLOAT16, _T.UINT8))
_GB: Final = 1e9


def _found(
    rule: str, severity: Severity, message: str, node: str = "", hint: str = "", code: str = ""
) -> Finding:
    return Finding(rule, severity, "graph", message, node, code, hint, evidence="documented")


def custom_op_conflict(ctx: Context) -> Iterator[Finding]:
    """The first line: may an ONNX model with custom ops be converted for A3 at all?"""
    custom = [n for n in ctx.nodes() if ctx.plugin(n) is not None or contract_of(n.proto)]
    if not custom or (ctx.soc_version and family_of(ctx.soc_version) == "A2"):
        return
    names = tuple(n.name for n in custom)
    yield _found(
        "custom-op-on-a3",
        "unknown",
        "the Ascend C guide says custom operators called from ONNX are not supported on Atlas A3"
        " (nor on 950); the operator's own page lists A3, its definition registers ascend910b and"
        " ascend910_93, and the GE pages claim ONNX parsing on all chips. Nobody here has tried:"
        " parsing works on every release, conversion for A3 awaits a device",
        names[0],
        "try one layer first; on A2 no such exclusion is written. Way round: torchair exports the"
        " same graph without ONNX (atc --framework=1)",
    )


def graph_rules(ctx: Context) -> Iterator[Finding]:
    """Interface, precision and memory."""
    yield from _inputs(ctx)
    yield from _precision(ctx)
    yield from _memory(ctx)
    yield from _recipes(ctx)


def _inputs(ctx: Context) -> Iterator[Finding]:
    open_inputs, unusual = [], []
    for name, value in ctx.view.root.inputs.items():
        elem = value.type.tensor_type.elem_type
        dims = ctx.view.shape(ctx.view.root, name)
        dynamic = dims is None or any(not isinstance(d, int) for d in dims)
        if dynamic:
            open_inputs.append(name)
        if elem == _T.INT8 and dynamic:
            shown = "unknown rank" if dims is None else ", ".join(map(str, dims))
            yield _found(
                "int8-input-dynamic",
                "warning",
                f"int8 graph input {name!r} has dynamic dims ({shown}): DT_INT8 inputs are"
                " documented as unsupported with dynamic shape",
                name,
                "bind every dim to a number (`sfa-onnx atc --dim name=N`), page the cache",
            )
        if elem not in _DOCUMENTED_INPUTS:
            unusual.append(name)
    if open_inputs:
        yield _found(
            "input-shape",
            "info",
            f"inputs with open dims need --input_shape: {', '.join(open_inputs)}",
            open_inputs[0],
            "`sfa-onnx atc --dim name=N` writes the option",
            "E10001",
        )
    if unusual:
        yield _found(
            "input-dtype-documented",
            "info",
            "the ATC manual lists float32, float16 and uint8 for ONNX inputs; the parser takes"
            f" these others too, and official samples use some: {', '.join(unusual)}",
            unusual[0],
        )


def _precision(ctx: Context) -> Iterator[Finding]:
    values = {ctx.view.dtype(n.scope, name) for n in ctx.nodes() for name in n.proto.input if name}
    values |= {v.type.tensor_type.elem_type for v in ctx.view.root.inputs.values()}
    if _T.BFLOAT16 not in values:
        return
    yield _found(
        "precision-mode",
        "warning",
        "the model computes in bfloat16; ATC's default precision mode turns that into float16",
        hint="pass --precision_mode=must_keep_origin_dtype (the generated atc.sh does)",
    )


def _memory(ctx: Context) -> Iterator[Finding]:
    weights = sum(nbytes(t) or 0 for s in ctx.view.scopes for t in s.graph.initializer)
    chip = chip_of(ctx.soc_version) if ctx.soc_version else None
    room = chip.memory if chip else 64 << 30
    where = chip.name if chip else "a device of 64 GiB"
    if weights > room:
        yield _found(
            "device-memory",
            "error" if chip else "warning",
            f"the weights take {weights / _GB:.1f} GB, {where} has {room / _GB:.1f} GB: an .om"
            " lives on one device",
            hint="convert a layer or a stage: `sfa-onnx atc --scope layer:N` or `stage:A-B`",
        )
    elif weights > 0.8 * room:
        message = f"the weights take {weights / _GB:.1f} of the {room / _GB:.1f} GB of {where};"
        message += " caches and workspace come on top"
        yield _found("device-memory", "warning", message)


def _recipes(ctx: Context) -> Iterator[Finding]:
    nodes = [
        n
        for n in ctx.nodes()
        if n.op_type == "NPUSparseFlashAttentionAntiquant" and ctx.takes_as_is(n)
    ]
    if nodes:
        yield _found(
            "recipes-package",
            "warning",
            "this binding needs the SparseFlashAttentionAntiquant package of cann-recipes-infer"
            " (v0.2.0 or v0.3.0), which is no longer published; CANN 9.1 and later hold another,"
            " experimental op of the same name that is not ours",
            nodes[0].name,
            "run `sfa-onnx atc`, whose default binding (kv-quant) is built in since CANN 8.5",
            "E10501",
        )
