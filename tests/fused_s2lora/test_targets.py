"""Maps that others read and do not call, or that make their weight at each call: refused, or made to work."""

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import WavLMConfig, WavLMModel

from fused_s2lora import S2LoraConfig
from tests.fused_s2lora.adapters import awaken, logits


def test_maps_that_a_wavlm_reads_are_refused_and_others_work():
    config = WavLMConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, conv_dim=(8,),
        conv_stride=(8,), conv_kernel=(16,), num_feat_extract_layers=1, num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2, layerdrop=0.0, mask_time_prob=0.0,
    )  # fmt: skip
    wavlm = WavLMModel(config).eval()
    with pytest.raises(ValueError, match=r"target encoder\.layers\.0\.attention\.\w_proj is of a WavLMAttention"):
        get_peft_model(wavlm, S2LoraConfig(r=2))
    attention = ["q_proj", "k_proj", "v_proj", "out_proj"]
    model = get_peft_model(wavlm, S2LoraConfig(r=2, target_modules="all-linear", exclude_modules=attention))
    awaken(model)
    model(torch.randn(1, 400)).last_hidden_state.sum().backward()
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    assert any("gru_rel_pos_linear" in name for name in trained)
    assert all(value.grad is not None for value in trained.values())


@pytest.mark.parametrize("padded", [False, True])
def test_a_transformer_encoder_of_pytorch_infers_with_its_adapter(padded):
    layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True)
    model = get_peft_model(nn.TransformerEncoder(layer, 2), S2LoraConfig(r=2, target_modules=["linear1", "linear2"]))
    awaken(model)
    x, padding = torch.randn(2, 5, 16), torch.tensor([[0, 0, 0, 0, 0], [0, 0, 0, 1, 1]]).bool()
    given = {"src_key_padding_mask": padding} if padded else {}
    trained_on = model(x, **given)
    with torch.no_grad():
        heard = model.eval()(x, **given)
        with model.disable_adapter():
            original = model(x, **given)
    torch.testing.assert_close(heard[~padding], trained_on[~padding])
    assert not torch.allclose(heard[~padding], original[~padding], atol=0.1)


@pytest.mark.parametrize("normalise", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
def test_a_weight_that_is_made_at_each_call_is_not_merged_into(normalise):
    block = nn.Sequential()
    block.add_module("one", normalise(nn.Linear(8, 8)))
    model = get_peft_model(block, S2LoraConfig(r=2, target_modules=["one"]))
    awaken(model)
    x = torch.randn(3, 8)
    expected = model(x)
    with pytest.raises(ValueError, match="made anew at each call"):
        model.merge_adapter()
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("way", ["merge_adapter", "merge_and_unload"])
def test_a_weight_that_is_the_embedding_too_is_not_merged_into(way, tiny_whisper):
    whisper, config = tiny_whisper(), S2LoraConfig(r=2, target_modules=["proj_out", "fc1"])
    model = get_peft_model(whisper, config)
    with pytest.raises(ValueError, match=r"proj_out has its weight in common with another module"):
        getattr(model, way)()
    model.unload()
    whisper.proj_out.weight = nn.Parameter(whisper.proj_out.weight.detach().clone())
    model = get_peft_model(whisper, config).eval()
    awaken(model)
    expected = logits(model)
    merged = getattr(model, way)() or model
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
