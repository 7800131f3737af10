"""What a caller asserts about a model's inputs, because no file can carry it.

A float mask that enters the graph may be a bias. Who knows better says so, by name:
`two-valued:attention_mask` is the assertion that this input holds 0 and numbers of -1e4 or less
(-inf included); `zero-one:attention_mask`, that it holds 0 and 1, as `(1 - mask) * low` expects;
`not-negative:key_scale`, that a scale of an indexer's keys holds no negative number.
Nothing is assumed unasked; what was stands in the record, the certificate, the report, and in the
fused model, so that `compare` draws such inputs.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import onnx

from sfa_onnx.errors import UsageError
from sfa_onnx.passes.candidate import Candidate

__all__ = ["FLAGS", "MASKS", "METADATA", "SCALES", "asserted", "assumed_inputs",
           "note_assumptions", "scales_of"]  # fmt: skip

METADATA: Final = "sfa_onnx.assume"
MASKS: Final = "two-valued"  # 0 and -1e4 or less
FLAGS: Final = "zero-one"  # 0 and 1
SCALES: Final = "not-negative"  # 0 and more
_T = onnx.TensorProto
_FLOATS: Final = (_T.FLOAT, _T.FLOAT16, _T.BFLOAT16)
_INTEGERS: Final = (_T.INT64, _T.INT32, _T.INT16, _T.INT8, _T.UINT8)
_TYPES: Final = {
    MASKS: ("float", _FLOATS),
    FLAGS: ("float or integer", _FLOATS + _INTEGERS),
    SCALES: ("float", (*_FLOATS, _T.DOUBLE)),
}


def asserted(assume: Iterable[str], graph: onnx.GraphProto) -> dict[str, frozenset[str]]:
    """The inputs that entries such as `two-valued:NAME` name, by kind.

    Raises:
        UsageError: an entry of another form, or a name that is no input of a type that can be so.
    """
    types = {v.name: v.type.tensor_type.elem_type for v in graph.input}
    found: dict[str, set[str]] = {kind: set() for kind in _TYPES}
    for entry in assume:
        kind, _, name = entry.partition(":")
        if kind not in _TYPES or not name:
            forms = " or ".join(f"'{k}:NAME'" for k in _TYPES)
            raise UsageError(f"assume={entry!r}: expected {forms}, NAME an input")
        what, fitting = _TYPES[kind]
        if types.get(name) not in fitting:
            known = ", ".join(sorted(n for n, t in types.items() if t in fitting)) or "none"
            raise UsageError(
                f"assume={entry!r}: the model has no {what} input {name!r} ({what} inputs: {known})"
            )
        found[kind].add(name)
    return {kind: frozenset(names) for kind, names in found.items()}


def note_assumptions(model: onnx.ModelProto, assume: Iterable[str]) -> None:
    """Write into a model what was assumed of its inputs."""
    entries = sorted({*assumed_entries(model), *assume})
    if not entries:
        return
    kept = [p for p in model.metadata_props if p.key != METADATA]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    model.metadata_props.add(key=METADATA, value=" ".join(entries))


def scales_of(model: onnx.ModelProto, taken: Iterable[Candidate]) -> list[str]:
    """Entries for the inputs of a model that fused candidates take for scales of keys in int8.

    No caller said so; that a scale is not negative is what quantisers see to. The entries make
    `compare` draw such inputs, as the ones that were said do.
    """
    inputs = {v.name for v in model.graph.input}
    found = dict.fromkeys(n for c in taken for n in c.scales if n in inputs)
    return [f"{SCALES}:{name}" for name in found]


def assumed_entries(model: onnx.ModelProto) -> list[str]:
    """The entries that a model carries."""
    return next((p.value.split() for p in model.metadata_props if p.key == METADATA), [])


def assumed_inputs(model: onnx.ModelProto, kind: str) -> frozenset[str]:
    """Inputs of a model that were assumed to be of a kind."""
    entries = (e.partition(":") for e in assumed_entries(model))
    return frozenset(name for own, _, name in entries if own == kind)
