"""Kill every verb that writes at random moments, and look at what is left.

    python scripts/kill-writers.py --times 200

The folder holds a model and an older result of the same verb. After each kill the result must be
the old one or the new one, whole: it opens, it names weights that are there, and it computes the
same numbers as before. Nothing else may have changed but hidden temporary files.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))

VERBS = {
    "fuse": ["fuse", "m.onnx", "-o", "out.onnx", "--certificate", "proof.json", "--force"],
    "fuse --materialize-absorbed": [
        *("fuse", "m.onnx", "-o", "out.onnx", "--materialize-absorbed", "--force")
    ],
    "fuse --weights copy": ["fuse", "m.onnx", "-o", "far/out.onnx", "--weights", "copy", "--force"],
    "fuse --report": ["fuse", "m.onnx", "-o", "out.onnx", "--report", "page.html", "--force"],
    "fuse, in place": ["fuse", "m.onnx", "-o", "m.onnx", "--force"],
    "compare --report": ["compare", "m.onnx", "fused.onnx", "--report", "page.html", "--force"],
    "unfuse": ["unfuse", "fused.onnx", "-o", "out.onnx", "--force"],
    "kv-cache": ["kv-cache", "m.onnx", "-o", "out.onnx", "--to", "int8", "--force"],
    "check --fix": ["check", "m.onnx", "--fix", "-o", "out.onnx", "--force"],
    "inspect --plan": ["inspect", "m.onnx", "--plan", "plan.yaml", "--no-verify", "--force"],
    "run": ["run", "m.onnx", "-o", "out.npz", "--force"],
    "atc": [
        *("atc", "fused.onnx", "-o", "atc", "--soc-version", "Ascend910B2", "--no-run", "--force")
    ],
    "demo": ["demo", "-o", "tour"],
}

# What stood there before, where the verb itself would only write the same again.
OLDER = {
    "fuse, in place": ["inspect", "m.onnx", "--no-verify"],
    "demo": ["inspect", "m.onnx", "--no-verify"],
    "atc": [word.replace("910B2", "910B3") for word in VERBS["atc"]],
}


def prepare(folder: Path) -> None:
    """A model with external weights, and its fused form."""
    import sfa_onnx
    from tests.absorbed_models import expanding
    from tests.test_materialize import saved

    path = saved(expanding(), folder)
    if path.name != "m.onnx":
        path.rename(folder / "m.onnx")
    (folder / "far").mkdir()
    sfa_onnx.fuse(folder / "m.onnx", folder / "fused.onnx")


def start(arguments: list[str], folder: Path) -> subprocess.Popen[bytes]:
    """The command as its own process group, so that its worker can be killed too."""
    import sfa_onnx

    environment = {**os.environ, "PYTHONPATH": str(Path(sfa_onnx.__file__).parents[1])}
    command = [sys.executable, "-m", "sfa_onnx", *arguments]
    return subprocess.Popen(
        command, cwd=folder, env=environment, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


def contents(folder: Path) -> dict[str, bytes]:
    """Every file that is neither hidden nor in a hidden folder: those are temporary."""
    found = {}
    for path in folder.rglob("*"):
        parts = path.relative_to(folder).parts
        if path.is_file() and not any(part.startswith(".") for part in parts):
            found["/".join(parts)] = path.read_bytes()
    return found


def broken(folder: Path, before: dict[str, bytes], after: dict[str, bytes]) -> list[str]:
    """What is neither old nor new and whole."""
    import numpy as np
    import onnx

    from sfa_onnx.files.model import load_model
    from sfa_onnx.files.weights import weights_findings

    found = []
    for name, data in contents(folder).items():
        if data == before.get(name) or data == after.get(name):
            continue
        if name.endswith(".onnx"):
            try:
                model = load_model(folder / name)
                bad = [
                    f.advice for f in weights_findings(model, (folder / name).parent) if not f.ok
                ]
                onnx.load(folder / name)
            except Exception as error:
                bad = [str(error)]
            found += [f"{name}: {text}" for text in bad]
        elif name.endswith(".npz"):
            with contextlib.suppress(Exception), np.load(folder / name) as arrays:
                if all(arrays[n].size >= 0 for n in arrays.files):
                    continue
            found.append(f"{name}: does not open")
        elif name.endswith(".html"):  # it holds the time and memory that the run took
            if not data.rstrip().endswith(b"</html>"):
                found.append(f"{name}: cut off")
        elif name in before:
            found.append(f"{name}: neither the old content nor the new one")
    found += [f"{name}: gone" for name in before if not (folder / name).exists()]
    found += _mixed(contents(folder), before, after)
    # An old model whose weights changed under it opens, and computes something else.
    for name, data in before.items():
        if name.endswith(".onnx") and (folder / name).read_bytes() == data:
            model = load_model(folder / name)
            for place in {f.location for f in weights_findings(model, (folder / name).parent)}:
                file = str(Path(name).parent / place)
                if (folder / file).read_bytes() != before.get(file):
                    found.append(f"{name}: the old model with other weights in {file}")
    return found


def _mixed(now: dict[str, bytes], before: dict[str, bytes], after: dict[str, bytes]) -> list[str]:
    """A hand-over of which one file is old and another is new."""
    files = [n for n in before if n.startswith("atc/") and before[n] != after.get(n)]
    old = [n for n in files if now.get(n) == before[n]]
    return [f"atc: {n} is old, others are new" for n in old] if len(old) < len(files) else []


def trial(verb: str, times: int, seed: int) -> dict[str, object]:
    """Kill one verb `times` times."""
    r = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        base = Path(name) / "base"
        base.mkdir()
        prepare(base)
        begin = time.monotonic()
        code = start(OLDER.get(verb, VERBS[verb]), base).wait()
        seconds = time.monotonic() - begin
        before = contents(base)
        again = Path(name) / "again"
        shutil.copytree(base, again)
        start(VERBS[verb], again).wait()
        after = contents(again)
        bad: list[str] = []
        killed = 0
        for _ in range(times):
            folder = Path(name) / "run"
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(base, folder)
            process = start(VERBS[verb], folder)
            # Writing happens late: two of three kills fall into the last third.
            share = r.random() if r.random() < 0.33 else r.uniform(0.6, 1.1)
            time.sleep(seconds * share)
            killed += process.poll() is None
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            bad += broken(folder, before, after)
    return {"verb": verb, "code": code, "times": times, "killed": killed, "broken": bad[:20]}


def main() -> int:
    """Try all verbs, or those named; exit 1 when something was left broken."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--verb", action="append", choices=list(VERBS))
    args = parser.parse_args()
    worst = 0
    for verb in args.verb or VERBS:
        result = trial(verb, args.times, args.seed)
        print(json.dumps(result), flush=True)
        worst |= bool(result["broken"])
    return worst


if __name__ == "__main__":
    sys.exit(main())
