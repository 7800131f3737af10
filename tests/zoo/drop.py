"""Write cases as files: `python -m tests.zoo.drop FOLDER [-k PATTERN]`.

Every case becomes NAME.onnx and NAME.npz (inputs; bfloat16 as uint16 bits), MANIFEST.json tells
what each is and what is expected of it.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx

from tests.zoo.base import Case
from tests.zoo.catalogue import cases


def drop(case: Case, folder: Path) -> dict[str, object]:
    """Write one case's model and inputs; its manifest entry."""
    onnx.save(case.build(), folder / f"{case.name}.onnx")
    feeds = case.feeds(0)
    bits = {k: v.view(np.uint16) if v.dtype == ml_dtypes.bfloat16 else v for k, v in feeds.items()}
    np.savez(folder / f"{case.name}.npz", **bits)
    return {
        "name": case.name,
        "family": case.family,
        "expect": case.expect,
        "op": case.op,
        "sites": case.sites,
        "reason": case.reason,
        **case.tags,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("-k", default="", help="regular expression on case names")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    manifest = []
    for case in cases(args.k):
        try:
            manifest.append(drop(case, args.folder))
        except Exception as error:
            print(f"{case.name}: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr)
        (args.folder / "MANIFEST.json").write_text(json.dumps(manifest, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
