"""Mutated models through all verbs, in child processes: `python -m tests.fuzz.run --count 1000`.

A child runs many mutants and says what it is about to do; when it dies or hangs, that mutant is
recorded and the next child goes on behind it. Nothing may die, hang, or raise what is not ours.

`--swift` calls the functions behind the verbs and runs the worker's tasks in the child itself, a
few times faster; a mutant that is the death of such a child is tried again as people would run it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.fuzz.child import child
from tests.fuzz.watch import Watch


def _ranges(first: int, count: int, jobs: int) -> list[tuple[int, int]]:
    size = -(-count // jobs)
    return [(n, min(n + size, first + count)) for n in range(first, first + count, size)]


def main() -> int:
    """Run `--count` mutants from `--first` on; exit 1 when something bad was seen."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="children at a time (default: 1)")
    parser.add_argument("--swift", action="store_true", help="functions, not command lines")
    parser.add_argument("--seconds", type=float, help="start no further mutant after so long")
    parser.add_argument("--out", type=Path, help="write the record here, as JSON")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        first, last = map(int, args.child.split(":"))
        child(first, last, swift=args.swift)
        return 0
    begin = time.monotonic()
    watch = Watch(args.out, swift=args.swift, seconds=args.seconds)
    with ThreadPoolExecutor(args.jobs) as pool:
        for done in [
            pool.submit(watch.run, *part) for part in _ranges(args.first, args.count, args.jobs)
        ]:
            done.result()
    report = {"seconds": round(time.monotonic() - begin), **watch.report()}
    text = json.dumps(report, indent=1)
    if args.out is not None:
        args.out.write_text(text)
    print(text)
    return 1 if watch.bad else 0


if __name__ == "__main__":
    sys.exit(main())
