"""What a configuration starts from, and what it refuses."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from fused_s2lora import S2LoraConfig, S2LoraLinear
from tests.fused_s2lora.adapters import batch, logits


def test_starts_as_the_frozen_model(tiny_whisper):
    model = get_peft_model(tiny_whisper(), S2LoraConfig()).eval()
    torch.testing.assert_close(logits(model), logits(tiny_whisper()))
    factors = model.base_model.s2lora_factors.pairs()[0]
    torch.testing.assert_close(factors.up["default"].norm(dim=0), torch.ones(8))
    torch.testing.assert_close(factors.down["default"].norm(dim=1), torch.ones(8))
    published = get_peft_model(tiny_whisper(), S2LoraConfig.paper()).base_model.s2lora_factors.pairs()[0]
    assert 0.01 < published.up["default"].std() < 0.03


@pytest.mark.parametrize("sharing", ["module", "none"])
def test_from_loras_start_the_first_step_is_the_factors(tiny_whisper, sharing):
    """The frozen model's output, with gradients of B and none of A and s, where s = 0 has those of s alone."""
    config = S2LoraConfig(init="lora", sharing=sharing, sparsity_weight=0.0)
    model = get_peft_model(tiny_whisper(), config).eval()
    torch.testing.assert_close(logits(model), logits(tiny_whisper()))
    model(**batch()).loss.backward()
    gradients = {name: value.grad.abs().max() for name, value in model.named_parameters() if value.requires_grad}
    learning = {name for name, size in gradients.items() if size > 0}
    assert learning == {name for name in gradients if ".s2lora_up." in name}


def test_unshared_is_lora(tiny_whisper):
    """With LoRA's A, and s left at 1, it computes what PEFT's LoRA does, and has the same gradients."""
    lora = get_peft_model(
        tiny_whisper(), LoraConfig(r=4, lora_alpha=4, target_modules=S2LoraConfig().target_modules)
    ).eval()
    ours = get_peft_model(tiny_whisper(), S2LoraConfig.unshared(r=4)).eval()
    counts = [model.get_nb_trainable_parameters()[0] for model in (lora, ours)]
    assert counts[1] == counts[0] + 32 * 4
    pairs = []
    for name, layer in ours.named_modules():
        if isinstance(layer, S2LoraLinear):
            theirs = lora.get_submodule(name)
            torch.testing.assert_close(layer.s2lora_down["default"].norm(dim=1), torch.ones(4))
            assert layer.s2lora_coefficients["default"].eq(1).all()
            with torch.no_grad():
                up = torch.randn_like(layer.s2lora_up["default"])
                for mine, other in ((layer.s2lora_up, theirs.lora_B), (layer.s2lora_down, theirs.lora_A)):
                    values = up if mine is layer.s2lora_up else other["default"].weight
                    mine["default"].copy_(values)
                    other["default"].weight.copy_(values)
                    pairs.append((name, mine["default"], other["default"].weight))
    losses = [model(**batch()).loss for model in (ours, lora)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    for name, mine, other in pairs:
        assert other.grad.abs().max() > 0, name
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("r", 0),
        ("r", 257),
        ("r", 8.0),
        ("r", True),
        ("dropout", "0.1"),
        ("scaling", None),
        ("sparsity_weight", float("nan")),
        ("threshold", float("nan")),
        ("norm_weight", float("inf")),
        ("init_std", float("inf")),
        ("sharing", "some"),
        ("coefficient", "vector"),
        ("init", "zeros"),
        ("penalty", "hard"),
        ("backend", "cuda"),
        ("audio_window", "short"),
        ("task", "summarise"),
        ("dropout", 1.0),
        ("sparsity_weight", -1.0),
        ("scaling", 0.0),
        ("coefficient_lr_ratio", 0.0),
    ],
)
def test_config_refuses_what_makes_no_sense(field, value):
    with pytest.raises(ValueError, match=f"{field}="):
        S2LoraConfig(**{field: value})


def test_a_start_that_nothing_could_leave_is_refused():
    with pytest.raises(ValueError, match="init='lora' starts with B = 0"):
        S2LoraConfig(init="lora", train_factors=False)
