"""The other road to an .om: `build_om.py`, its C++ half and what both know of the model."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any, Final

import onnx

from sfa_onnx.ascend.handover.command import AtcCommand
from sfa_onnx.ascend.handover.in_place import reuse_option
from sfa_onnx.ascend.handover.package import VENDOR, plugin_root
from sfa_onnx.passes.graph.cache_pairs import cache_pairs

__all__ = ["REUSE_OPTION", "builder_files"]

REUSE_OPTION: Final = "ge.exec.outputReuseInputMemIndexes"
# Options of atc -> the keys of aclgrphBuildInitialize and aclgrphBuildModel. The framework is set
# by the function that parses, the log level by the environment.
_GLOBAL: Final = {"--soc_version": "ge.socVersion"}
_BUILD: Final = {
    "--input_format": "input_format",
    "--input_shape": "input_shape",
    "--dynamic_dims": "ge.dynamicDims",
    "--precision_mode": "ge.exec.precision_mode",
    "--external_weight": "ge.externalWeight",
}
_ELSEWHERE: Final = frozenset(("--framework", "--log"))


def builder_files(model: onnx.ModelProto, command: AtcCommand, where: str) -> dict[str, str]:
    """File name -> text of what a hand-over carries for building without atc.

    Args:
        model: in the ATC flavour.
        command: the atc call that is to be said otherwise.
        where: the model's file, relative to the folder.

    Raises:
        KeyError: the call has an option that is not known here (a test tries every one).
    """
    source = plugin_root() / "builder" / "build_om.cc"
    script = resources.files("sfa_onnx.ascend.handover").joinpath("build_om.py")
    return {
        "build_om.py": script.read_text("utf-8"),
        "build_om.cc": source.read_text("utf-8"),
        "build_om.json": json.dumps(_plan(model, command, where), indent=2) + "\n",
    }


def _plan(model: onnx.ModelProto, command: AtcCommand, where: str) -> dict[str, Any]:
    pairs = cache_pairs(model)
    told = [(name, value) for name, value in command.options if name not in _ELSEWHERE]
    build = {_BUILD[name]: value for name, value in told if name not in _GLOBAL}
    if pairs:
        build[REUSE_OPTION] = reuse_option(pairs)
    return {
        "model": Path(where).as_posix(),
        "output": "model",
        "vendor": VENDOR,
        "global": {_GLOBAL[name]: value for name, value in told if name in _GLOBAL},
        "build": build,
        "in_place": [vars(pair) for pair in pairs],
    }
