"""The operator has one key head and one selection per query token: more of either are refused.

A head with keys (or a selection) of its own is, to the algebra, one more sequence (or token). What
distinguishes it from a batch axis is how tensors are laid out: heads are cut from the hidden width
or share an axis with the heads that they serve, and they come after the batch.
"""

from __future__ import annotations

from collections.abc import Iterable

from sfa_onnx.passes.axes.expr import Expr, Label
from sfa_onnx.passes.axes.trace import Ref, Stop
from sfa_onnx.passes.bind.rows import Columns
from sfa_onnx.passes.bind.site import Site
from sfa_onnx.passes.bind.sources import outside_reads

__all__ = ["check_heads"]


def check_heads(site: Site) -> None:
    """Check that all heads of a token share keys and selection.

    Raises:
        Stop: some heads have keys, or a selection, of their own.
    """
    if site.tracer.opaque:  # said when indices were followed to their source
        return
    columns = [c for c in (site.nope, site.rope) if c is not None]
    owned = {x for c in columns for x in outside_reads(c) - {c.label, c.inner}}
    owners = [x for x in site.rows if x in owned]
    choosers = [x for x in site.rows if x not in owned]
    views = _query_views(site)
    head = _key_head(site, columns, owners, views)
    if head is not None:
        where = site.nope.deep.ref.value
        raise Stop(
            f"the keys {where} have {head.size} heads; the operator takes one (N2 = 1)",
            where,
            "expected one row of keys for all heads of a token, as latent attention has",
        )
    if _own_selection(site, owners, choosers, views):
        value = _selection(site)
        raise Stop(
            f"not every head of a token attends to the same keys: {value} selects per head",
            value,
            "the operator takes one selection per query token: select for all heads together",
        )


def _query_views(site: Site) -> list[tuple[Ref, Label]]:
    """The output, and the query on its way to the products, with their columns."""
    return [(site.out, site.column), *((s.ref, q.label) for q, path in site.queries for s in path)]


def _key_head(
    site: Site, columns: list[Columns], owners: list[Label], views: list[tuple[Ref, Label]]
) -> Label | None:
    """A label of the keys that is a head, not a batch."""
    keys = [(s.ref, c.label) for c in columns for s in c.path]
    merged = _of_width([*views, *keys], owners)
    if merged:
        return merged[0]
    for ref, _ in views:
        if found := _beside_heads(site, ref, owners):
            return found
    if len(owners) > 1:
        late = _behind_keys(site, columns, owners) or _behind_tokens(site, views, owners)
        return late or (None if site.heads else owners[-1])
    if owners and all(_behind_unit(ref, owners[0]) for ref in (keys[-1][0], views[-1][0])):
        return owners[0]
    return None


def _of_width(views: Iterable[tuple[Ref, Label]], labels: list[Label]) -> list[Label]:
    """Those that share an axis with the columns of a tensor: parts of the hidden width."""
    found = []
    for ref, column in views:
        for coordinate in ref.coords[1:]:
            here = coordinate.labels
            if column in here and not coordinate.reads:
                found += [x for x in labels if x in here and _above(coordinate, x, column)]
    return found


def _above(coordinate: Expr, label: Label, column: Label) -> bool:
    """Whether a coordinate is `label` * width + `column`."""
    weights = {atom: by for atom, by in coordinate.terms if isinstance(atom, Label)}
    return weights.get(label, 0) > weights.get(column, 0) > 0


def _beside_heads(site: Site, ref: Ref, labels: list[Label]) -> Label | None:
    """One that shares an axis with a head, behind an axis of its own for the batch."""
    for axis, coordinate in enumerate(ref.coords):
        if not axis or not coordinate.labels & set(site.heads):
            continue
        rows = set(site.rows) - coordinate.labels
        before = ref.coords[:axis]
        if any(c.labels & rows for c in before) or not ref.coords[0].labels:
            for label in labels:
                if label in coordinate.labels:
                    return label
    return None


def _behind_keys(site: Site, columns: list[Columns], owners: list[Label]) -> Label | None:
    """One that lies behind the keys in their tensor, while another lies in front of them."""
    for c in columns:
        places = c.deep.ref.coords
        keys = [i for i, x in enumerate(places) if x.reads or site.key in x.labels]
        if len(keys) != 1:
            continue
        front = {x for i in range(keys[0] + 1) for x in places[i].labels if x in owners}
        behind = [x for i in range(keys[0] + 1, len(places)) for x in places[i].labels]
        if front and (late := [x for x in behind if x in owners and x not in front]):
            return late[0]
    return None


def _behind_tokens(site: Site, views: list[tuple[Ref, Label]], owners: list[Label]) -> Label | None:
    """One that comes behind the query tokens, while another comes in front of them."""
    tokens = set(site.rows) - set(owners)
    for ref, _ in views:
        seen: list[Label] = []
        for coordinate in ref.coords:
            here = [x for x in coordinate.labels if x in owners]
            if tokens & set(seen) and any(x in owners for x in seen) and here:
                return here[0]
            seen += coordinate.labels
    return None


def _behind_unit(ref: Ref, label: Label) -> bool:
    """Whether an axis of size 1 or none comes in front of the one that runs over `label`."""
    first = next((i for i, c in enumerate(ref.coords) if label in c.labels), 0)
    return first > 0 and not ref.coords[0].terms


def _own_selection(
    site: Site, owners: list[Label], choosers: list[Label], views: list[tuple[Ref, Label]]
) -> bool:
    """Whether one of the labels that distinguish selections is a head."""
    flat = [v for v in views if not _holds_tokens(site, v[0], choosers)]
    if _of_width(flat, choosers):
        return True
    if len(choosers) < 2:
        return False
    for ref, _ in views:
        for coordinate in ref.coords:
            beside = coordinate.labels & set(site.heads)
            here = [x for x in choosers if x in coordinate.labels]
            if beside and here and len(here) < len(choosers):
                return True
    if site.heads:
        return False
    return bool(owners) or len(choosers) > 2 or _behind_unit(views[-1][0], choosers[0])


def _holds_tokens(site: Site, ref: Ref, choosers: list[Label]) -> bool:
    """Whether an axis runs over all tokens and heads: [batch, all the rest]."""
    return any(
        set(choosers) <= c.labels and c.labels & set(site.heads) and not c.reads for c in ref.coords
    )


def _selection(site: Site) -> str:
    if site.selected:
        return site.selected[0].indices.value
    reads = [r for c in site.nope.deep.ref.coords for r in c.reads]
    return reads[0].value if reads else site.nope.deep.ref.value
