"""Absorption: per-head keys and values expanded from a latent become queries in latent space.

q . (W_UK c) = (W_UK^T q) . c, and sum_t p_t (W_UV c_t) = W_UV (sum_t p_t c_t). The weights are used
by reference: Reshape, Slice and Transpose nodes on the graph's own values, never a copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from sfa_onnx.passes.axes.expr import Label
from sfa_onnx.passes.axes.trace import Ref, Stop
from sfa_onnx.passes.bind.paths import State
from sfa_onnx.passes.bind.rows import Columns, require_one, trace_columns
from sfa_onnx.passes.bind.site import Site
from sfa_onnx.passes.emit.emitter import Emitter, Group

__all__ = ["Absorbed"]


@dataclass(frozen=True)
class Absorbed:
    """The two weights of an expansion.

    Attributes:
        key_weight: over heads, `column` and `latent` (of the key).
        value_weight: over heads, `out` and `value_latent`.
        column: nope columns of a head; `out`: value columns of a head.
        latent, value_latent: latent columns, as the key's and the value's trace label them.
        heads: labels of the heads.
    """

    key_weight: Ref
    value_weight: Ref
    column: Label
    out: Label
    latent: Label
    value_latent: Label
    heads: tuple[Label, ...]

    @classmethod
    def of(cls, site: Site) -> Absorbed:
        """The weights of a site whose keys and values are expanded.

        Raises:
            Stop: a weight depends on more than heads and columns.
        """
        key, value = site.nope, site.value
        if key.inner is None or value.inner is None:
            raise Stop(
                "keys and values are not both expanded",
                value.path[0].ref.value,
                "expand both from one latent, or none",
            )
        for columns in (key, value):
            allowed = {*site.heads, columns.label, columns.inner}
            extra = columns.weight[-1].ref.labels - allowed
            if extra:
                raise Stop(
                    f"the expansion weight {columns.weight[-1].ref.value} is not the same for every"
                    " token",
                    columns.weight[-1].ref.value,
                    "absorption needs one weight per head, for all tokens",
                )
        return cls(
            key.weight[-1].ref,
            value.weight[-1].ref,
            key.label,
            value.label,
            key.inner,
            value.inner,
            tuple(site.heads),
        )

    def latent_site(self, site: Site) -> Site:
        """The same attention in latent space: one key row for all heads."""
        key = _inner(site, site.nope.path, site.nope.behind, self.latent)
        value = _inner(site, site.value.path, site.value.behind, self.value_latent)
        weight = site.nope.weight[-1].factor
        if site.value.weight[-1].factor != 1:
            raise Stop(
                "the value's expansion is scaled",
                site.value.path[0].ref.value,
                "scale the attention's result instead",
            )
        return replace(site, nope=key, value=value, column=key.label, scale=site.scale * weight)

    def query(self, e: Emitter, ref: Ref, groups: Sequence[Group], elem_type: int) -> str:
        """Q @ W_UK^T: [rows, heads, nope] -> [rows, heads, C], in the order of `groups`."""
        rows, tokens, heads = (list(g) for g in groups[:3])
        q = e.arrange(ref, [rows, heads, tokens, [self.column]], "query")
        q = e.cast(q, elem_type)
        w = e.arrange(self.key_weight, [heads, [self.column], [self.latent]], "w_uk")
        q = e.emit("MatMul", [q, e.cast(w, elem_type)], "absorbed", elem_type)
        have = ref.labels | set(heads) | {self.latent}
        grouped = [rows, heads, tokens, [self.latent]]
        q = e.broadcast(q, grouped, have)
        return e.permute(q, grouped, [rows, tokens, heads, [self.latent]], "query")

    def output(
        self, e: Emitter, out: str, groups: Sequence[Group], elem_type: int
    ) -> tuple[str, list[Group]]:
        """Out @ W_UV: [rows, heads, C] -> [rows, heads, v]; its axes after that."""
        rows, tokens, heads = (list(g) for g in groups[:3])
        column = list(groups[3])
        out = e.permute(
            out, [rows, tokens, heads, column], [rows, heads, tokens, column], "latent_out"
        )
        w = e.arrange(self.value_weight, [heads, [self.value_latent], [self.out]], "w_uv")
        out = e.emit("MatMul", [out, e.cast(w, elem_type)], "expanded", elem_type)
        return out, [rows, heads, tokens, [self.out]]


def _inner(site: Site, path: Sequence[State], behind: int, label: Label) -> Columns:
    """Columns of the latent, traced on from behind the expansion."""
    start = path[behind]
    parts = trace_columns(site.tracer, start.ref, label)
    columns = require_one(parts, "the latent", start.ref.value)
    states = tuple(State(s.ref, s.factor * start.factor) for s in columns.path)
    return replace(columns, path=states)
