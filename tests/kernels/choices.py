"""Candidates, shapes and made-up times for the tests of the choice of strategy."""

import pytest
import torch

from fused_s2lora.kernels.strategy_record import FROZEN, Shape

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
NAMES = ("reference", "merged", "fused", "augmented")
CANDIDATES = dict.fromkeys(NAMES, lambda operands: pytest.fail("a candidate ran"))
FIELDS = (768, 3072, 8, 1, torch.bfloat16, torch.float32, True)
SHAPE, FEW_ROWS = Shape(2048, *FIELDS), Shape(64, *FIELDS)
MS = {"reference": 3.0, "merged": 2.0, "fused": 1.0, "augmented": 4.0, FROZEN: 0.5}


class Timer:
    """Stands for the GPU: gives planted times and notes which shapes were asked for."""

    def __init__(self, ms=MS, errors=()):
        self.ms, self.errors, self.asked = dict(ms), dict(errors), []

    def __call__(self, shape, device, candidates):
        self.asked.append(shape)
        return self.ms, self.errors


def forbidden(*args):
    """A timer for a chooser that is not to time."""
    raise AssertionError("timed")
