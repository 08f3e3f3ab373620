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
