"""Score the product on the zoo: `python -m tests.zoo.score [-k PATTERN] [-o FOLDER]`.

Prints one line per case and writes SCORE.md and SCORE.json into FOLDER. Cases run in a child
process with a time limit each, so that a crash or a hang is one failing case and not the end.
"""

from __future__ import annotations

import argparse
import json
import queue
import subprocess
import sys
import tempfile
import threading
import zlib
from collections import defaultdict
from pathlib import Path

from tests.zoo.base import Case
from tests.zoo.catalogue import cases
from tests.zoo.judge import Verdict, judge

LIMIT = 180.0  # seconds per case, export included


def worker() -> None:
    """Judge the cases named on stdin, one JSON line each on stdout."""
    by_name = {case.name: case for case in cases()}
    for line in sys.stdin:
        print("=" + json.dumps(judge(by_name[line.strip()]).as_dict()), flush=True)


class Child:
    """The process that judges; replaced after a crash or a hang."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None

    def ask(self, case: Case) -> Verdict:
        lost = Verdict(case.name, case.family, case.expect)
        process = self._alive()
        assert process.stdin
        process.stdin.write(case.name + "\n")
        process.stdin.flush()
        try:
            answer = self.answers.get(timeout=LIMIT)
        except queue.Empty:
            process.kill()
            process.wait()
            lost.failure = f"HANGS: nothing after {LIMIT:.0f} s"
            return lost
        if answer is None:
            lost.failure = f"CRASH: the process ended with code {process.wait()}"
            return lost
        return Verdict(**json.loads(answer))

    def _alive(self) -> subprocess.Popen[str]:
        if self.process and self.process.poll() is None:
            return self.process
        self.answers: queue.Queue[str | None] = queue.Queue()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.zoo.score", "--worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        threading.Thread(target=self._pump, args=(self.process,), daemon=True).start()
        return self.process

    def _pump(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout
        answers = self.answers
        for line in process.stdout:
            if line.startswith("="):
                answers.put(line[1:])
        answers.put(None)

    def close(self) -> None:
        if self.process:
            self.process.kill()


def one_line(v: Verdict) -> str:
    """A verdict as a line of text."""
    if v.fused:
        stress = "" if v.stress_error is None else f" stress {v.stress_error:.0e}"
        outcome = f"fused {v.fused}" + ("" if v.error is None else f" err {v.error:.0e}{stress}")
    else:
        outcome = f"refused: {v.reasons[0]}" if v.reasons else "nothing found"
    return f"{'ok  ' if v.ok else 'FAIL'} {v.name}  {outcome}  {v.seconds}s  {v.failure}{v.note}"


def markdown(verdicts: list[Verdict], notes: str) -> str:
    """SCORE.md: totals, then failing cases grouped by what stopped them, then everything."""
    good = sum(v.ok for v in verdicts)
    lines = [f"# Zoo: {good} of {len(verdicts)} as expected", ""]
    families: dict[tuple[str, str], list[Verdict]] = defaultdict(list)
    groups: dict[str, list[Verdict]] = defaultdict(list)
    for v in verdicts:
        families[(v.family, v.expect)].append(v)
        if not v.ok:
            reason = f" | {v.reasons[0]} (at {v.stopped[0]})" if v.reasons else ""
            groups[v.failure + reason].append(v)
    lines += ["| family | expect | ok | of | slowest fuse |", "|---|---|---|---|---|"]
    for (family, expect), members in sorted(families.items()):
        slow = max(m.seconds for m in members)
        lines.append(
            f"| {family} | {expect} | {sum(m.ok for m in members)} | {len(members)} | {slow} s |"
        )
    if notes:
        lines += ["", "## Diagnoses", "", notes.rstrip()]
    lines += ["", "## Failing, grouped"]
    for reason, members in sorted(groups.items(), key=lambda g: -len(g[1])):
        lines += ["", f"### {len(members)} x {reason}", "", ", ".join(m.name for m in members)]
    lines += ["", "## All", "", *(f"- {one_line(v)}" for v in verdicts)]
    return "\n".join(lines) + "\n"


def write(verdicts: list[Verdict], folder: Path, part: str) -> None:
    """SCORE.md and SCORE.json of what is known so far."""
    notes = folder / "NOTES.md"
    text = markdown(verdicts, notes.read_text() if notes.exists() else "")
    (folder / f"SCORE{part}.md").write_text(text)
    table = json.dumps([v.as_dict() for v in verdicts], indent=1)
    (folder / f"SCORE{part}.json").write_text(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-k", default="", help="regular expression on case names")
    parser.add_argument("-o", type=Path, default=Path(tempfile.gettempdir()) / "zoo")
    parser.add_argument("-n", type=int, default=1, help="only every n-th case, spread evenly")
    parser.add_argument("-f", action="store_true", help="only what failed in the last SCORE.json")
    parser.add_argument("-q", action="store_true", help="print failing cases only")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker()
        return 0
    args.o.mkdir(parents=True, exist_ok=True)
    chosen = [c for c in cases(args.k) if zlib.crc32(c.name.encode()) % args.n == 0]
    if args.f:
        failed = json.loads((args.o / "SCORE.json").read_text())
        names = {v["name"] for v in failed if v["failure"]}
        chosen = [c for c in chosen if c.name in names]
    child, verdicts = Child(), []
    part = "-part" if args.k or args.f else ""
    try:
        for number, case in enumerate(chosen):
            verdicts.append(child.ask(case))
            if not (args.q and verdicts[-1].ok):
                print(one_line(verdicts[-1]), flush=True)
            if number % 20 == 19:
                write(verdicts, args.o, part)
    finally:
        child.close()
        write(verdicts, args.o, part)
    print(f"{sum(v.ok for v in verdicts)} of {len(verdicts)} as expected")
    return 0 if all(v.ok for v in verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
