"""Back to standard operators: every operator of ours is replaced by its portable body."""

from __future__ import annotations

import os
from pathlib import Path

import onnx

from sfa_onnx.errors import UsageError
from sfa_onnx.files.model import load_model, save_model
from sfa_onnx.guard.doors import door
from sfa_onnx.operator.contract import Rounding
from sfa_onnx.operator.op import find_op
from sfa_onnx.passes.graph.index import GraphIndex
from sfa_onnx.passes.graph.provenance import site_of
from sfa_onnx.passes.scopes.index import body_views
from sfa_onnx.passes.scopes.splice import count_nodes
from sfa_onnx.report import FuseReport, SiteReport

__all__ = ["unfuse"]


def _is_ours(node: onnx.NodeProto) -> bool:
    return bool(node.domain) and find_op(node.domain, node.op_type) is not None


@door
def unfuse(
    model: str | os.PathLike[str] | onnx.ModelProto,
    output: str | os.PathLike[str] | None = None,
    *,
    rounding: Rounding = "exact",
    force: bool = False,
) -> FuseReport:
    """Replace our operators by standard ones; nothing of ours is needed to run the result.

    Every other node and initializer stays as it is.

    Args:
        model: a fused model (path or `ModelProto`, which is not changed).
        output: where to write the result; None: only return it.
        rounding: "npu": the standard operators round as CANN's kernels do.
        force: overwrite `output`.

    Returns:
        The model, and one entry per operator that was replaced (status "unfused").

    Raises:
        UsageError: the model holds none of our operators, or `output` exists.
    """
    from sfa_onnx.runtime.portable.model import with_standard_nodes
    from sfa_onnx.runtime.portable.restore import restored

    source, _ = restored(load_model(model))
    main = GraphIndex.of(source)
    sites = [
        SiteReport(
            site_id=site_of(index.place(i)),
            anchor=index.label(i),
            status="unfused",
            op_type=index.nodes[i].op_type,
            scope=index.path,
            layer=index.layer(i),
        )
        for index in (main, *body_views(main, telling=_is_ours))
        for i in index.own
        if _is_ours(index.nodes[i])
    ]
    if not sites:
        raise UsageError("the model holds no operator of ours, so there is nothing to unfuse")
    result = with_standard_nodes(source, rounding)
    report = FuseReport(
        model=result,
        sites=sites,
        nodes_before=count_nodes(source.graph),
        nodes_after=count_nodes(result.graph),
    )
    if output is not None:
        folder = None if isinstance(model, onnx.ModelProto) else Path(model).parent
        report.path = save_model(result, output, source_dir=folder, force=force)
    return report
