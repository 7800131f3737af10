"""The parent's side of the fuzzer: start children, outlive them, count what they say."""

from __future__ import annotations

import collections
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from tests.fuzz.verbs import SWIFT, VERBS

_SECONDS = 60  # of processor time for one mutant through all verbs; ten times that by the clock
_BATCH = 1000  # mutants of one child: what leaks goes with it
_FINE = (0, 1, 2, 3)  # exit codes
_ENDS = frozenset(  # how a function behind a verb may end
    (
        *("done", "fused", "refused", "no site", "passes", "findings", "equal", "not run"),
        "not finite alike",  # a scale of 1e38, rows without a key: NaN in one, 0 in the other
        *("not sound", "UsageError", "ModelError", "WeightsError", "BudgetError"),
        *("ContractError", "VerificationError", "MissingError", "CrashError"),
    )
)


def _cpu(session: int) -> float:
    """Processor seconds of all processes of a session: a busy machine is no hang."""
    ticks = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[3]) == session:
                ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


class Watch:
    """Starts children one after the other and collects what they say.

    Attributes:
        bad: what must not happen -> the mutants it happened to.
        codes: "verb -> how it ended" -> how often.
        done: mutants that went through all verbs.
        again: mutants that ended a swift child, and were tried again with the worker.
    """

    def __init__(
        self, out: Path | None, *, swift: bool = False, seconds: float | None = None
    ) -> None:
        self.codes: collections.Counter[str] = collections.Counter()
        self.bad: dict[str, list[int]] = {}
        self.done = 0
        self.again: list[int] = []
        self._out, self._swift = out, swift
        self._last = SWIFT[-1] if swift else VERBS[-1]
        self._until = None if seconds is None else time.monotonic() + seconds
        self._lock = threading.Lock()

    def run(self, first: int, last: int) -> None:
        """All mutants from `first` to `last`."""
        while first < last and not self._late():
            reached, why = self._child(first, min(last, first + _BATCH), swift=self._swift)
            if why and self._swift:
                with self._lock:
                    self.again.append(reached)
                reached, why = self._child(reached, reached + 1, swift=False)
            if why:
                self._note(why, reached)
            first = reached + 1

    def _late(self) -> bool:
        return self._until is not None and time.monotonic() > self._until

    def _child(self, first: int, last: int, *, swift: bool) -> tuple[int, str]:
        """One child; the last mutant that it finished or ended with, and how it ended with it."""
        command = [sys.executable, "-m", "tests.fuzz.run", "--child", f"{first}:{last}"]
        process = subprocess.Popen(
            [*command, "--swift"] if swift else command,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        at, hangs = self._follow(process, first)
        if hangs:
            os.killpg(process.pid, signal.SIGKILL)
        code = process.wait()
        number = int(str(at["n"]))
        if hangs:
            return number, f"{at['verb']}: hangs"
        return (number, f"{at['verb']}: the process ended with {code}") if code else (last - 1, "")

    def _follow(
        self, process: subprocess.Popen[bytes], first: int
    ) -> tuple[dict[str, object], bool]:
        """Read what a child says; its last line, and whether it went silent."""
        assert process.stdout is not None
        at: dict[str, object] = {"n": first, "verb": "start"}
        buffer, begin, before = b"", time.monotonic(), -1.0
        while True:
            if not select.select([process.stdout], [], [], 1.0)[0]:
                wall, spent = time.monotonic() - begin, _cpu(process.pid)
                before = spent if before < 0 else before
                if wall > 10 * _SECONDS or spent - before > _SECONDS:
                    return at, True
                continue
            data = os.read(process.stdout.fileno(), 1 << 16)
            if not data:
                return at, False
            *lines, buffer = (buffer + data).split(b"\n")
            for line in lines:
                message = json.loads(line)
                if message["n"] != at["n"]:
                    begin, before = time.monotonic(), -1.0
                at = message
                if "code" in message:
                    self._take(message)

    def _take(self, message: dict[str, object]) -> None:
        code = message["code"]
        with self._lock:
            self.codes[f"{message['verb']} -> {code}"] += 1
            self.done += message["verb"] == self._last
            if self.done % 100 == 0:
                self._write()
        if code not in _FINE and code not in _ENDS:
            self._note(f"{message['verb']}: {code}", int(str(message["n"])))
        for fault in set(message["faults"]):  # type: ignore[call-overload]
            self._note(f"{message['verb']}: {fault}", int(str(message["n"])))

    def _note(self, what: str, number: int) -> None:
        with self._lock:
            self.bad.setdefault(what, []).append(number)
            self._write()

    def _write(self) -> None:
        if self._out is not None:
            self._out.write_text(json.dumps(self.report(), indent=1))

    def report(self) -> dict[str, object]:
        """What was seen."""
        bad = {k: {"times": len(v), "first": v[:3]} for k, v in sorted(self.bad.items())}
        codes = dict(sorted(self.codes.items()))
        return {"mutants": self.done, "tried again": self.again, "bad": bad, "codes": codes}
