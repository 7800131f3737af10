"""New rows into pages: each goes to its slot, and tokens without one are not written.

Serving engines pad a batch and give the padding a negative slot, which `KvCacheWrite` skips; the
ATC flavour replaces it where the NPU operator does not.
"""

from __future__ import annotations

from sfa_onnx.kv_convert.emit import Emitter
from sfa_onnx.kv_convert.interface import SLOT_MAPPING
from sfa_onnx.operator.op import DOMAIN_OWN, KV_CACHE_WRITE

__all__ = ["write_pages"]


def write_pages(emit: Emitter, pages: str, rows: str, row_bytes: int) -> str:
    """Rows [B, S1, 1, D] into pages [block_num, block_size, 1, D] at `slot_mapping` [B * S1].

    A run-time that gives input and output the same buffer moves the new rows only.
    """
    new = emit.op("Reshape", [rows, emit.constant([-1, 1, row_bytes])])
    return emit.op(KV_CACHE_WRITE.name, [pages, new, SLOT_MAPPING], "pages", DOMAIN_OWN)
