"""The operator inside transformers' own models: same logits, same tokens, int8 in pages."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import sfa_onnx.torch as sfa_torch  # noqa: E402
from sfa_onnx import runtime  # noqa: E402
from sfa_onnx.errors import UsageError  # noqa: E402
from tests.zoo.hf import Spec, make_model  # noqa: E402
from tests.zoo.kin import _COMMON, Kin, cache_name, make  # noqa: E402

pytestmark = pytest.mark.torch


def tiny(model="deepseek", attention="eager", **kw):
    return make_model(Spec(model=model, attention=attention, layers=2, topk=8, **kw))


def prompt(batch=2, length=12):
    torch.manual_seed(1)
    ids = torch.randint(3, 96, (batch, length))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0  # left padding: the shorter sequence
    return ids, mask


def generate(model, tokens=64, **kw):
    ids, mask = prompt()
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False,
        return_dict_in_generate=True, output_logits=True, pad_token_id=0, **kw,
    )  # fmt: skip
    return out.sequences, torch.stack(out.logits, 1)


@pytest.mark.parametrize(
    ("family", "attention"), [("deepseek", "eager"), ("deepseek", "sdpa"), ("glm", "sdpa")]
)
def test_64_tokens_have_the_originals_logits(family, attention):
    model = tiny(family, attention)
    want_ids, want = generate(model)
    assert len(sfa_torch.patch_attention(model)) == 2
    ids, got = generate(model)
    assert torch.equal(ids, want_ids)
    assert (got - want).abs().max() <= 1e-5 * max(1, want.abs().max())
    sfa_torch.unpatch_attention(model)
    again = generate(model, 4)[1]
    assert torch.equal(again, want[:, :4])


def test_paged_int8_is_near_and_the_same_with_and_without_pages():
    model = tiny()
    _, want = generate(model, 1)
    sfa_torch.patch_attention(model, cache="paged-int8")
    ids, without = generate(model, 24)
    cache = sfa_torch.PagedInt8Cache(block_size=16)
    paged_ids, paged = generate(model, 24, past_key_values=cache)
    assert torch.equal(paged_ids, ids)
    np.testing.assert_allclose(paged, without, rtol=1e-4, atol=1e-4)
    assert cache.get_seq_length() == 12 + 24 - 1
    layer = cache.layers[0]
    assert layer.keys.dtype == torch.int8
    assert layer.keys.shape[1:] == (16, 1, 64 + 16 * 4 + 4)  # one tile of 64, float32 rope
    difference = (paged[:, :1] - want).norm() / want.norm()
    assert 1e-5 < difference < 0.05  # quantised, and not far off


def test_beams_and_crops_keep_pages_apart():
    model = tiny()
    sfa_torch.patch_attention(model, cache="paged-int8")
    ids, mask = prompt()
    kw = {"attention_mask": mask, "max_new_tokens": 6, "num_beams": 3, "do_sample": False,
          "pad_token_id": 0}  # fmt: skip
    want = model.generate(ids, **kw)
    got = model.generate(ids, past_key_values=sfa_torch.PagedInt8Cache(block_size=16), **kw)
    assert torch.equal(got, want)
    cache = sfa_torch.PagedInt8Cache(block_size=16)
    with torch.no_grad():
        first = model(ids, past_key_values=cache).logits
        cache.crop(-2)
        assert cache.get_seq_length() == 10
        again = model(ids[:, 10:], past_key_values=cache).logits
    np.testing.assert_allclose(again, first[:, 10:], rtol=1e-4, atol=1e-4)


def test_the_export_has_the_operator_inside(tmp_path):
    model = tiny()
    ids = prompt()[0]
    with torch.no_grad():
        want = model(ids, use_cache=False).logits
    sfa_torch.patch_attention(model)

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, input_ids):
            return self.model(input_ids, use_cache=False).logits

    sfa_torch.export(Logits().eval(), (ids,), tmp_path / "m.onnx", input_names=["ids"])
    kinds = [n.op_type for n in onnx.load(tmp_path / "m.onnx").graph.node if n.domain == "npu"]
    assert kinds == ["NPUSparseFlashAttention"] * 2
    (got,) = runtime.run(str(tmp_path / "m.onnx"), {"ids": ids.numpy()}).values()
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def decode(model, cache=None, steps=3):
    """The last state after a padded prompt of two, and after each of some more tokens."""
    ids, mask = prompt()
    name, states = cache_name(model), []
    kw = {} if cache is None else {name: cache}
    with torch.no_grad():
        for step in range(steps + 1):
            out = model(input_ids=ids, attention_mask=mask, use_cache=True, **kw)
            states.append((out.logits if hasattr(out, "logits") else out[0])[:, -1])
            kw, ids = {name: getattr(out, name)}, torch.tensor([[5 + step], [9]])
            mask = torch.cat((mask, torch.ones_like(ids)), 1)
    return torch.stack(states)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(
    "kin", [Kin("axk2"), Kin("dots3_note"), Kin("mistral_large4", nope=True)], ids=str
)
def test_the_other_families_have_the_originals_states(kin, attention):
    model = make(kin)
    model.config._attn_implementation = attention
    want = decode(model)
    assert sfa_torch.patch_attention(model)
    got = decode(model)
    assert (got - want).abs().max() <= 1e-5 * max(1, want.abs().max())
    sfa_torch.unpatch_attention(model)
    assert torch.equal(decode(model), want)
    sfa_torch.patch_attention(model, cache="paged-int8")
    packed = decode(model)
    np.testing.assert_allclose(
        decode(model, sfa_torch.PagedInt8Cache(block_size=16)), packed, rtol=1e-4, atol=1e-4
    )
    assert 1e-5 < (packed - want).norm() / want.norm() < 0.15


def glm5():
    """A tiny text model of glm5_next: pools of keys, a shared choice, linear layers around."""
    module = pytest.importorskip("transformers.models.glm5_next.modeling_glm5_next")
    widths = dict.fromkeys(("hidden_size", "intermediate_size", "moe_intermediate_size"), 32)
    heads = dict.fromkeys(("num_attention_heads", "num_key_value_heads", "linear_num_heads"), 4)
    heads |= dict.fromkeys(("qk_nope_head_dim", "v_head_dim", "linear_head_dim"), 8)
    latents = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 0}
    select = {"index_topk": 8, "index_head_dim": 16, "index_n_heads": 2, "index_kpool": 4}
    linear, indexed = "linear_attention", "indexed_attention"
    config = module.Glm5NextTextConfig(
        **widths, **heads, **latents, **select, vocab_size=96, num_hidden_layers=4, pad_token_id=0,
        n_routed_experts=2, num_experts_per_tok=1, mlp_layer_types=["dense"] * 4,
        layer_types=[linear, indexed, indexed, linear],
        indexer_types=["full", "full", "shared", "full"],
    )  # fmt: skip
    torch.manual_seed(0)
    return module.Glm5NextTextModel(config).eval()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_choice_that_the_model_makes_a_mask_of(attention):
    model = glm5()
    model.config._attn_implementation = attention
    want = decode(model)
    assert sfa_torch.patch_attention(model) == ["layers.1.self_attn", "layers.2.self_attn"]
    assert (decode(model) - want).abs().max() <= 1e-5 * max(1, want.abs().max())
    sfa_torch.unpatch_attention(model)
    assert torch.equal(decode(model), want)
    sfa_torch.patch_attention(model, cache="paged-int8")
    assert 1e-5 < (decode(model) - want).norm() / want.norm() < 0.05
    with pytest.raises(UsageError, match="past_key_values: expected a cache with a place for lin"):
        decode(model, sfa_torch.PagedInt8Cache())


def test_what_cannot_be_patched_is_refused():
    with pytest.raises(UsageError, match="model: expected one with an indexer in AXK2Attention"):
        sfa_torch.patch_attention(torch.nn.Linear(2, 2))
    model = tiny()
    with pytest.raises(UsageError, match="expected one that patch_attention changed"):
        sfa_torch.unpatch_attention(model)
    with pytest.raises(UsageError, match="cache: expected 'float' or 'paged-int8', got 'int4'"):
        sfa_torch.patch_attention(model, cache="int4")
    sfa_torch.patch_attention(model)
    with pytest.raises(UsageError, match="patched already"):
        sfa_torch.patch_attention(model)


def hy(vision):
    """A tiny hy_v4, or the text model of hy_v4_vl."""
    transformers = pytest.importorskip("transformers")
    sizes = _COMMON | {"num_hidden_layers": 2, "mlp_layer_types": ["dense"] * 2}
    if not vision:
        module = pytest.importorskip("transformers.models.hy_v4.modeling_hy_v4")
        config, build = transformers.HYV4Config(**sizes), module.HYV4ForCausalLM
    else:
        module = pytest.importorskip("transformers.models.hy_v4_vl.modeling_hy_v4_vl")
        rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
        config = module.HYV4VLTextConfig(**sizes, rope_parameters=rope)
        build = module.HYV4VLTextModel
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    return build(config).eval()


@pytest.mark.parametrize("vision", [False, True])
def test_sinks_go_to_the_operator(vision):
    model = hy(vision)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("sinks"):
                parameter.copy_(torch.linspace(-1, 2, parameter.numel()))
    want = decode(model)
    assert len(sfa_torch.patch_attention(model)) == 2
    got = decode(model)
    assert (got - want).abs().max() <= 1e-5 * max(1, want.abs().max())
    sfa_torch.unpatch_attention(model)
    sfa_torch.patch_attention(model, cache="paged-int8")
    packed = decode(model)
    paged = decode(model, sfa_torch.PagedInt8Cache(block_size=16))
    np.testing.assert_allclose(paged, packed, rtol=1e-4, atol=1e-4)
