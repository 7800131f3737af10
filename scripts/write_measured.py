"""Write the tables of measured times into the pages, from the recorded runs in docs/measured.json.

One number stands in one place: a benchmark's run is recorded there, and every page that quotes it
is written from it. `python -m scripts.write_measured`; a test asks that the pages are current.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

__all__ = ["PAGES", "RUNS", "written"]

ROOT: Final = Path(__file__).resolve().parent.parent
RUNS: Final = ROOT / "docs" / "measured.json"
_BLOCK: Final = re.compile(r"(<!-- measured: ([\w-]+) -->\n).*?(\n<!-- /measured -->)", re.DOTALL)


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def _heads(run: dict[str, Any]) -> str:
    heads = run["kernel"]["heads"]

    def cells(key: str, unit: str = "") -> list[str]:
        return [f"{h[key]}{unit}" if key in h else "" for h in heads.values()]

    rows = [
        ["us per token", *cells("us")],
        ["of the bf16 peak", *cells("peak", " %")],
        ["times the bare gather of the rows", *cells("gather")],
    ]
    return _table(["query heads", *heads], rows)


def _real_size(run: dict[str, Any]) -> str:
    rows = []
    for tokens, ms in run["real_size"]["tokens"].items():
        gains = " / ".join(f"{ms['original'] / ms[k]:.1f}x" for k in ("fused", "paged"))
        rows.append([f"{int(tokens):,}", *(f"{value:,} ms" for value in ms.values()), gains])
    return _table(["cached tokens", "original", "fused", "paged int8", ""], rows)


def _in_place(run: dict[str, Any]) -> str:
    rows = [
        [
            f"{int(n):,}",
            f"{ms['before']} ms",
            f"{ms['after']} ms",
            f"{ms['before'] / ms['after']:.2f}x",
        ]
        for n, ms in run["in_place"]["tokens"].items()
    ]
    return _table(["cached tokens", "before", "after", ""], rows)


_TABLES: Final[dict[str, Callable[[dict[str, Any]], str]]] = {
    "kernel": _heads,
    "real-size": _real_size,
    "in-place": _in_place,
}
PAGES: Final = {"README.md": ("kernel", "real-size", "in-place"), "docs/kernel.md": ("kernel",)}


def written(page: str) -> str:
    """The page's text with its tables as the recorded runs say."""
    runs = json.loads(RUNS.read_text(encoding="utf-8"))
    text = (ROOT / page).read_text(encoding="utf-8")
    return _BLOCK.sub(lambda m: f"{m[1]}{_TABLES[m[2]](runs)}{m[3]}", text)


if __name__ == "__main__":
    for name in PAGES:
        (ROOT / name).write_text(written(name), encoding="utf-8")
