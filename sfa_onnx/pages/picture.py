"""A small graph as a picture: nodes in layers, drawn as SVG.

Layers follow the longest path, so that every edge runs downwards; within a layer nodes stand near
the middle of what they read (two sweeps of the barycentre rule).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Final

from sfa_onnx.guard.text import printable

__all__ = ["MOST", "Box", "draw"]

MOST: Final = 60  # boxes of one picture
_WIDTH, _HEIGHT, _GAP, _STEP = 132, 34, 14, 70
_SMALLEST: Final = 0.75  # of its size a picture shrinks to before it is scrolled
_LETTERS: Final = 18  # of a box's second line, and of its title before it is squeezed
_TITLE: Final = 36  # of its title


@dataclass
class Box:
    """One node.

    Attributes:
        key: what edges name.
        title: its operator, or what kind of value it is.
        text: its name.
        role: colour class: "gone", "new", "around", or the role of an operand.
        reads: keys of the boxes above it.
    """

    key: str
    title: str
    text: str = ""
    role: str = "around"
    reads: list[str] = field(default_factory=list)


def draw(boxes: Sequence[Box], caption: str) -> str:
    """The boxes as an SVG element; more than `MOST` are cut, and the caption says so."""
    shown, left = list(boxes[:MOST]), max(0, len(boxes) - MOST)
    if not shown:
        return f"<figure><figcaption>{escape(caption)}: nothing to draw</figcaption></figure>"
    layers = _layers(shown)
    _order(layers)
    places = {
        box.key: (x * (_WIDTH + _GAP) + _GAP, y * _STEP + _GAP)
        for y, layer in enumerate(layers)
        for x, box in _centred(layer, max(map(len, layers)))
    }
    width = max(map(len, layers)) * (_WIDTH + _GAP) + _GAP
    height = len(layers) * _STEP + _GAP
    parts = [_edge(places[r], places[b.key]) for b in shown for r in b.reads if r in places]
    parts += [_box(b, *places[b.key]) for b in shown]
    more = f" ({left} more nodes are not drawn)" if left else ""
    return (
        f'<figure><div class="wide"><svg role="img" aria-label="{escape(caption)}"'
        f' viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" height="{height:.0f}"'
        f' style="min-width:{_SMALLEST * width:.0f}px">'
        f"{''.join(parts)}</svg></div><figcaption>{escape(caption + more)}</figcaption></figure>"
    )


def _layers(boxes: list[Box]) -> list[list[Box]]:
    """Boxes by the longest path from a source; what closes a circle is put where it is met."""
    known = {b.key: b for b in boxes}
    depth: dict[str, int] = {}
    for box in boxes:  # inputs come first where nodes are in order; a second pass corrects the rest
        depth[box.key] = 0
    for _ in range(len(boxes)):
        changed = False
        for box in boxes:
            low = max((depth[r] + 1 for r in box.reads if r in known and r != box.key), default=0)
            if low > depth[box.key] and low < len(boxes):
                depth[box.key], changed = low, True
        if not changed:
            break
    for box in boxes:  # what enters stands right above its first reader, not all at the top
        own = [depth[b.key] for b in boxes if box.key in b.reads]
        if own and not set(box.reads) & known.keys():
            depth[box.key] = max(0, min(own) - 1)
    layers: list[list[Box]] = [[] for _ in range(max(depth.values()) + 1)]
    for box in boxes:
        layers[depth[box.key]].append(box)
    return [layer for layer in layers if layer]


def _order(layers: list[list[Box]]) -> None:
    """Place each box near the middle of its neighbours: once down, once up."""
    readers: dict[str, list[str]] = {}
    for layer in layers:
        for box in layer:
            for read in box.reads:
                readers.setdefault(read, []).append(box.key)
    _sweep(layers[1:], layers[0], lambda b: b.reads)
    _sweep(layers[-2::-1], layers[-1], lambda b: readers.get(b.key, []))


def _sweep(layers: list[list[Box]], first: list[Box], near: object) -> None:
    place = {b.key: float(i) for i, b in enumerate(first)}
    assert callable(near)
    for layer in layers:
        own = {b.key: float(i) for i, b in enumerate(layer)}

        def middle(box: Box, own: dict[str, float] = own) -> float:
            known = [place[k] for k in near(box) if k in place]
            return sum(known) / len(known) if known else own[box.key]

        layer.sort(key=middle)
        place.update({b.key: float(i) for i, b in enumerate(layer)})


def _centred(layer: list[Box], widest: int) -> list[tuple[float, Box]]:
    start = (widest - len(layer)) / 2
    return [(start + i, box) for i, box in enumerate(layer)]


def _edge(a: tuple[float, float], b: tuple[float, float]) -> str:
    x1, y1, x2, y2 = a[0] + _WIDTH / 2, a[1] + _HEIGHT, b[0] + _WIDTH / 2, b[1]
    bend = (y2 - y1) / 2
    return (
        f'<path class="edge" d="M{x1:.0f} {y1:.0f} C{x1:.0f} {y1 + bend:.0f}'
        f' {x2:.0f} {y2 - bend:.0f} {x2:.0f} {y2:.0f}"/>'
    )


def _box(box: Box, x: float, y: float) -> str:
    name = printable(box.text)
    short = name if len(name) <= _LETTERS else "…" + name[-(_LETTERS - 1) :]
    title = printable(box.title)[:_TITLE]
    squeezed = f' textLength="{_WIDTH - 8}"' if len(title) > _LETTERS else ""
    return (
        f'<g class="box {escape(box.role)}" transform="translate({x:.0f} {y:.0f})">'
        f"<title>{escape(f'{title} {name}')}</title>"
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" rx="6"/>'
        f'<text x="{_WIDTH / 2}" y="14"{squeezed} lengthAdjust="spacingAndGlyphs">'
        f"{escape(title)}</text>"
        f'<text class="name" x="{_WIDTH / 2}" y="27">{escape(short)}</text></g>'
    )
