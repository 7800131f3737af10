"""What a caller asserts about a model's inputs, because no file can carry it.

A float mask that enters the graph may be a bias. Who knows better says so, by name:
`two-valued:attention_mask` is the assertion that this input holds 0 and numbers of -1e4 or less
(-inf included). Nothing is assumed unasked; what was stands in the record, the certificate, the
report, and in the fused model, so that `compare` draws such masks.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import onnx

from sfa_onnx.errors import UsageError

__all__ = ["METADATA", "assumed_masks", "note_assumptions", "two_valued"]

METADATA: Final = "sfa_onnx.assume"
_KIND: Final = "two-valued"


def two_valued(assume: Iterable[str], graph: onnx.GraphProto) -> frozenset[str]:
    """The inputs that `two-valued:NAME` entries name.

    Raises:
        UsageError: an entry of another form, or a name that is no float input of the graph.
    """
    floats = {
        v.name
        for v in graph.input
        if v.type.tensor_type.elem_type
        in (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
    }
    found = set()
    for entry in assume:
        kind, _, name = entry.partition(":")
        if kind != _KIND or not name:
            raise UsageError(f"assume={entry!r}: expected '{_KIND}:NAME', NAME an input")
        if name not in floats:
            known = ", ".join(sorted(floats)) or "none"
            raise UsageError(
                f"assume={entry!r}: the model has no float input {name!r} (float inputs: {known})"
            )
        found.add(name)
    return frozenset(found)


def note_assumptions(model: onnx.ModelProto, assume: Iterable[str]) -> None:
    """Write into a model what was assumed of its inputs."""
    entries = sorted({*assumed_entries(model), *assume})
    if not entries:
        return
    kept = [p for p in model.metadata_props if p.key != METADATA]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    model.metadata_props.add(key=METADATA, value=" ".join(entries))


def assumed_entries(model: onnx.ModelProto) -> list[str]:
    """The entries that a model carries."""
    return next((p.value.split() for p in model.metadata_props if p.key == METADATA), [])


def assumed_masks(model: onnx.ModelProto) -> frozenset[str]:
    """Inputs of a model that were assumed to be masks of two values."""
    return frozenset(e.partition(":")[2] for e in assumed_entries(model))
