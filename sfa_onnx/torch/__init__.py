"""Optional torch side: the operators as `torch.ops.sfa_onnx.*`, and their export to ONNX.

    import sfa_onnx.torch
    out = torch.ops.sfa_onnx.npu_sparse_flash_attention_antiquant(query, key, key, indices, ...)
    torch.onnx.export(model, args, dynamo=True,
                      custom_translation_table=sfa_onnx.torch.translation_table())

Needs `pip install 'sfa-onnx[torch]'`; nothing else of the package imports torch.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from typing import Any

from sfa_onnx.errors import MissingError

if "sfa_onnx.torch.on_cpu" in sys.orig_argv:
    # `import torch` loads an installed torch_npu by itself, and fails where it finds no CANN.
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"

if importlib.util.find_spec("torch") is None:
    raise MissingError("sfa_onnx.torch needs torch: pip install 'sfa-onnx[torch]'")

from sfa_onnx.torch.exporting import export, register_symbolics, translation_table
from sfa_onnx.torch.names import enable_ascend_names, owners
from sfa_onnx.torch.ops import OPERATORS, schema_of
from sfa_onnx.torch.patch import patch_attention, unpatch_attention

__all__ = [
    "OPERATORS",
    "PagedInt8Cache",
    "enable_ascend_names",
    "export",
    "owners",
    "patch_attention",
    "register_symbolics",
    "schema_of",
    "translation_table",
    "unpatch_attention",
]


def __getattr__(name: str) -> Any:
    """`PagedInt8Cache` is made when asked for: it derives from a class of transformers."""
    if name != "PagedInt8Cache":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from sfa_onnx.torch.paged_cache import PagedInt8Cache
    except ImportError as error:
        raise MissingError("PagedInt8Cache needs transformers >= 5.20") from error
    return PagedInt8Cache
