"""Family: representative cases of the other families inside If, Loop, Scan and local functions."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import onnx

from tests.zoo import bodies, expanded, flash, handmade, hf, int8, masks, nearmiss, official, packed
from tests.zoo.base import Case, Feeds

SOURCES = {
    int8: ("int8-gather-gather-dynamo-dyn", "int8-paged-flat-ts-dyn", "int8-rule-causal-ts-dyn"),
    official: ("official-layer-ts-dyn", "official-mask-bool_keep-ts-dyn"),
    hf: ("hf-eager-decode-dynamo", "hf-eager-decode-dynamo-dyn", "hf-sdpa-prefill-ts"),
    expanded: ("exp-official-ts", "exp-sdpa-bool-opset23"),
    flash: ("flash-tnd-lse-ts",),
    handmade: ("hand-float-nd_batch", "hand-int8-nd_batch", "hand-mask-scatter_max"),
    masks: ("mask-dense-input-ts",),
    packed: ("packed-arithmetic-f16",),
}
NEAR = (
    "int8-miss-softcap-ts",
    "int8-miss-value-other-scales-ts",
    "int8-miss-probs-output-ts",
    "dense-miss-alibi-ts",
    "dense-miss-relu-ts",
)
_PRODUCTS = ("Einsum", "MatMul")
STEPS = 2  # of loops and scans


@dataclass(frozen=True)
class Form:
    """One way to put a model into another scope.

    copies: how many sites one site becomes. feeds: what the new model takes.
    """

    name: str
    edit: Callable[[onnx.ModelProto], onnx.ModelProto]
    copies: int = 1
    feeds: Callable[[Feeds, int], Feeds] = lambda feeds, _: feeds


def _branch(feeds: Feeds, seed: int) -> Feeds:
    return feeds | {bodies.COND: np.array(seed % 2 == 0)}


def _first_float(model: onnx.ModelProto) -> tuple[str, ...]:
    """The first input of floating point: what a scan runs along."""
    return tuple(v.name for v in model.graph.input if v.type.tensor_type.elem_type != 7)[:1]


def _inputs(model: onnx.ModelProto) -> tuple[str, ...]:
    return tuple(v.name for v in model.graph.input)


def _half_outside(model: onnx.ModelProto) -> onnx.ModelProto:
    """What comes before the first product of two computed values stays outside."""
    stored = {t.name for t in model.graph.initializer}
    nodes = list(model.graph.node)
    first = next(
        i
        for i, n in enumerate(nodes)
        if n.op_type == "Attention" or (n.op_type in _PRODUCTS and not stored & set(n.input))
    )
    return bodies.in_if(model, first=first, suffix="/else")


FORMS = (
    Form("if", bodies.in_if, 2, _branch),
    Form("if-hoisted", partial(bodies.in_if, hoist=True, suffix="/else"), 2, _branch),
    Form("if-half", _half_outside, 2, _branch),
    Form("loop", partial(bodies.in_loop, trips=STEPS)),
    Form("loop-states", lambda m: bodies.in_loop(m, _inputs(m), declared=False, trips=STEPS)),
    Form("nested", bodies.nested, 2, _branch),
    Form("function", lambda m: bodies.calls(m, bodies.as_function(m, "Attn"), [{}]), 1,
         lambda feeds, _: {f"{name}.0": array for name, array in feeds.items()}),
)  # fmt: skip


def _scoped(case: Case, form: Form) -> Case:
    return replace(
        case,
        name=f"{case.name}@{form.name}",
        family="scoped",
        make=lambda: form.edit(case.build()),
        make_feeds=lambda seed: form.feeds(case.make_feeds(seed), seed),
        stress=None,
        sites=case.sites * form.copies,
        tags=dict(case.tags) | {"scope": form.name},
    )


def _merged() -> Iterator[Case]:
    """A prefill and a decode branch, as Optimum merges decoders."""
    known = {c.name: c for c in hf.cases()}
    for suffix in ("dynamo", "dynamo-dyn"):
        decode, prefill = (known[f"hf-eager-{part}-{suffix}"] for part in ("decode", "prefill"))

        def make(decode=decode, prefill=prefill) -> onnx.ModelProto:
            first = decode.build()
            del first.graph.output[1:]
            second = bodies.with_inputs(prefill.build(), "prompt_")
            return bodies.merged(second, first)

        def feeds(seed, decode=decode, prefill=prefill) -> Feeds:
            prompt = {f"prompt_{n}": a for n, a in prefill.make_feeds(seed).items()}
            return _branch(decode.make_feeds(seed) | prompt, seed)

        yield replace(
            decode,
            name=f"merged-decoder-{suffix}",
            family="scoped",
            make=make,
            make_feeds=feeds,
            stress=None,
            sites=2,
        )


def cases() -> Iterator[Case]:
    for family, names in SOURCES.items():
        known = {c.name: c for c in family.cases()}
        for name, form in itertools.product(names, FORMS):
            yield _scoped(known[name], form)
    known = {c.name: c for c in nearmiss.cases()}
    for name, form in itertools.product(NEAR, FORMS):
        yield _scoped(known[name], form)
    yield from _merged()
