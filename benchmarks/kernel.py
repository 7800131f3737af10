"""Speed of the attention core against what the machine can do: `python -m benchmarks.kernel`.

One query token, K = 2048 rows at random from a cache far larger than L3, one thread unless said.
The ceilings (dot products in registers, a bare gather of the same rows) are measured between the
calls in the same process, and everything is the best of many short bursts: ratios then hold on a
busy machine too. Prints a table; `--json` and `--png` write files beside it. `--rounding npu` sets
the NPU's rounding beside the exact one, call by call in turn.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from benchmarks import kernel_abi as core
from benchmarks import kernel_peers
from benchmarks.kernel_data import Cache, Clock, flops, machine

HEADS = (128, 64, 32, 16, 8, 4, 2, 1)
# The ceiling of each path: its widest multiply-add in registers.
CEILING = {
    "avx512_bf16": "bf16_512",
    "avx512f": "fp32_512",
    "avx2": "fp32_256",
    "neon": "fp32_neon",
    "neon_bf16": "fp32_neon",
    "scalar": "fp32_256",
}


@dataclass(frozen=True)
class Line:
    """One measurement. Times in microseconds per query token, rates in GFLOP/s."""

    cache: str
    isa: str
    heads: int
    threads: int
    us: float
    median_us: float
    gflops: float
    peak_gflops: float
    gather_us: float
    rounding: str = "exact"
    x_exact: float = 1.0  # medians of both roundings, measured in turn

    @property
    def of_peak(self) -> float:
        return self.gflops / (self.peak_gflops * self.threads) if self.peak_gflops else 0.0


def measure(clock: Clock, cache: Cache, isa: str, heads: int, threads: int, rounds: int) -> Line:
    """Calls over all index sets, ceilings in between."""
    calls = cache.calls(heads, isa)
    times, gathers, peaks = [], [], []
    chosen = core.library().sfa_core_isa().decode() if isa == "auto" else isa
    for _ in range(rounds):
        for i, params in enumerate(calls):
            times.append(clock.call(params, threads))
            if i % 4 == 0:
                # A set that no call has touched for half a rotation: its rows are cold.
                far = cache.indices[(i + len(calls) // 2) % len(calls)]
                gathers.append(clock.gather(cache, far, i // 4))
                peaks.append(clock.peak(CEILING[chosen], 2))
    best = min(times)
    return Line(
        cache=f"{cache.kind}/{cache.dtype.name}",
        isa=chosen,
        heads=heads,
        threads=threads,
        us=best,
        median_us=sorted(times)[len(times) // 2],
        gflops=flops(heads) / best / 1e3,
        peak_gflops=max(peaks),
        gather_us=min(gathers),
    )


def measure_rounding(clock: Clock, cache: Cache, isa: str, heads: int, rounds: int) -> Line:
    """The NPU's rounding against the exact one: the same calls, one after the other."""
    exact, npu = cache.calls(heads, isa), cache.calls(heads, isa, rounding="npu")
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for i in range(len(exact)):
            # Each finds the rows cold: they lie half a rotation apart.
            times[0].append(clock.call(exact[i]))
            times[1].append(clock.call(npu[(i + len(npu) // 2) % len(npu)]))
    ratio = sorted(times[1])[len(times[1]) // 2] / sorted(times[0])[len(times[0]) // 2]
    plain = measure(clock, cache, isa, heads, 1, 1)
    return replace(
        plain,
        us=min(times[1]),
        median_us=sorted(times[1])[len(times[1]) // 2],
        gflops=flops(heads) / min(times[1]) / 1e3,
        rounding="npu",
        x_exact=ratio,
    )


def table(lines: list[Line]) -> str:
    """Markdown: ours, ceilings, ratios."""
    head = (
        "| cache | path | N1 | threads | rounding | us/token | GFLOP/s | of peak | gather us"
        " | x gather | x exact |"
    )
    out = [head, "|" + "---|" * 11]
    for x in lines:
        out.append(
            f"| {x.cache} | {x.isa} | {x.heads} | {x.threads} | {x.rounding} | {x.us:.0f} "
            f"| {x.gflops:.0f} | {100 * x.of_peak:.0f} % | {x.gather_us:.0f} "
            f"| {x.us / x.gather_us:.2f} | {x.x_exact:.2f} |"
        )
    return "\n".join(out)


def plot(lines: list[Line], path: Path) -> None:
    """Time per token over N1, with the two ceilings. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5))
    for key in sorted({(x.cache, x.isa, x.threads) for x in lines}):
        chosen = [x for x in lines if (x.cache, x.isa, x.threads) == key]
        label = f"{key[1]}, {key[0]}, {key[2]} thread(s)"
        axes.plot([x.heads for x in chosen], [x.us for x in chosen], "o-", label=label)
    first = [x for x in lines if (x.cache, x.isa, x.threads) == _key(lines[0])]
    heads = [x.heads for x in first]
    axes.plot(heads, [flops(x.heads) / x.peak_gflops / 1e3 for x in first], "k--", label="peak")
    axes.plot(heads, [x.gather_us for x in first], "k:", label="gather")
    axes.set(xscale="log", yscale="log", xlabel="N1", ylabel="us per query token")
    axes.legend()
    figure.savefig(path, dpi=130, bbox_inches="tight")


def _key(line: Line) -> tuple[str, str, int]:
    return line.cache, line.isa, line.threads


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--heads", type=int, nargs="+", default=list(HEADS))
    parser.add_argument("--isa", nargs="+", default=["auto"], choices=list(core.ISAS))
    parser.add_argument("--cache", nargs="+", default=["int8"], choices=["int8", "float"])
    parser.add_argument("--dtype", default="bf16", choices=["bf16", "f16", "f32"])
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--rounding", default="exact", choices=["exact", "npu"])
    parser.add_argument("--rows", type=int, default=1 << 20, help="rows of the cache")
    parser.add_argument("--sets", type=int, default=96, help="index sets in rotation")
    parser.add_argument("--rounds", type=int, default=2, help="calls per index set")
    parser.add_argument("--peers", action="store_true", help="NumPy, torch, ONNX Runtime as well")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--png", type=Path)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    clock, lines, peers = Clock(), [], {}
    for kind in args.cache:
        cache = Cache(kind, args.dtype, args.rows, args.sets)
        for isa in args.isa:
            for threads in args.threads:
                for heads in args.heads:
                    lines.append(measure(clock, cache, isa, heads, threads, args.rounds))
            if args.rounding == "npu":
                measured = (measure_rounding(clock, cache, isa, n, args.rounds) for n in args.heads)
                lines.extend(measured)
        if args.peers and kind == "int8" and args.dtype == "bf16":
            peers = {n: kernel_peers.measure(cache, n, 12) for n in args.heads}
    print(f"{machine()}; K = 2048; {args.rows} rows; best of {args.rounds * args.sets} bursts\n")
    print(table(lines))
    for heads, times in peers.items():
        ours = min(x.us for x in lines if x.heads == heads and x.threads == 1)
        for name, took in times.items():
            print(f"N1={heads}: {name} {took:.0f} us, {took / ours:.1f}x ours")
    if args.json:
        record = {"machine": machine(), "lines": [asdict(x) for x in lines], "peers": peers}
        args.json.write_text(json.dumps(record, indent=1))
    if args.png:
        plot(lines, args.png)


if __name__ == "__main__":
    main()
