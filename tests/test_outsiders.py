"""Spellings of serving code, and equal sites that only names and node order tell apart."""

from __future__ import annotations

import pytest
from torch import nn

import sfa_onnx
from tests.zoo import catalogue
from tests.zoo.base import export, to_torch
from tests.zoo.judge import judge
from tests.zoo.outsiders import KEEPS, Masked, masked_feeds

pytestmark = [pytest.mark.kernel, pytest.mark.torch]

CASES = {case.name: case for case in catalogue.cases("^outsider-.*-ts$")}


@pytest.mark.parametrize("name", sorted(CASES))
def test_serving_code(name):
    verdict = judge(CASES[name])
    assert verdict.ok, verdict


class Layers(nn.Module):
    """Two attentions of the same kind; the second is traced with its inputs in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Masked(KEEPS["put"], False), Masked(KEEPS["put"], False)

    def forward(self, q, kv, wish):
        late = [x.tanh() for x in (wish, kv, q)]
        return self.first(q, kv, wish), self.second(*late[::-1])


def test_equal_sites_are_verified_once_whatever_their_names_are():
    model = export(Layers(), to_torch(masked_feeds(0)), ("a", "b"), exporter="ts", opset=17)
    first, second = sfa_onnx.fuse(model, expect_sites=2).fused
    assert first.record is not None
    assert first.record.shared_with is None
    assert second.record is not None
    assert second.record.shared_with == first.site_id
