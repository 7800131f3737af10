"""Speed of the lightning indexer against what the machine can do: `python -m benchmarks.indexer`.

One query token against many cached keys, one thread. The ceiling (multiply-adds in registers) is
measured between the calls in the same process. The core is timed piece by piece, each piece by the
least of many runs of CPU time, so that ratios hold on a busy machine too; whole operators and peers
are the least of some runs. Prints a table; `--json` writes a file beside it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import indexer_abi, indexer_peers
from benchmarks import kernel_abi as core
from benchmarks.indexer_abi import Call, random_call
from benchmarks.kernel_data import Abi, Clock, machine

DTYPES = {"f32": np.float32, "f16": np.float16, "bf16": indexer_abi.BF16, "int8": np.int8}
# The ceiling of each path for floats, bfloat16 and int8: its widest multiply-add in registers.
CEILINGS = {
    "avx512_bf16": {"bf16": "bf16_512", "int8": "int8_512", "": "fp32_512"},
    "avx512f": {"int8": "int8_512", "": "fp32_512"},
    "avx2": {"int8": "int16_256", "": "fp32_256"},
    "neon": {"": "fp32_neon"},
    "neon_bf16": {"": "fp32_neon"},
    "scalar": {"": "fp32_256"},
}


@dataclass(frozen=True)
class Line:
    """One measurement of the core. Times in microseconds per query token."""

    dtype: str
    isa: str
    keys: int
    scores_us: float  # with the best key only
    whole_us: float  # with the best `count` keys
    gflops: float
    peak_gflops: float
    select_us: float  # an indexer of one head and one column: an upper bound of the selection

    @property
    def of_peak(self) -> float:
        return self.gflops / self.peak_gflops if self.peak_gflops else 0.0


class Pieces:
    """A call's tasks, each with the least time that it took so far."""

    def __init__(self, clock: Clock, call: Call):
        self._clock, self._call = clock, call
        self._abi = Abi.of(indexer_abi.library(), "sfa_core_indexer")
        self._best = np.full(call.num_tasks(), np.inf)

    def run(self) -> None:
        self._clock.tasks(self._abi, self._call.params, self._best)

    @property
    def us(self) -> float:
        return float(self._best.sum()) / 1e3


def measure(clock: Clock, dtype: str, isa: str, args: argparse.Namespace) -> Line:
    """Scores, whole call and selection in turn, the ceiling in between."""
    shape = {"heads": args.heads, "width": args.width, "keys": args.keys}
    rng = np.random.default_rng(0)
    inputs, attributes = random_call(rng, DTYPES[dtype], **shape, count=args.count)
    thin = random_call(rng, np.float32, heads=1, width=1, keys=args.keys, count=args.count)
    thin[0]["query"][:], thin[0]["weights"][:] = 1, 1
    np.abs(thin[0]["key"], out=thin[0]["key"])
    calls = (Call(inputs, attributes | {"sparse_count": 1}, isa), Call(inputs, attributes, isa))
    pieces = [Pieces(clock, call) for call in (*calls, Call(*thin, isa))]
    chosen = core.library().sfa_core_isa().decode() if isa == "auto" else isa
    ceiling = CEILINGS[chosen].get(dtype, CEILINGS[chosen][""])
    peak = 0.0
    for _ in range(args.rounds):
        for one in pieces:
            one.run()
        peak = max(peak, clock.peak(ceiling, 4))
    scores, whole, select = (one.us for one in pieces)
    gflops = 2 * args.heads * args.width * args.keys / scores / 1e3
    return Line(dtype, chosen, args.keys, scores, whole, gflops, peak, select)


def least(run: Callable[[], Any], rounds: int) -> float:
    """Microseconds of CPU time of this process, the least of `rounds` runs after one to warm up."""
    run()
    times = []
    for _ in range(rounds):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return 1e6 * min(times)


def table(lines: list[Line], count: int) -> str:
    """Markdown: the core against its ceiling."""
    head = (
        f"| type | path | keys | scores us | G op/s | of peak | with top-{count} us | selection |"
    )
    out = [head, "|" + "---|" * 8]
    for x in lines:
        out.append(
            f"| {x.dtype} | {x.isa} | {x.keys} | {x.scores_us:.0f} | {x.gflops:.0f} "
            f"| {100 * x.of_peak:.0f} % | {x.whole_us:.0f} "
            f"| {x.whole_us - x.scores_us:.0f} us, at most {x.select_us:.0f} |"
        )
    return "\n".join(out)


def peers(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """The whole operator inside onnxruntime, and the same work by other means, in turn."""
    shape = {"heads": args.heads, "width": args.width, "keys": args.keys, "count": args.count}
    out: dict[str, dict[str, float]] = {}
    for dtype in args.dtype:
        inputs, attributes = random_call(np.random.default_rng(0), DTYPES[dtype], **shape)
        runs = indexer_peers.runs(inputs, attributes)
        best = dict.fromkeys(runs, np.inf)
        for _ in range(args.peer_rounds):
            for name, run in runs.items():
                best[name] = min(best[name], least(run, 1))
        out[dtype] = best
    return out


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--isa", nargs="+", default=["auto"], choices=list(core.ISAS))
    parser.add_argument("--heads", type=int, default=64)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--keys", type=int, default=65536)
    parser.add_argument("--count", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--peers", action="store_true", help="onnxruntime and torch as well")
    parser.add_argument("--peer-rounds", type=int, default=6)
    parser.add_argument("--json", type=Path)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    clock = Clock()
    lines = [measure(clock, dtype, isa, args) for isa in args.isa for dtype in args.dtype]
    print(f"{machine()}; {args.heads} heads x {args.width}; least of {args.rounds} runs\n")
    print(table(lines, args.count))
    times = peers(args) if args.peers else {}
    for dtype, best in times.items():
        ours = best[indexer_peers.OURS]
        for name, took in best.items():
            print(f"{dtype}: {name} {took:.0f} us, {took / ours:.1f}x our operator")
    if args.json:
        record = {"machine": machine(), "lines": [asdict(x) for x in lines], "peers": times}
        args.json.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
