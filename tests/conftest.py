"""Tests run against the installed package, where the compiled library is, not against the tree."""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "2")
# The reference multiplies small matrices: BLAS threads would only spin against each other.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# An export makes millions of small objects that live: looking for cycles among them every few
# hundred is a twentieth of its time.
gc.set_threshold(50_000, 20, 20)

_ROOT = str(Path(__file__).resolve().parent.parent)
if _ROOT in sys.path:
    # Keep `tests` importable, but let an installed sfa_onnx win over the source folder.
    sys.path.remove(_ROOT)
    sys.path.append(_ROOT)


@pytest.fixture(scope="session")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where exports of whole models are kept: shared by the workers of one session, or between
    sessions where `SFA_ONNX_ROAD_EXPORTS` names a folder (`tests.zoo.kin.exported`)."""
    kept = os.environ.get("SFA_ONNX_ROAD_EXPORTS")
    folder = Path(kept) if kept else tmp_path_factory.getbasetemp().parent / "exports"
    folder.mkdir(exist_ok=True)
    return folder
