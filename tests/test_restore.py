"""Operators put back from bodies that were merged, prefixed, renamed or inlined since."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import compose, helper, inliner

import sfa_onnx
from sfa_onnx.ascend import checks
from sfa_onnx.ascend.handover import write
from sfa_onnx.errors import UsageError
from sfa_onnx.kv_convert import convert
from sfa_onnx.operator.op import (
    LIGHTNING_INDEXER,
    SPARSE_FLASH_ATTENTION,
    SPARSE_FLASH_ATTENTION_ANTIQUANT,
)
from sfa_onnx.runtime.compare.run import compare
from sfa_onnx.runtime.portable.model import make_portable, unfuse
from sfa_onnx.runtime.portable.restore import restored
from tests.attention_cases import LAYOUTS, make_case
from tests.indexer_cases import indexer_call, indexer_model
from tests.op_models import needs_library, op_model
from tests.test_compare import decoder
from tests.test_kv_convert import TILE, growing


def renamed(model: onnx.ModelProto) -> onnx.ModelProto:
    """Our functions under another domain and name."""
    out = onnx.ModelProto.FromString(model.SerializeToString())
    for function in out.functions:
        name = f"fn_{function.name}{function.overload}"
        for node in out.graph.node:
            if (node.domain, node.op_type, node.overload) == (
                function.domain,
                function.name,
                function.overload,
            ):
                node.domain, node.op_type, node.overload = "lib", name, ""
        function.domain, function.name, function.overload = "lib", name, ""
    out.opset_import.add(domain="lib", version=1)
    return out


ROADS = {
    "unfused": unfuse,
    "renamed": lambda m: renamed(make_portable(m)),
    "inlined": lambda m: inliner.inline_local_functions(make_portable(m)),
    "prefixed": lambda m: compose.add_prefix(unfuse(m), "left_"),
    "prefixed and inlined": lambda m: inliner.inline_local_functions(
        compose.add_prefix(make_portable(m), "left_")
    ),
}


def operators(model: onnx.ModelProto) -> list[tuple[object, ...]]:
    """Our nodes with all that decides what they compute, names aside."""
    return [
        (n.domain, n.op_type, sorted(a.SerializeToString() for a in n.attribute),
         [bool(name) for name in n.input], len(n.output))
        for n in model.graph.node if n.domain in ("npu", "sfa_onnx")
    ]  # fmt: skip


def sources() -> dict[str, onnx.ModelProto]:
    found = {
        f"{op.name}-{'-'.join(layouts)}": op_model(make_case(op, layouts))
        for op in (SPARSE_FLASH_ATTENTION, SPARSE_FLASH_ATTENTION_ANTIQUANT)
        for layouts in LAYOUTS
    }
    found["two layers"] = decoder(np.float32)
    found["packed caches"] = convert(growing(2), to="packed-int8", tile_size=TILE).model
    inputs, attributes = indexer_call(LIGHTNING_INDEXER, LAYOUTS[0], np.float32)
    found["indexer"] = indexer_model(LIGHTNING_INDEXER, inputs, attributes)
    return found


SOURCES = sources()


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("name", SOURCES)
def test_every_body_becomes_its_operator_again(name: str, road: str) -> None:
    source = SOURCES[name]
    changed = ROADS[road](source)
    before = changed.SerializeToString()
    back, found = restored(changed)
    assert changed.SerializeToString() == before, "the model given was changed"
    assert len(found) == len(operators(source))
    assert operators(back) == operators(source)
    assert len(back.graph.node) == len(source.graph.node)
    onnx.checker.check_model(back)


def test_a_body_that_was_edited_stays() -> None:
    changed = unfuse(decoder(np.float32))
    node = next(n for n in changed.graph.node if n.op_type == "GreaterOrEqual")
    node.op_type = "Greater"
    back, found = restored(changed)
    assert len(found) == 1, "the other layer's is whole"
    assert any(n.op_type == "Greater" for n in back.graph.node)


def test_a_constant_that_was_edited_counts() -> None:
    changed = unfuse(decoder(np.float32, layers=1))
    node = next(n for n in changed.graph.node if n.op_type == "Transpose" and "/" in n.name)
    del node.attribute[:]
    node.attribute.append(helper.make_attribute("perm", [0, 1, 2]))
    assert restored(changed)[1] == []


def test_values_that_others_read_stay() -> None:
    changed = unfuse(decoder(np.float32, layers=1))
    inner = next(n for n in changed.graph.node if n.op_type == "GreaterOrEqual")
    kind = onnx.TensorProto.BOOL
    changed.graph.output.append(helper.make_tensor_value_info(inner.output[0], kind, [None] * 3))
    back, found = restored(changed)
    assert len(found) == 1
    assert any(n.op_type == "GreaterOrEqual" for n in back.graph.node)
    onnx.checker.check_model(back)


@needs_library
@pytest.mark.parametrize("road", ROADS)
def test_every_verb_takes_it_as_ours(tmp_path, road: str) -> None:
    source = decoder(np.float32)
    path = tmp_path / "m.onnx"
    onnx.save(ROADS[road](source), path)
    report = sfa_onnx.fuse(path, expect_sites=2)
    assert {s.op_type for s in report.fused} == {SPARSE_FLASH_ATTENTION.name}
    assert all("node for node" in s.record.assumptions[0] for s in report.fused if s.record)
    assert compare(path, report.model).passed
    assert len(sfa_onnx.unfuse(path).sites) == 2
    assert convert(path, to="int8").sites == 2
    rows = checks.check(path, cann="9.1", soc_version="Ascend910B2")
    assert not any("ReduceProd" in f.message for f in rows.findings)
    handed = write(path, tmp_path / "out", soc_version="Ascend910B2", execute=False)
    assert handed.operators == 2
    with pytest.raises(UsageError, match="put back"):
        sfa_onnx.fuse(path, certificate=tmp_path / "proof.json")
