"""Evaluate our operators in float64 by `sfa_onnx.reference`, whatever types the model declares.

A packed row holds its rope in 16 bits and its scales in float32, so packing promoted values would
round them. Here `KvCachePack` therefore writes a *handle* into each row (the row's number in a
table of exact parts), and the attention looks the parts up. Reshapes and gathers in between move
handles exactly as they would move rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from sfa_onnx.errors import ContractError
from sfa_onnx.files.onnx_attrs import attributes
from sfa_onnx.operator import kv_cache, reference
from sfa_onnx.operator.op import (
    KV_CACHE_PACK,
    LIGHTNING_INDEXER,
    SPARSE_FLASH_ATTENTION,
    SPARSE_FLASH_ATTENTION_ANTIQUANT,
    PackedRow,
    find_op,
)

__all__ = ["Judge", "is_own"]

Array = NDArray[Any]


def is_own(node: onnx.NodeProto) -> bool:
    """Whether a node is one of our operators (standard runtimes cannot run it)."""
    return bool(node.domain) and find_op(node.domain, node.op_type) is not None


@dataclass
class Judge:
    """Runs one of our nodes on float64 values.

    Attributes:
        scale: multiplies the node's `scale_value`; 1 unless the scale is being calibrated.
        rope_dtype: type of the rope bytes in packed rows that the model itself holds.
        rope_itemsize: bytes per rope item of the rows that `KvCachePack` makes in this model.
    """

    scale: float = 1.0
    rope_dtype: Any = np.float32
    rope_itemsize: int = 2
    _parts: list[tuple[Array, Array]] = field(default_factory=list)

    def forget(self) -> None:
        """Drop the rows that were packed so far: another run begins."""
        self._parts.clear()

    def run(self, node: onnx.NodeProto, inputs: list[Array | None]) -> Array | tuple[Array, ...]:
        """The output of `node`, or all of them where it has several.

        Raises:
            ContractError: the inputs break the operator's contract (a real finding: the fused
                model would fail there).
        """
        contract = find_op(node.domain, node.op_type)
        values = attributes(node)
        if contract is KV_CACHE_PACK:
            return self._pack(values, inputs)
        if contract is LIGHTNING_INDEXER:
            return reference.lightning_indexer(*inputs, **values)  # type: ignore[arg-type]
        values["scale_value"] = float(values["scale_value"]) * self.scale
        if contract is SPARSE_FLASH_ATTENTION and values.get("return_softmax_lse"):
            return reference.sparse_flash_attention_lse(*inputs, **values)  # type: ignore[arg-type]
        if contract is SPARSE_FLASH_ATTENTION:
            return reference.sparse_flash_attention(*inputs, **values)  # type: ignore[arg-type]
        if contract is SPARSE_FLASH_ATTENTION_ANTIQUANT:
            return self._antiquant(values, inputs)
        raise ContractError(f"{node.op_type}: not an operator that verification can evaluate")

    def _pack(self, values: dict[str, Any], inputs: list[Array | None]) -> Array:
        """Rows of handles in place of packed bytes."""
        nope, rope, scale, clip = (*inputs, None, None, None)[:4]
        if nope is None or nope.dtype != np.int8 or scale is None or clip is not None:
            raise ContractError("KvCachePack: only exact packing (int8 and scales) is verified")
        tile = int(values.get("tile_size", 128))
        width = nope.shape[-1]
        parts = kv_cache.dequantise(nope, scale, np.float64).reshape(-1, width)
        ropes = np.zeros((len(parts), 0)) if rope is None else rope.reshape(len(parts), -1)
        row = PackedRow(width, ropes.shape[-1], tile, self.rope_itemsize if ropes.size else 2)
        base = sum(len(p) for p, _ in self._parts) + 1  # 0 stays "no handle"
        self._parts.append((parts, ropes.astype(np.float64)))
        packed = np.zeros((len(parts), row.bytes), np.int8)
        handles = np.arange(base, base + len(parts), dtype=np.int64)
        packed[:, :8] = handles.view(np.int8).reshape(-1, 8)
        return packed.reshape(*nope.shape[:-1], row.bytes)

    def _antiquant(
        self, values: dict[str, Any], inputs: list[Array | None]
    ) -> Array | tuple[Array, ...]:
        """The int8 operator; rows are handles when the model packs them, else real bytes."""
        if not self._parts:
            return reference.sparse_flash_attention_antiquant(
                *inputs,  # type: ignore[arg-type]
                **values,
                rope_dtype=self.rope_dtype,
            )
        place = [t.name for t in SPARSE_FLASH_ATTENTION_ANTIQUANT.inputs].index("sinks")
        sinks = inputs[place] if len(inputs) > place else None
        query, key, _, indices, _, _, *lengths = (*inputs, *[None] * 9)[:9]
        assert query is not None
        assert key is not None
        latents, ropes = (np.concatenate(p) for p in zip(*self._parts, strict=True))
        handles = np.ascontiguousarray(key[..., :8]).view(np.int64)[..., 0] - 1
        if (handles < 0).any() or (handles >= len(latents)).any():
            raise ContractError("key: rows that KvCachePack did not make reach the operator")
        width = latents.shape[-1]
        parts = [latents[handles], ropes[handles] if ropes.shape[-1] else None]
        rope_query = query[..., width:] if ropes.shape[-1] else None
        known = {a.name for a in SPARSE_FLASH_ATTENTION.attributes}
        rows = [rope_query, parts[1], sinks]
        inputs = [query[..., :width], parts[0], None, indices, *lengths[:3], *rows]
        return reference.sparse_flash_attention(
            *inputs,  # type: ignore[arg-type]
            **{k: v for k, v in values.items() if k in known},
        )
