"""The report of a candidate before it is judged: what it is, its limits, its cost, its id."""

from __future__ import annotations

import logging

from sfa_onnx.errors import ModelError
from sfa_onnx.operator.op import LIGHTNING_INDEXER
from sfa_onnx.passes.candidate import Candidate, RefusedSite, Role
from sfa_onnx.passes.cost import (
    compare_costs,
    nominal_sizes,
    region_cost,
    replacement_cost,
    selection_cost,
)
from sfa_onnx.passes.graph.index import GraphIndex
from sfa_onnx.passes.limits import npu_limits
from sfa_onnx.passes.scopes.index import ScopeIndex
from sfa_onnx.passes.shapes.concrete import Concrete
from sfa_onnx.report import SiteReport

__all__ = ["Costs", "describe", "unique_ids"]

_IN_A_LOOP = (
    "views of the expansion weight run in every iteration unless the runtime folds them;"
    " materialize_absorbed (--materialize-absorbed) avoids that"
)
_log = logging.getLogger("sfa_onnx")


class Costs:
    """Estimated work of sites, at nominal sizes of the graph's symbols."""

    def __init__(self, index: GraphIndex) -> None:
        self._index = index
        self._sizes = Concrete(index, nominal_sizes(index))

    def of(self, item: Candidate) -> dict[str, float]:
        """Before and after; empty where shapes are unknown."""
        try:
            before = region_cost(self._sizes, (self._index.nodes[i] for i in item.nodes))
            if item.op is LIGHTNING_INDEXER:
                after = selection_cost(self._sizes, item)
            else:
                after = replacement_cost(self._sizes, item)
        except (ModelError, ValueError, KeyError, IndexError, TypeError) as error:
            _log.debug("no cost for %s: %s", item.site_id, error)
            return {}
        return compare_costs(before, after) if before.flops and after.flops else {}


def describe(
    index: GraphIndex, item: Candidate | RefusedSite, number: int, costs: Costs | None
) -> SiteReport:
    """The report of one candidate, refused until proved otherwise."""
    site = SiteReport(
        site_id=index.place(item.anchor) or f"site-{number}",
        anchor=index.label(item.anchor),
        status="refused",
        scope=index.path,
        layer=item.layer,
        family=item.family,
        terms=item.terms,
    )
    if isinstance(item, RefusedSite):
        refusal = item.refusal
        site.refuse(refusal.reason, refusal.hint, refusal.stopped_at)
        site.bound = item.bound
        return site
    site.op_type = item.op.name
    site.npu_limits = npu_limits(item)
    site.bound = tuple(item.notes)
    site.roles = {operand.value: operand.role.value for operand in item.operands}
    if isinstance(index, ScopeIndex) and index.repeats and _absorbs(item):
        site.bound += (_IN_A_LOOP,)
    item.site_id = site.site_id
    site.cost = costs.of(item) if costs is not None else {}
    return site


def _absorbs(item: Candidate) -> bool:
    return any(operand.role is Role.EXPANSION for operand in item.operands)


def unique_ids(sites: list[SiteReport]) -> None:
    """Site ids name sites in plans: equal anchors (impossible in valid graphs) get a number."""
    seen: dict[str, int] = {}
    for site in sites:
        count = seen.get(site.site_id, 0)
        seen[site.site_id] = count + 1
        if count:
            site.site_id = f"{site.site_id}#{count + 1}"
