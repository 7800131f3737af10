"""Family: representative cases of the other families after edits and after other tools."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from tests.zoo import expanded, hf, int8, official
from tests.zoo.base import Case
from tests.zoo.edits import EDITS, TOOLS

SOURCES = {
    int8: ("int8-gather-gather-dynamo", "int8-rule-causal-ts-dyn", "int8-paged-flat-dynamo-dyn"),
    official: ("official-layer-dynamo", "official-mask-bool_keep-ts-dyn"),
    hf: ("hf-eager-decode-dynamo-dyn", "hf-sdpa-decode-dynamo"),
    expanded: ("exp-official-dynamo", "exp-sdpa-bool-opset23"),
}
FEW = {"renamed", "identities", "shuffled", "function"}  # on every source; the rest where small


def _derived(case: Case, name: str, edit) -> Case:
    tags = dict(case.tags) | {"edit": name}
    return replace(
        case,
        name=f"{case.name}+{name}",
        family="edited",
        make=lambda: edit(case.build()),
        tags=tags,
    )


def cases() -> Iterator[Case]:
    for family, names in SOURCES.items():
        chosen = {c.name: c for c in family.cases() if c.name in names}
        for name in names:
            for edit, function in {**EDITS, **TOOLS}.items():
                if family in (int8, official) or edit in FEW or edit in TOOLS:
                    yield _derived(chosen[name], edit, function)
