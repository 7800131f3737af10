"""Tests run against the installed package, where the compiled library is, not against the tree."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "2")
# The reference multiplies small matrices: BLAS threads would only spin against each other.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

_ROOT = str(Path(__file__).resolve().parent.parent)
if _ROOT in sys.path:
    # Keep `tests` importable, but let an installed sfa_onnx win over the source folder.
    sys.path.remove(_ROOT)
    sys.path.append(_ROOT)
