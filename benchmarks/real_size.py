"""One decoder layer at DeepSeek-V3.2's true size through the whole road.

    python -m benchmarks.real_size [--lengths 4096 16384 65536] [--folder DIR] [--no-turns]

Exports the demo's layer at true dimensions (hidden 7168, 128 heads, q_lora 1536, kv_lora 512,
rope 64, indexer 64 x 128, top-k 2048; float32, random weights in external data), then inspect,
fuse, kv-cache, compare and the hand-over to ATC, with time and peak memory of each step in a
process of its own, and the time of one decode token in onnxruntime before and after; last the
paged layer with the selection as exported against that with the indexer's operator, products head
by head and caches in place, in turn in one process.
Needs torch for the export (once per folder) and about 12 GB of memory.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx

REAL = {
    "HIDDEN": 7168, "Q_RANK": 1536, "HEADS": 128, "LATENT": 512, "ROPE": 64, "NOPE": 128,
    "VALUE": 128, "INDEX_HEADS": 64, "INDEX_WIDTH": 128, "TOPK": 2048,
}  # fmt: skip
ROOT = Path(__file__).resolve().parent.parent
NAME, FUSED, INT8 = "layer.onnx", "layer.sfa.onnx", "layer.int8.onnx"
WEIGHTS = "decode_layer.weights"
CHUNK = 1 << 24


def exporter() -> ModuleType:
    """The demo's export script with the sizes of the real thing."""
    spec = importlib.util.spec_from_file_location("layer", ROOT / "examples" / "export_demo.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    vars(module).update(REAL)
    return module


def export(folder: Path) -> None:
    """Graph from torch, weights written here in pieces: nothing of 2 GB is ever in memory twice."""
    import torch

    layer = exporter()
    torch.nn.Linear.reset_parameters = lambda _: None  # type: ignore[method-assign,assignment]
    model = layer.without_weights(layer.export(torch.float32, past=4095))
    (folder / NAME).write_bytes(model.SerializeToString())
    rng = np.random.default_rng(0)
    block = rng.standard_normal(CHUNK, dtype=np.float32)
    with (folder / WEIGHTS).open("wb") as stream:
        for tensor in model.graph.initializer:
            if not tensor.external_data:
                continue
            place = {e.key: e.value for e in tensor.external_data}
            stream.seek(int(place["offset"]))
            std = float(tensor.doc_string.split("std=")[1]) if tensor.doc_string else 1.0
            mean = float(tensor.doc_string.split("mean=")[1].split()[0])
            left = math.prod(tensor.dims)
            while left:
                start = int(rng.integers(CHUNK // 2))
                piece = mean + std * block[start : start + min(left, CHUNK // 2)]
                stream.write(piece.astype(np.float32).tobytes())
                left -= len(piece)


def feeds(folder: Path, length: int) -> Path:
    """Inputs of one decode step with `length` cached tokens, the new one included."""
    path = folder / f"feeds_{length}.npz"
    if not path.exists():
        from sfa_onnx import demo

        np.savez(path, **demo.feeds(past_length=length - 1, model=folder / NAME))
    return path


def measured(folder: Path, step: str, *arguments: str) -> dict[str, object]:
    """Run one verb in a process of its own: seconds, peak memory, exit code."""
    code = "import sys; from sfa_onnx.cli import main; sys.exit(main(sys.argv[1:]))"
    start = time.perf_counter()
    log = folder / f"{step.replace(' ', '_')}.log"
    timed = ["/usr/bin/env", sys.executable, "-c", WATCH, str(folder / "peak"), code, *arguments]
    with log.open("w") as stream:
        done = subprocess.run(timed, stdout=stream, stderr=stream, check=False)
    peak = int((folder / "peak").read_text()) / 1e6
    seconds = time.perf_counter() - start
    print(f"{step:34} {seconds:8.1f} s  {peak:6.2f} GB  exit {done.returncode}", flush=True)
    return {"step": step, "seconds": seconds, "peak_gb": peak, "exit": done.returncode}


# Runs the verb as a child and leaves the child's own peak memory (kB) in a file.
WATCH = """
import resource, subprocess, sys
code = subprocess.run([sys.executable, "-c", *sys.argv[2:]]).returncode
open(sys.argv[1], "w").write(str(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss))
sys.exit(code)
"""


def token_time(path: Path, inputs: Path, runs: int) -> float:
    """Median milliseconds of one decode token."""
    from sfa_onnx import runtime
    from sfa_onnx.kv_convert.interface import adapt_feeds, read_interface
    from sfa_onnx.runtime.timing import time_session

    with np.load(inputs) as archive:
        arrays = {name: archive[name] for name in archive.files}
    interface = read_interface(onnx.load(path, load_external_data=False))
    if interface is not None:
        arrays = adapt_feeds(interface, arrays, new_tokens=1)
    return time_session(runtime.session(path), arrays, runs).median_ms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 16384, 65536])
    parser.add_argument("--folder", type=Path, help="keep files here (default: a temporary one)")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--no-turns", action="store_true", help="leave out the last comparison")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        results = road(folder, args.lengths, args.runs, in_place=not args.no_turns)
    if args.json:
        args.json.write_text(json.dumps(results, indent=2))


def road(folder: Path, lengths: list[int], runs: int, *, in_place: bool) -> dict[str, object]:
    """All steps; every figure printed as it comes."""
    if not (folder / NAME).exists():
        start = time.perf_counter()
        subprocess.run(
            [sys.executable, "-c", "import sys, pathlib; from benchmarks import real_size;"
             " real_size.export(pathlib.Path(sys.argv[1]))", str(folder)],
            check=True, cwd=ROOT,
        )  # fmt: skip
        print(f"{'export (torch)':34} {time.perf_counter() - start:8.1f} s")
    model, fused, int8 = folder / NAME, folder / FUSED, folder / INT8
    steps = [
        measured(folder, "inspect", "inspect", str(model)),
        measured(folder, "fuse", "fuse", str(model), "-o", str(fused), "--force",
                 "--expect-sites", "1"),
        measured(folder, "kv-cache paged-int8", "kv-cache", str(fused), "--to", "paged-int8",
                 "-o", str(int8), "--force"),
    ]  # fmt: skip
    first = feeds(folder, lengths[0])
    for name, after in (("compare fused", fused), ("compare paged-int8", int8)):
        steps.append(
            measured(folder, name, "compare", str(model), str(after), "--inputs", str(first))
        )
    steps.append(
        measured(folder, "atc hand-over", "atc", str(fused), "--soc-version", "Ascend910B2",
                 "--npu-dtype", "bf16", "--dim", "batch=1", "--dim", f"past_len={lengths[0] - 1}",
                 "-o", str(folder / "atc"), "--force")
    )  # fmt: skip
    turns = paged_turns(folder, lengths, runs) if in_place else []
    rows = []
    print(f"\n{'S2':>8} {'original ms':>12} {'fused ms':>10} {'paged-int8 ms':>14} {'speed-up':>9}")
    for length in lengths:
        inputs = feeds(folder, length)
        times = [token_time(path, inputs, runs) for path in (model, fused, int8)]
        rows.append({"length": length, "ms": times})
        ratios = f"{times[0] / times[1]:.1f}x {times[0] / times[2]:.1f}x"
        print(f"{length:8} {times[0]:12.1f} {times[1]:10.1f} {times[2]:14.1f} {ratios:>9}")
    return {"steps": steps, "token_ms": rows, "turns": turns}


def paged_turns(folder: Path, lengths: list[int], runs: int) -> list[dict[str, float]]:
    """Paged decoding as it was (attention alone fused) and as it is, in turn in one process."""
    from benchmarks.real_size_turns import in_turn

    models = []
    for name, how in (("before", "--no-indexer"), ("after", "--materialize-absorbed")):
        fused, paged = folder / f"layer.{name}.onnx", folder / f"layer.{name}.paged.onnx"
        measured(folder, f"fuse {how}", "fuse", str(folder / NAME), "-o", str(fused), "--force",
                 how)  # fmt: skip
        measured(folder, f"kv-cache {name}", "kv-cache", str(fused), "--to", "paged-int8",
                 "-o", str(paged), "--force")  # fmt: skip
        models.append(paged)
    found = in_turn(models[0], models[1], [feeds(folder, n) for n in lengths], runs)
    print(f"\n{'S2':>8} {'attention alone':>16} {'all, in place':>14}  CPU ms of one thread")
    for length, row in zip(lengths, found, strict=True):
        ratio = row["before_ms"] / row["after_ms"]
        times = f"{row['before_ms']:16.1f} {row['after_ms']:14.1f}"
        print(f"{length:8} {times} {ratio:8.2f}x   outputs differ by {row['off']:.1e}")
    return found


if __name__ == "__main__":
    main()
