"""Mutated models through the functions behind all verbs: a slice of what `tests.fuzz.run` does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import sfa_onnx
from tests.fuzz.corpus import seeds
from tests.fuzz.mutate import mutant
from tests.fuzz.verbs import SWIFT, VERBS

ROOT = Path(__file__).resolve().parent.parent
_COUNT = 500


def test_nothing_dies_hangs_or_raises_what_is_not_ours(tmp_path):
    record = tmp_path / "record.json"
    command = [sys.executable, "-m", "tests.fuzz.run", "--swift", "--jobs", "2"]
    environment = {**os.environ, "PYTHONPATH": f"{Path(sfa_onnx.__file__).parents[1]}:{ROOT}"}
    done = subprocess.run(
        [*command, "--count", str(_COUNT), "--out", str(record)],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    report = json.loads(record.read_text())
    assert done.returncode == 0, report["bad"]
    assert report["bad"] == {}
    # Those that ended a child went through the command lines instead.
    assert report["mutants"] == _COUNT - len(report["tried again"])
    for verb in SWIFT:
        assert any(key.startswith(f"{verb} -> ") for key in report["codes"]), verb
    assert report["codes"]["fuse -> fused"] > 5, "mutants that still hold a site"
    assert set(SWIFT) <= set(VERBS)


def test_a_mutant_is_the_same_everywhere():
    models = list(seeds())
    assert [mutant(models, n) for n in range(5)] == [mutant(models, n) for n in range(5)]
    assert len({mutant(models, n) for n in range(40)}) > 30
