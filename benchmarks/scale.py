"""Time and memory of fusing a 61-layer, 130,000-node model with 1.5 TB of external weights.

    python -m benchmarks.scale [--metadata] [--rivals] [--folder DIR]

Each engine runs in a process of its own; the weights are a sparse file that takes no disk space.
`--rivals` also runs onnxscript's rewriter and whole-graph GraphSurgeon on the same file: each finds
the Softmax of every site, replaces it by an Identity, and saves.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from tests import big_model

_TAIL = """
import resource
print(f"{time.monotonic() - begin:8.2f} s wall {time.process_time() - cpu:8.2f} s cpu"
      f" {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:8.0f} MB")
"""
_HEAD = "import sys, time\nsource, target = sys.argv[1:3]\n"
_CLOCK = "begin, cpu = time.monotonic(), time.process_time()\n"

OURS = """
from sfa_onnx.passes import certificate
from sfa_onnx import fusion as run_fuse
if {plain}:
    certificate.snapshot = lambda model: certificate.Snapshot()
{clock}
report = run_fuse.fuse(source, target, verify={verify}, force=True)
print({{k: round(v, 2) for k, v in report.seconds.items()}}, len(report.fused), "sites,",
      report.weights_bytes_read, "bytes of weights read")
"""
ONNXSCRIPT = """
import onnx_ir as ir
from onnxscript.rewriter import pattern
rule = pattern.RewriteRule(lambda op, x: op.Softmax(x, axis=-1), lambda op, x: op.Identity(x))
{clock}
model = ir.load(source)
print(pattern.RewriteRuleSet([rule]).apply_to_model(model), "matches")
ir.save(model, target)
"""
GRAPHSURGEON = """
import onnx
import onnx_graphsurgeon as gs
{clock}
graph = gs.import_onnx(onnx.load(source, load_external_data=False))
sites = [n for n in graph.nodes if n.op == "Softmax"]
for node in sites:
    node.op, node.attrs = "Identity", {{}}
graph.cleanup().toposort()
onnx.save(gs.export_onnx(graph), target)
print(len(sites), "matches")
"""


def run(name: str, body: str, source: Path) -> None:
    """One engine in a process of its own."""
    target = source.with_name(f"{source.stem}.out.onnx")
    code = _HEAD + body.format(clock=_CLOCK, plain="plain" in name, verify="verify" in name) + _TAIL
    done = subprocess.run(
        [sys.executable, "-c", code, source, target], capture_output=True, text=True
    )
    target.unlink(missing_ok=True)
    print(f"{name:34} {done.stdout.strip() or done.stderr.strip().splitlines()[-1]}")


def main() -> None:
    """Build the model and run every engine on it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--metadata", action="store_true", help="with 170 MB of exporter metadata")
    parser.add_argument("--rivals", action="store_true", help="onnxscript and GraphSurgeon too")
    parser.add_argument("--folder", type=Path, help="keep the model here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        source = big_model.write(args.folder or scratch, metadata=args.metadata)
        print(f"{source.stat().st_size / 1e6:.0f} MB of graph, 1.5 TB of weights")
        run("sfa_onnx plain", OURS, source)
        run("sfa_onnx verify and hash", OURS, source)
        if args.rivals:
            run("onnxscript rewriter, one rule", ONNXSCRIPT, source)
            run("GraphSurgeon, whole graph", GRAPHSURGEON, source)


if __name__ == "__main__":
    main()
