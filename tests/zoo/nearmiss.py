"""Near misses: graphs one step away from the operator, which must not be fused.

Two honest pipelines (`Gathered` int8 with indices as input, `Dense` float with top-k and a mask);
each near miss overrides one step of one or both.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from tests.zoo.base import ANTIQUANT, FLOAT_KV, Case, export, to_torch
from tests.zoo.honest import Dense, Gathered, N, Pipeline, dense_feeds, gathered_feeds
from tests.zoo.missteps import DENSE, GATHERED, STEPS

# Other than the operator, yet expressible with it around other inputs: refused or exactly right.
OR_RIGHT = {
    "per-head-scale", "row-temperature", "halved-probs", "value-doubled", "value-half",
    "value-flipped", "rope-other-rows", "scale-other-rows", "rope-rotated-after", "other-batch",
    "first-batch", "interleaved-batch", "reversed-scales", "rope-first-value", "value-scaled",
    "mask-inverted", "or-window",
}  # fmt: skip


def _module(base: type[Pipeline], override: dict) -> Pipeline:
    torch.manual_seed(0)
    module = type("Miss", (base,), override)()
    module.sink = nn.Parameter(torch.randn(N))
    module.bias = nn.Parameter(torch.randn(1, 1, N, 1))
    module.mix = nn.Parameter(torch.randn(N, N))
    return module


def _case(form: str, name: str, override: dict, exporter: str, **more) -> Case:
    base, feed = (Gathered, gathered_feeds) if form == "int8" else (Dense, dense_feeds)
    outputs = ("out", "second") if "result" in override else ("out",)

    def make():
        return export(
            _module(base, override),
            to_torch(feed(0)),
            outputs,
            exporter=exporter,
            opset=18 if exporter == "dynamo" else 17,
        )

    tags = {"exporter": exporter, "opset": 18, "dtype": "f32", "dynamic": False}
    tags["or_right"] = name.removeprefix("miss-") in OR_RIGHT
    return Case(
        f"{form}-{name}-{exporter}",
        "nearmiss" if override else "honest",
        make,
        feed,
        tags=tags,
        **more,
    )


def cases() -> Iterator[Case]:
    for form, op in (("int8", ANTIQUANT), ("dense", FLOAT_KV)):
        extra = GATHERED if form == "int8" else DENSE
        for exporter in ("dynamo", "ts"):
            yield _case(form, "honest", {}, exporter, op=op)
            for name, (override, reason) in {**STEPS, **extra}.items():
                if name == "dropout" and exporter == "ts":
                    continue  # the tracer exports in evaluation mode and drops it
                if form == "dense" and name in ("mask-log-count",) and exporter == "ts":
                    continue
                more = {"expect": "refuse", "reason": reason}
                yield _case(form, f"miss-{name}", override, exporter, **more)
