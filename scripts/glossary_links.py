"""A hook of the documentation's builder: the first use of a term of ours leads to the glossary."""

from __future__ import annotations

import posixpath
import re
from typing import Any, Final

__all__ = ["TERMS", "link", "on_page_markdown"]

# What people read -> heading in docs/glossary.md.
TERMS: Final = {
    r"sites?": "site",
    r"anchors?": "anchor",
    r"[Aa]bsorbed": "absorbed",
    r"packed rows?": "packed-row",
    r"own rounding": "own-rounding",
    r"[Dd]ischarged by": "assumption",
    r"classes of sites|one of a class": "class",
    r"certificates?": "certificate",
    r"ATC flavour|flavours?": "canonical-and-atc-flavour",
    r"[Hh]and-overs?": "hand-over",
    r"gears?": "gear",
    r"an edge": "edge",
}
_SKIPPED: Final = ("glossary.md", "reference/")
# Not touched: fenced and inline code, links, images, headings, tables' rules, HTML.
_QUIET: Final = re.compile(
    r"```.*?```|`[^`\n]*`|!?\[[^\]]*\]\([^)]*\)|^#[^\n]*|<[^>\n]*>", re.S | re.M
)


def link(markdown: str, page: str) -> str:
    """`markdown` of `page` (a path below docs) with links into the glossary."""
    glossary = posixpath.relpath("glossary.md", posixpath.dirname(page) or ".")
    for term, anchor in TERMS.items():
        quiet = [m.span() for m in _QUIET.finditer(markdown)]
        for found in re.finditer(rf"(?<![\w-])(?:{term})(?![\w-])", markdown):
            if not any(low <= found.start() < high for low, high in quiet):
                text = f"[{found[0]}]({glossary}#{anchor})"
                markdown = markdown[: found.start()] + text + markdown[found.end() :]
                break
    return markdown


def on_page_markdown(markdown: str, *, page: Any, **_more: Any) -> str:
    """What the builder calls for every page."""
    path: str = page.file.src_uri
    return markdown if path.startswith(_SKIPPED) else link(markdown, path)
