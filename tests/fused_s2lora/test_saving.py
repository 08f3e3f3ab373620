"""The adapter and its configuration as files: saved, loaded, and refused where they do not fit."""

import pickle
import warnings
from collections import OrderedDict

import pytest
import torch
from peft import AutoPeftModel, PeftConfig, PeftModel, get_peft_model
from safetensors import safe_open
from torch import nn
from transformers import WhisperForConditionalGeneration

from fused_s2lora import S2LoraConfig
from tests.fused_s2lora.adapters import adapted, awaken, logits


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_saved_and_loaded(tiny_whisper, tmp_path, low_cpu_mem_usage):
    model = adapted(tiny_whisper, r=4, sharing="module")
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    factors = [key for key in shapes if "s2lora_factors" in key]
    coefficients = [key for key in shapes if key.endswith("s2lora_coefficients")]
    assert len(factors) == 2 * 5
    assert len(coefficients) == 32
    assert len(shapes) == len(factors) + len(coefficients)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loaded = PeftModel.from_pretrained(tiny_whisper(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
    torch.testing.assert_close(logits(loaded), logits(model))
    assert loaded.get_nb_trainable_parameters()[0] == 0
    encoder = loaded.base_model.model.model.encoder.layers
    assert encoder[0].fc1.s2lora_up["default"] is encoder[1].fc2.s2lora_up["default"]


def test_saved_from_a_state_that_has_each_tensor_once(tiny_whisper, tmp_path):
    """As scripts gather it from `named_parameters()`."""
    model = adapted(tiny_whisper, r=4)
    trained = {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}
    model.save_pretrained(tmp_path, state_dict=trained)
    loaded = PeftModel.from_pretrained(tiny_whisper(), tmp_path).eval()
    torch.testing.assert_close(logits(loaded), logits(model))


def test_modules_and_adapters_may_have_names_like_the_adapters_parameters(tmp_path):
    """PEFT, too, tells parameters by their place and not by a name with s2lora_ in it."""

    def base() -> nn.Module:
        torch.manual_seed(0)
        maps = {"0": nn.Linear(8, 8), "s2lora_up": nn.Linear(8, 8), "s2lora_head": nn.Linear(8, 4)}
        return nn.Sequential(OrderedDict(maps))

    config = S2LoraConfig(r=2, target_modules=["0", "s2lora_up"], modules_to_save=["s2lora_head"])
    model = get_peft_model(base(), config)
    awaken(model)
    with torch.no_grad():
        model.base_model.model.s2lora_head.modules_to_save["default"].weight.mul_(2.0)
    x = torch.randn(3, 8)
    model.save_pretrained(tmp_path)
    for name in ("default", "s2lora_first"):
        torch.testing.assert_close(PeftModel.from_pretrained(base(), tmp_path, adapter_name=name)(x), model(x))


def test_config_survives_files_and_pickle(tmp_path):
    config = S2LoraConfig(r=4, sharing="stack", audio_window="trim", audio_window_margin=32, language="en")
    config.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, S2LoraConfig)
    assert loaded == config
    assert pickle.loads(pickle.dumps(config)) == config


def test_auto_peft_model_finds_the_class(tiny_whisper, tmp_path):
    tiny_whisper().save_pretrained(tmp_path / "base")
    base = WhisperForConditionalGeneration.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, S2LoraConfig())
    awaken(model)
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModel.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded.eval()), logits(model.eval()))


def test_file_of_another_rank_or_model_is_refused(tiny_whisper, tmp_path):
    adapted(tiny_whisper, r=4).save_pretrained(tmp_path / "a")
    config = S2LoraConfig.from_pretrained(tmp_path / "a")
    with pytest.raises(ValueError, match="does not fit this model"):
        PeftModel.from_pretrained(tiny_whisper(d_model=48, encoder_ffn_dim=96, decoder_ffn_dim=96), tmp_path / "a")
    with pytest.raises(ValueError, match="does not fit this model: it lacks"):
        PeftModel.from_pretrained(tiny_whisper(encoder_layers=3), tmp_path / "a")
    with pytest.raises(ValueError, match="does not fit this model: it has"):
        PeftModel.from_pretrained(tiny_whisper(encoder_layers=1), tmp_path / "a")
    config.r = 6
    with pytest.raises(ValueError, match=r"is \(4,\) in the file and \(6,\) here"):
        PeftModel.from_pretrained(tiny_whisper(), tmp_path / "a", config=config)
