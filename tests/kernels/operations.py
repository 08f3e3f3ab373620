"""The operation by each of its strategies, for the tests that hold them all to one thing."""

import functools

import pytest
import torch

from fused_s2lora import s2_linear
from fused_s2lora.kernels import device
from fused_s2lora.kernels.strategies import STRATEGIES
from tests.oracle import DEVICE

ON_GPU = DEVICE == "cuda"
OPERATIONS = {name: functools.partial(s2_linear, backend=name) for name in STRATEGIES}
each_operation = pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)


def use_kernels(monkeypatch, use: bool = True) -> None:
    """Triton's kernels, in its interpreter where there is no GPU, or plain PyTorch."""
    monkeypatch.setattr(device, "runs_triton", lambda x: use and x.dtype != torch.float64)
