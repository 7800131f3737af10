"""The plug-in as a vendor package, laid out the way CANN loads it.

    opp/vendors/config.ini                                   load_priority=sfa_onnx
    opp/vendors/sfa_onnx/framework/onnx/libcust_onnx_parsers.so
    opp/vendors/sfa_onnx/bin/set_env.bash                    puts the vendor folder on
                                                             ASCEND_CUSTOM_OPP_PATH
    plugin/*.cc *.h, build_plugin.sh                         sources and the one-line build
    python/sfa_onnx_ge_plugin/                               the twin for CANN 9.2's Python API

No version.info: a toolkit that names the versions it takes would skip a folder of another one
without a word (E13010 follows), and this plug-in fits all of them: it is built where it runs.

The library is built when a toolkit is found (ASCEND_HOME_PATH). It runs where atc runs, so it is
built for that host, not for the device; CXX=aarch64-linux-gnu-g++ builds it for another one.
"""

from __future__ import annotations

import logging
import os
import platform
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from sfa_onnx.errors import MissingError
from sfa_onnx.files.model import atomic_write

__all__ = ["VENDOR", "Package", "plugin_root", "toolkit", "write"]

_LOG = logging.getLogger("sfa_onnx")

VENDOR = "sfa_onnx"
LIBRARY = "libcust_onnx_parsers.so"
_HEADER = "register/register.h"
_BUILD_SECONDS = 300

_BUILD = """#!/bin/bash
# Builds the parser plug-in against the installed CANN toolkit (source its set_env.sh first).
# CXX=aarch64-linux-gnu-g++ builds it for another host; it runs where atc runs, not on the device.
set -euo pipefail
cd "$(dirname "${{BASH_SOURCE[0]}}")"
: "${{ASCEND_HOME_PATH:?not set: source /usr/local/Ascend/cann/set_env.sh (or your own) first}}"
{line}
echo "built {library}"
"""
_LINE = (
    '"${{CXX:-g++}}" -std=c++17 -O2 -fPIC -shared -D_GLIBCXX_USE_CXX11_ABI=0'
    ' -I"$ASCEND_HOME_PATH/include" -I"$ASCEND_HOME_PATH/$(uname -m)-linux/include"'
    " plugin/*.cc -o {library}"
)
_SET_ENV = """#!/bin/bash
# Source this: CANN then finds the parser plug-in of sfa-onnx.
_sfa_onnx_vendor="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
export ASCEND_CUSTOM_OPP_PATH="$_sfa_onnx_vendor${ASCEND_CUSTOM_OPP_PATH:+:$ASCEND_CUSTOM_OPP_PATH}"
unset _sfa_onnx_vendor
"""


@dataclass
class Package:
    """What was written."""

    root: Path
    vendor: Path
    built: bool = False
    build_line: str = ""
    files: list[str] = field(default_factory=list)  # relative to root
    notes: list[str] = field(default_factory=list)


def plugin_root() -> Path:
    """The folder of the plug-in's sources: in the installed package, else in the source tree.

    Raises:
        MissingError: they are in neither.
    """
    here = Path(__file__).parents[1]
    for folder in (here / "plugin_sources", here.parents[1] / "kernels" / "ascend"):
        if (folder / "plugin" / "register.cc").is_file():
            return folder
    raise MissingError(
        f"the plug-in's sources are neither in {here / 'plugin_sources'} nor in a source tree above"
        " it; reinstall sfa-onnx"
    )


def toolkit() -> Path | None:
    """The installed CANN toolkit, by ASCEND_HOME_PATH or ASCEND_TOOLKIT_HOME."""
    for name in ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME"):
        value = os.environ.get(name)
        if value and any((Path(value) / i / _HEADER).is_file() for i in _include_folders()):
            return Path(value)
    return None


def _include_folders() -> tuple[str, str]:
    """Where toolkits keep their headers: one folder, or one per host architecture."""
    return "include", f"{platform.machine()}-linux/include"


def write(folder: Path, *, force: bool = False) -> Package:
    """Lay the package out below `folder`, and build the plug-in when a toolkit is there.

    Args:
        folder: an existing folder.
        force: overwrite existing files.

    Raises:
        UsageError: a file exists and `force` is not set.
        MissingError: the plug-in's sources are not part of this installation.
    """
    vendors = folder / "opp" / "vendors"
    vendor = vendors / VENDOR
    library = (vendor / "framework" / "onnx" / LIBRARY).relative_to(folder)
    line = _LINE.format(library=library)
    package = Package(folder, vendor, build_line=line.replace("{{", "{").replace("}}", "}"))
    (vendor / "framework" / "onnx").mkdir(parents=True, exist_ok=True)
    texts = {
        "opp/vendors/config.ini": f"load_priority={VENDOR}\n",
        f"opp/vendors/{VENDOR}/bin/set_env.bash": _SET_ENV,
        "build_plugin.sh": _BUILD.format(line=package.build_line, library=library),
    }
    texts |= _sources()
    for name, text in texts.items():
        _put(folder / name, text, force)
        package.files.append(name)
    _build(package, folder, library)
    return package


def _sources() -> dict[str, str]:
    root = plugin_root()
    found = [*sorted((root / "plugin").iterdir()), *sorted((root / "python").rglob("*.py"))]
    wanted = [p for p in found if p.suffix in (".cc", ".h", ".py")]
    return {str(p.relative_to(root)): p.read_text() for p in wanted}


def _put(path: Path, text: str, force: bool) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, text.encode(), force=force)
    if path.suffix in (".sh", ".bash"):
        path.chmod(path.stat().st_mode | 0o111)


def _build(package: Package, folder: Path, library: Path) -> None:
    home, compiler = toolkit(), os.environ.get("CXX", "g++")
    if home is None:
        package.notes.append(
            "plug-in not built: no CANN toolkit here (ASCEND_HOME_PATH); run ./build_plugin.sh on"
            " the machine that has one"
        )
        return
    if shutil.which(compiler) is None:
        package.notes.append(f"plug-in not built: no compiler {compiler}; install g++ or set CXX")
        return
    sources = sorted(str(p.relative_to(folder)) for p in (folder / "plugin").glob("*.cc"))
    command = [compiler, "-std=c++17", "-O2", "-fPIC", "-shared", "-D_GLIBCXX_USE_CXX11_ABI=0"]
    command += [f"-I{home / folder}" for folder in _include_folders()]
    command += [*sources, "-o", str(library)]
    _LOG.info("building the plug-in against %s", home)
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=_BUILD_SECONDS, check=False
    )
    package.built = done.returncode == 0
    if package.built:
        package.files.append(str(library))
        return
    first = next((text for text in done.stderr.splitlines() if "error" in text), done.stderr[:200])
    package.notes.append(f"plug-in not built: the compiler failed against {home}: {first}")
