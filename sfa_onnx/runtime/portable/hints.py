"""What a body of standard nodes says of itself: which operator it is, and how it was written.

The hint is the doc string of the nodes that make the body's results, which tools copy with the node
whatever they do to names. It is only a hint: `restore` writes the body anew and compares.
"""

from __future__ import annotations

import json
from typing import Any, Final

from onnx import NodeProto

from sfa_onnx.files.json_form import parsed

__all__ = ["read_hint", "write_hint"]

_MARK: Final = "sfa_onnx body: "


def write_hint(node: NodeProto, told: dict[str, Any], output: int) -> None:
    """Note on `node` that it makes this output of the body that `told` describes."""
    node.doc_string = _MARK + json.dumps(told | {"output": output}, sort_keys=True)


def read_hint(node: NodeProto) -> dict[str, Any] | None:
    """What a node says of the body it ends; None for any other node."""
    if not node.doc_string.startswith(_MARK):
        return None
    try:
        told = parsed(node.doc_string[len(_MARK) :])
    except ValueError:
        return None
    return told if isinstance(told, dict) else None
