"""Scripts written for the NPU, on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytestmark = pytest.mark.torch

SCRIPT = """
import sys

import torch
import torch_npu
import torchair
import custom_ops
import torch.nn as nn
from torch_npu.testing.testcase import TestCase, run_tests
from torchair.configs.compiler_config import CompilerConfig

torch_npu.npu.set_device(0)


def arguments():
    torch.manual_seed(0)
    nope = torch.randint(-127, 128, (4, 16, 1, 512)).to(torch.int8)
    rope = torch.randn(4, 16, 1, 64).to(torch.bfloat16)
    scale = torch.rand(4, 16, 1, 4)
    key = torch.cat((nope, rope.view(torch.int8), scale.view(torch.int8)), -1)
    query = torch.randn(2, 1, 4, 576).to(torch.bfloat16)
    indices = torch.stack([torch.randperm(32)[:8] for _ in range(2)]).reshape(2, 1, 1, 8).int()
    table = torch.tensor([[2, 0], [1, 3]], dtype=torch.int32)
    lengths = torch.tensor([32, 32], dtype=torch.int32)
    return query, key, indices, table, lengths


class Net(nn.Module):
    def forward(self, query, key, indices, table, lengths):
        return torch_npu.npu_sparse_flash_attention_antiquant(
            query, key, key, indices, 0.05, 1, 2, 2, block_table=table,
            actual_seq_lengths_kv=lengths, layout_kv="PA_BSND", attention_mode=2,
            quant_scale_repo_mode=1, tile_size=128, rope_head_dim=64)


class TestOperator(TestCase):
    def test_eager_and_graph(self):
        args = [a.to("npu:0") for a in arguments()]
        config = CompilerConfig()
        config.experimental_config.frozen_parameter = True
        backend = torchair.get_npu_backend(compiler_config=config)
        eager = Net().npu()(*(a.npu() for a in args))
        graph = torch.compile(Net().npu(), backend=backend, fullgraph=True)(*args)
        self.assertTrue(torch.equal(eager, graph))
        torch.npu.synchronize()
        assert eager.shape == (2, 1, 4, 512) and torch.zeros(1, device="npu").is_cpu
        self.assertRtolEqual(eager.cpu(), graph)
        assert "Ascend910" in torch.npu.get_device_properties().name
        assert torch_npu.npu_kv_quant_sparse_flash_attention is not None
        try:
            torch_npu.npu_fused_infer_attention_score
        except AttributeError as error:
            assert "CPU stand-in for torch_npu has no attribute" in str(error)
        print("arguments:", sys.argv[1:])


if __name__ == "__main__":
    run_tests()
"""


# A run that counts lines (`pytest --cov`) counts those of the child, too.
COUNTED = {k: v for k, v in os.environ.items() if k.startswith("COVERAGE_")}


def on_cpu(*arguments, cwd=None, path=""):
    here = f"{Path(__file__).parents[1]}:{path}"
    return subprocess.run(
        [sys.executable, "-m", "sfa_onnx.torch.on_cpu", *arguments],
        capture_output=True, text=True, cwd=cwd,
        env={"PYTHONPATH": here, "PATH": "/usr/bin:/bin", **COUNTED},
    )  # fmt: skip


def test_a_vendor_script_runs_unchanged(tmp_path):
    script = tmp_path / "test_op.py"
    script.write_text(SCRIPT)
    done = on_cpu(str(script), "-v")
    assert done.returncode == 0, done.stderr
    assert "arguments: ['-v']" in done.stdout
    assert "OK" in done.stderr
    done = on_cpu("-m", "test_op", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


VLLM = """
    import torch
    import torch_npu
    from vllm_ascend.utils import enable_custom_op

    torch_npu.npu.config.allow_internal_format = True
    assert enable_custom_op()
    query, cache = torch.randn(2, 1, 4, 576).half().npu(), torch.zeros(2, 8, 1, 656).char().npu()
    indices = torch.arange(8, dtype=torch.int32).expand(2, 1, 1, 8).contiguous().npu()
    given = dict(key_quant_mode=2, value_quant_mode=2)
    call = torch.ops._C_ascend.npu_kv_quant_sparse_flash_attention
    out, top, total = call(query, cache, cache, indices, 0.04, **given)
    assert top.numel() == total.numel() == 0
    again, top, total = call(query, cache, cache, indices, 0.04, **given, return_softmax_lse=True)
    print(torch.equal(out, again), tuple(top.shape), total.flatten().tolist())
"""


def test_a_script_of_vllm_ascend_runs_and_gets_its_softmax(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(VLLM))
    done = on_cpu(str(script))
    # Rows of zeros: every score is 0, the sum counts the keys.
    assert done.stdout == f"True (2, 1, 1, 4) {[8.0] * 8}\n", done.stderr
    done = on_cpu("--vllm-release", "0.18.0", str(script))
    assert "has no attribute 'npu_kv_quant_sparse_flash_attention'" in done.stderr


def test_failures_and_exit_codes_are_the_scripts(tmp_path):
    script = tmp_path / "fails.py"
    script.write_text("import torch_npu, sys\nsys.exit(5)\n")
    assert on_cpu(str(script)).returncode == 5
    assert "no such file" in on_cpu("nowhere.py").stderr
    done = on_cpu("--release", "1.0", str(script))
    assert done.returncode == 2
    assert "no schemas of torch_npu 1.0" in done.stderr


def test_an_installed_torch_npu_that_needs_cann_is_not_in_the_way(tmp_path):
    (tmp_path / "torch_npu.py").write_text("raise ImportError('libascendcl.so')\n")
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
        import torch_npu
        print(torch_npu.npu.is_available(), torch_npu.npu_lightning_indexer)
    """)
    )
    done = on_cpu(str(script))
    assert done.stdout.startswith("True npu"), done.stderr


def test_what_a_stand_in_lacks_is_named(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
        import torch, torch_npu
        print(torch_npu.hifloat8)
        for read in ("torch_npu.float8_e8m0fnu", "torch.npu.NPUGraph", "torch_npu.npu_moe"):
            try:
                eval(read)
            except AttributeError as error:
                print(error)
        try:
            import torch_npu.contrib.module
        except ModuleNotFoundError as error:
            print(error, error.name)
        print(hasattr(torch_npu, "npu_moe"), getattr(torch.npu, "Stream", None))
    """)
    )
    done = on_cpu(str(script))
    number, *lines = done.stdout.splitlines()
    assert (number, done.returncode) == ("290", 0), done.stderr
    start = "sfa_onnx's CPU stand-in for torch_npu"
    assert lines[0].startswith(f"{start} has no 'float8_e8m0fnu': of the small floats the")
    assert lines[1].startswith(f"{start}.npu has no attribute 'NPUGraph': it has the sparse")
    assert lines[2].startswith(f"{start} has no attribute 'npu_moe':")
    assert lines[3].startswith(f"{start} has no module 'torch_npu.contrib'")
    assert lines[3].endswith("torch_npu.contrib")
    assert lines[4:] == ["False None"]


def test_skips_for_the_sake_of_cann_do_not_hold_here(tmp_path):
    script = tmp_path / "test_skipped.py"
    script.write_text(
        textwrap.dedent("""
        import unittest
        from torch_npu.testing.testcase import TestCase, run_tests

        class Test(TestCase):
            @unittest.skip("needs a newer CANN version")
            def test_operator(self):
                print("ran")

            @unittest.skipIf(True, "CANN 8.5 only")
            def test_other(self):
                print("ran")

            @unittest.skip("not ready")
            def test_unready(self):
                raise RuntimeError

            @unittest.skip
            def test_bare(self):
                raise RuntimeError

        run_tests()
    """)
    )
    done = on_cpu(str(script))
    assert done.stdout.split() == ["ran", "ran"]
    assert "OK (skipped=2)" in done.stderr, done.stderr
    assert "tests run that are marked 'needs a newer CANN version'" in done.stderr
    assert "skipped=4" in on_cpu("--keep-skips", str(script)).stderr


def test_torch_does_not_load_an_installed_torch_npu_by_itself(tmp_path):
    (tmp_path / "torch_npu.py").write_text("raise ImportError('libascendcl.so')\n")
    record = tmp_path / "torch_npu-2.9.0.dist-info"
    record.mkdir()
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: torch_npu\nVersion: 2.9.0\n")
    (record / "entry_points.txt").write_text("[torch.backends]\ntorch_npu = torch_npu:_autoload\n")
    script = tmp_path / "script.py"
    script.write_text("import torch, torch_npu\nprint(torch_npu.__version__)\n")
    done = on_cpu(str(script), path=tmp_path)
    assert done.stdout.startswith("0.0.0+sfa_onnx"), done.stderr
    plain = subprocess.run(
        [sys.executable, "-c", "import torch"], capture_output=True, text=True,
        env={"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert "torch_npu" in plain.stderr  # without on_cpu that very package stops torch
