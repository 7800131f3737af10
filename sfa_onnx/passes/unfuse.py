"""Back to standard operators: every operator of ours is replaced by its portable body."""

from __future__ import annotations

import os
from pathlib import Path

import onnx

from sfa_onnx.errors import UsageError
from sfa_onnx.model import load_model, save_model
from sfa_onnx.op import find_op
from sfa_onnx.passes.index import GraphIndex
from sfa_onnx.report import FuseReport, SiteReport

__all__ = ["unfuse"]


def unfuse(
    model: str | os.PathLike[str] | onnx.ModelProto,
    output: str | os.PathLike[str] | None = None,
    *,
    force: bool = False,
) -> FuseReport:
    """Replace our operators by standard ones; nothing of ours is needed to run the result.

    Every other node and initializer stays as it is.

    Args:
        model: a fused model (path or `ModelProto`, which is not changed).
        output: where to write the result; None: only return it.
        force: overwrite `output`.

    Returns:
        The model, and one entry per operator that was replaced (status "unfused").

    Raises:
        UsageError: the model holds none of our operators, or `output` exists.
    """
    from sfa_onnx.runtime.portable import unfuse as standard_nodes

    source = load_model(model)
    index = GraphIndex.of(source)
    sites = [
        SiteReport(
            site_id=index.label(i),
            anchor=index.label(i),
            status="unfused",
            op_type=node.op_type,
            layer=index.layer(i),
        )
        for i, node in enumerate(index.nodes)
        if find_op(node.domain, node.op_type) is not None and node.domain
    ]
    if not sites:
        raise UsageError("the model holds no operator of ours, so there is nothing to unfuse")
    result = standard_nodes(source)
    report = FuseReport(
        model=result,
        sites=sites,
        nodes_before=len(source.graph.node),
        nodes_after=len(result.graph.node),
    )
    if output is not None:
        folder = None if isinstance(model, onnx.ModelProto) else Path(model).parent
        report.path = save_model(result, output, source_dir=folder, force=force)
    return report
