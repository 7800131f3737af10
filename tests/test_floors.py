"""Imports run downwards only: a table of floors, held against every import of the package."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "sfa_onnx"

# From the ground up. A module lives on the floor of its longest prefix and imports nothing from a
# floor above. Rooms of one floor may know each other; no import may close a circle of modules.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("errors", "version"),
    ("guard",),
    ("report",),
    ("operator", "op", "reference", "kv_cache", "files"),
    ("passes", "passes.candidate"),
    ("passes.graph", "passes.shapes"),
    ("passes.axes", "passes.scopes"),
    ("passes.values",),
    ("passes.bind",),
    ("passes.emit",),
    ("passes.find",),
    ("passes.cost", "passes.limits", "passes.plan", "passes.certificate"),
    ("passes.materialize", "passes.products"),
    ("passes.splice", "passes.scopes.splice", "passes.site_report"),
    ("passes.verify",),
    ("passes.indexer",),
    ("runtime.elem_types", "runtime.portable"),
    ("kv_convert",),
    ("summary",),
    ("runtime",),
    ("torch",),
    ("fusion_options", "fusion_run"),
    ("pages",),
    ("fusion", "unfusion", "ascend", "demo"),
    ("", "doctor"),  # "": the package itself, which only hands out names
    ("cli", "__main__"),
)
FACADES = ("",)  # read by everyone for a name or two; their own imports are lazy


def modules() -> dict[str, Path]:
    """Every module of the package by its name below `sfa_onnx`."""
    found = {}
    for path in (ROOT / PACKAGE).rglob("*.py"):
        parts = path.relative_to(ROOT / PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path, known: dict[str, Path]) -> Iterator[str]:
    """Modules of the package that a file imports, at its top or inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            top, _, rest = name.partition(".")
            if top != PACKAGE:
                continue
            yield rest if rest in known else rest.rpartition(".")[0]


def floor(module: str) -> int:
    """The floor of a module: that of its longest prefix in the table."""
    best, level = -1, -1
    for height, rooms in enumerate(FLOORS):
        for room in rooms:
            inside = module == room or (room and module.startswith(f"{room}."))
            if inside and len(room) > best:
                best, level = len(room), height
    assert level >= 0, f"{module} stands on no floor: enter its room in FLOORS"
    return level


@functools.cache
def edges() -> dict[str, set[str]]:
    """Who imports whom, without what the facade hands out lazily."""
    known = modules()
    return {
        module: {i for i in imports(path, known) if i != module and i not in FACADES}
        for module, path in known.items()
        if module not in FACADES
    }


def test_imports_run_downwards_only() -> None:
    upwards = [
        f"{module} (floor {floor(module)}) imports {target} (floor {floor(target)})"
        for module, targets in edges().items()
        for target in sorted(targets)
        if floor(target) > floor(module)
    ]
    assert not upwards, "\n".join(upwards)


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Modules left when those without imports inside the graph are taken away again and again."""
    left = dict(graph)
    while free := [m for m, targets in left.items() if not targets & (left.keys() - {m})]:
        for module in free:
            del left[module]
    while free := [m for m in left if not any(m in t for o, t in left.items() if o != m)]:
        for module in free:
            del left[module]
    return [sorted(left)] if left else []


def test_no_import_closes_a_circle() -> None:
    assert not circles(edges())


def test_a_circle_and_an_import_upwards_are_seen() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [["b", "c"]]
    assert floor("passes.bind.mask") > floor("passes.axes.expr")
    assert floor("fusion") > floor("runtime.compare.run") > floor("kv_convert.trace")


def test_every_room_of_the_table_exists() -> None:
    known = modules()
    missing = [r for rooms in FLOORS for r in rooms if r not in known and r != "passes.values"]
    assert not missing


# Vocabulary, tables and reports of the passes: tested where they are used.
USED_IN = {
    "candidate": "test_verify.py",
    "cost": "test_fuse_api.py",
    "limits": "test_fuse_api.py",
    "plan": "test_assume.py",
    "site_report": "test_fuse_api.py",
}


def test_a_pass_and_its_test_are_twins_by_name() -> None:
    """Every room and module of `passes` has a test that bears its name, or is listed above."""
    rooms = {p.stem for p in (ROOT / PACKAGE / "passes").iterdir() if p.suffix in ("", ".py")}
    tests = [p.stem.split("_")[1:] for p in (ROOT / "tests").glob("test_*.py")]
    named = {room for room in rooms if any(room in words for words in tests)}
    assert rooms - named - {"__init__", "__pycache__"} == set(USED_IN)
    assert all((ROOT / "tests" / name).exists() for name in USED_IN.values())
