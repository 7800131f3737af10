"""Family: masks of finite numbers, masks added twice, and what is put where NaN would be."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from tests.zoo.base import Case
from tests.zoo.scorepath import S1, S2, B, Hook, K, Steps, number
from tests.zoo.write import Graph

F16_MIN, F32_MIN = -65504.0, float(np.finfo(np.float32).min)


def _hidden(g: Graph, s: Steps) -> str:
    """Where scores are hidden [B, S1, 1, keys]."""
    if not s.dense:
        return g.op("Less", g.unsqueeze("indices", 2), g.const(0, np.int32))
    zeros = g.const(np.zeros((B, S1, K)), bool)
    hit = g.op("ScatterElements", g.const(np.ones((B, S1, S2)), bool), s.indices(g), zeros, axis=-1)
    return g.unsqueeze(hit, 2)


def filled(value: float) -> Hook:
    """Scores replaced by a number."""

    def hide(g: Graph, s: Steps, x: str) -> str:
        return g.op("Where", _hidden(g, s), number(g, value, s.kind), x)

    return hide


def added(value: float, times: int = 1) -> Hook:
    """A number added to scores, once or more often."""

    def hide(g: Graph, s: Steps, x: str) -> str:
        hidden = _hidden(g, s)
        for _ in range(times):
            zero = number(g, 0, s.kind)
            x = g.op("Add", x, g.op("Where", hidden, number(g, value, s.kind), zero))
        return x

    return hide


def multiplied(value: float) -> Hook:
    """(1 - visible) * number, as many models write it."""

    def hide(g: Graph, s: Steps, x: str) -> str:
        visible = g.cast(g.op("Not", _hidden(g, s)), s.kind)
        gone = g.op("Sub", number(g, 1, s.kind), visible)
        return g.op("Add", x, g.op("Mul", gone, number(g, value, s.kind)))

    return hide


def summed(value: float) -> Hook:
    """Two masks added to each other first; in half precision the sum is -inf."""

    def hide(g: Graph, s: Steps, x: str) -> str:
        hidden, zero, low = _hidden(g, s), number(g, 0, s.kind), number(g, value, s.kind)
        one, other = (g.op("Where", hidden, low, zero) for _ in range(2))
        return g.op("Add", x, g.op("Add", one, other))

    return hide


def floored(value: float) -> Hook:
    """The sum of two masks, not below the lowest number."""

    def hide(g: Graph, s: Steps, x: str) -> str:
        hidden, zero, low = _hidden(g, s), number(g, 0, s.kind), number(g, value, s.kind)
        one, other = (g.op("Where", hidden, low, zero) for _ in range(2))
        return g.op("Add", x, g.op("Max", g.op("Add", one, other), low))

    return hide


def _guard(fill: Any) -> Hook:
    """Weights that are NaN replaced."""

    def weigh(g: Graph, s: Steps, p: str) -> str:
        return g.op("Where", g.op("IsNaN", p), number(g, fill, s.kind), p)

    return weigh


def _tables() -> Iterator[tuple[str, Steps, str]]:
    for kind in ("f32", "f16"):
        lowest = F16_MIN if kind == "f16" else F32_MIN
        far = {"inf": -np.inf, "1e4": -1e4, "65504": F16_MIN, "min": lowest}
        for name, value in far.items():
            yield f"filled-{name}-{kind}", Steps(hide=filled(value), kind=kind), ""
            yield f"added-{name}-{kind}", Steps(hide=added(value), kind=kind), ""
            if name != "inf":
                yield f"multiplied-{name}-{kind}", Steps(hide=multiplied(value), kind=kind), ""
        yield f"twice-{kind}", Steps(hide=added(lowest, 2), kind=kind), ""
        yield f"summed-{kind}", Steps(hide=summed(lowest), kind=kind), ""
        yield f"floored-{kind}", Steps(hide=floored(lowest), kind=kind), ""
        yield f"guard-{kind}", Steps(weigh=_guard(0.0), kind=kind), ""
        for value in (-1.0, -30.0, -1000.0, 0.0, 1e4):
            near = f"{value:g}"
            reason = f"puts {value:g} in place of scores"
            yield f"near-filled{near}-{kind}", Steps(hide=filled(value), kind=kind), reason
            if value:
                reason = "0 and -inf|not bool|adds"
                yield f"near-added{near}-{kind}", Steps(hide=added(value), kind=kind), reason
    yield "near-guard-uniform", Steps(weigh=_guard(1 / K)), "Where"
    yield "near-guard-nan", Steps(weigh=_guard(np.nan)), "Where"


def cases() -> Iterator[Case]:
    for name, steps, reason in _tables():
        for dense in (False, True):
            yield _case(name, Steps(**{**vars(steps), "dense": dense}), reason)


def _case(name: str, s: Steps, reason: str) -> Case:
    tags = {"exporter": "hand", "opset": s.opset, "dtype": s.kind, "dynamic": False}
    more = {"expect": "refuse", "reason": reason} if reason else {}
    build = lambda: s.build()  # noqa: E731 - of this module: its source names the cache
    form = "dense" if s.dense else "gathered"
    return Case(f"finite-{name}-{form}", "finite", build, s.feeds, tags=tags, **more)
