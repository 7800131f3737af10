"""Equal sites: same structure, types, sizes, constants and provenance. Verified once."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import onnx

from sfa_onnx.passes.candidate import Candidate

__all__ = ["fingerprint"]


def fingerprint(
    candidate: Candidate,
    region: onnx.ModelProto,
    replacement: onnx.ModelProto,
    masks: Iterable[onnx.ModelProto],
    shapes: Iterable[tuple[str, ...]],
) -> str:
    """A hash that two sites share exactly when one verification holds for both.

    Covers operator types, attributes, wiring, constant values, operand roles, axes, types, domains
    (without the names of producers) and every known size, of the site, of its replacement and of
    the nodes that make its masks.
    """
    digest = hashlib.blake2b(digest_size=16)
    names: dict[str, int] = {}
    for operand in candidate.operands:
        names.setdefault(operand.value, len(names))
    for operand in candidate.operands:
        domain, axes = operand.domain, [_axis(axis, names) for axis in operand.axes]
        facts = (operand.role, axes, operand.elem_type, domain.distinct, domain.low)
        limits = (domain.high, domain.negative_allowed, domain.valid_first, domain.values)
        digest.update(repr((facts, limits, domain.sorted_descending)).encode())
    digest.update(repr((candidate.op.key, list(shapes))).encode())
    for model in (region, replacement, *masks):
        _add_model(digest, model, names)
    return digest.hexdigest()


def _axis(axis: str, names: dict[str, int]) -> str:
    """An axis' name; "D_of_x" without the name of x, which another layer's site calls otherwise."""
    kind, of, value = axis.partition("_of_")
    return f"{kind}{of}{names.get(value, '')}"


def _add_model(digest: hashlib.blake2b, model: onnx.ModelProto, names: dict[str, int]) -> None:
    """What the outputs are computed from; neither names nor the order of nodes count."""
    known = {name: f"operand {number}" for name, number in names.items()}
    for tensor in model.graph.initializer:
        if tensor.name not in names:
            known[tensor.name] = _hash(_unnamed(tensor))
    for node in model.graph.node:
        facts = [f"{node.domain}::{node.op_type}".encode()]
        facts += [a.SerializeToString() for a in sorted(node.attribute, key=lambda a: a.name)]
        facts += [known.get(name, name).encode() for name in node.input]
        for i, name in enumerate(node.output):
            known.setdefault(name, _hash(*facts, str(i).encode()))
    digest.update(repr([known.get(o.name) for o in model.graph.output]).encode())


def _unnamed(tensor: onnx.TensorProto) -> bytes:
    copy = onnx.TensorProto()
    copy.CopyFrom(tensor)
    copy.ClearField("name")
    return bytes(copy.SerializeToString())


def _hash(*parts: bytes) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()
