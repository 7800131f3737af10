"""Refuse a library that a manylinux2014 system could not load. Usage: wheel_symbols.py LIBRARY.

Reads what `readelf` prints: the newest glibc version that an imported symbol asks for, and the
libraries that are linked to.
"""

from __future__ import annotations

import re
import subprocess
import sys

NEWEST = (2, 17)  # glibc of manylinux2014
ALLOWED = re.compile(r"libc\.so\.6|ld-linux-\S+|libgcc_s\.so\.1")


def problems(library: str) -> list[str]:
    """What stands against the tag; empty when nothing does."""
    text = subprocess.run(
        ["readelf", "--wide", "--version-info", "--dynamic", library],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    found = []
    for version in sorted(set(re.findall(r"GLIBC_(\d+(?:\.\d+)+)", text))):
        if tuple(map(int, version.split("."))) > (*NEWEST, 0):
            found.append(f"needs GLIBC_{version}, manylinux2014 has {NEWEST[0]}.{NEWEST[1]}")
    for needed in re.findall(r"\(NEEDED\).*\[(.+?)\]", text):
        if not ALLOWED.fullmatch(needed):
            found.append(f"links to {needed}")
    return found


if __name__ == "__main__":
    found = problems(sys.argv[1])
    for problem in found:
        print(f"{sys.argv[1]}: {problem}", file=sys.stderr)
    sys.exit(1 if found else 0)
