"""An adapter scaled down after training lies on the line between the original model and the adapted one."""

import copy

import pytest
import torch
from peft import AdaLoraConfig, IA3Config, LoHaConfig, LoraConfig, get_peft_model

from fused_s2lora import S2LoraConfig, fuse_whisper, interpolate
from fused_s2lora.training.audio_window import AudioWindow
from fused_s2lora.training.models import load_adapter, remember_speech, remembered_speech
from tests.fused_s2lora.adapters import adapted, logits

TARGETS = ["q_proj", "v_proj"]
CONFIGS = {
    "S2-LoRA": S2LoraConfig(r=4),
    "S2-LoRA, not shared": S2LoraConfig(r=4, sharing="none", coefficient="scalar"),
    "LoRA": LoraConfig(r=4, target_modules=TARGETS),
    "LoRA with biases of its own": LoraConfig(r=4, target_modules=TARGETS, lora_bias=True),
    "LoRA on an embedding": LoraConfig(r=4, target_modules=[*TARGETS, "embed_positions"]),
    "AdaLoRA": AdaLoraConfig(init_r=4, target_r=2, target_modules=TARGETS, total_step=10),
}


def trained(model, config):
    """A model with an adapter whose update is not zero."""
    model = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def weights(model) -> dict[str, torch.Tensor]:
    """Of the plain model with its adapter merged."""
    return {name: value.clone() for name, value in model.merge_and_unload().named_parameters()}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_weights_lie_on_the_line(tiny_whisper, config):
    original = {name: value.clone() for name, value in tiny_whisper().named_parameters()}
    whole = weights(trained(tiny_whisper(), config))
    model = trained(tiny_whisper(), config)
    interpolate(model, 0.25)
    moved = 0
    for name, value in weights(model).items():
        torch.testing.assert_close(value, torch.lerp(original[name], whole[name], 0.25), msg=name)
        moved += not torch.equal(whole[name], original[name])
    assert moved >= 12


def test_ends_of_the_line_and_a_fused_model(tiny_whisper):
    model = adapted(tiny_whisper)
    fuse_whisper(model)
    before = logits(model)
    interpolate(model, 1.0)
    assert torch.equal(logits(model), before)
    interpolate(model, 0.0)
    with model.disable_adapter():
        original = logits(model)
    torch.testing.assert_close(logits(model), original)
    assert not torch.allclose(before, original)


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_a_share_out_of_range_is_refused(tiny_whisper, share):
    with pytest.raises(ValueError, match="not between 0 and 1"):
        interpolate(adapted(tiny_whisper), share)


def test_other_adapters_are_refused(tiny_whisper):
    model = get_peft_model(tiny_whisper(), IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    with pytest.raises(ValueError, match=r"an active adapter of peft\.tuners\.ia3\.layer"):
        interpolate(model, 0.5)
    with pytest.raises(ValueError, match="no active adapter"):
        interpolate(tiny_whisper(), 0.5)


def test_whole_modules_trained_beside_the_adapter_are_refused(tiny_whisper):
    model = get_peft_model(tiny_whisper(), S2LoraConfig(modules_to_save=["layer_norm"]))
    with pytest.raises(ValueError, match="modules_to_save"):
        interpolate(model, 0.5)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"bias": "all"}, "biases"),
        ({"bias": "lora_only"}, "biases"),
        ({"init_lora_weights": "pissa"}, "changed base model"),
        ({"init_lora_weights": "pissa_niter_4"}, "changed base model"),
        ({"init_lora_weights": "OLoRA"}, "changed base model"),
    ],
    ids=str,
)
def test_lora_that_is_not_on_the_line_is_refused(tiny_whisper, options, named):
    model = trained(tiny_whisper(), LoraConfig(r=4, target_modules=TARGETS, **options))
    with pytest.raises(ValueError, match=named):
        interpolate(model, 0.5)


@pytest.mark.parametrize("start", ["corda", "loftq", "lora_ga"])
def test_starts_that_need_data_or_a_gpu_are_refused_by_name(tiny_whisper, start):
    model = trained(tiny_whisper(), LoraConfig(r=4, target_modules=TARGETS))
    model.peft_config["default"].init_lora_weights = start
    with pytest.raises(ValueError, match=rf"changed base model \({start}\)"):
        interpolate(model, 0.5)


@pytest.mark.parametrize("config", ["S2-LoRA", "LoRA"])
def test_an_adapter_that_is_not_active_stays_as_it_is(tiny_whisper, config):
    model = trained(tiny_whisper(), CONFIGS[config])
    kept = {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}
    model.add_adapter("other", copy.deepcopy(CONFIGS[config]))
    for active in ("other", "default"):
        model.set_adapter(active)
        interpolate(model, 0.5)
        same = all(torch.equal(model.get_parameter(name), value) for name, value in kept.items())
        assert same == (active == "other")


@pytest.mark.parametrize("config", ["S2-LoRA", "LoRA", "AdaLoRA"])
def test_a_merged_adapter_is_refused(tiny_whisper, config):
    model = trained(tiny_whisper(), CONFIGS[config])
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        interpolate(model, 0.5)


@pytest.mark.parametrize("config", ["S2-LoRA", "LoRA", "AdaLoRA"])
def test_window_and_language_of_a_share_that_is_saved(tiny_whisper, tmp_path, config):
    """PEFT writes back what S2-LoRA's configuration holds; for its own methods the README says to write it again."""
    first, second = tmp_path / "first", tmp_path / "second"
    get_peft_model(tiny_whisper(), CONFIGS[config]).save_pretrained(first)
    remember_speech(first, AudioWindow("trim", 32), "sw", "transcribe")
    expected = remembered_speech(first)
    model = load_adapter(tiny_whisper(), first)
    interpolate(model, 0.5)
    model.save_pretrained(second)
    assert (remembered_speech(second) == expected) == (config == "S2-LoRA")
    remember_speech(second, AudioWindow("trim", 32), "sw", "transcribe")
    assert remembered_speech(second) == expected


def test_an_active_adapter_of_another_kind_is_refused(tiny_whisper):
    """Its update would stay where it is."""
    model = get_peft_model(tiny_whisper(), LoraConfig(r=4, target_modules=TARGETS), mixed=True)
    model.add_adapter("other", LoHaConfig(r=4, target_modules=TARGETS, init_weights=False))
    model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match=r"active adapter of peft\.tuners\.loha\.layer"):
        interpolate(model, 0.5)
    model.set_adapter(["default"])
    interpolate(model, 0.5)
