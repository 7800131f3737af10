"""Decisions that every replacement shares: types, scale, query and output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from sfa_onnx.operator.contract import OpContract
from sfa_onnx.passes.axes.expr import Label
from sfa_onnx.passes.axes.places import axis_labels, is_view
from sfa_onnx.passes.axes.trace import Ref, Stop, is_float
from sfa_onnx.passes.bind.paths import State, deepen
from sfa_onnx.passes.bind.rows import Columns
from sfa_onnx.passes.bind.site import Query, Sinks, Site
from sfa_onnx.passes.emit.absorb import Absorbed
from sfa_onnx.passes.emit.emitter import Emitter, Group
from sfa_onnx.passes.shapes.types import MANTISSA

__all__ = [
    "Built",
    "Plan",
    "deliver",
    "make_sinks",
    "queries",
    "query_rows",
    "rope_rows",
    "rounded_alike",
    "split_rows",
    "unrounded",
    "with_sinks",
    "working_type",
]

_T = onnx.TensorProto


@dataclass
class Built:
    """A replacement and what it says about the site."""

    emitter: Emitter
    op: OpContract
    family: str
    output: str
    query: Ref
    query_rope: Ref | None
    scale: float
    notes: list[str]

    @property
    def outputs(self) -> tuple[str, ...]:
        """Every value that the replacement makes for the graph."""
        made = {o for n in self.emitter.nodes for o in n.output}
        statistics = self.emitter.tracer.index.producer.keys() & made
        return (self.output, *sorted(statistics - {self.output}))


@dataclass
class Plan:
    """Decisions shared by the steps: axes of the operator's query, types, scale."""

    e: Emitter
    site: Site
    batch: list[Label]
    tokens: list[Label]
    elem_type: int
    output: str
    scale: float = 1.0
    absorb: Absorbed | None = None
    rope_by: float = (
        1.0  # what the query's rope is multiplied by: rope scores have their own factor
    )


def working_type(site: Site) -> tuple[int, str]:
    """The operator's float type, and the value its output replaces.

    The weighted sum's own type, or the one it is cast to when query and keys come from that type
    (a graph that computes in float32 over 16-bit tensors: so does the operator).
    """
    index, sizes = site.tracer.index, site.tracer.sizes
    own = sizes.elem_type(site.out.value)
    uses = index.uses(site.out.value)
    if len(uses) == 1 and uses[0][1] == 0 and not index.is_graph_output(site.out.value):
        node = index.nodes[uses[0][0]]
        if node.op_type == "Cast":
            target = sizes.elem_type(node.output[0])
            if target == own or (is_float(target) and _all_have(site, target)):
                return target, node.output[0]
    if own not in (_T.FLOAT, _T.FLOAT16, _T.BFLOAT16):
        raise Stop(
            f"the attention is computed in {_T.DataType.Name(own)}",
            site.out.value,
            "the operator takes float32, float16 and bfloat16",
        )
    return own, site.out.value


def _all_have(site: Site, elem_type: int) -> bool:
    """Whether query and key exist in this type in the graph."""

    def has(states: Sequence[State]) -> bool:
        return any(site.tracer.sizes.elem_type(s.ref.value) == elem_type for s in states)

    queries = [q for q in (site.nope_query, site.rope_query) if q is not None]
    if not all(has(deepen(site.tracer, q.ref)) for q in queries):
        return False
    keys = [c.path for c in (site.nope, site.rope) if c is not None and c.kind == "float"]
    return all(has(path) for path in keys)


def queries(plan: Plan) -> tuple[State, State | None]:
    """Where to take the query from, behind constant factors and casts from the operator's type."""
    site = plan.site
    nope = _pick_query(plan, site.nope_query)
    rope = _pick_query(plan, site.rope_query) if site.rope_query is not None else None
    scale = site.scale * nope.factor * _row_factor(site.nope)
    plan.scale = scale
    if scale <= 0:
        raise Stop(
            f"scores are multiplied by {scale:g}, which is not positive",
            nope.ref.value,
            "negate the query (or the keys) instead",
        )
    _learn(plan, [nope, *([rope] if rope is not None else [])])
    if rope is not None and site.rope is not None:
        other = site.rope_factor * rope.factor * _row_factor(site.rope)
        if abs(other - scale) > 1e-6 * abs(scale):
            plan.rope_by = other / scale
    if _row_factor(site.value) != 1:
        raise Stop(
            f"the value is {_row_factor(site.value):g} times the stored rows",
            site.value.path[0].ref.value,
            "expected the key's nope part unscaled",
        )
    return nope, rope


def _learn(plan: Plan, queries: Sequence[State]) -> None:
    """Sizes are read off tensors that stay in the graph: queries, stored rows, selections."""
    site = plan.site
    refs = [q.ref for q in queries]
    refs += [c.deep.ref for c in (site.nope, site.rope) if c is not None]
    refs += [s.indices for s in site.selected] + [v.ref for v in site.visible]
    refs += [Ref(r.value, r.coords) for c in site.nope.deep.ref.coords for r in c.reads]
    for ref in refs:
        plan.e.learn(ref)


def _row_factor(columns: Columns) -> float:
    factor = columns.deep.factor
    if columns.scale:
        factor *= columns.scale[-1].factor
    return factor


def _pick_query(plan: Plan, query: Query) -> State:
    path = unrounded(plan.site, deepen(plan.site.tracer, query.ref), plan.elem_type)
    first = max(
        (i for i, s in enumerate(path) if s.factor != path[max(i - 1, 0)].factor), default=0
    )
    sizes = plan.site.tracer.sizes
    for state in path[first:]:
        if sizes.elem_type(state.ref.value) == plan.elem_type and is_view(state.ref):
            return state
    return next(s for s in reversed(path[: first + 1]) if is_view(s.ref))


def unrounded(site: Site, path: Sequence[State], elem_type: int) -> list[State]:
    """The path up to a cast to a narrower type than the operator's: behind it, numbers differ.

    The check in float64 cannot see this. Rows for an int8 operator are rounded by the operator.
    """
    if elem_type not in MANTISSA:
        return list(path)
    kept: list[State] = []
    fewest = max(MANTISSA.values())
    for state in path:
        bits = MANTISSA.get(site.tracer.sizes.elem_type(state.ref.value), 0)
        if fewest < min(bits, MANTISSA[elem_type]):
            break
        fewest = min(fewest, bits)
        kept.append(state)
    return kept


def rounded_alike(site: Site, elem_type: int) -> None:
    """Check that keys and values are rounded to the same type: the operator reads one of them.

    Raises:
        Stop: one of the two is rounded more than the operator rounds, and more than the other.
    """
    own = MANTISSA.get(elem_type, 0)
    coarsest = []
    for columns in (site.nope, site.value):
        types = [site.tracer.sizes.elem_type(s.ref.value) for s in columns.path]
        coarsest.append(min((t for t in types if t in MANTISSA), key=MANTISSA.__getitem__))
    key, value = coarsest
    if min(MANTISSA[key], own) != min(MANTISSA[value], own):
        name = _T.DataType.Name
        raise Stop(
            f"keys are rounded to {name(key)}, values to {name(value)}",
            site.value.path[0].ref.value,
            "cast both or none: the operator reads keys and values from the same rows",
        )


def query_rows(plan: Plan, state: State, groups: Sequence[Group]) -> str:
    """The query in the order of `groups`, in the operator's type (absorbed where needed)."""
    e = plan.e
    if plan.absorb is not None and plan.absorb.column in state.ref.labels:
        return plan.absorb.query(e, state.ref, groups, plan.elem_type)
    value = e.broadcast(e.arrange(state.ref, groups, "query"), groups, state.ref.labels)
    return e.cast(value, plan.elem_type)


def rope_rows(plan: Plan, state: State, groups: Sequence[Group]) -> str:
    """The query's rope; another factor than the nope part's is multiplied in here, in float32.

    What float32 leaves of the factor is added: the ratio of two scales seldom is such a number.
    """
    value = query_rows(plan, state, groups)
    if plan.rope_by == 1:
        return value
    e, coarse = plan.e, np.float32(plan.rope_by)
    rope, total = e.cast(value, _T.FLOAT), ""
    for by in (coarse, np.float32(plan.rope_by - float(coarse))):
        if by:
            part = e.emit("Mul", [rope, e.constant(np.asarray(by))], "query_rope", _T.FLOAT)
            total = e.emit("Add", [total, part], "query_rope", _T.FLOAT) if total else part
    return e.cast(total, plan.elem_type)


def with_sinks(plan: Plan, op: OpContract, inputs: list[str]) -> list[str]:
    """`inputs` with the sinks, float32 [N1], at their place, where the site has some."""
    if plan.site.sinks is None or plan.site.sinks.behind:
        return inputs
    place = [t.name for t in op.inputs].index("sinks")
    return [*inputs, *[""] * (place - len(inputs)), make_sinks(plan, plan.site.sinks)]


def make_sinks(plan: Plan, sinks: Sinks) -> str:
    """Sinks as the operator takes them, float32 [N1]."""
    e, total = plan.e, ""
    heads: list[Group] = [plan.site.heads]
    for by, ref in sinks.parts:
        value = e.cast(e.broadcast(e.arrange(ref, heads, "sinks"), heads, ref.labels), _T.FLOAT)
        if by != 1:
            factor = e.constant(np.asarray(by, np.float32))
            value = e.emit("Mul", [value, factor], "sinks", _T.FLOAT)
        total = e.emit("Add", [total, value], "sinks", _T.FLOAT) if total else value
    number = e.constant(np.asarray([sinks.number], np.float32))
    if not total:
        return e.broadcast(number, heads, ())
    return e.emit("Add", [total, number], "sinks", _T.FLOAT) if sinks.number else total


def split_rows(plan: Plan) -> None:
    """Rows with a cache of their own are the batch, the others query tokens (dense forms)."""
    site = plan.site
    own: set[Label] = set()
    for c in (site.nope, site.rope):
        if c is not None:
            own |= set(c.deep.ref.labels) - {site.key, c.label}
    plan.batch = [x for x in site.rows if x in own]
    plan.tokens = [x for x in site.rows if x not in own]


def deliver(plan: Plan, out: str, groups: Sequence[Group]) -> None:
    """Bring the operator's output to the axes of the value it replaces."""
    e, site = plan.e, plan.site
    target = [axis_labels(c) for c in site.out.coords]
    if any(t is None for t in target):
        raise Stop("the output's axes are no view of the operator's", site.out.value)
    if plan.absorb is not None:
        out, groups = plan.absorb.output(e, out, groups, plan.elem_type)
    value = e.permute(out, [list(g) for g in groups], [t or [] for t in target], "out")
    e.finish(value, plan.output)
