"""`python -m sfa_onnx.torch.on_cpu script.py ...`: a script written for the NPU, on the CPU.

The operators of the vendors' names run on this machine with the NPU's roundings; `torch_npu`,
`custom_ops`, `torchair` and `vllm_ascend` are stand-ins, whether installed or not; "npu" means the
CPU. Tests that their authors skip for the sake of an installed CANN run: none is asked here.
"""

from __future__ import annotations

import argparse
import runpy
import sys
import unittest
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sfa_onnx.errors import SfaError
from sfa_onnx.torch.compute import ROUNDINGS
from sfa_onnx.torch.names import enable_ascend_names
from sfa_onnx.torch.stand_in import install

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a script, or with `-m` a module, and return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m sfa_onnx.torch.on_cpu", description=__doc__)
    parser.add_argument("--rounding", choices=ROUNDINGS, default="npu", help="default: npu")
    parser.add_argument("--release", help="torch_npu release whose schemas are defined")
    parser.add_argument("--vllm-release", help="the same of vllm-ascend")
    parser.add_argument("--chip", default="Ascend910_9392", help="name the device gives itself")
    parser.add_argument(
        "--keep-skips", action="store_true", help="also skip tests whose reason is the CANN version"
    )
    parser.add_argument("-m", dest="module", action="store_true", help="SCRIPT is a module's name")
    parser.add_argument("script", help="Python file (or module with -m)")
    parser.add_argument("rest", nargs=argparse.REMAINDER, metavar="...", help="its arguments")
    asked = parser.parse_args(arguments)
    if not asked.module and not Path(asked.script).is_file():
        parser.error(f"{asked.script}: no such file")
    try:
        install(first=True, chip=asked.chip)
        enable_ascend_names(
            release=asked.release, vllm_release=asked.vllm_release, rounding=asked.rounding
        )
    except SfaError as error:
        parser.error(str(error))
    if not asked.keep_skips:
        _run_skipped_for_cann()
    sys.argv = [asked.script, *asked.rest]
    try:
        if asked.module:
            sys.path.insert(0, str(Path.cwd()))
            runpy.run_module(asked.script, run_name="__main__", alter_sys=True)
        else:
            sys.path.insert(0, str(Path(asked.script).resolve().parent))
            runpy.run_path(asked.script, run_name="__main__")
    except SystemExit as ended:
        return _code(ended)
    return 0


def _run_skipped_for_cann() -> None:
    """`unittest.skip`, `skipIf` and `skipUnless` let a test run whose reason speaks of CANN."""
    real, said = unittest.skip, set()

    def skip(reason: Any) -> Callable[[Any], Any]:
        if not isinstance(reason, str) or "CANN" not in reason:
            return real(reason)
        if reason not in said:
            said.add(reason)
            print(f"on_cpu: no CANN is needed here, so tests run that are marked {reason!r};"
                  " --keep-skips leaves them out", file=sys.stderr)  # fmt: skip
        return lambda test: test

    unittest.skip = unittest.case.skip = skip


def _code(ended: SystemExit) -> int:
    if ended.code is None or isinstance(ended.code, int):
        return ended.code or 0
    print(ended.code, file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
