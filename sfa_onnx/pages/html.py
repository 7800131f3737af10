"""The frame of a page: one file, no script, nothing fetched; readable on a phone and on a wall."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Final

from sfa_onnx.guard.text import printable

__all__ = ["bars", "facts", "page", "section", "strip", "table", "text"]

_STYLE: Final = """
:root{--ink:#1d2530;--soft:#5b6775;--line:#d5dbe3;--paper:#fff;--tint:#f4f6f9;--good:#1a7f4b;
--bad:#b3261e;--new:#cfe8d9;--gone:#f6d9d6;--query:#d8e4fb;--latent:#fbe9c8;--indices:#e9dcf7}
@media(prefers-color-scheme:dark){:root{--ink:#e6eaf0;--soft:#9aa7b6;--line:#3a4552;--paper:#14181d;
--tint:#1c2229;--good:#5fcf94;--bad:#ff8a80;--new:#1f4a33;--gone:#57302d;--query:#24395f;
--latent:#574420;--indices:#42305c}}
*{box-sizing:border-box}body{margin:0 auto;max-width:1500px;padding:1rem;color:var(--ink);
background:var(--paper);font:16px/1.5 system-ui,sans-serif;overflow-wrap:anywhere}
h1{font-size:1.5rem;margin:.2rem 0}h2{font-size:1.15rem;margin:2rem 0 .5rem}
p{margin:.4rem 0}.soft,figcaption{color:var(--soft)}.good{color:var(--good)}.bad{color:var(--bad)}
.wide{overflow-x:auto}table{border-collapse:collapse;width:100%;font-size:.92rem}
td,th{text-align:left;vertical-align:top;padding:.3rem .6rem .3rem 0;
border-bottom:1px solid var(--line)}th{overflow-wrap:normal}td{min-width:5.6em}
td:first-child{min-width:9em}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.15rem 1rem;margin:.5rem 0}
dt{color:var(--soft)}dd{margin:0}code{font-size:.92em}
.strip{display:flex;flex-wrap:wrap;gap:3px;margin:.6rem 0}
.strip span{width:22px;height:22px;border-radius:4px;border:1px solid var(--line)}
.strip .fused{background:var(--good)}.strip .refused{background:var(--bad)}
figure{margin:.6rem 0;background:var(--tint);border-radius:8px;padding:.6rem}
svg{display:block;max-width:100%;height:auto}
svg text{font:600 11px system-ui,sans-serif;text-anchor:middle;fill:var(--ink)}
svg .name{font:10px ui-monospace,monospace;fill:var(--soft)}
svg rect{fill:var(--paper);stroke:var(--line)}svg .edge{fill:none;stroke:var(--soft);opacity:.55}
.gone rect{fill:var(--gone)}.new rect{fill:var(--new)}
.query rect,.query_rope rect{fill:var(--query)}
.latent rect,.latent_int8 rect,.key_rope rect,.packed rect,.scale rect,.expansion rect
{fill:var(--latent)}
.indices rect,.mask rect,.block_table rect,.lengths_kv rect,.lengths_query rect
{fill:var(--indices)}
.pair{display:grid;grid-template-columns:minmax(0,1fr);gap:.6rem}
@media(min-width:1000px){.pair{grid-template-columns:repeat(2,minmax(0,1fr))}}
.bars{display:flex;align-items:flex-end;gap:2px;height:60px}
.bars i{flex:1 1 0;max-width:18px;background:var(--query);min-height:1px}
.bars .over{background:var(--bad)}
"""


def text(value: object) -> str:
    """A value as page text; what a file named cannot steer the page."""
    return escape(printable(str(value)))


def page(title: str, summary: str, sections: Sequence[str]) -> str:
    """A whole page."""
    body = "\n".join(sections)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{text(title)}</title><style>{_STYLE}</style></head><body>"
        f"<h1>{text(title)}</h1><p>{summary}</p>\n{body}\n</body></html>\n"
    )


def section(title: str, *parts: str) -> str:
    """A heading and what stands below it; "" when there is nothing."""
    filled = [p for p in parts if p]
    return f"<section><h2>{text(title)}</h2>{''.join(filled)}</section>" if filled else ""


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table; "" without rows."""
    if not rows:
        return ""
    top = "".join(f"<th>{text(h)}</th>" for h in head)
    lines = "".join(f"<tr>{''.join(f'<td>{text(c)}</td>' for c in row)}</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{top}</tr>{lines}</table></div>'


def facts(pairs: Sequence[tuple[str, object]]) -> str:
    """Names and values."""
    return f"<dl>{''.join(f'<dt>{text(k)}</dt><dd>{text(v)}</dd>' for k, v in pairs)}</dl>"


def strip(cells: Sequence[tuple[str, str]]) -> str:
    """One square a site: (class, what it says when pointed at)."""
    spans = "".join(f'<span class="{text(c)}" title="{text(t)}"></span>' for c, t in cells)
    return f'<div class="strip">{spans}</div>' if cells else ""


def bars(counts: Sequence[int], labels: Sequence[str], over: int) -> str:
    """A histogram; bars from position `over` on are drawn as beyond the bound."""
    top = max(counts, default=0)
    if not top:
        return ""
    items = "".join(
        f'<i class="{"over" if i >= over else ""}" style="height:{100 * n / top:.0f}%"'
        f' title="{text(label)}: {n}"></i>'
        for i, (n, label) in enumerate(zip(counts, labels, strict=True))
    )
    return f'<div class="bars">{items}</div>'
