"""Mutated models through all verbs, in child processes: `python -m tests.fuzz.run --count 1000`.

A child runs many mutants and says what it is about to do; when it dies or hangs, that mutant is
recorded and the next child goes on behind it. Nothing may die, hang, or raise what is not ours.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.fuzz.corpus import seeds
from tests.fuzz.mutate import mutant

VERBS = ("inspect", "fuse", "unfuse", "kv-cache", "check", "atc", "run", "compare", "doctor")
_SECONDS = 120  # for one mutant through all verbs


def arguments(verb: str, model: Path, folder: Path) -> list[str]:
    """The command line of one verb, writing into `folder`."""
    out = folder / f"{verb}.onnx"
    more = {
        "fuse": ["-o", str(out), "--certificate", str(folder / "proof.json"), "--force"],
        "unfuse": ["-o", str(out), "--force"],
        "kv-cache": ["-o", str(out), "--to", "int8", "--force"],
        "check": ["--fix", "-o", str(out), "--force"],
        "atc": ["-o", str(folder / "atc"), "--soc-version", "Ascend910B2", "--no-run", "--force"],
        "run": ["-o", str(folder / "out.npz"), "--force"],
        "compare": [str(model)],
        "inspect": ["--explain", "--estimate"],
    }
    return [verb, str(model), *more.get(verb, [])]


def child(first: int, last: int) -> None:
    """Run mutants `first` to `last`; one JSON line before and after each verb."""
    import logging

    from sfa_onnx.cli import main

    report, sys.stdout = sys.stdout, open(os.devnull, "w")  # noqa: SIM115, PTH123
    faults: list[str] = []

    class Listen(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.exc_info and record.exc_info[1]:
                error = record.exc_info[1]
                step = error.__traceback__
                where = ""
                while step is not None:
                    name = step.tb_frame.f_code.co_filename
                    if "sfa_onnx" in name:
                        where = f"{name.rpartition('sfa_onnx/')[2]}:{step.tb_lineno}"
                    step = step.tb_next
                faults.append(f"{type(error).__name__} at {where}: {str(error)[:80]}")

    log = logging.getLogger("sfa_onnx")
    log.addHandler(Listen())
    log.setLevel(logging.DEBUG)
    log.propagate = False
    models = list(seeds())
    for number in range(first, last):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            path = folder / "mutant.onnx"
            path.write_bytes(mutant(models, number))
            for verb in VERBS:
                faults.clear()
                print(json.dumps({"n": number, "verb": verb}), file=report, flush=True)
                try:
                    code: object = main(arguments(verb, path, folder))
                except SystemExit as error:
                    code = error.code
                except BaseException as error:
                    code = f"{type(error).__name__}: {error}"
                line = {"n": number, "verb": verb, "code": code, "faults": list(faults)}
                print(json.dumps(line), file=report, flush=True)


class Watch:
    """Starts children one after the other and collects what they say."""

    def __init__(self, out: Path | None) -> None:
        self.codes: collections.Counter[str] = collections.Counter()
        self.bad: dict[str, list[int]] = {}
        self.done = 0
        self.out = out

    def run(self, first: int, last: int) -> None:
        """All mutants from `first` to `last`."""
        while first < last:
            first = self._child(first, last) + 1

    def _child(self, first: int, last: int) -> int:
        """One child; the number of the last mutant that it finished or died of."""
        command = [sys.executable, "-m", "tests.fuzz.run", "--child", f"{first}:{last}"]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
        )
        assert process.stdout is not None
        at: dict[str, object] = {"n": first, "verb": "start"}
        buffer, begin = b"", time.monotonic()
        while True:
            if not select.select([process.stdout], [], [], 1.0)[0]:
                if time.monotonic() - begin < _SECONDS:
                    continue
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                self._note(f"{at['verb']}: hangs", int(str(at["n"])))
                return int(str(at["n"]))
            data = os.read(process.stdout.fileno(), 1 << 16)
            if not data:
                break
            *lines, buffer = (buffer + data).split(b"\n")
            for line in lines:
                message = json.loads(line)
                if message["n"] != at["n"]:
                    begin = time.monotonic()
                    self.done += 1
                at = message
                if "code" in message:
                    self._take(message)
        code = process.wait()
        if code:
            self._note(f"{at['verb']}: the process ended with {code}", int(str(at["n"])))
        return int(str(at["n"])) if code else last

    def _take(self, message: dict[str, object]) -> None:
        self.codes[f"{message['verb']} -> {message['code']}"] += 1
        if message["code"] not in (0, 1, 2, 3):
            self._note(f"{message['verb']}: {message['code']}", int(str(message["n"])))
        for fault in set(message["faults"]):  # type: ignore[call-overload]
            self._note(f"{message['verb']}: {fault}", int(str(message["n"])))

    def _note(self, what: str, number: int) -> None:
        found = self.bad.setdefault(what, [])
        found.append(number)
        if self.out is not None:
            self.out.write_text(json.dumps(self.report(), indent=1))

    def report(self) -> dict[str, object]:
        """What was seen."""
        bad = {k: {"times": len(v), "first": v[:3]} for k, v in sorted(self.bad.items())}
        return {"mutants": self.done, "bad": bad, "codes": dict(sorted(self.codes.items()))}


def main() -> int:
    """Run `--count` mutants from `--first` on; exit 1 when something bad was seen."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the record here, as JSON")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        first, _, last = args.child.partition(":")
        child(int(first), int(last))
        return 0
    watch = Watch(args.out)
    watch.run(args.first, args.first + args.count)
    text = json.dumps(watch.report(), indent=1)
    if args.out is not None:
        args.out.write_text(text)
    print(text)
    return 1 if watch.bad else 0


if __name__ == "__main__":
    sys.exit(main())
