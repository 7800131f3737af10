"""What the NPU kernel would reject at a site that is mathematically the operator."""

from __future__ import annotations

from typing import Any

import onnx

from sfa_onnx.files.onnx_attrs import attributes
from sfa_onnx.operator.contract import INT8, OpContract
from sfa_onnx.operator.op import KV_CACHE_PACK, LIGHTNING_INDEXER, NPU
from sfa_onnx.passes.candidate import Candidate, Role

__all__ = ["npu_limits"]


def npu_limits(candidate: Candidate) -> tuple[str, ...]:
    """One sentence per limit of `sfa_onnx.op.NPU` that the site exceeds; empty when none.

    Sizes that the file leaves open are not judged here; `check` sees the concrete ones.
    """
    found: list[str] = []
    for node in candidate.replacement:
        if (node.domain, node.op_type) == candidate.op.key:
            found += _attribute_limits(candidate.op, node)
        elif (node.domain, node.op_type) == KV_CACHE_PACK.key:
            found += _attribute_limits(KV_CACHE_PACK, node)
    return tuple(dict.fromkeys([*found, *_type_limits(candidate), *_size_limits(candidate)]))


def _attribute_limits(op: OpContract, node: onnx.NodeProto) -> list[str]:
    """Attributes with a value that the NPU does not take."""
    values = attributes(node)
    found = []
    for spec in op.attributes:
        value: Any = values.get(spec.name, spec.default)
        if spec.npu is not None and value not in spec.npu:
            legal = ", ".join(str(v) for v in spec.npu)
            found.append(f"{spec.name} is {value}; the NPU takes {legal}")
    return found


def _type_limits(candidate: Candidate) -> list[str]:
    """The query's type."""
    kinds = [o.elem_type for o in candidate.operands if o.role is Role.QUERY]
    if not kinds or kinds[0] == 0:
        return []
    name = onnx.TensorProto.DataType.Name(kinds[0]).lower()
    spelled = f"tensor({name})"
    if spelled in NPU.query_types or spelled == INT8:
        return []
    legal = ", ".join(t.removeprefix("tensor(").removesuffix(")") for t in NPU.query_types)
    return [f"the query is {name}; the NPU takes {legal}"]


def _indexer_limits(candidate: Candidate, sizes: dict[str, int]) -> list[str]:
    """Heads, width and count of an indexer."""
    if candidate.op is not LIGHTNING_INDEXER:
        return []
    found = []
    masks = (o for o in candidate.operands if o.role is Role.MASK)
    padded = any("S2" in "*".join(o.axes).split("*") for o in masks)
    if padded:
        found.append("padding is one more head and column of the indexer; the NPU has no such mask")
    if any(
        a.name == "layout_key" and a.s == b"PA_BSND"
        for n in candidate.replacement
        for a in n.attribute
    ):
        found.append("every query row is a sequence with one page of keys; the NPU bounds pages")
    for name, what, want in (
        ("Hi", "indexer heads", NPU.indexer_heads),
        ("Di", "columns per indexer key", NPU.indexer_dim),
    ):
        if (got := sizes.get(name)) is not None and got != want:
            found.append(f"{got} {what}; the NPU takes {want}")
    if sizes.get("K", 0) > NPU.sparse_count_max:
        found.append(f"{sizes['K']} keys are selected; the NPU takes {NPU.sparse_count_max}")
    return found


def _size_limits(candidate: Candidate) -> list[str]:
    """Head count, widths and page size, where they are known."""
    sizes = {k: v for k, v in candidate.sizes.items() if isinstance(v, int)}
    found = _indexer_limits(candidate, sizes)
    # Fewer heads than the kernel's next number and no rope at all: `atc` pads both, exactly.
    if (heads := sizes.get("N1")) is not None and heads > max(NPU.heads):
        legal = ", ".join(str(h) for h in NPU.heads)
        found.append(f"{heads} query heads; the NPU takes {legal}")
    for label, name, want in (("C", "nope width", NPU.nope), ("R", "rope width", NPU.rope)):
        if (got := sizes.get(label)) is not None and got != want and (label, got) != ("R", 0):
            found.append(f"{name} is {got}; the NPU takes {want}")
    page = sizes.get("page_size")
    if page is not None and (page % NPU.block_size_multiple or page > NPU.block_size_max):
        found.append(
            f"pages of {page} tokens; the NPU takes multiples of {NPU.block_size_multiple} up to"
            f" {NPU.block_size_max}"
        )
    return found
