"""`python -m sfa_onnx` is the `sfa-onnx` command, and so is `start`."""

from __future__ import annotations

import sys

__all__ = ["start"]


def start() -> int:
    """Run the command; Ctrl-C while it is still being imported ends it as quietly as later."""
    try:
        from sfa_onnx.cli import main
    except KeyboardInterrupt:
        print("interrupted: nothing was begun", file=sys.stderr)
        return 130
    return main()


if __name__ == "__main__":
    sys.exit(start())
