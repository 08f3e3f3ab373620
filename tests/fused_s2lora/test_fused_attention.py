"""Attention in blocks of heads in a fused model."""

import torch
from transformers.models.whisper.modeling_whisper import WhisperAttention

from fused_s2lora import fuse_whisper, unfuse_whisper, whisper_fusion
from fused_s2lora.kernels import device
from tests.fused_s2lora.adapters import adapted, assert_same, batch, in_float64, step


def test_attention_in_blocks_is_the_reference_in_every_gradient(tiny_whisper, monkeypatch):
    oracle = step(in_float64(tiny_whisper))
    model = in_float64(tiny_whisper)
    calls = []
    attention = whisper_fusion.attention
    monkeypatch.setattr(whisper_fusion, "attention", lambda *qkv: calls.append(qkv[0].shape) or attention(*qkv))
    fuse_whisper(model)
    assert_same(step(model), oracle)
    assert not calls  # float64 is PyTorch's
    monkeypatch.setattr(device, "attends_in_blocks", lambda q: True)
    assert_same(step(model), oracle)
    assert len(calls) == 2 + 2  # two encoder layers and two cross-attentions: the decoder's own attention is masked
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    assert_same(step(model), oracle)
    calls.clear()
    for module in model.modules():
        if isinstance(module, WhisperAttention):
            module.dropout = 0.5
    step(model)
    assert not calls
    unfuse_whisper(model)
    assert model.get_base_model().config._attn_implementation == "sdpa"


def test_attention_in_blocks_generates_the_same(tiny_whisper, monkeypatch):
    model = adapted(tiny_whisper)
    features = batch()["input_features"]
    options = {"max_new_tokens": 8, "num_beams": 2}
    plain = model.generate(features, **options)
    fuse_whisper(model)
    monkeypatch.setattr(device, "attends_in_blocks", lambda q: True)
    assert torch.equal(model.generate(features, **options), plain)


def test_an_attention_that_was_chosen_is_left_alone(tiny_whisper):
    model = adapted(tiny_whisper)
    model.get_base_model().set_attn_implementation("eager")
    fuse_whisper(model)
    assert model.get_base_model().config._attn_implementation == "eager"
    unfuse_whisper(model)
    assert model.get_base_model().config._attn_implementation == "eager"
