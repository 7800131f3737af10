import json

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import TensorProto, helper, numpy_helper

import sfa_onnx
from sfa_onnx import runtime
from sfa_onnx.errors import ModelError, UsageError
from sfa_onnx.kv_convert import convert
from sfa_onnx.operator.op import SPARSE_FLASH_ATTENTION, SPARSE_FLASH_ATTENTION_ANTIQUANT
from sfa_onnx.report import to_json
from sfa_onnx.runtime.compare.run import compare
from sfa_onnx.runtime.feeds.draw import random_feeds
from sfa_onnx.runtime.portable.model import unfuse
from sfa_onnx.runtime.twin import twin
from tests.attention_cases import BF16
from tests.op_models import elem_type, needs_library
from tests.test_kv_convert import TILE, growing, static_cache

HEADS, NOPE, ROPE, HIDDEN, TOP, VOCABULARY = 4, 16, 8, 12, 10, 50
SFA, SFAA = SPARSE_FLASH_ATTENTION, SPARSE_FLASH_ATTENTION_ANTIQUANT


def decoder(dtype=np.float32, op=SFA, layers=2, seed=0):
    """Token ids -> embedding -> layers of (query, top-k of scores, our operator) -> logits."""
    kind, r = elem_type(dtype), np.random.default_rng(seed)
    nodes, weights, inputs = [], {}, []

    def weight(name, *shape):
        weights[name] = (r.standard_normal(shape) / np.sqrt(shape[0])).astype(dtype)
        return name

    def add(kind_, *values, out, **attributes):
        nodes.append(helper.make_node(kind_, list(values), [out], name=f"node_{out}", **attributes))
        return out

    weights["shape_q"] = np.array([0, 0, HEADS, NOPE + ROPE])
    weights["flat"] = np.array([0, 0, HEADS * NOPE])
    weights["top"], weights["two"] = np.array([TOP]), np.array([2])
    hidden = add("Gather", weight("embed", VOCABULARY, HIDDEN), "input_ids", out="hidden0")
    for i in range(layers):
        q = add("MatMul", hidden, weight(f"wq{i}", HIDDEN, HEADS * (NOPE + ROPE)), out=f"q{i}")
        q = add("Reshape", q, "shape_q", out=f"heads{i}")
        scores = add("MatMul", hidden, f"index_key{i}", out=f"scores{i}")
        scores = add("Cast", scores, out=f"wide{i}", to=TensorProto.FLOAT)
        nodes.append(helper.make_node("TopK", [scores, "top"], [f"v{i}", f"i{i}"], name=f"topk{i}"))
        narrow = add("Cast", f"i{i}", out=f"narrow{i}", to=TensorProto.INT32)
        picked = add("Unsqueeze", narrow, "two", out=f"picked{i}")
        attributes = op.complete(
            {"scale_value": 0.2, "sparse_mode": 0}
            | ({"rope_head_dim": ROPE, "tile_size": 8} if op is SFAA else {})
        )
        if op is SFA:
            weights[f"split{i}"] = np.array([NOPE, ROPE])
            nodes.append(
                helper.make_node("Split", [q, f"split{i}"], [f"qn{i}", f"qr{i}"], axis=-1,
                                 name=f"split_{i}")
            )  # fmt: skip
            operands = [f"qn{i}", f"past_latent{i}", f"past_latent{i}", picked, "", "", "",
                        f"qr{i}", f"past_rope{i}"]  # fmt: skip
            caches = {f"past_latent{i}": (kind, NOPE), f"past_rope{i}": (kind, ROPE)}
        else:
            operands = [q, f"past_rows{i}", f"past_rows{i}", picked]
            size = np.dtype(dtype).itemsize
            caches = {f"past_rows{i}": (TensorProto.INT8, NOPE + ROPE * size + 8)}
        inputs += [
            helper.make_tensor_value_info(n, t, ["batch", "past_len", 1, w])
            for n, (t, w) in caches.items()
        ]
        inputs.append(
            helper.make_tensor_value_info(f"index_key{i}", kind, ["batch", HIDDEN, "past_len"])
        )
        nodes.append(
            helper.make_node(op.name, operands, [f"attn{i}"], name=f"site{i}", domain=op.domain,
                             **attributes)
        )  # fmt: skip
        flat = add("Reshape", f"attn{i}", "flat", out=f"flat{i}")
        out = add("MatMul", flat, weight(f"wo{i}", HEADS * NOPE, HIDDEN), out=f"o{i}")
        hidden = add("Add", hidden, out, out=f"hidden{i + 1}")
    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "seq"])
    graph = helper.make_graph(
        nodes,
        "decoder",
        [ids, *inputs],
        [helper.make_tensor_value_info(hidden, kind, ["batch", "seq", HIDDEN])],
        [numpy_helper.from_array(w, n) for n, w in weights.items()],
    )
    imports = [helper.make_opsetid("", 18), helper.make_opsetid("npu", 1)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=9)
    onnx.checker.check_model(model, full_check=True)
    return model


def scaled(model, site, factor):
    """The unfused model with the scale of one site changed a little: a wrong fusion."""
    wrong = onnx.ModelProto()
    wrong.CopyFrom(model)
    for node in wrong.graph.node:
        if node.name == site:
            next(a for a in node.attribute if a.name == "scale_value").f *= factor
    return unfuse(wrong)


@needs_library
@pytest.mark.parametrize("op", [SFA, SFAA], ids=["float", "antiquant"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_true_fusion_passes_site_by_site_and_as_a_whole(op, dtype):
    fused = decoder(BF16 if dtype == "bfloat16" else np.dtype(dtype), op)
    before = unfuse(fused)
    report = compare(before, fused, seed=3)
    assert [s.method for s in report.sites] == ["captured", "captured"], report.sites
    assert [s.name for s in report.sites] == ["site0", "site1"]
    assert [o.name for o in report.outputs] == ["hidden2"]
    assert report.passed, report
    assert report.verdict.startswith("same")
    assert all(s.difference.noise > 0 for s in report.sites)
    assert report.outputs[0].difference.noise > 0
    assert any("float32 twins" in n for n in report.notes) == (dtype == "bfloat16")
    assert json.loads(json.dumps(to_json(report)))["sites"][0]["difference"]["dtype"] == dtype


@needs_library
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_wrong_site_is_named(dtype):
    fused = decoder(dtype)
    report = compare(scaled(fused, "site1", 1.05), fused)
    assert [s.passed for s in report.sites] == [True, False]
    assert not report.passed
    assert report.verdict.startswith("different")
    assert "site1" in report.verdict


@needs_library
def test_the_callers_bounds_hold():
    fused = decoder(np.float32)
    before = unfuse(fused)
    assert compare(before, fused, atol=1e-3, rtol=1e-3).passed
    assert not compare(before, fused, atol=0.0, rtol=0.0).passed


@needs_library
def test_given_inputs_are_used_and_decide_the_sizes():
    fused = decoder(np.float32)
    ids = np.array([[7, 8, 9, 10, 11]])
    report = compare(unfuse(fused), fused, inputs={"input_ids": ids})
    assert report.inputs["input_ids"] == "int64[1, 5], given"
    assert report.outputs[0].difference.shape == (1, 5, HIDDEN)
    with pytest.raises(UsageError, match=r"no input \['nope'\]"):
        compare(unfuse(fused), fused, inputs={"nope": ids})


@needs_library
def test_external_weights_are_opened_by_path(tmp_path):
    fused = decoder(np.float32)
    paths = []
    for name, model in (("before", unfuse(fused)), ("after", fused)):
        path = tmp_path / f"{name}.onnx"
        onnx.save(model, path, save_as_external_data=True, location="w.bin", size_threshold=64)
        (tmp_path / "w.bin").rename(tmp_path / f"{name}.bin")
        light = onnx.load(path, load_external_data=False)
        for tensor in light.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = f"{name}.bin"
        onnx.save(light, path)
        paths.append(path)
    report = compare(*paths)
    assert report.passed, report
    assert [s.method for s in report.sites] == ["captured", "captured"]


@needs_library
@pytest.mark.parametrize("factor", [1.0, 1.05])
def test_without_weights_the_sites_still_run_on_random_values(tmp_path, factor):
    fused = decoder(np.float32)
    paths = []
    for name, model in (("before", scaled(fused, "site0", factor)), ("after", fused)):
        path = tmp_path / f"{name}.onnx"
        onnx.save(model, path, save_as_external_data=True, location="w.bin", size_threshold=600)
        paths.append(path)
    (tmp_path / "w.bin").unlink()
    report = compare(*paths)
    assert not report.outputs
    assert any("whole models were not run" in n for n in report.notes)
    assert [s.method for s in report.sites] == ["random", "random"], report.sites
    assert [s.passed for s in report.sites] == [factor == 1.0, True]
    assert not report.passed
    if factor == 1.0:
        assert report.verdict.startswith("not compared: the whole models were not run: the weights")
        assert report.verdict.endswith("(2 sites agree on random values)")
    else:
        assert report.verdict.startswith("different: 1 of 2")


@needs_library
@pytest.mark.parametrize("cut", ["short", "pointer"])
def test_weights_that_are_not_there_are_told_before_a_run(tmp_path, cut):
    fused = decoder(np.float32, layers=1)
    paths = []
    for name, model in (("before", unfuse(fused)), ("after", fused)):
        path = tmp_path / f"{name}.onnx"
        onnx.save(model, path, save_as_external_data=True, location="w.bin", size_threshold=600)
        paths.append(path)
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n"
    weights = tmp_path / "w.bin"
    weights.write_bytes(weights.read_bytes()[:-64] if cut == "short" else pointer)
    report = compare(*paths)
    assert not report.passed
    assert report.verdict.startswith("not compared")
    assert ("git lfs pull" if cut == "pointer" else "truncated") in report.verdict


@needs_library
def test_inputs_that_cannot_be_guessed_are_asked_for():
    fused = decoder(np.float32, layers=1)
    model = unfuse(fused)
    for m in (model, fused):
        m.graph.input.append(helper.make_tensor_value_info("shape", TensorProto.INT64, [3]))
        node = helper.make_node("Reshape", [m.graph.output[0].name, "shape"], ["odd"], name="odd")
        m.graph.node.append(node)
        m.graph.output[0].CopyFrom(helper.make_tensor_value_info("odd", TensorProto.FLOAT, None))
    report = compare(model, fused)
    assert report.verdict.startswith("not compared")
    assert "give --inputs with shape" in report.verdict


@needs_library
@pytest.mark.parametrize("wrong", [False, True])
def test_a_float16_conversion_is_judged_by_its_own_rounding(wrong):
    fused = decoder(np.float32, layers=1)
    original = unfuse(fused)
    half = to_float16(scaled(fused, "site0", 1.2) if wrong else fused)
    report = compare(original, half)
    assert report.outputs, report.notes
    assert {o.difference.dtype for o in report.outputs} == {"float16"}
    assert all(o.passed for o in report.outputs) == (not wrong), report
    assert any("float16 in one model only" in n for n in report.notes)


def to_float16(model):
    """Weights, inputs and outputs in float16, and what lies between."""
    half = twin(model, [TensorProto.FLOAT], TensorProto.FLOAT16)
    for tensor in half.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            array = numpy_helper.to_array(tensor).astype(np.float16)
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    for value in half.graph.input:
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            value.type.tensor_type.elem_type = TensorProto.FLOAT16
    for node in half.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.i == TensorProto.FLOAT:
                attribute.i = TensorProto.FLOAT16
    return half


@needs_library
def test_a_model_beyond_memory_is_compared_site_by_site(monkeypatch):
    monkeypatch.setattr("sfa_onnx.runtime.compare.room._MEMORY_SHARE", 1e-12)
    fused = decoder(np.float32)
    report = compare(scaled(fused, "site1", 1.05), fused)
    assert [s.method for s in report.sites] == ["random", "random"]
    assert [s.passed for s in report.sites] == [True, False]
    assert "its weights take 0 GB" in report.notes[0]


@needs_library
def test_portable_and_fused_are_one_model():
    from sfa_onnx.runtime.portable.model import make_portable

    fused = decoder(np.float32, layers=1)
    report = compare(unfuse(fused), make_portable(fused))
    assert report.passed


def test_equal_models_pass_without_sites():
    model = unfuse(decoder(np.float32, layers=1))
    report = compare(model, model)
    assert report.passed
    assert any("no fused site" in n for n in report.notes)


def test_a_broken_model_is_reported_not_swallowed(tmp_path):
    broken = tmp_path / "x.onnx"
    broken.write_bytes(b"not a model at all, sorry")
    with pytest.raises(ModelError):
        compare(broken, broken)


# ------------------------------------------------------------------ int8 caches


@needs_library
@pytest.mark.parametrize("cache", ["growing", "hf", "official"])
@pytest.mark.parametrize("form", ["int8", "packed-int8", "paged-int8"])
@pytest.mark.parametrize("original", [False, True], ids=["from-fused", "from-original"])
def test_converted_caches_are_judged_on_rounded_latents(cache, form, original):
    source = growing(2) if cache == "growing" else static_cache(cache)
    converted = convert(source, to=form, block_size=16, tile_size=TILE).model
    report = compare(unfuse(source) if original else source, converted)
    assert report.passed, report
    assert {s.method for s in report.sites} == {"rounded"}
    assert all(1e-3 < s.loss < 2e-2 for s in report.sites)
    assert not any(o.judged for o in report.outputs)
    assert "int8 costs" in report.verdict


@needs_library
@pytest.mark.parametrize("form", ["int8", "packed-int8", "paged-int8"])
def test_a_wrong_conversion_is_noticed(form):
    source = growing(2)
    converted = convert(source, to=form, block_size=16, tile_size=TILE).model
    packs = [n for n in converted.graph.node if n.op_type == "KvCachePack"]
    assert len(packs) == 2
    packs[0].input[0], packs[1].input[0] = packs[1].input[0], packs[0].input[0]
    report = compare(source, converted)
    assert not report.passed
    assert not any(s.passed for s in report.sites)


# ------------------------------------------------------------------ the protocol


def test_a_twin_keeps_names_and_tells_the_rounding():
    fused = decoder(BF16, layers=1)
    original = unfuse(fused)
    wide = twin(original, [TensorProto.BFLOAT16], TensorProto.FLOAT)
    rough = twin(original, [TensorProto.BFLOAT16], TensorProto.FLOAT, rounded=TensorProto.BFLOAT16)
    feeds = random_feeds(original, fused=fused)
    exact, emulated = (runtime.run(m, feeds)["hidden1"] for m in (wide, rough))
    assert exact.dtype == emulated.dtype == np.float32
    assert (emulated == emulated.astype(BF16).astype(np.float32)).all()
    error = np.linalg.norm(exact - emulated) / np.linalg.norm(exact)
    assert 1e-4 < error < 2e-2


def test_a_site_of_another_shape_is_not_equal():
    # The file declares two rows and takes any number: what is fused for two is wrong for three.
    text = """<ir_version: 8, opset_import: ["" : 17]>
    lying (float[B,S,4,40] query, float[B,T,40] kv, int32[B,S,6] given) => (float[B,2,4,32] out)
    <int64 zero={0}, int64[1] first={0}, int64[1] last={-1}, int64[1] width={32}, int64[1] two={2},
     float low={-1e30}> {
      idx = Cast<to=7>(given)
      none = Less(idx, zero)
      hidden = Unsqueeze(none, two)
      safe = Max(idx, zero)
      at = Unsqueeze(safe, last)
      rows = GatherND<batch_dims=1>(kv, at)
      keys = Transpose<perm=[0, 1, 3, 2]>(rows)
      scores = MatMul(query, keys)
      seen = Where(hidden, low, scores)
      p = Softmax<axis=-1>(seen)
      v = Slice(rows, first, width, last)
      out = MatMul(p, v)
    }"""
    model = onnx.parser.parse_model(text)
    fused = sfa_onnx.fuse(model)
    assert any("sizes 2 and S are equal" in a for a in fused.sites[0].record.assumptions)
    feeds = {
        "query": np.ones((2, 3, 4, 40), np.float32),
        "kv": np.ones((2, 9, 40), np.float32),
        "given": np.zeros((2, 3, 6), np.int32),
    }
    report = compare(model, fused.model, inputs=feeds)
    assert not report.passed
    assert "another shape" in report.sites[0].reason
