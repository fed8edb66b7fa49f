"""The models of `lq bench --model`: what transformers computes from the same weights, by steps and by prompts."""

import dataclasses

import pytest
import torch
from torch import nn

from lqcompile import decoder, model_check, ways
from lqcompile.quantize import QuantLinear

TINY = decoder.SHAPES["tiny"]
KINDS = {
    "llama": TINY,
    "qwen2": dataclasses.replace(TINY, bias=True, epsilon=1e-6),
    "gemma2": dataclasses.replace(TINY, tied=True, gelu=True, sandwich=True, scaled=True, soft_cap=30.0),
}


def random(shape, dtype=torch.float32, **how):
    torch.manual_seed(0)
    return decoder.random(shape, torch.device("cpu"), dtype, **{"bits": 4, "group": 128, **how})


def theirs(kind, shape, model):
    """The same model by transformers, with the weights that `model` dequantizes to."""
    from transformers import AutoConfig, AutoModelForCausalLM

    more = {"attn_logit_softcapping": None, "query_pre_attn_scalar": shape.head} if kind == "gemma2" else {}
    config = AutoConfig.for_model(
        kind, hidden_size=shape.hidden, intermediate_size=shape.intermediate, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, head_dim=shape.head,
        vocab_size=shape.vocabulary, rms_norm_eps=shape.epsilon, tie_word_embeddings=shape.tied,
        rope_theta=shape.theta, **more,
    )  # fmt: skip
    made = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    dense = decoder.replaced(model, decoder.dense).state_dict()
    names = {"embedding": "model.embed_tokens", "norm": "model.norm", "attention": "self_attn"}
    names |= {name: f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")}
    last = "pre_feedforward_layernorm" if shape.sandwich else "post_attention_layernorm"
    names |= {"blocks": "model.layers", "before_attention": "input_layernorm", "before_mlp": last}
    names |= {"after_attention": "post_attention_layernorm", "after_mlp": "post_feedforward_layernorm"}
    renamed = {".".join(names.get(part, part) for part in name.split(".")): value for name, value in dense.items()}
    if kind == "gemma2":
        # Its norms multiply by 1 + weight.
        renamed = {name: value - 1 if "norm" in name else value for name, value in renamed.items()}
    made.load_state_dict(renamed)
    return made


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_prompt_gives_the_logits_of_transformers_and_so_do_steps(kind):
    shape = KINDS[kind]
    model = random(shape)
    for norm in (m for m in model.modules() if isinstance(m, decoder.RMSNorm)):
        norm.weight.add_(torch.randn(shape.hidden) / 4)
    tokens = torch.randint(0, shape.vocabulary, (2, 9))
    exact = theirs(kind, shape, model)(tokens).logits
    model.empty_cache(2, 16, torch.float32)
    after, logits = model(tokens, torch.arange(9))
    torch.testing.assert_close(logits, exact[:, -1], rtol=1e-4, atol=1e-4)
    assert torch.equal(after, exact[:, -1].argmax(-1, keepdim=True))
    model.empty_cache(2, 16, torch.float32)
    for i in range(9):
        _, logits = model(tokens[:, i : i + 1], torch.tensor([i]))
        torch.testing.assert_close(logits, exact[:, i], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_reference_is_the_model_in_float32(kind):
    """It differs from eager bfloat16 by roundings, from float32 on the same weights by those of weights and head."""
    model = random(KINDS[kind], torch.bfloat16)
    addresses = [p.data_ptr() for p in model.parameters()]
    for point in (model_check.Point(2, 1, 16), model_check.Point(1, 9, 9)):
        calls = model_check.references(model, point)
        assert len(calls) == model_check.CHECKED
        assert [p.data_ptr() for p in model.parameters()] == addresses
        wide = random(KINDS[kind]).float()
        wide.load_state_dict(model.state_dict())
        wide.empty_cache(point.batch, point.length, torch.float32)
        for call in calls:
            assert 1e-3 < model_check.relative(call.logits, call.exact) < 0.03
            assert model_check.relative(wide(call.tokens, call.position)[1], call.exact) < 0.01
            assert torch.equal(call.next, call.logits.argmax(-1, keepdim=True))


@torch.no_grad()
def test_a_cache_that_fits_is_emptied_in_place():
    model = random(TINY, torch.bfloat16)
    model.empty_cache(2, 16, torch.bfloat16)
    _, first = model(torch.zeros(2, 1, dtype=torch.long), torch.tensor([0]))
    keys = [block.attention.keys for block in model.blocks]
    assert all(bool(t.any()) for t in keys)
    model.empty_cache(2, 16, torch.bfloat16)
    assert all(block.attention.keys is t and not t.any() for block, t in zip(model.blocks, keys, strict=True))
    assert torch.equal(model(torch.zeros(2, 1, dtype=torch.long), torch.tensor([0]))[1], first)
    for batch, length, dtype in ((3, 16, torch.bfloat16), (3, 8, torch.bfloat16), (3, 8, torch.float32)):
        model.empty_cache(batch, length, dtype)
        assert model.blocks[1].attention.values.shape == (batch, 2, length, 64) and model.cos.shape == (length, 64)
        assert model.blocks[1].attention.values.dtype == model.sin.dtype == dtype


def test_blocks_are_quantized_and_the_head_is_dense():
    shape = dataclasses.replace(TINY, tied=True)
    model = random(shape, torch.bfloat16, bits=3, method="bcq", rounds=1)
    layers = [m for m in model.blocks.modules() if isinstance(m, QuantLinear)]
    assert len(layers) == 7 * shape.layers and {m.format.spec for m in layers} == {"binary:3:128:float:bfloat16"}
    assert not [m for m in model.blocks.modules() if isinstance(m, nn.Linear)]
    assert model.lm_head.weight is model.embedding.weight and model.lm_head.weight.dtype == torch.bfloat16
    head = model.lm_head.weight.nbytes
    packed = sum(t.nbytes for m in layers for t in m.buffers())
    assert head + packed < decoder.weight_bytes(model) < head + packed + 20 * shape.hidden


@torch.no_grad()
def test_ways_hold_the_same_weights_and_share_what_is_not_quantized():
    model = random(TINY, torch.bfloat16)
    dense, packed = (ways.model_of(name, model) for name in ("dense", "int4pack"))
    assert ways.model_of("lq", model) is model is ways.model_of("inductor", model)
    for other in (dense, packed):
        assert other.lm_head.weight is model.lm_head.weight and other is not model
        assert not [m for m in other.modules() if isinstance(m, QuantLinear)]
    x = torch.randn(3, 5, TINY.hidden, dtype=torch.bfloat16)
    ours, one, other = (m.blocks[1].mlp.up(x) for m in (model, dense, packed))
    assert torch.equal(ours, one)
    assert float((ours - other).double().norm() / ours.double().norm()) < 0.02
    assert decoder.weight_bytes(packed) < decoder.weight_bytes(dense) / 2
    with pytest.raises(ValueError, match="4 bits"):
        ways.model_of("int4pack", random(TINY, torch.bfloat16, bits=3))


@pytest.mark.parametrize("name", decoder.SHAPES)
def test_groups_of_128_divide_every_shape(name):
    shape = decoder.SHAPES[name]
    assert shape.heads % shape.kv_heads == 0
    with torch.device("meta"):
        linears = [m for m in decoder.Block(shape).modules() if isinstance(m, nn.Linear)]
    assert len(linears) == 7 + (shape.experts > 0) and all(m.in_features % 128 == 0 for m in linears)
