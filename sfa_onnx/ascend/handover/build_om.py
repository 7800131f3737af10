"""Build the .om through GE's own interface, with the options that the atc command cannot set.

    python build_om.py            writes model.om beside this script; atc.sh is the other road

Above all `ge.exec.outputReuseInputMemIndexes`: cache outputs share the memory of their inputs, so
that a decode step writes its new rows and copies no cache. For CANN 9.0 and later; source CANN's
set_env.sh first. Compiles build_om.cc with g++ against that toolkit. Never run on a device.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
LIBRARIES = ("ge_compiler", "fmk_onnx_parser", "graph", "graph_base")
NEEDED = ("ge_compiler", "fmk_onnx_parser", "graph")


def toolkit() -> Path:
    """The installed toolkit."""
    home = os.environ.get("ASCEND_HOME_PATH") or os.environ.get("ASCEND_TOOLKIT_HOME")
    if not home:
        sys.exit("ASCEND_HOME_PATH is not set: source CANN's set_env.sh first")
    return Path(home)


def folders(home: Path, *names: str) -> list[Path]:
    """Folders of the toolkit that exist: at its top, or below the host's architecture."""
    tops = (home, home / f"{platform.machine()}-linux")
    return [top / name for top in tops for name in names if (top / name).is_dir()]


def compile_builder(home: Path) -> Path:
    """build_om.cc as a program, compiled again when its source is newer."""
    source, program = HERE / "build_om.cc", HERE / "build_om"
    if program.is_file() and program.stat().st_mtime >= source.stat().st_mtime:
        return program
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        sys.exit(f"no compiler {compiler}: install g++ or set CXX")
    libraries = folders(home, "lib64", "compiler/lib64")
    found = [n for n in LIBRARIES if any((d / f"lib{n}.so").exists() for d in libraries)]
    if missing := [n for n in NEEDED if n not in found]:
        names = ", ".join(f"lib{n}.so" for n in missing)
        sys.exit(
            f"{names}: in none of {', '.join(map(str, libraries)) or home}; is it CANN >= 9.0?"
        )
    command = [compiler, "-std=c++17", "-O2", "-D_GLIBCXX_USE_CXX11_ABI=0", str(source)]
    command += [f"-I{folder}" for folder in folders(home, "include")]
    for folder in libraries:
        command += [f"-L{folder}", f"-Wl,-rpath,{folder}"]
    unfinished = program.with_name(f".{program.name}.tmp")
    command += [*(f"-l{n}" for n in found), "-o", str(unfinished)]
    if subprocess.run(command, check=False).returncode:
        sys.exit(f"build_om.cc does not compile against {home}: see the message above")
    unfinished.replace(program)
    return program


def fill(text: str) -> str:
    """A value with the dims that stayed open, from the environment, as atc.sh takes them."""

    def given(name: str) -> str:
        value = os.environ.get(name)
        if not value:
            sys.exit(f"{name} is not set, see README.md; e.g. {name}=1 python build_om.py")
        return value

    def computed(found: re.Match[str]) -> str:
        """The shell's arithmetic, done by the shell."""
        for name in re.findall(r"[A-Za-z_]\w*", found[1]):
            if not given(name).isdigit():
                sys.exit(f"{name}={given(name)}: {found[0]} needs a number")
        line = ["bash", "-c", f"echo {found[0]}"]
        return subprocess.run(line, check=True, capture_output=True, text=True).stdout.strip()

    text = re.sub(r"\$\(\((.+?)\)\)(?=[,;]|$)", computed, text)
    return re.sub(r"\$\{(\w+)\}", lambda found: given(found[1]), text)


def environment(plan: dict[str, Any]) -> dict[str, str]:
    """The environment in which the parser finds our plug-in."""
    vendor = HERE / "opp" / "vendors" / plan["vendor"]
    library = vendor / "framework" / "onnx" / "libcust_onnx_parsers.so"
    if not library.is_file() and subprocess.run(["bash", HERE / "build_plugin.sh"]).returncode:
        sys.exit("the parser plug-in was not built: see the message above")
    known = os.environ.get("ASCEND_CUSTOM_OPP_PATH")
    return {**os.environ, "ASCEND_CUSTOM_OPP_PATH": f"{vendor}:{known}" if known else str(vendor)}


def main() -> None:
    """Compile the builder, then run it with what build_om.json says."""
    plan = json.loads((HERE / "build_om.json").read_text(encoding="utf-8"))
    home = toolkit()
    unfinished = HERE / f".{plan['output']}.tmp"
    words = [str(compile_builder(home)), str(HERE / plan["model"]), str(unfinished)]
    for kind in ("global", "build"):
        for key, text in plan[kind].items():
            words += [f"{kind}:{key}", fill(text)]
    code = subprocess.run(words, env=environment(plan), check=False).returncode
    written = sorted(HERE.glob(f"{unfinished.name}*.om"))  # GE may add the platform to the name
    if code:
        for path in written:
            path.unlink()
        sys.exit(code)
    if not written:
        sys.exit(f"the builder ended without an error, but wrote no {plan['output']}.om")
    # run_om.py passes one address for both sides of these pairs, for this file alone: they never
    # lie beside a model that was built otherwise.
    pairs = HERE / f"{plan['output']}.in_place.json"
    pairs.unlink(missing_ok=True)
    for path in written:
        path.replace(HERE / f"{plan['output']}{path.name.removeprefix(unfinished.name)}")
    unfinished.write_text(json.dumps(plan["in_place"], indent=2), encoding="utf-8")
    unfinished.replace(pairs)
    for pair in plan["in_place"]:
        print(f"in place: output {pair['output']} in the memory of input {pair['input']}")


if __name__ == "__main__":
    main()
