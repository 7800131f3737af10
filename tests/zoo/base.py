"""What a case of the zoo is, and how torch modules become ONNX models here."""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np
import onnx

Feeds = dict[str, np.ndarray]
ANTIQUANT = "NPUSparseFlashAttentionAntiquant"
FLOAT_KV = "NPUSparseFlashAttention"
NP_TYPES = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}


@dataclass(frozen=True)
class Case:
    """One model of the zoo and what the product must do with it.

    expect: "fuse" (exactly `sites` sites of type `op`), "refuse" (at least one candidate is listed
    as refused with a reason matching `reason`, none fused), "leave" (nothing fused; listing it is
    optional) or "either" (refused, or fused with the right numbers).
    `stress` feeds are legal inputs of the original that a loose fusion gets wrong.
    """

    name: str
    family: str
    make: Callable[[], onnx.ModelProto]
    make_feeds: Callable[[int], Feeds]
    expect: Literal["fuse", "refuse", "leave", "either"] = "fuse"
    op: str | None = None
    sites: int = 1
    reason: str = ""
    stress: Callable[[int], Feeds] | None = None
    tags: Mapping[str, Any] = field(default_factory=dict)

    def build(self) -> onnx.ModelProto:
        """The model; exported once per version of the zoo's sources and kept on disk."""
        return _cached(self.name, self.make)

    def feeds(self, seed: int = 0) -> Feeds:
        return self.make_feeds(seed)


@lru_cache(maxsize=64)
def _source_key(module: str) -> str:
    """Digest of a family's source and of the zoo modules it imports."""
    seen, todo = {"base"}, [module.rpartition(".")[2]]
    digest = hashlib.sha256(Path(__file__).read_bytes())
    while todo:
        stem = todo.pop()
        if stem not in seen:
            seen.add(stem)
            text = Path(__file__).with_name(f"{stem}.py").read_text()
            digest.update(text.encode())
            todo += sorted(re.findall(r"^from tests\.zoo\.(\w+) import", text, re.M))
            for names in re.findall(r"^from tests\.zoo import (.+)$", text, re.M):
                todo += [n.strip() for n in names.split(",")]
    return digest.hexdigest()[:16]


def _cached(name: str, make: Callable[[], onnx.ModelProto]) -> onnx.ModelProto:
    default = Path(tempfile.gettempdir()) / "sfa_onnx_zoo"
    root = Path(os.environ.get("SFA_ONNX_ZOO_CACHE", default))
    path = root / f"{_source_key(make.__module__)}" / f"{name}.onnx"
    if path.exists():
        return onnx.load(path)
    model = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}")
    onnx.save(model, part)
    part.replace(path)
    return model


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Exporters talk a lot; the zoo does not listen unless they fail."""
    import torch

    torch.set_num_threads(1)
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    sink = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(sink), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.disable(level)


def export(
    module: Any,
    inputs: Mapping[str, Any],
    outputs: Sequence[str] = ("out",),
    *,
    exporter: str = "dynamo",
    opset: int = 18,
    dynamic: Mapping[str, Mapping[int, str]] | None = None,
    optimize: bool = True,
    args: tuple[Any, ...] = (),
) -> onnx.ModelProto:
    """Export `module(**inputs)`; inputs in the order of its forward.

    exporter: "dynamo" or "ts" (the legacy tracer). dynamic: input -> axis -> dim name.
    """
    import torch

    module = module.eval()
    common = {"opset_version": opset, "output_names": list(outputs)}
    with quiet():
        if exporter == "ts":
            buffer = io.BytesIO()
            torch.onnx.export(
                module,
                args or tuple(inputs.values()),
                buffer,
                dynamo=False,
                input_names=list(inputs),
                dynamic_axes={k: dict(v) for k, v in (dynamic or {}).items()},
                **common,
            )
            return onnx.load_from_string(buffer.getvalue())
        shapes = None
        if dynamic is not None:
            shapes = {
                k: dict.fromkeys(dynamic.get(k, {}), torch.export.Dim.DYNAMIC) or None
                for k in inputs
            }
        program = torch.onnx.export(
            module,
            (),
            kwargs=dict(inputs),
            dynamo=True,
            verbose=False,
            input_names=list(inputs),
            dynamic_shapes=shapes,
            optimize=optimize,
            **common,
        )
        return program.model_proto


def torch_dtype(name: str) -> Any:
    """ "f32" -> torch.float32 and so on."""
    import torch

    return {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[name]


def to_torch(feeds: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Feeds as torch tensors (bfloat16 through its bits)."""
    import torch

    def one(a: np.ndarray) -> Any:
        if a.dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(a.view(np.int16).copy()).view(torch.bfloat16)
        return torch.from_numpy(np.array(a, order="C"))

    return {k: one(v) for k, v in feeds.items()}
