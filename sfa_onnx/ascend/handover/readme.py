"""The texts of a hand-over folder: atc.sh and its README."""

from __future__ import annotations

from typing import Final

from sfa_onnx.ascend.handover.command import AtcCommand
from sfa_onnx.ascend.handover.log import ERRORS
from sfa_onnx.ascend.handover.report import HandoverReport

__all__ = ["atc_script", "readme"]

_UNFINISHED: Final = "model_unfinished"


def atc_script(command: AtcCommand, model: str, vendor: str) -> str:
    """atc.sh: checks the ground, then the exact call.

    Args:
        command: the call.
        model: the ATC flavour, relative to the script.
        vendor: name of the vendor folder that holds the plug-in.
    """
    asks = [
        f': "${{{variable}:?not set, see README.md; e.g. {variable}=1 bash atc.sh}}"'
        for variable in command.unbound.values()
    ]
    library = f"opp/vendors/{vendor}/framework/onnx/libcust_onnx_parsers.so"
    return "\n".join(
        [
            "#!/bin/bash",
            "# Converts the model beside this script to model.om. Source CANN's set_env.sh first.",
            "set -euo pipefail",
            'cd "$(dirname "${BASH_SOURCE[0]}")"',
            "command -v atc >/dev/null || {",
            '  echo "atc not found: source CANN\'s set_env.sh first" >&2',
            "  exit 127",
            "}",
            *asks,
            f"[ -f {library} ] || ./build_plugin.sh",
            f"source opp/vendors/{vendor}/bin/set_env.bash",
            "# atc writes under another name: model.om is always whole, of this call or the last.",
            f"trap 'rm -f {_UNFINISHED}*.om' EXIT",
            f"rm -f {_UNFINISHED}*.om",
            command.line(model, _UNFINISHED),
            f"written=({_UNFINISHED}*.om)  # atc may add the platform to the name",
            '[ -f "${written[0]}" ] || {',
            '  echo "atc ended without an error, but wrote no .om" >&2',
            "  exit 1",
            "}",
            "rm -f model.in_place.json  # of another road to model.om",
            f'for file in "${{written[@]}}"; do mv -f "$file" "model${{file#{_UNFINISHED}}}"; done',
            "",
        ]
    )


def readme(report: HandoverReport, model_name: str) -> str:
    """README.md of the folder: steps, files, and the table for when it fails."""
    rows = [f"| {code} | {what} | {advice} |" for code, (what, advice) in ERRORS.items()]
    unbound = [f"- `{variable}`: dim `{name}`" for name, variable in report.unbound.items()]
    asked = ["", "atc.sh asks for these dims:", *unbound] if unbound else []
    return "\n".join(
        [
            f"# {model_name}: from ONNX to .om",
            "",
            f"Chip {report.soc_version}, CANN {report.cann}, binding {report.binding}. Nothing here"
            " was run on a device yet.",
            "",
            "1. On the machine with CANN: `source /usr/local/Ascend/cann/set_env.sh` (or your"
            " path).",
            "2. `bash atc.sh` (builds the plug-in when its library is missing, then converts).",
            "3. `python run_om.py model.om`, then `sfa-onnx compare MODEL.onnx --against .`",
            *asked,
            "",
            "| file | what it is |",
            "| --- | --- |",
            f"| {model_name} | the model in the form CANN's parser reads |",
            "| atc.sh | the exact atc call |",
            "| build_om.py, build_om.cc, build_om.json | the other road to model.om, for CANN 9.0"
            " and later: GE's own interface, caches written in place; instead of atc.sh |",
            "| build_plugin.sh, plugin/ | the parser plug-in, built by one g++ line |",
            "| opp/vendors/ | the vendor package; copy it to another place if you like, and source"
            " its bin/set_env.bash |",
            "| python/ | the plug-in for CANN 9.2's Python interface, instead of the C++ one |",
            "| mapping.json | fused node -> replaced nodes, for lining dumps up |",
            "| inputs/, outputs.json, run_om.py | run the .om and keep its outputs |",
            "",
            "## If it fails",
            "",
            "Lines starting with `[sfa_onnx plug-in]` name the node and the reason. More log:"
            " `export ASCEND_SLOG_PRINT_TO_STDOUT=1 ASCEND_GLOBAL_LOG_LEVEL=1`.",
            "",
            "| code | what it means | what to do |",
            "| --- | --- | --- |",
            *rows,
            "",
        ]
    )
