"""Products with W_UK and W_UV beside a site: MatMul over heads, and the same numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import sfa_onnx
from sfa_onnx import demo, runtime
from sfa_onnx.passes.candidate import Candidate, Operand, Role
from sfa_onnx.passes.certificate import check_certificate
from sfa_onnx.passes.graph.index import GraphIndex
from sfa_onnx.passes.products import weight_products
from sfa_onnx.passes.splice import splice
from sfa_onnx.runtime.compare import compare

SIZES = {"b": 2, "s": 3, "h": 4, "d": 5, "c": 7}
F32 = TensorProto.FLOAT


def product(
    equation: str, *, behind: bool = False, known: bool = True, stored: bool = True
) -> onnx.ModelProto:
    """x and a weight, in the equation's order, in one Einsum; the weight a part of a larger one."""
    terms, out = equation.split("->")
    names = terms.split(",")
    weight = next(i for i, n in enumerate(names) if set(n) == set("hdc"))
    x, w = names[1 - weight], names[weight]
    inputs = ["x", "x"]
    inputs[weight] = "w"
    nodes = [
        helper.make_node("Slice", ["stored", "low", "high"], ["w"]),
        helper.make_node("Einsum", inputs, ["y"], "product", equation=equation),
    ]
    dims = [SIZES[n] if known or n in "hdc" else n for n in x]
    graph = helper.make_graph(
        nodes, "g",
        [helper.make_tensor_value_info("x", F32, dims)],
        [helper.make_tensor_value_info("y", F32, [SIZES[n] if known else n for n in out])],
        value_info=[helper.make_tensor_value_info("w", F32, [SIZES[n] for n in w])],
    )  # fmt: skip
    shape = [SIZES[n] for n in w]
    whole = np.random.default_rng(0).standard_normal((shape[0] + 2, *shape[1:]))
    tensors = {"stored": whole.astype(np.float32), "low": np.array([1]), "high": np.array([-1])}
    if not stored:
        graph.input.append(helper.make_tensor_value_info("stored", F32, whole.shape))
        del tensors["stored"]
    graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in tensors.items())
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def site(model: onnx.ModelProto, behind: bool) -> Candidate:
    """A site whose query is y, or whose output is x."""
    from sfa_onnx.operator.op import SPARSE_FLASH_ATTENTION

    query = (Operand("" if behind else "y", Role.QUERY, (), F32),)
    outputs = ("x",) if behind else ()
    return Candidate(
        model.graph, 0, SPARSE_FLASH_ATTENTION, "", (), (), query, outputs, [], site_id="a"
    )


def rewritten(model: onnx.ModelProto, behind: bool = False) -> tuple[onnx.ModelProto, list[str]]:
    out = onnx.ModelProto.FromString(model.SerializeToString())
    index = GraphIndex.of(out)
    found = weight_products(index, [(site(out, behind), None)])
    splice(out, index, [item for item, _ in found])
    return out, [item.family for item, _ in found]


EQUATIONS = [
    "bshd,hdc->bshc", "bshc,hdc->bshd", "bhsd,hdc->bhsc", "bhsd,dhc->bshc", "bsdh,chd->cbhs",
    "hdc,bshd->bshc", "shd,hdc->shc", "hsd,hcd->hsc", "hd,hdc->hc", "dh,chd->ch", "sbhd,dch->bcsh",
]  # fmt: skip


@pytest.mark.parametrize("equation", EQUATIONS)
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("behind", [True, False])
def test_any_order_of_labels_gives_the_same(equation: str, known: bool, behind: bool) -> None:
    model = product(equation, known=known)
    after, families = rewritten(model, behind)
    assert families == ["product with W_UV" if behind else "product with W_UK"]
    kinds = [n.op_type for n in after.graph.node]
    assert kinds.count("MatMul") == 1
    assert "Einsum" not in kinds
    onnx.checker.check_model(after, full_check=True)
    names = next(n for n in equation.split("->")[0].split(",") if set(n) != set("hdc"))
    rng = np.random.default_rng(1)
    for small in ("", "s", "b"):
        sizes = SIZES | {n: 1 for n in small if not known}
        feeds = {"x": rng.standard_normal([sizes[n] for n in names]).astype(np.float32)}
        want, got = (runtime.run(m, feeds)["y"] for m in (model, after))
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("equation", "why"),
    [
        ("bshd,hdc->bsc", "heads are summed"),
        ("bshd,hdc->bhc", "a token axis is summed"),
        ("bshdc,hdc->bsh", "nothing is added"),
        ("bsd,hdc->bshc", "no heads in the activations"),
    ],
)
def test_other_products_stay(equation: str, why: str) -> None:
    model = product(equation)
    after, families = rewritten(model)
    assert families == [], why
    assert after == model


def test_a_weight_that_is_computed_or_fed_stays() -> None:
    assert rewritten(product("bshd,hdc->bshc", stored=False))[1] == []


def test_sizes_that_an_einsum_would_broadcast_stay() -> None:
    model = product("bshd,hdc->bshc")
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_value = 1
    assert rewritten(model)[1] == []
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "heads"
    assert rewritten(model)[1] == []


def test_an_einsum_elsewhere_stays() -> None:
    model = product("bshd,hdc->bshc")
    model.graph.node.append(helper.make_node("Relu", ["y"], ["z"]))
    out = onnx.ModelProto.FromString(model.SerializeToString())
    apart = site(out, behind=False)
    apart.operands = (Operand("z", Role.QUERY, (), F32),)
    assert weight_products(GraphIndex.of(out), [(apart, None)]) == []


def test_the_demo_layer(tmp_path: Path) -> None:
    """Both products become MatMul, their weights are written in the order it reads, all agrees."""
    model = demo.materialise(tmp_path)
    plain = sfa_onnx.fuse(model, tmp_path / "plain.onnx", expect_sites=1)
    report = sfa_onnx.fuse(
        model, tmp_path / "own.onnx", expect_sites=1, materialize_absorbed=True,
        certificate=tmp_path / "proof.json",
    )  # fmt: skip
    before, after = ([n.op_type for n in r.model.graph.node] for r in (plain, report))
    assert before.count("Einsum") - after.count("Einsum") == 2
    more = set(report.sites[0].removed) - set(plain.sites[0].removed)
    assert sum("einsum" in name for name in more) == 2, "the site's report tells them too"
    (weight,) = report.materialized
    shapes = {n.rsplit(".", 1)[1]: d for n, d in _dims(report.model, weight.made).items()}
    assert shapes == {"w_uk": [16, 128, 512], "w_uv": [16, 512, 128]}
    assert weight.bytes_read == weight.bytes_written
    assert check_certificate(tmp_path / "proof.json", model, tmp_path / "own.onnx").holds
    feeds = demo.feeds(past_length=300, model=model)
    one, two = (runtime.run(tmp_path / f"{n}.onnx", feeds) for n in ("plain", "own"))
    for name, want in one.items():
        np.testing.assert_allclose(two[name], want, rtol=2e-3, atol=2e-3)
    assert compare(model, tmp_path / "own.onnx").passed


def _dims(model: onnx.ModelProto, names: object) -> dict[str, list[int]]:
    return {t.name: list(t.dims) for t in model.graph.initializer if t.name in names}  # type: ignore[operator]
