"""The replacement of one bound site: the operator and what it needs before and after."""

from __future__ import annotations

from dataclasses import replace

from sfa_onnx.passes.axes.trace import Stop, is_float
from sfa_onnx.passes.bind.packed import PackedSite
from sfa_onnx.passes.bind.rows import Columns
from sfa_onnx.passes.bind.site import Site
from sfa_onnx.passes.emit.absorb import Absorbed
from sfa_onnx.passes.emit.emitter import Emitter
from sfa_onnx.passes.emit.float import build_float
from sfa_onnx.passes.emit.int8 import build_int8
from sfa_onnx.passes.emit.packed import build_packed
from sfa_onnx.passes.emit.plan import Built, Plan, rounded_alike, working_type

__all__ = ["build_site"]


def build_site(site: Site, stem: str) -> Built | None:
    """Emit the replacement of `site`; every new name starts with `stem`.

    None: the rows have to be gathered by the graph's own index tensors; bind the anchor again with
    `Tracer.opaque` set.

    Raises:
        Stop: the form is understood but has no replacement.
    """
    e = Emitter(site.tracer, stem)
    if isinstance(site, PackedSite):
        return build_packed(site, e)
    elem_type, output = working_type(site)
    plan = Plan(e, site, [], list(site.rows), elem_type, output)
    if site.nope.kind == "expanded":
        plan.absorb = Absorbed.of(site)
        plan.site = site = plan.absorb.latent_site(site)
    if site.nope.kind == "int8" and site.statistics:
        plan.site = site = _dequantised(site)
    if site.nope.kind == "int8":
        return build_int8(plan) if site.tracer.opaque or site.selected else None
    stored = site.nope.deep.ref.value
    if not is_float(site.tracer.sizes.elem_type(stored)):
        factor = site.nope.deep.factor
        how = (
            "without a scale" if factor == 1 else f"and scaled by one number, {factor:.6g}, for all"
        )
        raise Stop(
            f"the keys {stored} are integers that are cast to float {how}",
            stored,
            "expected float keys, or int8 keys times a tensor of scales, gathered beside them",
        )
    rounded_alike(site, elem_type)
    return build_float(plan)


def _dequantised(site: Site) -> Site:
    """The site over rows as the graph dequantises them.

    The int8 operator returns neither the largest score nor the log-sum-exp.
    """

    def floats(columns: Columns) -> Columns:
        return replace(columns, path=columns.path[: columns.behind], scale=(), inverse=False)

    return replace(site, nope=floats(site.nope), value=floats(site.value))
