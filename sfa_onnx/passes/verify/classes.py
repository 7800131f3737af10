"""Equal sites: same structure, types, sizes, constants and provenance. Verified once."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable
from dataclasses import replace

import onnx

from sfa_onnx.passes.candidate import Candidate, Refusal
from sfa_onnx.passes.graph.index import GraphIndex
from sfa_onnx.passes.verify.assumptions import assumptions_of
from sfa_onnx.report import VerifyRecord

__all__ = ["Classes", "Verdict", "fingerprint"]

Verdict = VerifyRecord | Refusal


class Classes:
    """Verdicts on the sites of one graph: each class is judged once."""

    def __init__(self, index: GraphIndex) -> None:
        self._index = index
        self._known: dict[str, tuple[str, Verdict]] = {}

    def verdict(self, candidate: Candidate, key: str, judge: Callable[[], Verdict]) -> Verdict:
        """What `judge` says of the first site with this fingerprint, made out for this one."""
        shared = key in self._known
        if not shared:
            begin = time.monotonic()
            result = judge()
            if isinstance(result, VerifyRecord):
                result = replace(result, seconds=time.monotonic() - begin)
            self._known[key] = (self._index.label(candidate.anchor), result)
        first, known = self._known[key]
        if isinstance(known, Refusal):
            return known
        assumptions = (*assumptions_of(self._index, candidate), *known.assumptions)
        known = replace(known, assumptions=assumptions)
        return replace(known, shared_with=first, seconds=0.0) if shared else known


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
    """What the outputs are computed from; neither names nor the order of nodes count.

    Masks and indices are operands of their site, and outputs of the model that makes them: there
    it is what makes them that counts.
    """
    known = {name: f"operand {number}" for name, number in names.items()}
    free = (v for v in model.graph.input if v.name not in names)
    for number, value in enumerate(free):
        known[value.name] = f"input {number} {value.type.tensor_type.elem_type}"
    for tensor in model.graph.initializer:
        if tensor.name not in names:
            known[tensor.name] = _hash(_unnamed(tensor))
    for node in model.graph.node:
        facts = [f"{node.domain}::{node.op_type}".encode()]
        facts += [a.SerializeToString() for a in sorted(node.attribute, key=lambda a: a.name)]
        facts += [known.get(name, name).encode() for name in node.input]
        for i, name in enumerate(node.output):
            known[name] = _hash(*facts, str(i).encode())
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
