"""Selections of pools of tokens and of a single one, and keys folded one by one."""

from __future__ import annotations

import pytest

from tests.zoo import catalogue
from tests.zoo.judge import judge

pytestmark = [pytest.mark.kernel, pytest.mark.torch]

CASES = {case.name: case for case in catalogue.cases("^pools-.*-ts-static$")}


@pytest.mark.parametrize("name", sorted(CASES))
def test_pool(name: str) -> None:
    verdict = judge(CASES[name])
    assert verdict.ok, verdict
