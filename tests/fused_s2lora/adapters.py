"""Adapted tiny Whispers and their input, for the tests of the adapter."""

from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import nn

from fused_s2lora import S2LoraConfig


def batch(seed: int = 0) -> dict[str, torch.Tensor]:
    """Two utterances for a tiny Whisper: features [2, 8, 100] and labels [2, 5]."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "input_features": torch.randn(2, 8, 100, generator=generator),
        "labels": torch.randint(3, 90, (2, 5), generator=generator),
    }


def awaken(model: nn.Module, seed: int = 0, scale: float = 0.3) -> None:
    """Coefficients that are not zero, so that the adapter does something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".s2lora_coefficients." in name:
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))


def adapted(tiny_whisper: Callable[..., nn.Module], **config: Any) -> PeftModel:
    """A tiny Whisper whose adapter is awake, in evaluation mode."""
    model = get_peft_model(tiny_whisper(), S2LoraConfig(**config))
    awaken(model)
    return model.eval()


def logits(model: nn.Module) -> torch.Tensor:
    """What the model makes of `batch()`, without gradient."""
    with torch.no_grad():
        return model(**batch()).logits


def step(model: nn.Module, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    """Loss and the gradient of every trainable parameter, in one training step."""
    model.zero_grad()
    inputs = {name: value.to(next(model.parameters()).device) for name, value in batch().items()}
    loss = model(input_features=inputs["input_features"].to(dtype), labels=inputs["labels"]).loss
    loss.backward()
    trainable = {name: value for name, value in model.named_parameters() if value.requires_grad}
    assert all(value.grad is not None for value in trainable.values())
    return {"loss": loss.detach(), **{name: value.grad.clone() for name, value in trainable.items()}}


def in_float64(tiny_whisper, **config) -> PeftModel:
    return adapted(tiny_whisper, r=4, **config).double().train()


def assert_same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        error = (got[name] - value).abs().max()
        assert error <= 1e-9 * value.abs().max() + 1e-12, f"{name} is off by {error:.1e}"
