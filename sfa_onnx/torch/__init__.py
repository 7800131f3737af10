"""Optional torch side: the operators as `torch.ops.sfa_onnx.*`, and their export to ONNX.

    import sfa_onnx.torch
    out = torch.ops.sfa_onnx.npu_sparse_flash_attention_antiquant(query, key, key, indices, ...)
    torch.onnx.export(model, args, dynamo=True,
                      custom_translation_table=sfa_onnx.torch.translation_table())

Needs `pip install 'sfa-onnx[torch]'`; nothing else of the package imports torch.
"""

from __future__ import annotations

import importlib.util

from sfa_onnx.errors import MissingError

if importlib.util.find_spec("torch") is None:
    raise MissingError("sfa_onnx.torch needs torch: pip install 'sfa-onnx[torch]'")

from sfa_onnx.torch.exporting import export, register_symbolics, translation_table
from sfa_onnx.torch.names import enable_ascend_names
from sfa_onnx.torch.ops import OPERATORS, schema_of

__all__ = [
    "OPERATORS",
    "enable_ascend_names",
    "export",
    "register_symbolics",
    "schema_of",
    "translation_table",
]
