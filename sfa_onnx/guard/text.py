"""Names from files, as they may be shown: control characters escaped."""

from __future__ import annotations

import unicodedata

__all__ = ["printable"]

_KEPT = "\n\t"
_ESCAPED = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})  # general categories of Unicode


def printable(text: str) -> str:
    r"""`text` with everything that could steer a terminal escaped: ESC becomes `\x1b`.

    Line breaks and tabs stay: our own messages hold them. Direction marks and other invisible
    characters are escaped too, since they make one name look like another.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if c in _KEPT or _is_plain(c) else _escape(c) for c in text)


def _is_plain(character: str) -> bool:
    return unicodedata.category(character) not in _ESCAPED


def _escape(character: str) -> str:
    code = ord(character)
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
