"""What a node's name and metadata say about where it came from: the site, the torch module."""

from __future__ import annotations

import ast
from typing import Final

import onnx

__all__ = ["SITE", "layer_of", "site_of"]

SITE: Final = "/sfa"  # behind a site's name in the names of all nodes and values that replace it


def site_of(name: str) -> str:
    """The site that a node stands for, by the node's name; of other nodes, the name as it is.

    A site is called what its anchor was called, in reports, plans and certificates and in every
    verb: "layers.3/Softmax/sfa/NPUSparseFlashAttention_4" belongs to "layers.3/Softmax".
    """
    return name.partition(f"{SITE}/")[0]


def layer_of(node: onnx.NodeProto) -> str:
    """The torch module a node came from ("model.layers.3.self_attn"); "" when unknown.

    dynamo exports write it in `metadata_props`, TorchScript exports in node-name paths.
    """
    props = {p.key: p.value for p in node.metadata_props}
    if scopes := props.get("pkg.torch.onnx.name_scopes"):
        return _module_of_scopes(scopes)
    if namespace := props.get("namespace"):
        parts = [p.split(":")[0].strip() for p in namespace.split("/")[:-1]]
        return parts[-1] if parts else ""
    name = site_of(node.name)
    return ".".join(name.strip("/").split("/")[:-1]) if "/" in name else ""


def _module_of_scopes(scopes: str) -> str:
    try:
        parts = ast.literal_eval(scopes)
    except (ValueError, SyntaxError):
        return ""
    return str(parts[-2]) if isinstance(parts, list) and len(parts) > 1 else ""
