"""One spelling as a function of tensors, and the case it becomes under each exporter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import nn

from tests.zoo.base import FLOAT_KV, Case, Feeds, export, to_torch

__all__ = ["Form", "case_of"]


@dataclass(frozen=True)
class Form:
    """One spelling: a function of tensors, the feeds it takes, and what must become of it."""

    name: str
    forward: Callable[..., Any]
    feeds: Callable[[np.random.Generator], Feeds]
    dynamic: dict[str, dict[int, str]] = field(default_factory=dict)
    refuse: str = ""
    outputs: tuple[str, ...] = ("out",)
    opset: int = 18
    exporters: tuple[str, ...] = ("dynamo", "ts")
    sites: int = 1
    op: str = FLOAT_KV
    dtype: str = "f32"


class _Module(nn.Module):
    def __init__(self, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.function = forward


def _module(form: Form, names: tuple[str, ...]) -> nn.Module:
    """A module whose forward has the feeds' names, as exporters want it."""
    space: dict[str, Any] = {"_Module": _Module}
    given = ", ".join(names)
    passed = ", ".join(f"{n}={n}" for n in names)
    code = f"class Named(_Module):\n    def forward(self, {given}):\n"
    exec(code + f"        return self.function({passed})\n", space)
    return space["Named"](form.forward)


def case_of(family: str, form: Form, exporter: str, dynamic: bool) -> Case:
    """The form, exported one way."""

    def make():
        inputs = to_torch(form.feeds(np.random.default_rng(0)))
        return export(
            _module(form, tuple(inputs)),
            inputs,
            form.outputs,
            exporter=exporter,
            opset=form.opset if exporter == "dynamo" else min(form.opset, 17),
            dynamic={k: form.dynamic.get(k, {}) for k in inputs} if dynamic else None,
        )

    make.__module__ = f"tests.zoo.{family}"  # whose source names the cache
    kind = "dyn" if dynamic else "static"
    return Case(
        f"{family}-{form.name}-{exporter}-{kind}",
        family,
        make,
        lambda seed: form.feeds(np.random.default_rng(seed)),
        expect="refuse" if form.refuse else "fuse",
        op=None if form.refuse else form.op,
        reason=form.refuse,
        sites=form.sites,
        tags={"exporter": exporter, "dynamic": dynamic, "dtype": form.dtype},
    )
