"""Sequences packed along one axis, Attention nodes with merged heads, and why sites are refused."""

from __future__ import annotations

import pytest

from tests.zoo.catalogue import cases
from tests.zoo.judge import judge


@pytest.mark.parametrize("kind", ["packed-dynamo", "paged-dynamo", "paged-dynamo-dyn"])
def test_sequences_that_the_graph_tells_apart_by_prefix_sums(kind: str) -> None:
    """Prefix sums of queries and of keys are drawn as such; fused and original agree in runs."""
    (case,) = cases(f"^ragged-{kind}$")
    verdict = judge(case)
    assert verdict.ok, verdict.failure or verdict.reasons
    assert verdict.fused == 1
