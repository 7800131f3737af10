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
    shapes: Iterable[tuple[int, ...]],
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
        domain = operand.domain
        facts = (operand.role, operand.axes, operand.elem_type, domain.distinct, domain.low)
        limits = (domain.high, domain.negative_allowed, domain.valid_first, domain.values)
        digest.update(repr((facts, limits, domain.sorted_descending)).encode())
    digest.update(repr((candidate.op.key, list(shapes))).encode())
    for model in (region, replacement, *masks):
        _add_model(digest, model, names)
    return digest.hexdigest()


def _add_model(digest: hashlib.blake2b, model: onnx.ModelProto, names: dict[str, int]) -> None:
    """Wiring by order of appearance, everything else by value."""
    constants = {t.name: t for t in model.graph.initializer}
    for node in model.graph.node:
        digest.update(f"{node.domain}::{node.op_type}".encode())
        for attribute in sorted(node.attribute, key=lambda a: a.name):
            digest.update(attribute.SerializeToString())
        for name in node.input:
            if name in constants and name not in names:
                tensor = onnx.TensorProto()
                tensor.CopyFrom(constants[name])
                tensor.ClearField("name")
                digest.update(tensor.SerializeToString())
            digest.update(repr(names.setdefault(name, len(names)) if name else -1).encode())
        for name in node.output:
            digest.update(repr(names.setdefault(name, len(names)) if name else -1).encode())
    digest.update(repr([names.get(o.name) for o in model.graph.output]).encode())
