"""What is done with one mutant: every verb as a command line, or the functions behind the verbs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

VERBS = ("inspect", "fuse", "unfuse", "kv-cache", "check", "atc", "compare", "run", "doctor")
SWIFT = ("inspect", "fuse", "unfuse", "kv-cache", "check", "atc", "run", "compare")


def arguments(verb: str, model: Path, folder: Path) -> list[str]:
    """The command line of one verb, writing into `folder`."""
    out = folder / f"{verb}.onnx"
    more = {
        "fuse": ["-o", str(out), "--certificate", str(folder / "proof.json"), "--force"],
        "unfuse": ["-o", str(out), "--force"],
        "kv-cache": ["-o", str(out), "--to", "int8", "--force"],
        "check": ["--fix", "-o", str(out), "--force"],
        "atc": ["-o", str(folder / "atc"), "--soc-version", "Ascend910B2", "--no-run", "--force"],
        "run": ["-o", str(folder / "out.npz"), "--force"],
        "compare": [str(model)],
        "inspect": ["--explain", "--estimate"],
    }
    return [verb, str(model), *more.get(verb, [])]


class Behind:
    """The functions behind the verbs, without parsing and printing; what fuses is used further.

    `inspect` looks for no site, since `fuse` does; `unfuse`, `kv-cache`, `atc` and `compare` take
    the fused model where there is one, and the mutant itself otherwise.
    """

    def __init__(self, model: Path, folder: Path, *, estimates: bool) -> None:
        """`estimates`: `inspect` estimates costs too, which takes as long as all else."""
        self._model, self._folder, self._estimates = model, folder, estimates
        self._fused: Path | None = None

    def __iter__(self) -> Iterator[tuple[str, Callable[[], Any]]]:
        yield "inspect", self._inspect
        yield "fuse", self._fuse
        yield "unfuse", self._unfuse
        yield "kv-cache", self._convert
        yield "check", self._check
        yield "atc", self._atc
        yield "run", self._run
        yield "compare", self._compare

    @property
    def _last(self) -> Path:
        return self._fused or self._model

    def _inspect(self) -> None:
        from sfa_onnx.ascend.estimate import estimate
        from sfa_onnx.files.model import load_model
        from sfa_onnx.summary import summarise

        summarise(self._model)
        if self._estimates:
            estimate(load_model(self._model), soc_version=None)

    def _fuse(self) -> str:
        import sfa_onnx

        out, proof = self._folder / "fuse.onnx", self._folder / "proof.json"
        report = sfa_onnx.fuse(self._model, out, certificate=proof)
        if report.fused:
            self._fused = out
        return "fused" if report.fused else "refused" if report.refused else "no site"

    def _unfuse(self) -> None:
        from sfa_onnx.unfusion import unfuse

        unfuse(self._last, self._folder / "unfuse.onnx")

    def _convert(self) -> None:
        from sfa_onnx.kv_convert import convert

        convert(self._last, self._folder / "kv-cache.onnx", to="int8")

    def _check(self) -> str:
        from sfa_onnx.ascend import checks

        report = checks.check(self._model, user_plugins=checks.OWN_PLUGINS)
        checks.fix_file(self._model, report, self._folder / "check.onnx")
        return "passes" if report.passed else "findings"

    def _atc(self) -> None:
        from sfa_onnx.ascend.handover import folder as handover

        handover.write(
            self._last, self._folder / "atc", soc_version="Ascend910B2", execute=False, force=True
        )

    def _run(self) -> None:
        from sfa_onnx.runtime.execute import run_file
        from sfa_onnx.runtime.feeds.draw import random_feeds

        run_file(self._model, random_feeds(self._model, 0))

    def _compare(self) -> str:
        from sfa_onnx.runtime.compare.run import compare

        report = compare(self._model, self._last)
        if report.missing or report.passed:
            return "not run" if report.missing else "equal"
        rows = [r.difference for r in (*report.sites, *report.outputs) if r.difference]
        return "differs" if any(d.outside for d in rows) else "not finite alike"
