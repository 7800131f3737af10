"""Write measured times into the pages, from the recorded runs in docs/measured.json.

One number stands in one place: a benchmark's run is recorded there, and every page that quotes it
is written from it. `python -m scripts.write_measured`; a test asks that the pages are current.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

__all__ = ["PAGES", "RUNS", "outside", "written"]

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


def _span(numbers: list[float] | float, word: str = "-") -> str:
    """One number, or "low-high"."""
    if not isinstance(numbers, list):
        return f"{numbers:,}"
    low, high = numbers
    return f"{low}" if low == high else f"{low}{word}{high}"


def _heads_alike(times: dict[str, float]) -> str:
    """As "1.9x at 128, 64 and 16 heads, 1.8x at one"."""
    groups: dict[float, list[str]] = {}
    for heads, ratio in times.items():
        groups.setdefault(ratio, []).append("one" if heads == "1" else heads)
    parts = []
    for ratio, heads in groups.items():
        many = f"{', '.join(heads[:-1])} and {heads[-1]} heads" if heads[1:] else heads[0]
        parts.append(f"{ratio}x at {many}")
    return ", ".join(parts)


def _threads(run: dict[str, Any]) -> str:
    return f"Two threads: {_heads_alike(run['threads']['heads'])}, on a quiet machine."


def _peers(run: dict[str, Any]) -> str:
    many, few = (run["peers"]["heads"][n] for n in ("128", "16"))
    paths = run["paths"]
    return (
        f"At 128 heads NumPy takes {many['numpy']}x, torch.compile (bf16) {many['compiled']}x and"
        f" the best onnxruntime graph of standard operators {many['standard']}x as long; at 16"
        f" heads {few['numpy']}x, {few['compiled']}x and {few['standard']}x\n(float32 paths:"
        f" {paths['avx512f']} % of the FMA peak with AVX-512, {paths['avx2']} % with AVX2)."
        f" {_threads(run)}"
    )


def _paths(run: dict[str, Any]) -> str:
    paths = run["paths"]
    return (
        f"With the rows in cache the products alone run at {_span(paths['in_cache'], ' to ')} % of"
        f" the peak in both phases. AVX-512F\nreaches {paths['avx512f']} % and AVX2"
        f" {paths['avx2']} % of the fp32 peak at 128 heads; a bf16 float cache"
        f" {paths['bf16_cache']} % of the bf16 peak; a\nfloat16 query over int8 rows takes"
        f" {paths['float16_products']} times the dot products and runs at"
        f" {paths['float16_query']} % of the bf16 peak.\n{_threads(run)}"
    )


def _indexer(run: dict[str, Any]) -> str:
    rows = []
    for name, us in run["indexer"]["types"].items():
        of = f" of {us['of']}" if "of" in us else ""
        others = [us[k] / us["session"] for k in ("graph", "compiled")]
        graph, compiled = (f"{r:.1f}x" if r < 10 else f"{r:.0f}x" for r in others)
        rows.append(
            [name, _span(us["scores"]), f"{_span(us['peak'])} %{of}", _span(us["selected"]),
             str(us["session"]), f"{us['graph']} ({graph})", f"{us['compiled']} ({compiled})"]
        )  # fmt: skip
    head = ["type", "scores us", "of the path's peak", "with top-2048 us", "in onnxruntime"]
    table = _table([*head, "graph as exported, f32", "torch.compile, same type"], rows)
    chosen, whole = run["indexer"]["selection_us"], run["indexer"]["types"]["int8"]["selected"][0]
    return (
        f"{table}\n\nIn int8 the exact selection takes {chosen} us of that,"
        f" {chosen / whole:.1%}".removesuffix("%")
        + " %: chosen lanes are appended without a branch, the k-th best is found by interpolation,"
        " and the best are\nsorted by the digits in which they differ."
    )


def _indexer_model(run: dict[str, Any]) -> str:
    model = run["indexer_model"]
    rows = [
        [name, *(f"{before} -> {after} %" for before, after in zip(*of.values(), strict=True))]
        for name, of in model["types"].items()
    ]
    return _table(["of the peak, modelled", *model["machines"]], rows)


def _scale(run: dict[str, Any]) -> str:
    scale = run["scale"]
    ours, layer = scale["fuse"], scale["layer"]
    others = [f"{scale[n]['s']} s and {scale[n]['mb']} MB" for n in ("onnxscript", "graphsurgeon")]
    return (
        f"`{scale['command']}`: 129,000 nodes with 1.5 TB of weights fuse in"
        f" {_span(ours['s'], ' to ')} s and {ours['mb']} MB (verification and hashing"
        f" {ours['more_s']} s more);\nonnxscript's rewriter takes {others[0]}, whole-graph"
        f" GraphSurgeon {others[1]} to match alone. The true-size layer took {layer['inspect']} s"
        f" to inspect,\n{layer['fuse']} s to fuse (verification included), {layer['convert']} s to"
        f" convert, {_span(layer['compare'], ' to ')} s and {layer['compare_gb']} GB to compare,"
        f" {layer['atc']} s to hand over."
    )


def outside(page: str) -> str:
    """The page's text about speed without what is written from the recorded runs."""
    text = (ROOT / page).read_text(encoding="utf-8")
    if page == "README.md":
        text = text.partition("\n## How fast")[2].partition("\n## ")[0]
    return _BLOCK.sub("", text)


_TABLES: Final[dict[str, Callable[[dict[str, Any]], str]]] = {
    "kernel": _heads,
    "real-size": _real_size,
    "in-place": _in_place,
    "peers": _peers,
    "paths": _paths,
    "indexer": _indexer,
    "indexer-model": _indexer_model,
    "scale": _scale,
}
PAGES: Final = {
    "README.md": ("kernel", "peers", "real-size", "in-place", "scale"),
    "docs/kernel.md": ("kernel", "paths", "indexer", "indexer-model"),
}


def written(page: str) -> str:
    """The page's text with its tables as the recorded runs say."""
    runs = json.loads(RUNS.read_text(encoding="utf-8"))
    text = (ROOT / page).read_text(encoding="utf-8")
    return _BLOCK.sub(lambda m: f"{m[1]}{_TABLES[m[2]](runs)}{m[3]}", text)


if __name__ == "__main__":
    for name in PAGES:
        (ROOT / name).write_text(written(name), encoding="utf-8")
