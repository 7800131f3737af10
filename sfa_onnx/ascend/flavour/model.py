"""Canonical <-> ATC flavour of a fused model.

Canonical: our operators in the domains `npu` and `sfa_onnx`, any opset; for onnx.checker, people
and tools. ATC: what CANN's ONNX parser takes, from release 8.5 on: one opset import (default
domain, 11..18), functions inlined, every node named once, no empty outputs, nothing the parser
accepts and misreads. Both run in onnxruntime with our library. Weights are neither read nor
copied: external tensors keep their location, large embedded ones are set aside meanwhile.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from onnx import GraphProto, ModelProto, TensorProto

from sfa_onnx.ascend.cann import cann as line_of
from sfa_onnx.ascend.checks.rewrites import PARSER_REPAIRS
from sfa_onnx.ascend.flavour import form
from sfa_onnx.ascend.flavour.cache_writes import PaddedWrites
from sfa_onnx.ascend.flavour.downlevel import MAX_OPSET, MIN_OPSET, to_opset
from sfa_onnx.ascend.flavour.index_padding import padded_indexer, unpad_indexers
from sfa_onnx.ascend.flavour.nodes import FromAtc, ToAtc, is_ours
from sfa_onnx.ascend.flavour.norms import fuse_norms, readable_norms
from sfa_onnx.ascend.flavour.padding import pad_attention
from sfa_onnx.ascend.flavour.reductions import best_opset, readable_reductions
from sfa_onnx.ascend.flavour.repairs import REPAIRS
from sfa_onnx.ascend.flavour.rows import narrow_rows
from sfa_onnx.ascend.flavour.scatters import readable_scatters
from sfa_onnx.ascend.flavour.scope import Facts, Names, apply, inner_graphs
from sfa_onnx.ascend.flavour.sinks import sinks_behind
from sfa_onnx.errors import ModelError, UsageError
from sfa_onnx.files.json_form import parsed
from sfa_onnx.files.model import load_model, paused_gc
from sfa_onnx.guard.doors import door
from sfa_onnx.guard.guarded import inline
from sfa_onnx.operator.op import ALL_OPS, DOMAIN_NPU, DOMAIN_OWN
from sfa_onnx.passes.shapes.dims import write_numbers
from sfa_onnx.runtime.portable.norms import NORM_KEYS

__all__ = ["FLAVOUR_KEY", "AtcModel", "convert", "from_atc", "is_atc", "to_atc"]

FLAVOUR_KEY = "sfa_onnx.flavour"  # model metadata: how this ATC file came about
_OWN = frozenset(op.key for op in ALL_OPS)
_IR_VERSION = 8  # what opset 18 came with; every released parser reads it
_ASIDE = "set-aside:"  # location of the stub of an embedded tensor
_LARGE = 1024  # bytes: embedded tensors above this are set aside while rewriting


@dataclass
class AtcModel:
    """The ATC flavour and what was changed to get there."""

    model: ModelProto
    binding: str
    notes: list[str] = field(default_factory=list)
    renamed: list[str] = field(default_factory=list)  # "old node name -> new node name"


@door
def to_atc(
    model: ModelProto,
    *,
    binding: str = "kv-quant",
    npu_dtype: str | None = None,
    opset: int | None = None,
    cann: str | None = None,
    norms: bool | None = None,
) -> ModelProto:
    """The ATC flavour of a model; see `convert` for the arguments and errors."""
    return convert(
        model, binding=binding, npu_dtype=npu_dtype, opset=opset, cann=cann, norms=norms
    ).model


@door
def convert(
    model: ModelProto,
    *,
    binding: str = "kv-quant",
    npu_dtype: str | None = None,
    opset: int | None = None,
    cann: str | None = None,
    norms: bool | None = None,
) -> AtcModel:
    """Write the ATC flavour of a model; the model itself is not changed.

    Args:
        model: a fused model (canonical, portable or ATC already), weights embedded or external.
        binding: the operator of int8 sites, one of `sfa_onnx.operator.op.CHOICES`.
        npu_dtype: "bf16" or "fp16": cast float32 queries (and float keys) of our nodes to it.
        opset: the opset to stay at or below, 11..18; default 18.
        cann: the CANN line whose plug-ins will read the file, one of `CANN_VERSIONS`; None: all
            of them. Reductions are written as that line reads them.
        norms: write root mean square norms as the vendor's fused operators; None: where `cann` is
            given, as all its lines have them.

    Raises:
        ModelError: the model breaks the format's rules, or something in the graph has no form
            that CANN's parser understands, named.
        ContractError: one of our nodes breaks its contract.
        UsageError: unknown binding, dtype, opset or CANN line.
    """
    model = load_model(model)
    _check_limit(MAX_OPSET if opset is None else opset, model)
    if cann is not None:
        line_of(cann)
    with paused_gc():
        work, stash = _without_weights(model)
        form.one_domain(work.graph)
        portable = any((f.domain, f.name) in _OWN for f in work.functions)
        work = _inline(work)
        source = _opset(work)
        _refuse_old(work, source)
        result = AtcModel(work, binding)
        fused = cann is not None if norms is None else norms
        target = _rewrite(result, source, npu_dtype, cann, norms=fused, fixed=opset is not None)
        form.refuse_unfit(work, target)
        form.refuse_short(stash.values())
        _seal(work, source, target, binding, portable=portable)
        _restore(work, stash)
    return result


def _check_limit(limit: int, model: ModelProto) -> None:
    if not MIN_OPSET <= limit <= MAX_OPSET:
        raise UsageError(f"opset {limit}: CANN's parser takes {MIN_OPSET}..{MAX_OPSET}")
    source = max((i.version for i in model.opset_import if i.domain in ("", "ai.onnx")), default=0)
    if source > limit and limit < MAX_OPSET:
        raise UsageError(
            f"opset {limit}: the model uses {source}; only {MAX_OPSET} can be made of it"
        )


def _rewrite(
    result: AtcModel,
    source: int,
    npu_dtype: str | None,
    cann: str | None,
    *,
    norms: bool,
    fixed: bool,
) -> int:
    """All passes, in the order they rest on each other; returns the opset of the result."""
    work, names = result.model, Names(result.model)
    result.renamed = form.name_nodes(work.graph, names)
    _note(result, form.name_outputs(work.graph, names), "empty output name", "removed")
    _note(
        result,
        write_numbers(work.graph),
        "dim that is a number",
        "written as such",
        many="dims that are numbers",
    )
    facts = Facts.of(work)
    result.notes += to_opset(work, source, names, facts)
    _note(result, form.lift_initializers(work, names), "initializer", "moved or made dense")
    target = min(source, MAX_OPSET)
    if norms:
        result.notes += fuse_norms(work, names, facts, target)
    target = target if fixed else best_opset(work.graph, cann, target)
    repairs = (
        *REPAIRS,
        *PARSER_REPAIRS,
        readable_norms,
        readable_scatters(cann),
        readable_reductions(cann),
    )
    if rewritten := apply(work, repairs, facts, names, target):
        nodes = "1 node" if rewritten == 1 else f"{rewritten} nodes"
        result.notes.append(f"rewrote {nodes} that the parser would misread")
    behind = apply(work, (sinks_behind,), facts, names, target)
    _note(result, behind, "sink", "written as a factor behind the operator")
    heads = apply(work, (padded_indexer,), facts, names, target)
    padding = "padded with zeros: CANN's kernel takes 64 heads of 128 columns"
    _note(result, heads, "indexer", padding)
    result.notes += pad_attention(work, facts, names, target, narrow=npu_dtype is not None)
    ours = ToAtc(result.binding, npu_dtype, result.notes)
    apply(work, (ours,), facts, names, target)
    result.notes += narrow_rows(work, ours.wide, facts, names)
    padded = apply(work, (PaddedWrites(),), facts, names, target)
    _note(result, padded, "cache write", "whose padding repeats a token that has a slot")
    _move_vendor_nodes(work.graph)
    tied = form.feed_constant_outputs(work, names, facts, target)
    result.notes += [f"output {name}: constants only, tied to an input" for name in tied]
    _note(
        result,
        form.clean_external_data(work),
        "external_data entry",
        "cleaned",
        many="external_data entries",
    )
    return target


@door
def from_atc(model: ModelProto) -> ModelProto:
    """The canonical flavour of an ATC model: our operators back in their own domains.

    Rewrites made for the parser stay (they mean the same), but for the zeros around indexers; every
    attribute is written, the exact scale included. A model that shipped our operators' bodies gets
    them again.

    Raises:
        ModelError: the model breaks the format's rules, or imports no default domain.
        ContractError: a node of ours carries what has no canonical form.
    """
    from sfa_onnx.runtime.portable.model import with_bodies
    from sfa_onnx.runtime.portable.norms import add_norm_bodies

    work, stash = _without_weights(load_model(model))
    form.one_domain(work.graph)
    opset = _opset(work)
    names = Names(work)
    apply(work, (FromAtc(),), Facts(), names, opset)
    unpad_indexers(work, names, opset)
    domains = {d: 1 for d in (DOMAIN_NPU, DOMAIN_OWN) if d in _domains(work.graph)}
    kept = {i.domain: i.version for i in work.opset_import if i.domain not in ("", "ai.onnx")}
    del work.opset_import[:]
    for domain, version in {"": opset, **kept, **domains}.items():
        work.opset_import.add(domain=domain, version=version)
    story = _story(work)
    work.ir_version = story.get("ir_version_before", work.ir_version)
    _set_metadata(work, None)
    if story.get("portable"):
        work = with_bodies(work)
    add_norm_bodies(work)
    _restore(work, stash)
    return work


@door
def is_atc(model: ModelProto) -> bool:
    """Whether a model has the ATC flavour: one default import, and our nodes (if any) in it."""
    imports = {i.domain or "ai.onnx" for i in model.opset_import}
    return imports == {"ai.onnx"} and not model.functions


def _note(result: AtcModel, count: int, what: str, done: str, *, many: str = "") -> None:
    """'1 sink written ...', '2 sinks written ...', where there are any."""
    if count:
        noun = what if count == 1 else many or f"{what}s"
        result.notes.append(f"{count} {noun} {done}")


def _opset(model: ModelProto) -> int:
    versions = {i.version for i in model.opset_import if i.domain in ("", "ai.onnx")}
    if not versions and "" not in _domains(model.graph):
        return MAX_OPSET  # only nodes of ours: any opset will do
    if len(versions) != 1:
        raise ModelError(
            f"the model imports the default domain as {sorted(versions)}; expected one"
        )
    return int(versions.pop())


def _refuse_old(model: ModelProto, opset: int) -> None:
    ours = any(is_ours(node) for node in model.graph.node)
    if opset < (MIN_OPSET if ours else 8):
        raise ModelError(
            f"the model uses opset {opset}; CANN's parser and our plug-in take"
            f" {MIN_OPSET}..{MAX_OPSET}: export it again at opset {MAX_OPSET}"
        )


def _inline(model: ModelProto) -> ModelProto:
    """Inline model functions; bodies of our own operators (portable form) are simply dropped."""
    rest = [f for f in model.functions if (f.domain, f.name) not in _OWN | NORM_KEYS]
    del model.functions[:]
    if not rest:
        return model
    model.functions.extend(rest)
    inlined = inline(model)
    form.one_domain(inlined.graph)
    return inlined


def _domains(graph: GraphProto) -> set[str]:
    found = set()
    for node in graph.node:
        found.add(node.domain)
        for inner in inner_graphs(node):
            found |= _domains(inner)
    return found


def _move_vendor_nodes(graph: GraphProto) -> None:
    """`npu` operators with built-in plug-ins share the default domain; other domains cannot."""
    for node in graph.node:
        if node.domain == DOMAIN_NPU and node.op_type.startswith("NPU"):
            node.domain = ""
        if node.domain:
            raise ModelError(
                f"node {node.name!r}: {node.op_type} in domain {node.domain!r}; CANN's parser takes"
                " a single domain up to 9.1 and has no plug-in for this one. Replace the node by"
                " standard operators, e.g. export without the optimiser that introduced it"
            )
        for inner in inner_graphs(node):
            _move_vendor_nodes(inner)


def _seal(model: ModelProto, source: int, target: int, binding: str, *, portable: bool) -> None:
    del model.opset_import[:]
    model.opset_import.add(domain="", version=target)
    ours = any(is_ours(node) for node in model.graph.node)
    story = {"flavour": "atc", "opset_before": source, "ir_version_before": model.ir_version}
    story |= {"binding": binding} if ours else {}
    story |= {"portable": True} if portable else {}
    model.ir_version = _IR_VERSION
    _set_metadata(model, json.dumps(story))


def _story(model: ModelProto) -> dict[str, Any]:
    text = next((p.value for p in model.metadata_props if p.key == FLAVOUR_KEY), "{}")
    try:
        story = parsed(text)
    except ValueError:
        return {}
    return story if isinstance(story, dict) else {}


def _set_metadata(model: ModelProto, text: str | None) -> None:
    kept = [(p.key, p.value) for p in model.metadata_props if p.key != FLAVOUR_KEY]
    del model.metadata_props[:]
    for key, value in kept + ([(FLAVOUR_KEY, text)] if text else []):
        model.metadata_props.add(key=key, value=value)


def _without_weights(model: ModelProto) -> tuple[ModelProto, dict[str, TensorProto]]:
    """A working copy whose large embedded initializers are stubs, and the tensors set aside."""
    stash = {t.name: t for t in model.graph.initializer if len(t.raw_data) > _LARGE}
    if not stash:
        copy = ModelProto()
        copy.CopyFrom(model)
        return copy, stash
    copy = ModelProto()
    for fd, value in model.ListFields():
        if fd.name == "graph":
            continue
        if fd.is_repeated:
            getattr(copy, fd.name).extend(value)
        else:
            setattr(copy, fd.name, value)
    for fd, value in model.graph.ListFields():
        if fd.name == "initializer":
            copy.graph.initializer.extend(_stub(t) if t.name in stash else t for t in value)
        elif fd.is_repeated:
            getattr(copy.graph, fd.name).extend(value)
        else:
            setattr(copy.graph, fd.name, value)
    return copy, stash


def _stub(tensor: TensorProto) -> TensorProto:
    stub = TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
    stub.data_location = TensorProto.EXTERNAL
    stub.external_data.add(key="location", value=_ASIDE + tensor.name)
    return stub


def _restore(model: ModelProto, stash: dict[str, TensorProto]) -> None:
    for tensor in model.graph.initializer:
        if tensor.external_data and tensor.external_data[0].value.startswith(_ASIDE):
            name = tensor.name  # may have been renamed
            tensor.CopyFrom(stash[tensor.external_data[0].value.removeprefix(_ASIDE)])
            tensor.name = name
