"""Indexers written out: a term per head added up, blocks of keys or of rows joined."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

import sfa_onnx
from sfa_onnx import runtime
from tests.hand_indexers import CAUSAL, feeds, fused, indexer, refused

pytestmark = pytest.mark.kernel
HIDDEN = f"{CAUSAL} m = Where(seen, total, low)\n"
SPLIT = " q0, q1, q2 = Split<axis=2>(q)\n w0, w1, w2 = Split<axis=2>(w)\n"


def head(n: int, *, key: str = "kt", relu: str = "Relu", weight: str = "", by: str = "") -> str:
    """One head's term y{n} of q{n} [B, S, 8] and w{n} [B, S, 1]."""
    scaled = f" x{n} = Mul(a{n}, {by})\n" if by else f" x{n} = Identity(a{n})\n"
    return (
        f" a{n} = MatMul(q{n}, {key})\n{scaled} r{n} = {relu}(x{n})\n"
        f" y{n} = Mul(r{n}, {weight or f'w{n}'})\n"
    )


def taken(order: list[int], weights: list[int] | None = None) -> str:
    """Heads of q and w one by one, in an order."""
    text = ""
    for n, (h, g) in enumerate(zip(order, weights or order, strict=True)):
        text += f" i{n} = Constant<value_int={h}>()\n j{n} = Constant<value_ints=[{g}]>()\n"
        text += f" q{n} = Gather<axis=2>(q, i{n})\n w{n} = Gather<axis=2>(w, j{n})\n"
    return text


def unrolled(before: str, *heads: str, total: str = "Sum", hidden: str = HIDDEN) -> onnx.ModelProto:
    terms = ", ".join(f"y{n}" for n in range(len(heads)))
    text = f" kt = Transpose<perm=[0,2,1]>(k)\n{before}{''.join(heads)} total = {total}({terms})\n"
    more = ", float[B,T,8] other, float[B,S,1] w9, float[B,S,8] q9"
    return indexer(more, products=text, relu="", weighed="", summed="", hidden=hidden)


SQUEEZED = SPLIT + "".join(f" p{n} = Squeeze(q{n}, two)\n" for n in range(3))


def test_a_sum_of_heads_is_one_selection_over_views() -> None:
    """The operands are the tensors that were cut: nothing is joined again."""
    report = fused(unrolled(taken([0, 1, 2]), *map(head, range(3))))
    kinds = [n.op_type for n in report.model.graph.node]
    assert not {"Concat", "MatMul", "Gather"} & set(kinds)


@pytest.mark.parametrize(
    ("order", "weights"),
    [
        ([2, 0, 1], None),
        ([1, 2], None),
        ([2, 0], None),
        ([0, 1, 2], [2, 0, 1]),
        ([0, 0, 2], [0, 1, 2]),
        ([1, 1], [0, 2]),
        ([0, 1, -1], None),
        ([-1, -2, -3], [0, -2, 2]),
        ([0, -1, 1], [0, 1, 2]),
    ],
    ids=lambda x: " ".join(map(str, x or ())),
)
def test_whatever_heads_are_added_up_keep_their_weights(
    order: list[int], weights: list[int] | None
) -> None:
    fused(unrolled(taken(order, weights), *map(head, range(len(order)))))


def test_heads_may_be_split_scaled_and_of_several_tensors() -> None:
    text = "".join(head(n, by="half").replace(f"(q{n}", f"(p{n}") for n in range(3))
    fused(unrolled(SQUEEZED, text, "", ""))
    own = taken([0, 1]) + " q2 = Tanh(q9)\n w2 = Abs(w9)\n"
    fused(unrolled(own, *map(head, range(3))))


def test_many_heads_are_one_selection() -> None:
    """As many as models have, one node after the other."""
    heads = 64
    text = " kt = Transpose<perm=[0,2,1]>(k)\n"
    for n in range(heads):
        text += f" i{n} = Constant<value_int={n}>()\n j{n} = Constant<value_ints=[{n}]>()\n"
        text += f" q{n} = Gather<axis=2>(q, i{n})\n w{n} = Gather<axis=2>(w, j{n})\n{head(n)}"
        text += f" s{n} = Add({f's{n - 1}' if n else 'zero'}, y{n})\n"
    model = indexer(products=text, relu="", weighed="", summed="", hidden=" m = Identity(s63)\n")
    for value in model.graph.input:
        if value.name in "qw":
            value.type.tensor_type.shape.dim[2].dim_value = heads
    report = fused(model)
    assert len(report.model.graph.node) < 12


NOT_ALIKE = {
    "one without relu": [head(0), head(1, relu="Identity"), head(2)],
    "one with another activation": [head(0), head(1), head(2, relu="Sigmoid")],
    "one of other keys": [head(0), head(1, key="ot"), head(2)],
    "one twice as large": [head(0), head(1, by="two0"), head(2)],
    "one taken away": [head(0), head(1, by="minus"), head(2)],
    "one without weight": [head(0), head(1, weight="one0"), head(2)],
    "a relu around two": [head(0), head(1), " y2 = Relu(y0)\n"],
}


@pytest.mark.parametrize("kind", NOT_ALIKE)
def test_heads_that_are_not_alike_are_refused(kind: str) -> None:
    before = taken([0, 1, 2]) + " ot = Transpose<perm=[0,2,1]>(other)\n one0 = Add(half, half)\n"
    refused(unrolled(before, *NOT_ALIKE[kind]), "")


def test_heads_with_keys_of_their_own_are_refused() -> None:
    """Head n looks at columns of its own of wider keys."""
    text = " zt = Transpose<perm=[0,2,1]>(wide)\n k0, k1 = Split<axis=1>(zt)\n" + taken([0, 1])
    text += head(0, key="k0") + head(1, key="k1") + " total = Add(y0, y1)\n"
    steps = {"relu": "", "weighed": "", "summed": "", "hidden": " m = Identity(total)\n"}
    refused(indexer(", float[B,T,16] wide", products=text, **steps), "keys of its own")


PAST = ", float[B,P,8] past"


def block(n: int, key: str, relu: str = "Relu", weight: str = "w4") -> str:
    """Scores t{n} [B, S, T] of one block of keys."""
    return (
        f" b{n} = Transpose<perm=[0,2,1]>({key})\n c{n} = Unsqueeze(b{n}, one)\n"
        f" x{n} = MatMul(q, c{n})\n r{n} = {relu}(x{n})\n y{n} = Mul(r{n}, {weight})\n"
        f" t{n} = ReduceSum<keepdims=0>(y{n}, two)\n"
    )


def blocks(
    before: str, *parts: str, more: str = "", keys: str = "T", hidden: str = "", joined: str = ""
) -> onnx.ModelProto:
    names = ", ".join(f"t{n}" for n in range(len(parts)))
    text = f" w4 = Unsqueeze(w, last)\n{before}{''.join(parts)}"
    text += joined or f" s = Concat<axis=-1>({names})\n"
    steps = {"relu": "", "weighed": "", "summed": ""}
    hidden = hidden or " m = Identity(s)\n"
    return indexer(more, keys=keys, products=text, hidden=hidden, **steps)


def test_blocks_of_one_tensor_are_its_keys() -> None:
    before = " k0, k1, k2 = Split<axis=1>(k)\n"
    report = fused(blocks(before, block(0, "k0"), block(1, "k1"), block(2, "k2"), keys="12"))
    assert "Concat" not in {n.op_type for n in report.model.graph.node}


SEEN = " all = Shape<start=2, end=3>(s)\n" + CAUSAL.replace(
    "Shape<start=1, end=2>(k)", "Identity(all)"
)


@pytest.mark.parametrize(
    "hidden", ["", f"{SEEN} m = Where(seen, s, low)\n"], ids=["open", "causal"]
)
def test_a_cache_and_new_keys_scored_apart_are_joined(hidden: str) -> None:
    model = blocks("", block(0, "past"), block(1, "k"), more=PAST, hidden=hidden)
    report = sfa_onnx.fuse(model)
    assert [s.reason for s in report.selections] == [""]
    for batch, rows, new, past in ((2, 3, 3, 9), (1, 2, 2, 5), (3, 1, 1, 20)):
        given = feeds(model, batch, rows, new, P=past)
        want, got = (runtime.run(m, given)["indices"] for m in (model, report.model))
        np.testing.assert_array_equal(want, got)


@pytest.mark.parametrize("new", ["past, k", "k, past"])
def test_one_new_key_scored_apart_is_a_block(new: str) -> None:
    """A step of decoding: the axis of the new key has size 1."""
    names = new.split(", ")
    model = blocks("", *(block(n, key) for n, key in enumerate(names)), more=PAST, keys="1")
    report = sfa_onnx.fuse(model)
    assert [s.reason for s in report.selections] == [""]
    given = feeds(model, 2, 3, 1, P=9)
    want, got = (runtime.run(m, given)["indices"] for m in (model, report.model))
    np.testing.assert_array_equal(want, got)


def test_blocks_that_are_masked_one_by_one_are_masked_together() -> None:
    more = f"{PAST}, bool[B,P] kept0, bool[B,T] kept1"
    own = " p{n} = Unsqueeze(kept{n}, one)\n m{n} = Where(p{n}, t{n}, low)\n"
    joined = "".join(own.format(n=n) for n in (0, 1)) + " s = Concat<axis=-1>(m0, m1)\n"
    model = blocks("", block(0, "past"), block(1, "k"), more=more, joined=joined)
    report = sfa_onnx.fuse(model)
    assert [s.reason for s in report.selections] == [""]
    given = feeds(model, 2, 3, 4, P=6)
    given["kept0"] = np.arange(6) < np.asarray([[6], [2]])
    given["kept1"] = np.asarray([[True, False, True, True], [True, True, False, True]])
    want, got = (runtime.run(m, given)["indices"] for m in (model, report.model))
    np.testing.assert_array_equal(want, got)


def causal_by_block(step: int) -> onnx.ModelProto:
    """Three blocks of 4 keys; those of block n are numbered from n * step on."""
    before, joined = " k0, k1, k2 = Split<axis=1>(k)\n" + CAUSAL, ""
    for n in range(3):
        numbers = ", ".join(str(step * n + i) for i in range(4))
        joined += f" g{n} = Constant<value_ints=[{numbers}]>()\n"
        joined += f" o{n} = LessOrEqual(g{n}, h7)\n m{n} = Where(o{n}, t{n}, low)\n"
    parts = [block(n, f"k{n}") for n in range(3)]
    joined += " s = Concat<axis=-1>(m0, m1, m2)\n"
    return blocks(before, *parts, keys="12", joined=joined)


def test_blocks_that_are_causal_one_by_one_are_causal_together() -> None:
    report = fused(causal_by_block(4))
    (node,) = (n for n in report.model.graph.node if n.op_type == "NPULightningIndexer")
    assert next(a.i for a in node.attribute if a.name == "sparse_mode") == 3


@pytest.mark.parametrize("step", [0, 3, -4])
def test_blocks_that_number_their_keys_otherwise_are_refused(step: int) -> None:
    refused(causal_by_block(step), "")


SCALED = " z{n} = Unsqueeze(by{n}, one)\n m{n} = Mul(t{n}, z{n})\n"


def scaled(kind: str, turned: str = "") -> onnx.ModelProto:
    """Two blocks of keys of a type, each with a scale per key behind the relu."""
    before = " past8 = Cast<to=1>(codes0)\n k8 = Cast<to=1>(codes1)\n by1 = Identity(new_scale)\n"
    before += f" by0 = {turned or 'Identity(old_scale)'}\n"
    joined = "".join(SCALED.format(n=n) for n in (0, 1))
    joined += " s = Concat<axis=-1>(m0, m1)\n"
    more = (
        f", {kind}[B,P,8] codes0, {kind}[B,T,8] codes1, float[B,P] old_scale, float[B,T] new_scale"
    )
    return blocks(before, block(0, "past8"), block(1, "k8"), more=more, joined=joined)


@pytest.mark.parametrize("kind", ["int8", "float16"])
def test_scales_of_blocks_are_joined_as_their_keys_are(kind: str) -> None:
    said = [] if kind == "int8" else ["not-negative:old_scale", "not-negative:new_scale"]
    if said:
        hint = refused(scaled(kind), "may be negative")
        assert all(f"--assume {entry}" in hint for entry in said)
        refused(scaled(kind), "may be negative", assume=said[:1])
    report = sfa_onnx.fuse(scaled(kind), assume=said)
    assert [s.reason for s in report.selections] == [""]
    given = feeds(scaled(kind), 2, 3, 4, P=9)
    want, got = (runtime.run(m, given)["indices"] for m in (scaled(kind), report.model))
    np.testing.assert_array_equal(want, got)


@pytest.mark.parametrize("kind", ["int8", "float16"])
def test_a_scale_of_one_block_that_may_be_negative_is_found(kind: str) -> None:
    said = ["not-negative:old_scale", "not-negative:new_scale"]
    refused(scaled(kind, "Sub(old_scale, half)"), "the weight by0 depends on", assume=said)


UNLIKE = {
    "one without relu": (block(0, "past"), block(1, "k", relu="Identity")),
    "other weights": (block(0, "past"), block(1, "k", weight="v4")),
    "twice as large": (block(0, "past"), block(1, "k", weight="z4")),
}


@pytest.mark.parametrize("kind", UNLIKE)
def test_blocks_that_are_not_alike_are_refused(kind: str) -> None:
    before = " v4 = Abs(w4)\n z4 = Mul(w4, two0)\n"
    refused(blocks(before, *UNLIKE[kind], more=PAST), "")


def test_blocks_in_another_order_are_the_keys_of_that_order() -> None:
    """Indices count along what is joined, not along the tensor it was cut from."""
    before = " k0, k1, k2 = Split<axis=1>(k)\n"
    fused(blocks(before, block(0, "k2"), block(1, "k0"), block(2, "k1"), keys="12"))


@pytest.mark.parametrize("starts", [(0, 4, 8), (8, 0, 4)])
def test_blocks_written_into_a_buffer_are_joined(starts: tuple[int, ...]) -> None:
    """x[..., a:b] = scores, as exporters write it: along the first axis, turned there and back."""
    before = " k0, k1, k2 = Split<axis=1>(k)\n b0s = Shape<end=1>(q)\n"
    before += " b1s = Shape<start=1, end=2>(q)\n twelve = Constant<value_ints=[12]>()\n"
    before += " fours = Constant<value_ints=[4, 1]>()\n"
    joined = " shape = Concat<axis=0>(twelve, b0s, b1s)\n u0 = ConstantOfShape(shape)\n"
    for n, start in enumerate(starts):
        numbers = ", ".join(map(str, range(start, start + 4)))
        joined += f" g{n} = Constant<value_ints=[{numbers}]>()\n i{n} = Reshape(g{n}, fours)\n"
        joined += f" v{n} = Transpose<perm=[2, 0, 1]>(t{n})\n"
        joined += f" u{n + 1} = ScatterND(u{n}, i{n}, v{n})\n"
    joined += " s = Transpose<perm=[1, 2, 0]>(u3)\n"
    parts = [block(n, f"k{n}") for n in range(3)]
    fused(blocks(before, *parts, keys="12", joined=joined))


def sequence(n: int, *, of: int | None = None, by: str = "", mask: str = "") -> str:
    """Scores s{n} [1, S, T] of sequence n, with the keys of sequence `of`."""
    own = n if of is None else of
    text = f" n{n} = Constant<value_int={n}>()\n o{n} = Constant<value_int={own}>()\n"
    text += f" q{n} = Gather<axis=0>(q, n{n})\n k{n} = Gather<axis=0>(k, o{n})\n"
    text += f" w{n} = Gather<axis=0>(w, n{n})\n v{n} = Unsqueeze(w{n}, last)\n"
    text += f" b{n} = Transpose<perm=[1,0]>(k{n})\n x{n} = MatMul(q{n}, b{n})\n r{n} = Relu(x{n})\n"
    text += f" y{n} = Mul(r{n}, v{n})\n t{n} = ReduceSum<keepdims=0>(y{n}, one)\n"
    text += f" z{n} = {f'Mul(t{n}, {by})' if by else f'Identity(t{n})'}\n"
    text += f" m{n} = {f'Where({mask}, z{n}, low)' if mask else f'Identity(z{n})'}\n"
    return f"{text} s{n} = Unsqueeze(m{n}, none)\n"


def by_sequence(*parts: str, before: str = "", more: str = "") -> onnx.ModelProto:
    names = ", ".join(f"s{n}" for n in range(len(parts)))
    text = f"{before}{''.join(parts)} s = Concat<axis=0>({names})\n"
    model = indexer(more, products=text, relu="", weighed="", summed="")
    for value in model.graph.input:
        value.type.tensor_type.shape.dim[0].dim_value = len(parts)
    return model


KEPT = " d0, d1, d2 = Split<axis=0>(kept)\n"  # [1, T] each: one for all rows of a sequence


@pytest.mark.parametrize("kind", ["open", "causal", "padding", "keys of others"])
def test_a_loop_over_sequences_is_one_selection(kind: str) -> None:
    before = CAUSAL if kind == "causal" else KEPT if kind == "padding" else ""
    masks = {"causal": "seen", "padding": "d{n}"}
    parts = [
        sequence(n, of=(n + 1) % 3 if "others" in kind else None,
                 mask=masks.get(kind, "").format(n=n))
        for n in range(3)
    ]  # fmt: skip
    model = by_sequence(*parts, before=before, more=", bool[B,T] kept" * (kind == "padding"))
    report = sfa_onnx.fuse(model)
    assert [s.reason for s in report.selections] == [""]
    assert "MatMul" not in {n.op_type for n in report.model.graph.node}
    for rows, keys in ((3, 12), (1, 7)):
        given = feeds(model, 3, rows, keys)
        want, got = (runtime.run(m, given)["indices"] for m in (model, report.model))
        np.testing.assert_array_equal(want, got)


@pytest.mark.parametrize(
    "other", [{"by": "half"}, {"by": "minus"}, {"mask": "seen"}], ids=["scaled", "turned", "masked"]
)
def test_sequences_that_are_not_alike_are_refused(other: dict[str, str]) -> None:
    refused(by_sequence(sequence(0), sequence(1, **other), sequence(2), before=CAUSAL), "")


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_rows_in_chunks_are_all_rows(order: tuple[int, int]) -> None:
    """Long prompts are scored some rows at a time; causal rows are masked at the end."""
    text = " w4 = Unsqueeze(w, last)\n q0, q1 = Split<axis=1>(q)\n w0, w1 = Split<axis=1>(w4)\n"
    for n, own in enumerate(order):
        part = block(n, "k", weight=f"w{own}")
        text += part.replace("MatMul(q,", f"MatMul(q{own},")
    text += " s = Concat<axis=1>(t0, t1)\n"
    hidden = f"{CAUSAL} m = Where(seen, s, low)\n"
    steps = {"products": text, "relu": "", "weighed": "", "summed": "", "hidden": hidden}
    model = indexer(rows="6", **steps)
    report = sfa_onnx.fuse(model)
    assert [s.reason for s in report.selections] == [""]
    given = feeds(model, 2, 6, 9)
    want, got = (runtime.run(m, given)["indices"] for m in (model, report.model))
    np.testing.assert_array_equal(want, got)


def test_sizes_that_exporters_name_apart_are_one_where_the_mask_meets_the_scores() -> None:
    """A cache and new keys of the indexer (P, T), and those of the attention (U, V)."""
    more = f"{PAST}, float[B,U,4] latent, float[B,V,4] latent_new"
    seen = " a0 = Shape<start=1, end=2>(latent)\n a1 = Shape<start=1, end=2>(latent_new)\n"
    seen += " all = Add(a0, a1)\n" + CAUSAL.replace("Shape<start=1, end=2>(k)", "Identity(all)")
    hidden = f"{seen} m = Where(seen, s, low)\n"
    for parts, joined in (
        ([block(0, "past"), block(1, "k")], ""),
        ([" ka = Concat<axis=1>(past, k)\n", block(0, "ka")], " s = Identity(t0)\n"),
    ):
        model = blocks("", *parts, more=more, hidden=hidden, joined=joined)
        report = sfa_onnx.fuse(model)
        assert [s.reason for s in report.selections] == [""]
        for batch, rows, new, past in ((2, 3, 3, 9), (3, 1, 1, 20)):
            given = feeds(model, batch, rows, new, P=past, U=past, V=new)
            want, got = (runtime.run(m, given)["indices"] for m in (model, report.model))
            np.testing.assert_array_equal(want, got)
