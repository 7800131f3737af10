"""A 671B model: megabytes, and the weights file is never opened. (Seconds: benchmarks/scale.py.)"""

import subprocess
import sys
import tracemalloc
from pathlib import Path

import onnx
import pytest

import sfa_onnx
from sfa_onnx.passes.graph.index import GraphIndex
from sfa_onnx.passes.scopes.index import ScopeIndex
from tests import big_model
from tests.zoo import bodies

# A child process, so that its peak memory is its own; neither verification nor hashing is part of
# the budget.
CHILD = """
import re, sys
from sfa_onnx.passes import certificate
from sfa_onnx import fusion as run_fuse
certificate.snapshot = lambda model: certificate.Snapshot()
report = run_fuse.fuse(sys.argv[1], sys.argv[2], verify=False)
# Not ru_maxrss: that remembers what the parent held when it started this process.
peak = re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read()).group(1)
print(peak, len(report.fused), report.weights_bytes_read, report.nodes_before)
print(report.seconds)
"""


@pytest.mark.parametrize(("metadata", "megabytes"), [(False, 450), (True, 1150)])
def test_memory(tmp_path, metadata, megabytes):
    path = big_model.write(tmp_path, metadata=metadata)
    done = subprocess.run(
        [sys.executable, "-c", CHILD, path, tmp_path / "out.onnx"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
    )
    assert done.returncode == 0, done.stderr
    peak, fused, read, nodes = done.stdout.splitlines()[0].split()
    assert int(nodes) > 125_000
    assert int(fused) == big_model.LAYERS
    assert int(read) == 0
    assert int(peak) / 1024 <= megabytes, done.stdout


def test_weights_are_never_opened(tmp_path, monkeypatch):
    """An audit hook sees every file that is opened while a model with weights is fused."""
    path = big_model.write(tmp_path, layers=4, experts=2, filler=5)
    code = (
        "import sys, sfa_onnx\n"
        "opened = []\n"
        "sys.addaudithook(lambda e, a: opened.append(str(a[0])) if e == 'open' else None)\n"
        "report = sfa_onnx.fuse(sys.argv[1], sys.argv[2])\n"
        "assert len(report.fused) == 4, report.sites\n"
        "print(sum('w.bin' in o for o in opened), sum('big.onnx' in o for o in opened))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, path, tmp_path / "out.onnx"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
    )
    assert done.stdout.split() == ["0", "1"], done.stdout + done.stderr


def test_equal_layers_are_verified_once(tmp_path):
    path = big_model.write(tmp_path, layers=6, experts=0, filler=2)
    (tmp_path / "w.bin").unlink()  # the weights need not even be there
    report = sfa_onnx.fuse(path)
    shared = [s.record.shared_with for s in report.fused]
    assert shared == [None] + [report.sites[0].anchor] * 5


def test_a_merged_decoder_shares_what_lies_around_its_branches(tmp_path):
    """Both branches in one file: every layer fuses in each, and no weight is opened or copied."""
    path = big_model.write(tmp_path, layers=4, experts=2, filler=5)
    model = onnx.load(path, load_external_data=False)
    merged = bodies.in_if(model, hoist=True, suffix="/else")
    onnx.save(merged, tmp_path / "merged.onnx")
    (tmp_path / "w.bin").unlink()
    report = sfa_onnx.fuse(tmp_path / "merged.onnx")
    assert len(report.fused) == 8
    assert report.weights_bytes_read == 0
    assert [t.name for t in report.model.graph.initializer] == [
        t.name for t in sfa_onnx.fuse(path).model.graph.initializer if "/sfa/" not in t.name
    ]
    assert len(report.model.graph.node) == 1


def test_bodies_do_not_copy_what_lies_around_them(tmp_path):
    """Time and memory of looking into bodies grow with the bodies, not with the graph."""
    main = GraphIndex.of(onnx.load(big_model.write(tmp_path), load_external_data=False))
    body = onnx.helper.make_graph(
        [onnx.helper.make_node("Softmax", ["x"], ["y"])],
        "body",
        [],
        [onnx.helper.make_tensor_value_info("y", 1, None)],
    )
    owner = onnx.helper.make_node("If", ["c"], ["z"], then_branch=body, else_branch=body)
    main.graph.node.append(owner)
    around = GraphIndex(main.graph, main.opsets)
    tracemalloc.start()
    views = [ScopeIndex(around, len(main.nodes), "then_branch", body) for _ in range(50)]
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(views[0].nodes) > 125_000
    assert used < 50 * 100_000
