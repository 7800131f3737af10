"""Run promoted models: onnxruntime, in the worker, for standard operators; the judge for ours."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import onnx
from numpy.typing import NDArray

from sfa_onnx.guard.guarded import Stage
from sfa_onnx.guard.worker import RemoteError
from sfa_onnx.operator.op import KV_CACHE_PACK, LIGHTNING_INDEXER
from sfa_onnx.passes.verify.judge import Judge, is_own

__all__ = ["Executable", "Feeds"]

Array = NDArray[Any]
_T = onnx.TensorProto
_KINDS = {"bool": _T.BOOL, "double": _T.DOUBLE, "int64": _T.INT64, "int32": _T.INT32} | {
    "int8": _T.INT8,
    "uint8": _T.UINT8,
}
Feeds = Mapping[str, Array]


class Executable:
    """A small model, run in stages: standard operators between the nodes that are ours.

    Attributes:
        judge: evaluates our own operators; its `scale` may be changed between runs.
        engine: "onnxruntime", or "onnx.reference" where that has no kernel for the promoted type.
    """

    def __init__(self, model: onnx.ModelProto, judge: Judge | None = None) -> None:
        self.judge = judge or Judge()
        self.engine = "onnxruntime"
        self._outputs = [o.name for o in model.graph.output]
        self._constants = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
        self._kinds: dict[str, int] = {}  # element types of what the stages so far hand on
        self._steps = [self._step(model, part) for part in _stages(model.graph.node)]

    def run(self, feeds: Feeds) -> list[Array]:
        """The model's outputs, in order.

        Raises:
            RuntimeError: a runtime rejected the model or the inputs.
            CrashError, BudgetError: it died of them, or asked for too much memory.
            ContractError: our operator rejected its inputs.
        """
        self.judge.forget()
        values: dict[str, Array] = {**self._constants, **feeds}
        for step in self._steps:
            if isinstance(step, onnx.NodeProto):
                inputs = [values[name] if name else None for name in step.input]
                made = self.judge.run(step, inputs)
                several = made if isinstance(made, tuple) else (made,)
                values.update(zip(step.output, several, strict=False))
            else:
                values.update(step.run(values))
        return [values[name] for name in self._outputs]

    def _step(
        self, model: onnx.ModelProto, nodes: Sequence[onnx.NodeProto]
    ) -> onnx.NodeProto | _Stage:
        if len(nodes) == 1 and is_own(nodes[0]):
            return nodes[0]
        stage = _Stage(model, nodes, self._outputs, self._kinds)
        self._kinds.update(stage.kinds())
        if stage.engine != "onnxruntime":
            self.engine = stage.engine
        return stage


def _stages(nodes: Sequence[onnx.NodeProto]) -> list[list[onnx.NodeProto]]:
    """Split at our own nodes: [standard ...], [own], [standard ...], ... in a valid order.

    Standard nodes get even levels, ours odd ones; a node's level is never below its inputs'.
    """
    level: dict[str, int] = {}
    buckets: dict[int, list[onnx.NodeProto]] = {}
    for node in nodes:
        at = max((level.get(i, 0) for i in node.input), default=0)
        at += (at % 2 == 0) if is_own(node) else at % 2
        level.update(dict.fromkeys(node.output, at))
        buckets.setdefault(at, []).append(node)
    parts: list[list[onnx.NodeProto]] = []
    for at, bucket in sorted(buckets.items()):
        parts += [[n] for n in bucket] if at % 2 else [bucket]
    return parts


class _Stage:
    """Standard operators between two of ours, as one session."""

    def __init__(
        self,
        model: onnx.ModelProto,
        nodes: Sequence[onnx.NodeProto],
        wanted: Sequence[str],
        kinds: Mapping[str, int],
    ) -> None:
        part = onnx.ModelProto()
        part.ir_version = model.ir_version
        part.opset_import.extend(model.opset_import)
        part.graph.name = "stage"
        part.graph.node.extend(nodes)
        made = {o for n in nodes for o in n.output if o}
        self._inputs = sorted({i for n in nodes for i in n.input if i} - made)
        self._outputs = sorted(_needed(model, nodes, made, wanted))
        constants = {t.name: t for t in model.graph.initializer}
        declared = {v.name: v for v in model.graph.input}
        for name in self._inputs:
            if name in constants:
                part.graph.initializer.append(constants[name])
            elif name in declared:
                part.graph.input.append(declared[name])
            else:  # made by an earlier stage, or by one of ours: attention and packed rows
                kind = kinds.get(name, _own_kind(model, name))
                part.graph.input.append(onnx.helper.make_tensor_value_info(name, kind, None))
        self._inputs = [i for i in self._inputs if i not in constants]
        part.graph.output.extend(onnx.ValueInfoProto(name=o) for o in self._outputs)
        try:
            self._runner = Stage(part)
        except RemoteError as error:
            raise RuntimeError(_told(error)) from error
        self.engine = self._runner.engine

    def kinds(self) -> dict[str, int]:
        """Element types of the values that this stage hands on, where its engine says."""
        names = ((n, t.removeprefix("tensor(")[:-1]) for n, t in self._runner.types.items())
        return {name: _KINDS[kind] for name, kind in names if kind in _KINDS}

    def run(self, values: Feeds) -> dict[str, Array]:
        """Values of this stage that later stages or the caller need."""
        feeds = {name: values[name] for name in self._inputs}
        try:
            results = self._runner.run(self._outputs, feeds)
        except RemoteError as error:
            raise RuntimeError(_told(error)) from error
        return dict(zip(self._outputs, results, strict=True))


def _needed(
    model: onnx.ModelProto, nodes: Sequence[onnx.NodeProto], made: set[str], wanted: Sequence[str]
) -> set[str]:
    """The values of a stage that somebody outside reads."""
    inside = {n.output[0] for n in nodes if n.output}
    outside = {
        i for n in model.graph.node if not n.output or n.output[0] not in inside for i in n.input
    }
    return made & (outside | set(wanted))


def _own_kind(model: onnx.ModelProto, name: str) -> int:
    """The element type of what one of our operators makes."""
    for node in model.graph.node:
        if name in node.output:
            if node.op_type == KV_CACHE_PACK.name:
                return int(_T.INT8)
            chosen = node.op_type == LIGHTNING_INDEXER.name and name == node.output[0]
            return int(_T.INT32 if chosen else _T.DOUBLE)
    return int(_T.DOUBLE)


def _told(error: RemoteError) -> str:
    """What a runtime complains about, without its codes: "Expand 'name': invalid expand shape"."""
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", str(error))
    return re.sub(
        r"Non-zero status code returned while running (\w+) node\. Name:('[^']*') Status Message:",
        r"\1 \2:",
        text,
    )
