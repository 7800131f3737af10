"""Find every attention over selected keys in a graph, and bind it or say why not."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

from sfa_onnx.passes.axes.trace import Stop, Tracer, UnifyError
from sfa_onnx.passes.bind.finished import by_finished_indices
from sfa_onnx.passes.bind.heads import check_heads
from sfa_onnx.passes.bind.packed import bind_packed
from sfa_onnx.passes.bind.region import Region, cover
from sfa_onnx.passes.bind.roles import bind
from sfa_onnx.passes.bind.site import AttentionRegion, NotASite, Site
from sfa_onnx.passes.candidate import Candidate, Refusal, RefusedSite
from sfa_onnx.passes.emit.detach import detach
from sfa_onnx.passes.emit.open import check_open_sizes
from sfa_onnx.passes.emit.plan import Built
from sfa_onnx.passes.emit.site import build_site
from sfa_onnx.passes.find.attempt import FAULTS, plain, refused, unified
from sfa_onnx.passes.find.fed import Seen, fed_by_selection
from sfa_onnx.passes.find.others import other_attention
from sfa_onnx.passes.find.products import products, products_above
from sfa_onnx.passes.find.regions import attention_regions
from sfa_onnx.passes.graph.index import GraphIndex
from sfa_onnx.passes.graph.provenance import SITE
from sfa_onnx.passes.shapes.concrete import Concrete

__all__ = ["FindOptions", "find_candidates"]


@dataclass(frozen=True)
class FindOptions:
    """What a caller may decide about recognition.

    Attributes:
        max_steps: how many tracing steps one site may take before it is refused.
        absorb: whether per-head expanded (MHA) forms may be fused by absorption.
        masks: float inputs that hold 0 and -1e4 or less only, as the caller asserts.
        flags: inputs that hold 0 and 1 only, as the caller asserts.
        scales: inputs that hold no negative number, as the caller asserts.
        trace: whether to report each site's normal form and the identities that led to it.
    """

    max_steps: int = 200_000
    absorb: bool = True
    masks: frozenset[str] = frozenset()
    flags: frozenset[str] = frozenset()
    scales: frozenset[str] = frozenset()
    trace: bool = False


def find_candidates(
    index: GraphIndex, options: FindOptions | None = None
) -> list[Candidate | RefusedSite]:
    """All sites of `index.graph`, in graph order; none that is fed by a selection vanishes.

    Dense attention without a selection and routers (TopK after the softmax) are no candidates.
    """
    options = options or FindOptions()
    sizes = Concrete(index)
    other = Concrete(index, second=True) if sizes.dynamic else sizes
    search = _Search(index, sizes, other, options)
    found = search.sites()
    tracer = Tracer(index, sizes, other, options.max_steps)
    anchors = {r.anchor for r in search.everyone}
    for site in other_attention(tracer, search.products, search.taken, anchors):
        if not isinstance(found.get(site.anchor), Candidate):
            found[site.anchor] = site
    return [found[anchor] for anchor in sorted(found)]


class _Search:
    """Looks at every region of a graph."""

    def __init__(
        self, index: GraphIndex, sizes: Concrete, other: Concrete, options: FindOptions
    ) -> None:
        self.index, self.sizes, self.other, self.options = index, sizes, other, options
        self.products = products(index)
        self.everyone = attention_regions(index, sizes, self.products)
        self.named = Counter(index.label(r.anchor) for r in self.everyone)
        self.taken = {r.anchor for r in self.everyone}

    def sites(self) -> dict[int, Candidate | RefusedSite]:
        """What each region is, by the node that names it."""
        found: dict[int, Candidate | RefusedSite] = {}
        for region in self.everyone:
            site = self._look(region)
            for result in region.results[1:]:
                if site is None or isinstance(site, Candidate):
                    break
                later = self._look(replace(region, result=result))
                site = later if isinstance(later, Candidate) else site
            if site is not None and not isinstance(found.get(site.anchor), Candidate):
                found[site.anchor] = site
                self.taken |= {self.index.producer[v] for v in region.inner}
        return found

    def _look(self, region: AttentionRegion) -> Candidate | RefusedSite | None:
        tracer = Tracer(self.index, self.sizes, self.other, self.options.max_steps)
        tracer.masks, tracer.flags = self.options.masks, self.options.flags
        tracer.terms = [] if self.options.trace else None
        label = self.index.label(region.anchor)
        tracer.stem = label if self.named[label] <= 1 else region.weights or region.result
        fed = fed_by_selection(tracer, region)
        if not fed:
            return None
        site = _one(tracer, region, self.options, surely=fed is Seen.SELECTION)
        if site is not None and tracer.terms:
            site = replace(site, terms=tuple(tracer.terms))
        return site if fed is not Seen.GATHER or isinstance(site, Candidate) else None


def _one(
    tracer: Tracer, region: AttentionRegion, options: FindOptions, *, surely: bool
) -> Candidate | RefusedSite | None:
    index = tracer.index
    bound = [f"{index.nodes[region.anchor].op_type} {index.label(region.anchor)}"]
    layer = index.layer(region.anchor)
    try:
        return _bound(tracer, region, options, bound)
    except NotASite as none:
        if none.refusal is None or not surely:
            return None
        refusal = _told(index, region, none.refusal)
    except Stop as stop:
        refusal = _told(index, region, stop)
    except FAULTS as fault:
        refusal = refused(fault, region.scores, bound[0])
    return RefusedSite(region.anchor, layer, refusal, tuple(bound))


def _told(index: GraphIndex, region: AttentionRegion, stop: Stop) -> Refusal:
    outside = _scores_outside(index, region)
    return outside or Refusal(plain(stop.reason), stop.at, stop.hint)


def _scores_outside(index: GraphIndex, region: AttentionRegion) -> Refusal | None:
    """What is wrong where a body holds the softmax, but no product that makes its scores."""
    begins = min(index.producer[v] for v in region.inner)
    if begins < region.anchor or "Softmax" not in index.nodes[begins].op_type:
        return None  # at a product, or an operator that holds one
    above, _ = products_above(index, region.scores) or (set(), set())
    if not above or max(above) >= index.first:
        return None
    value = index.nodes[max(above)].output[0]
    return Refusal(
        f"the scores {value} are computed outside of {index.path}, the body that holds the softmax",
        value,
        "compute scores, softmax and weighted sum in one graph",
    )


def _bound(
    tracer: Tracer, region: AttentionRegion, options: FindOptions, bound: list[str]
) -> Candidate:
    """Bind and build, by what indices mean or, where that is not understood, as they are."""
    budget = tracer.budget

    def otherwise() -> Candidate | None:
        tracer.budget = budget
        try:
            return unified(
                tracer, region.scores, "attention", lambda: _finished(tracer, region, bound[:1])
            )
        except (Stop, NotASite, *FAULTS):
            return None

    try:
        candidate = unified(
            tracer,
            region.scores,
            "attention",
            lambda: _candidate(*_bind_and_build(tracer, region, options, bound)),
        )
        candidate.otherwise = otherwise
        return candidate
    except NotASite as none:
        again = otherwise() if none.refusal is not None and none.refusal.addressing else None
        if again is None:
            raise
        return again
    except Stop as stop:
        again = otherwise() if stop.addressing else None
        if again is None:
            raise
        return again


def _finished(tracer: Tracer, region: AttentionRegion, bound: list[str]) -> Candidate:
    """The candidate whose rows are read by a finished index tensor.

    Raises:
        Stop: there is no such view of it.
    """
    tracer.opaque = tracer.tables = True
    try:
        site = by_finished_indices(bind_packed(bind(tracer, region, bound)))
        if site is None:
            raise Stop("the rows are not read by finished index tensors", region.scores)
        tracer.opaque = False  # nothing is followed any more: what the reads are is known
        check_heads(site)
        tracer.opaque = True
        built = build_site(site, tracer.stem + SITE)
        if built is None:
            raise Stop("the keys' gather is not understood", site.nope.deep.ref.value)
        return _candidate(site, site, built)
    finally:
        tracer.opaque = tracer.tables = False


def _bind_and_build(
    tracer: Tracer, region: AttentionRegion, options: FindOptions, bound: list[str]
) -> tuple[Site, Site, Built]:
    """(the site with indices followed to their source, the site as built, its replacement)."""
    stem = tracer.stem + SITE
    named: Site | None = None
    for tracer.opaque in (False, True):
        if named is None or tracer.followed:  # else an opaque tracer binds the very same
            del bound[1:]
            tracer.followed = False
            site = bind_packed(bind(tracer, region, bound))
            named = named or site
        if site.nope.kind == "expanded" and not options.absorb:
            raise Stop(
                "keys and values are expanded per head, and absorption is switched off",
                site.nope.path[0].ref.value,
                "allow absorption",
            )
        built = build_site(site, stem)
        if built is not None:
            return named, site, built
    raise Stop("the keys' gather is not understood", site.nope.deep.ref.value)


def _candidate(named: Site, site: Site, built: Built) -> Candidate:
    e = built.emitter
    detach(e, site)
    outputs = built.outputs
    e.prune(outputs)
    check_open_sizes(e.nodes, e.initializers, site.tracer.sizes.stands_for, built.output)
    queries = [built.query, *([built.query_rope] if built.query_rope is not None else [])]
    region = cover(named, outputs, [q.value for q in queries], e.used)
    _check_sizes(site.tracer, region)
    _check_closed(site, region, outputs)
    index = site.tracer.index
    if buried := index.buried_below(region.nodes, outputs):
        names = ", ".join(index.label(i) for i in buried)
        built.notes.append(f"removed as well: {names}, which no output needs")
    return Candidate(
        graph=index.graph,
        anchor=site.attention.anchor,
        op=built.op,
        family=built.family,
        nodes=region.nodes,
        support=region.support,
        operands=region.operands,
        outputs=outputs,
        replacement=e.nodes,
        replacement_initializers=e.initializers,
        sizes=region.sizes,
        layer=index.layer(site.attention.anchor),
        site_id="",
        notes=built.notes,
        equal=site.tracer.sizes.equal,
    )


def _check_sizes(tracer: Tracer, region: Region) -> None:
    """Sizes that meet in the site are one, also where the file declares the results.

    Raises:
        UnifyError: symbols turned out to be another size.
    """
    before = tracer.sizes.symbols
    for i in sorted({*region.nodes, *region.support}):
        tracer.sizes.check(tracer.index.nodes[i])
        if (now := tracer.sizes.symbols) is not before:
            changed = (pair for pair in tracer.sizes.equal if now[pair[1]] != before[pair[1]])
            raise UnifyError(*next(changed))


def _check_closed(site: Site, region: Region, outputs: tuple[str, ...]) -> None:
    """What lies between the products and the output must go; if it stays, somebody reads it.

    Raises:
        Stop: an inner value is used outside.
    """
    index = site.tracer.index
    inner = {*region.nodes, *region.support}
    removed = set(region.nodes)
    todo, seen = [*site.products, *filter(None, [site.attention.weights])], set[str]()
    kept: list[str] = []
    while todo:
        value = todo.pop()
        if value in outputs or value in seen:
            continue
        seen.add(value)
        producer = index.producer[value]
        if producer in inner and producer not in removed:
            kept.append(value)
        for i, _ in index.uses(value):
            if i in inner and index.nodes[i].op_type not in ("Shape", "Size"):
                todo += [o for o in index.nodes[i].output if o]
    if kept:
        direct = [v for v in kept if index.is_graph_output(v) or _users(index, v, inner)]
        raise _used_outside(index, (direct or kept)[0], removed)


def _users(index: GraphIndex, value: str, inner: set[int]) -> list[int]:
    return [i for i, _ in index.uses(value) if i not in inner]


def _used_outside(index: GraphIndex, value: str, removed: set[int]) -> Stop:
    made = index.producer[value]
    node = index.nodes[made]
    what = "the log-sum-exp" if "LogSum" in node.op_type else "the inner value"
    users = [index.label(i) for i, _ in index.uses(value) if i not in removed]
    by = f"used outside the attention by {users[0]}" if users else "kept by the graph"
    if index.is_graph_output(value):
        by = "a graph output"
    if made < index.first:
        by = f"computed outside of {index.path}, the body that holds the softmax"
    return Stop(
        f"{what} {value} is {by}",
        value,
        "only the result, the largest score and the log-sum-exp of float rows may leave it",
    )
