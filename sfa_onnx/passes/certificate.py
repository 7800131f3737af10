"""Proof of what a fusion changed and what it did not: hashes of every part, before and after.

The untouched part is computed, not claimed: a node is untouched when both files hold a node with
the same first output and the same bytes. `check_certificate` repeats that from the two files, and
reads back the weights that were materialised.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import onnx

from sfa_onnx.errors import ModelError, UsageError, WeightsError
from sfa_onnx.files.external import StorageReader, iter_tensors
from sfa_onnx.files.json_form import form_problem, parsed
from sfa_onnx.files.model import atomic_write, hash_message, load_model, paused_gc
from sfa_onnx.files.weights_file import digest_of
from sfa_onnx.guard.doors import door
from sfa_onnx.passes.graph.index import GraphIndex
from sfa_onnx.passes.graph.order import put_in_order
from sfa_onnx.passes.graph.sub_graphs import bodies
from sfa_onnx.report import FuseReport, to_json
from sfa_onnx.version import __version__

__all__ = [
    "CertificateCheck",
    "Changes",
    "Snapshot",
    "check_certificate",
    "compare_snapshots",
    "make_certificate",
    "snapshot",
    "untouched",
    "write_certificate",
]

_VERSION = 2  # 2: nodes of bodies one by one, and materialised weights


@dataclass(frozen=True)
class Snapshot:
    """Hashes of everything in a model.

    Attributes:
        nodes: first output -> hash, in graph order; "y.then_branch/x" makes x in a body.
        initializers: name -> hash (external tensors: of the pointer).
        values: value_info and quantisation annotations, "kind name" -> hash.
        other: inputs, outputs, functions, metadata, header: field -> hash.
    """

    nodes: dict[str, str] = field(default_factory=dict)
    initializers: dict[str, str] = field(default_factory=dict)
    values: dict[str, str] = field(default_factory=dict)
    other: dict[str, str] = field(default_factory=dict)


_FORM: Final = {  # what a reader of a certificate looks at
    "difference": {str: None},
    "added_nodes": {str: str},
    "inlined": [(str, str)],
    "?taken": [str],
    "?joined": [str],
    "materialized": [{"made": {str: str}}],
    "sites": [{"?removed": [str]}],
}


@dataclass(frozen=True)
class Changes:
    """How two snapshots differ; `moved` nodes are untouched but in another order."""

    untouched_nodes: int
    untouched_initializers: int
    removed_nodes: tuple[str, ...]
    added_nodes: tuple[str, ...]
    moved_nodes: tuple[str, ...]
    removed_initializers: tuple[str, ...]
    added_initializers: tuple[str, ...]
    removed_values: tuple[str, ...]
    added_values: tuple[str, ...]
    changed_fields: tuple[str, ...]
    untouched_hash: str


@dataclass(frozen=True)
class CertificateCheck:
    """Whether a certificate describes two files; `problems` says where it does not."""

    holds: bool
    problems: tuple[str, ...]
    difference: Changes


def snapshot(model: onnx.ModelProto) -> Snapshot:
    """Hash every part of a model, nodes of bodies one by one."""
    graph = model.graph
    found = Snapshot()
    with paused_gc():
        _add_graph(found, graph, "")
    found.other.update(
        inputs=_hash_all(graph.input),
        outputs=_hash_all(graph.output),
        sparse_initializers=_hash_all(graph.sparse_initializer),
        functions=_hash_all(model.functions),
        opset_import=_hash_all(sorted(model.opset_import, key=lambda o: o.domain)),
        metadata=_hash_all([*model.metadata_props, *graph.metadata_props]),
        header=_hash_text(
            model.ir_version,
            model.producer_name,
            model.producer_version,
            model.domain,
            model.model_version,
            model.doc_string,
            graph.name,
            graph.doc_string,
        ),
    )
    return found


def _add_graph(found: Snapshot, graph: onnx.GraphProto, path: str) -> None:
    """Hash a graph's parts; those of a body are distinguished by the path to it."""
    for i, node in enumerate(graph.node):
        key = path + _key(node, i)
        inner = bodies(node)
        found.nodes[key] = _hash_shell(node) if inner else hash_message(node)
        for name, body in inner.items():
            _add_graph(found, body, f"{key}.{name}/")
            found.other[f"{key}.{name}"] = _hash_text(
                body.name,
                body.doc_string,
                *(_hash_all(part) for part in (body.input, body.output, body.metadata_props)),
                _hash_all(body.sparse_initializer),
            )
    for tensor in graph.initializer:
        found.initializers[path + tensor.name] = hash_message(tensor)
    for info in graph.value_info:
        found.values[f"value_info {path}{info.name}"] = hash_message(info)
    for note in graph.quantization_annotation:
        found.values[f"quantization_annotation {path}{note.tensor_name}"] = hash_message(note)


def _hash_shell(node: onnx.NodeProto) -> str:
    """Hash of a node without the contents of its bodies."""
    graphs = (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)
    fields = [(f.name, repr(v)) for f, v in node.ListFields() if f.name != "attribute"]
    return _hash_text(
        fields,
        [a.name for a in node.attribute],
        _hash_all(a for a in node.attribute if a.type not in graphs),
    )


def _key(node: onnx.NodeProto, position: int) -> str:
    """A node's identity: its first output; unique in a valid graph."""
    return next((o for o in node.output if o), f"#{position}")


def _hash_all(messages: Iterable[Any]) -> str:
    return _hash_text(*(hash_message(m) for m in messages))


def _hash_text(*parts: object) -> str:
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()


def compare_snapshots(before: Snapshot, after: Snapshot) -> Changes:
    """What stayed, went and came."""
    same = {key for key, value in before.nodes.items() if after.nodes.get(key) == value}
    order_before = [key for key in before.nodes if key in same]
    order_after = [key for key in after.nodes if key in same]
    moved = [a for a, b in zip(order_before, order_after, strict=True) if a != b]
    tensors = [n for n, h in before.initializers.items() if after.initializers.get(n) == h]
    return Changes(
        untouched_nodes=len(same),
        untouched_initializers=len(tensors),
        removed_nodes=tuple(k for k in before.nodes if k not in same),
        added_nodes=tuple(k for k in after.nodes if k not in same),
        moved_nodes=tuple(moved),
        removed_initializers=_gone(before.initializers, after.initializers),
        added_initializers=_gone(after.initializers, before.initializers),
        removed_values=_gone(before.values, after.values),
        added_values=_gone(after.values, before.values),
        changed_fields=tuple(k for k, h in before.other.items() if after.other.get(k) != h),
        untouched_hash=_hash_text(
            [(k, before.nodes[k]) for k in order_before],
            sorted((n, before.initializers[n]) for n in tensors),
        ),
    )


def _gone(first: dict[str, str], second: dict[str, str]) -> tuple[str, ...]:
    """Names of `first` that `second` lacks or holds with other bytes."""
    return tuple(name for name, value in first.items() if second.get(name) != value)


@door
def make_certificate(report: FuseReport, before: Snapshot) -> dict[str, Any]:
    """The certificate of a fusion, ready for JSON.

    Args:
        report: the outcome, with the fused model.
        before: the snapshot of the model before splicing.
    """
    after = snapshot(report.model)
    difference = compare_snapshots(before, after)
    kept = set(before.nodes) - set(difference.removed_nodes)
    return {
        "version": _VERSION,
        "tool": f"sfa_onnx {__version__}",
        "difference": to_json(difference),
        "untouched_nodes": {k: h for k, h in before.nodes.items() if k in kept},
        "untouched_initializers": {
            n: h for n, h in before.initializers.items() if after.initializers.get(n) == h
        },
        "added_nodes": {k: after.nodes[k] for k in difference.added_nodes},
        "weights_bytes_read": report.weights_bytes_read,
        "materialized": to_json(report.materialized),
        "inlined": to_json(report.inlined),
        "taken": to_json(report.taken),
        "joined": to_json(report.joined),
        "assumed": to_json(report.assumed),
        "sites": to_json([*report.sites, *report.selections]),
        "notes": to_json(report.notes),
    }


@door
def write_certificate(
    certificate: dict[str, Any], path: str | os.PathLike[str], *, force: bool = False
) -> Path:
    """Write a certificate as JSON, atomically."""
    target = Path(path)
    atomic_write(target, (json.dumps(certificate, indent=1) + "\n").encode(), force=force)
    return target


@door
def check_certificate(
    path: str | os.PathLike[str],
    before: str | os.PathLike[str] | onnx.ModelProto,
    after: str | os.PathLike[str] | onnx.ModelProto,
) -> CertificateCheck:
    """Recompute a certificate from the two models it speaks of.

    Raises:
        UsageError: the file is not a certificate of this version.
    """
    stated = _read(Path(path))
    from sfa_onnx.passes.graph.attention_caches import join_caches
    from sfa_onnx.passes.graph.constant_ifs import take_branches
    from sfa_onnx.passes.graph.functions import inline_functions

    functions = [(domain, name) for domain, name in stated["inlined"]]
    original = inline_functions(load_model(before), functions).model
    original = take_branches(original, stated.get("taken", ()))
    original = join_caches(original, stated.get("joined", ()))
    if not GraphIndex.of(original).ordered:
        original = onnx.ModelProto.FromString(original.SerializeToString())
        put_in_order(original.graph)
    changed = load_model(after)
    fused = snapshot(changed)
    difference = compare_snapshots(snapshot(original), fused)
    problems = _problems(stated, difference, fused)
    folder = None if isinstance(after, onnx.ModelProto) else Path(after).parent
    problems += _wrong_weights(stated, changed, StorageReader(folder))
    return CertificateCheck(not problems, tuple(problems), difference)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UsageError(f"{path}: the certificate does not exist")
    try:
        stated = parsed(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{path}: not a certificate: {error}") from error
    if not isinstance(stated, dict) or stated.get("version") != _VERSION:
        raise UsageError(f"{path}: not a certificate of version {_VERSION}")
    if problem := form_problem(stated, _FORM):
        raise UsageError(f"{path}: not a certificate: {problem}; write it again with fuse")
    return dict(stated)


def _problems(stated: dict[str, Any], found: Changes, fused: Snapshot) -> list[str]:
    """Where the certificate and the files disagree."""
    problems = []
    claims = stated["difference"]
    for name, value in to_json(found).items():
        if claims.get(name) != value:
            problems.append(
                f"{name}: the certificate says {_short(claims.get(name))}, the files"
                f" say {_short(value)}"
            )
    hashes = stated["added_nodes"]
    for key in dict.fromkeys((*hashes, *found.added_nodes)):
        if key not in hashes or fused.nodes.get(key) != hashes[key]:
            problems.append(f"the fused node that makes {key!r} was changed after fusing")
    if found.moved_nodes:
        problems.append(f"{len(found.moved_nodes)} untouched nodes are in another order")
    removed = {name for site in stated["sites"] for name in site.get("removed", ())}
    if found.removed_nodes and not removed:
        problems.append("nodes were removed, but no site claims them")
    return problems


def _wrong_weights(
    stated: dict[str, Any], model: onnx.ModelProto, reader: StorageReader
) -> list[str]:
    """Materialised weights whose bytes are not those the certificate speaks of."""
    tensors = {tensor.name: tensor for tensor in iter_tensors(model)}
    problems = []
    for item in stated["materialized"]:
        for name, digest in item["made"].items():
            try:
                found = digest_of(reader.weight(tensors[name]))
            except (KeyError, WeightsError) as error:
                problems.append(f"the weight {name!r} cannot be read: {error}")
                continue
            if found != digest:
                problems.append(f"the weight {name!r} holds other bytes than were written")
    return problems


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 100 else text[:97] + "..."


def untouched(before: Snapshot, after: Snapshot) -> str:
    """The note that proves what stayed; a moved node would be a fault of ours.

    Raises:
        ModelError: an untouched node changed its place.
    """
    difference = compare_snapshots(before, after)
    if difference.moved_nodes:
        raise ModelError(f"splicing moved the node that makes {difference.moved_nodes[0]!r}")
    return (
        f"untouched: {difference.untouched_nodes} nodes and {difference.untouched_initializers}"
        " initializers, equal by hash and in order"
    )
