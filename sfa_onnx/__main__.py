"""`python -m sfa_onnx` is the `sfa-onnx` command."""

from __future__ import annotations

import sys

from sfa_onnx.cli import main

if __name__ == "__main__":
    sys.exit(main())
