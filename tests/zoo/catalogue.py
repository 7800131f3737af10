"""All cases of the zoo."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator

from tests.zoo.base import Case

FAMILIES = (
    "int8",
    "official",
    "nearmiss",
    "hf",
    "expanded",
    "flash",
    "handmade",
    "packed",
    "masks",
    "extra",
    "selections",
    "edited",
    "scorepath",
    "scoped",
    "scoremiss",
    "heads",
    "finite",
    "attention_op",
    "elsewhere",
    "outsiders",
    "guarded",
    "kernels",
    "foreign",
    "sides",
    "pools",
)


def cases(pattern: str = "") -> Iterator[Case]:
    """Every case whose name matches `pattern` (a regular expression searched for)."""
    for family in FAMILIES:
        for case in importlib.import_module(f"tests.zoo.{family}").cases():
            if re.search(pattern, case.name):
                yield case
