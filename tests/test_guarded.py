"""Results tested for NaN, weights zeroed by their masks, masks that are reckoned from flags."""

from __future__ import annotations

import pytest

from tests.zoo import catalogue
from tests.zoo.judge import judge

pytestmark = [pytest.mark.kernel, pytest.mark.torch]

CASES = {case.name: case for case in catalogue.cases("^guarded-(.*-ts|(miss-)?open-.*)$")}


@pytest.mark.parametrize("name", sorted(CASES))
def test_guarded(name):
    verdict = judge(CASES[name])
    assert verdict.ok, verdict
