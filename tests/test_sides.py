"""What leaves an attention besides its result, sinks of every spelling, and merges by sigmoids."""

from __future__ import annotations

import pytest

from tests.zoo import catalogue
from tests.zoo.judge import judge

pytestmark = [pytest.mark.kernel, pytest.mark.torch]

CASES = {case.name: case for case in catalogue.cases("^sides-.*-ts-static$")}


@pytest.mark.parametrize("name", sorted(CASES))
def test_side(name: str) -> None:
    verdict = judge(CASES[name])
    assert verdict.ok, verdict
