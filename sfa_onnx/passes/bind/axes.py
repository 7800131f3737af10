"""Rows and heads of a bound attention: who has keys of his own, who shares them, what selects."""

from __future__ import annotations

from collections.abc import Iterator

from sfa_onnx.passes.axes.expr import Expr, Label, Quot, Read, Rem
from sfa_onnx.passes.axes.trace import Pieces, Ref, Stop, Tracer
from sfa_onnx.passes.bind.literals import Kept, Literal, Selected, Visible
from sfa_onnx.passes.bind.paths import deepen
from sfa_onnx.passes.bind.rows import Columns
from sfa_onnx.passes.bind.site import NotASite, Site
from sfa_onnx.passes.bind.sources import all_reads, index_sources
from sfa_onnx.passes.bind.usage import reworked, threshold

__all__ = ["check_rows", "rows_changed", "splits", "take_masks", "tell_rows"]


def take_masks(site: Site, literals: list[Literal]) -> None:
    """Sort masks into the selection and the rest.

    Raises:
        Stop: two selections, or keys that are gathered and masked by a selection.
        NotASite: no selection.
    """
    for literal in literals:
        if isinstance(literal, Selected):
            same = [s for s in site.selected if _same_selection(s, literal)]
            if not same:
                site.selected.append(literal)
        elif isinstance(literal, Visible) and literal not in site.visible:
            site.visible.append(literal)
    _one_selection(site, [x for x in literals if isinstance(x, Kept)])
    reads = [r for c in site.nope.deep.ref.coords for r in c.reads]
    gathered = any(_selects(r, site.key) for r in reads)
    if site.tracer.tables:  # a page table is not followed here: what reads per key selects
        gathered = any(site.key in c.labels for r in reads for c in r.coords)
    if not site.selected and not gathered:
        raise NotASite(_unselected(site))
    if site.selected and gathered:
        raise Stop(
            "the keys are gathered by indices and masked by a selection as well",
            site.selected[0].indices.value,
        )


def _one_selection(site: Site, unions: list[Kept]) -> None:
    """Keep one selection; the finished masks of all others only narrow it.

    Raises:
        Stop: there is no such mask.
    """
    first = next((s for s in site.selected if s.exact), next(iter(site.selected), None))
    for other in (s for s in site.selected if s is not first):
        if other.mask is None:
            names = " and ".join(s.indices.value for s in site.selected)
            raise Stop(f"two selections mask one attention: {names}", other.indices.value)
        site.visible.append(other.mask)
    if first is not None:
        site.selected = [first]
        site.kept = None if first.exact or first.mask is None else Kept(first.mask, (first,))
    elif few := [u for u in unions if _is_few(u, site.key)]:
        site.kept = few[0]
        site.selected = list(few[0].among)
    for union in unions:
        if union is not site.kept and union.mask not in site.visible:
            site.visible.append(union.mask)


def _is_few(union: Kept, key: Label) -> bool:
    """Whether a union is a selection of keys: what it keeps besides is not all of them."""
    return (not union.over or key in union.over) and union.extra < key.size


def _unselected(site: Site) -> Stop | None:
    """Why a selection upstream is not one of these keys; None when pages explain the gather."""
    reads = all_reads(site.nope.deep.ref.coords)
    if (read := next(reads, None)) is not None:
        return _of_blocks(site.tracer, read)
    tracer, where = site.tracer, site.nope.deep.ref.value
    if (changed := rows_changed(tracer, where)) is not None:
        return changed
    if _gathered_apart(tracer, site.nope.deep.ref, site.key):
        return Stop(
            f"the rows {where} are put together from gathers that are not one: sequences in another"
            " order or of other lengths, other factors, or indices computed one by one",
            where,
            "stack the indices instead of the rows and gather once, or attend sequence by sequence",
        )
    inverted = next((v for v in site.visible if v.hides), None)
    if inverted is not None:
        return Stop(
            f"the mask {inverted.ref.value} hides the selected keys, or marks none",
            inverted.ref.value,
            "expected a mask that keeps exactly the selected keys",
        )
    if (bound := _bounded_only(site)) is not None:
        return bound
    if site.visible:
        names = ", ".join(v.ref.value for v in site.visible)
        return Stop(
            f"the mask ({names}) is not a selection that other masks only narrow",
            site.visible[0].ref.value,
            "expected: visible = selected and (any other masks)",
        )
    maker = tracer.index.maker(where)
    if maker is not None and maker.op_type in ("Loop", "Scan"):
        label = tracer.index.label(tracer.index.producer[where])
        return Stop(
            f"the keys {where} are gathered by the body of {maker.op_type} {label}, which is not"
            " followed",
            where,
            "gather the rows of all sequences at once (batch_dims=1 instead of map_fn)",
        )
    return Stop(
        f"a selection feeds the attention, but the keys {where} are not gathered by it",
        where,
        "expected keys gathered by one index tensor, or a scattered mask",
    )


def _of_blocks(tracer: Tracer, read: Read) -> Stop | None:
    """What a selection of blocks is refused by; None where no selection makes the index."""
    for value in index_sources(tracer, Ref(read.value, read.coords)):
        if tracer.index.maker(value) is not None:  # a TopK, not a page table from outside
            return Stop(
                f"{value} selects blocks of keys, not single ones (read at"
                f" {', '.join(map(str, read.coords))})",
                value,
                "select token by token",
                addressing=True,
            )
    return None


def _bounded_only(site: Site) -> Stop | None:
    """Masks that a threshold bounds: they keep any number of keys where scores tie."""
    for mask in site.visible:
        found = threshold(site.tracer.index, mask.ref.value)
        if found is not None:
            return Stop(
                f"keys are selected by a threshold ({found[0]} with values of TopK {found[1]}):"
                " scores that tie make the number of keys unbounded",
                mask.ref.value,
                "scatter the indices of the TopK into the mask; do not compare with its values",
            )
    return None


def rows_changed(tracer: Tracer, where: str) -> Stop | None:
    """What arithmetic lies between rows that are gathered and the keys `where`, if any does."""
    changes = reworked(tracer.index, where)
    if not changes:
        return None
    names = ", ".join(f"{tracer.index.nodes[i].op_type} {tracer.index.label(i)}" for i in changes)
    return Stop(
        f"the gathered rows are changed by {names} before they are keys ({where}); only views,"
        " casts and scales are read through",
        where,
        "change rows before they are stored: expected the gathered rows themselves, or int8 rows"
        " times their scales",
    )


def _same_selection(a: Selected, b: Selected) -> bool:
    swap = {b.slot: Expr.of(a.slot)}
    return a.indices == b.indices.substitute(swap)


def _selects(read: Read, key: Label) -> bool:
    """Whether every key has an index of its own (a page table is read once per page)."""
    if key.size == 1:
        return True
    for coordinate in read.coords:
        if any(atom == key for atom, _ in coordinate.terms):
            return True
        if any(_selects(inner, key) for inner in coordinate.reads):
            return True
    return False


def _gathered_apart(tracer: Tracer, ref: Ref, key: Label, deep: int = 4) -> bool:
    """Whether rows are put together from parts, every one of them gathered by an index per key."""
    step = tracer.step(ref)
    if not deep or not isinstance(step, Pieces) or step.label == key:
        return False
    for _, _, part in step.parts:
        part = deepen(tracer, part)[-1].ref
        alone = any(_selects(r, key) for c in part.coords for r in c.reads)
        if not alone and not _gathered_apart(tracer, part, key, deep - 1):
            return False
    return True


def tell_rows(site: Site, others: set[Label]) -> None:
    """Distinguish rows (own keys, own selection) from heads (same keys, same selection)."""
    deciding = _labels(site.nope, site.key)
    if site.rope is not None:
        deciding |= _labels(site.rope, site.key)
    for s in site.selected:
        deciding |= s.indices.labels - {s.slot}
    if site.kept is not None:
        deciding |= site.kept.mask.ref.labels - {site.key}
    for v in site.visible:
        deciding |= v.ref.labels
    ordered = [x for c in site.out.coords for x in _in_order(c) if x in others]
    site.rows = [x for x in ordered if x in deciding]
    site.heads = [x for x in ordered if x not in deciding]


def _check_width(site: Site, selected: Selected) -> None:
    """A selection among fewer positions than there are keys names blocks of them."""
    block, rest = divmod(site.key.size, selected.width)
    if block > 1 and not rest and selected.block != block:
        value = selected.indices.value
        raise Stop(
            f"{value} selects among {selected.width} blocks of {block} keys, not single keys",
            value,
            "select token by token",
        )


def check_rows(site: Site) -> None:
    """Masks do not differ per head, and every batch reads its own cache.

    Raises:
        Stop: one of them does not hold.
    """
    for s in site.selected:
        _check_width(site, s)
    if not site.heads:
        shared = _labels(site.nope, site.key)
        for s in site.selected:
            shared |= s.indices.labels
        for v in site.visible:
            extra = v.ref.labels - shared - {site.key}
            if extra and not all(x.size == 1 for x in extra):
                raise Stop(
                    f"the mask {v.ref.value} differs per head",
                    v.ref.value,
                    "all heads of the operator see the same keys",
                )
    if site.tracer.opaque:
        return
    ref = site.nope.deep.ref
    shape = site.tracer.shape(ref.value)
    for axis, (coordinate, size) in enumerate(zip(ref.coords, shape, strict=True)):
        own = coordinate.labels - {site.nope.label, site.key}
        twisted = any(a in own and c < 0 for a, c in coordinate.terms)
        # a loop over batches, written out, has no label of theirs
        fixed = not coordinate.terms and any(x.size == size > 1 for x in site.rows)
        fixed = fixed and not _of_one_batch(site, coordinate, size)
        parts = any(isinstance(a, Quot | Rem) for a, _ in coordinate.terms)
        plain = coordinate.reads or site.nope.label in coordinate.labels
        if (twisted or fixed or parts) and not plain:
            raise Stop(
                f"axis {axis} of {ref.value} is read at {coordinate}: not the query's own batch",
                ref.value,
                addressing=True,
            )


def _of_one_batch(site: Site, coordinate: Expr, size: int) -> bool:
    """Whether the query, too, is read at one place of such an axis: its rows are no batches."""
    _, path = site.queries[0]
    shapes = [(s.ref.coords, site.tracer.shape(s.ref.value)) for s in path]
    return any((coordinate, size) in zip(*own, strict=True) for own in shapes)


def _in_order(coordinate: Expr) -> list[Label]:
    terms = sorted(coordinate.terms, key=lambda t: -t[1])
    return [atom for atom, _ in terms if isinstance(atom, Label)]


def _labels(columns: Columns, key: Label) -> set[Label]:
    ignore = {columns.label, key} | ({columns.inner} if columns.inner else set())
    return {x for x in columns.deep.ref.labels if x not in ignore}


def splits(site: Site) -> dict[Label, Expr]:
    """Labels that some tensor has as two axes: each becomes two labels."""
    own = {x for c in site.out.coords for x in c.labels} - {site.column}
    for coordinate in _all_coords(site):
        for atom in _divisions(coordinate):
            label = next(iter(atom.expr.labels), None)
            if label in own and atom.expr == Expr.of(label) and label.size % atom.by == 0:
                high = Label(f"{label.name}h", label.size // atom.by)
                low = Label(f"{label.name}l", atom.by)
                return {label: Expr.of(high) * atom.by + Expr.of(low)}
    return {}


def _all_coords(site: Site) -> Iterator[Expr]:
    refs = [site.nope_query.ref, site.nope.deep.ref, site.value.deep.ref]
    if site.rope is not None and site.rope_query is not None:
        refs += [site.rope_query.ref, site.rope.deep.ref]
    refs += [s.indices for s in site.selected] + [v.ref for v in site.visible]
    for ref in refs:
        yield from ref.coords


def _divisions(coordinate: Expr) -> Iterator[Quot | Rem]:
    for atom, _ in coordinate.terms:
        if isinstance(atom, Quot | Rem):
            yield atom
            yield from _divisions(atom.expr)
        elif isinstance(atom, Read):
            for inner in atom.coords:
                yield from _divisions(inner)
