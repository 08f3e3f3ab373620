"""Which precision "auto" is on which device: with made-up devices."""

import pytest
import torch

from fused_s2lora.training.precision import resolved


@pytest.mark.parametrize(
    ("gpu", "cpu", "expected"),
    [("own bf16", False, "bf16"), ("emulated bf16", True, "fp16"), (None, True, "bf16"), (None, False, "fp32")],
)
def test_auto_is_what_the_device_multiplies_in_hardware(monkeypatch, gpu, cpu, expected):
    """PyTorch computes bf16 on every GPU, on those before Ampere slowly: they have fp16."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu is not None)
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or gpu == "own bf16"
    )
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: cpu)
    assert resolved("auto") == expected
    assert resolved("fp32") == "fp32"
