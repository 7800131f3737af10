"""Kill every verb that writes at random moments, and look at what is left.

    python scripts/kill-writers.py --times 200

The folder holds a model and an older result of the same verb. After each kill the result must be
the old one or the new one, whole: it opens, it names weights that are there, and it computes the
same numbers as before. Nothing else may have changed but hidden temporary files. Each trial is a
fork of this process, which has imported everything already, and so is its worker; four of ten are
killed at any moment, the others soon after they begin to write.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import json
import os
import pkgutil
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path
from typing import IO

for _pool in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_pool] = "1"  # forks take no threads along
ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))

import onnxruntime  # noqa: E402, F401 - here, so that no fork has to

import sfa_onnx  # noqa: E402
from sfa_onnx.cli import main as main_of_cli  # noqa: E402
from sfa_onnx.guard import worker  # noqa: E402
from sfa_onnx.guard.serve import serve  # noqa: E402

_MEMORY = Path("/dev/shm")  # a file system in memory, where there is one

VERBS = {
    "fuse": ["fuse", "m.onnx", "-o", "out.onnx", "--certificate", "proof.json", "--force"],
    "fuse --materialize-absorbed": [
        *("fuse", "m.onnx", "-o", "out.onnx", "--materialize-absorbed", "--no-verify", "--force")
    ],
    "fuse --weights copy": [
        *("fuse", "m.onnx", "-o", "far/out.onnx", "--weights", "copy", "--no-verify", "--force")
    ],
    "fuse --report": [
        *("fuse", "m.onnx", "-o", "out.onnx", "--report", "page.html", "--no-verify", "--force")
    ],
    "fuse, in place": ["fuse", "m.onnx", "-o", "m.onnx", "--no-verify", "--force"],
    "compare --report": ["compare", "m.onnx", "fused.onnx", "--report", "page.html", "--force"],
    "unfuse": ["unfuse", "fused.onnx", "-o", "out.onnx", "--force"],
    "kv-cache": ["kv-cache", "fused.onnx", "-o", "out.onnx", "--to", "int8", "--force"],
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
    from tests.absorbed_models import expanding
    from tests.test_materialize import saved

    path = saved(expanding(), folder)
    if path.name != "m.onnx":
        path.rename(folder / "m.onnx")
    (folder / "far").mkdir()
    sfa_onnx.fuse(folder / "m.onnx", folder / "fused.onnx")


class _Forked:
    """Stands where `subprocess.Popen` starts the worker: a fork, which has imported all already."""

    def __init__(self, _command: list[str], *, stderr: IO[bytes], **_: object) -> None:
        (to_read, write), (read, to_write) = os.pipe(), os.pipe()
        self.pid, self.returncode = os.fork(), None
        if not self.pid:
            for given, wanted in ((to_read, 0), (to_write, 1), (stderr.fileno(), 2)):
                os.dup2(given, wanted)
            os.closerange(3, 256)
            serve()
            os._exit(0)
        os.close(to_read)
        os.close(to_write)
        self.stdin, self.stdout = os.fdopen(write, "wb", 0), os.fdopen(read, "rb", 0)

    def poll(self) -> int | None:
        if self.returncode is None and (found := os.waitpid(self.pid, os.WNOHANG))[0]:
            self.returncode = os.waitstatus_to_exitcode(found[1])
        return self.returncode

    def wait(self, timeout: float = 1e9) -> int:
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("worker", timeout)
            time.sleep(0.001)
        return self.returncode

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)


def start(arguments: list[str], folder: Path) -> int:
    """Run the command in a fork that leads a process group, so that its worker can be killed too.

    Returns:
        Its process id.
    """
    if pid := os.fork():
        return pid
    os.setsid()
    os.chdir(folder)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    worker.subprocess = types.SimpleNamespace(  # type: ignore[attr-defined]
        Popen=_Forked, PIPE=subprocess.PIPE, TimeoutExpired=subprocess.TimeoutExpired
    )
    code = 1
    with contextlib.suppress(BaseException):
        code = main_of_cli(arguments)
        worker.stop()
    os._exit(code)


def wait(pid: int) -> int:
    """How a fork ended."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill(pid: int) -> bool:
    """End a fork and its worker; whether it was still running."""
    alive = not os.waitpid(pid, os.WNOHANG)[0]
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    if alive:
        os.waitpid(pid, 0)
    return alive


def listing(folder: Path) -> set[tuple[str, int, int]]:
    """What lies in a folder, hidden files too, with sizes and times."""
    found = set()
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            told = path.stat()
            found.add((str(path), told.st_size, told.st_mtime_ns))
    return found


def wait_for_kill(r: random.Random, seconds: float, folder: Path, pid: int) -> None:
    """A random moment of the whole run, or one shortly after the first file appears or changes."""
    end = time.monotonic() + seconds * r.uniform(0.0, 1.1)
    if r.random() < 0.4:
        time.sleep(max(0.0, end - time.monotonic()))
        return
    first = listing(folder)
    while listing(folder) == first and not ended(pid):
        time.sleep(0.0005)
    time.sleep(seconds * 0.1 * r.random() ** 2)


def ended(pid: int) -> bool:
    """Whether a fork has ended (and waits to be asked how)."""
    told = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    return told is not None


def contents(folder: Path) -> dict[str, bytes]:
    """Every file that is neither hidden nor in a hidden folder: those are temporary."""
    found = {}
    for path in folder.rglob("*"):
        parts = path.relative_to(folder).parts
        if path.is_file() and not any(part.startswith(".") for part in parts):
            data = path.read_bytes()
            if path.suffix == ".json":  # a certificate holds the time that verification took
                data = re.sub(rb'"seconds": [0-9.e-]+', b'"seconds": 0', data)
            found["/".join(parts)] = data
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
    with tempfile.TemporaryDirectory(dir=_MEMORY if _MEMORY.is_dir() else None) as name:
        base = Path(name) / "base"
        base.mkdir()
        if not (pid := os.fork()):
            prepare(base)
            worker.stop()
            os._exit(0)
        wait(pid)
        code = wait(start(OLDER.get(verb, VERBS[verb]), base))
        before = contents(base)
        again = Path(name) / "again"
        shutil.copytree(base, again)
        begin = time.monotonic()
        wait(start(VERBS[verb], again))
        seconds = time.monotonic() - begin
        after = contents(again)
        bad: list[str] = []
        killed = changed = 0
        for _ in range(times):
            folder = Path(name) / "run"
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(base, folder)
            first = listing(folder)
            pid = start(VERBS[verb], folder)
            wait_for_kill(r, seconds, folder, pid)
            alive = kill(pid)
            killed += alive
            changed += alive and listing(folder) != first
            bad += broken(folder, before, after)
    counts = {"times": times, "killed": killed, "while writing": changed}
    return {"verb": verb, "code": code, "seconds": round(seconds, 2), **counts, "broken": bad[:20]}


def main() -> int:
    """Try all verbs, or those named; exit 1 when something was left broken."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--verb", action="append", choices=list(VERBS))
    args = parser.parse_args()
    for module in pkgutil.walk_packages(sfa_onnx.__path__, "sfa_onnx."):
        if not module.name.startswith(("sfa_onnx.torch", "sfa_onnx.__main__")):
            with contextlib.suppress(Exception):  # what is left alone on a device
                importlib.import_module(module.name)
    gc.collect()
    gc.freeze()
    worst = 0
    for verb in args.verb or VERBS:
        result = trial(verb, args.times, args.seed)
        print(json.dumps(result), flush=True)
        worst |= bool(result["broken"])
    return worst


if __name__ == "__main__":
    sys.exit(main())
