"""The layers and the step as pytest-benchmark cases:  pytest --benchmark-only bench

Every provider of a layer is first held to float64; a wrong one fails here instead of being timed.
"""

import itertools

import pytest
import torch

from bench.cases import Case, make_operands
from bench.layer import passes
from bench.providers import providers, refuse_wrong
from bench.step import METHODS, StepCase, build_step

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ON_GPU = DEVICE == "cuda"
CASES = [
    Case("encoder-layer", *(("large-v3", 24_000) if ON_GPU else ("base", 1040)), precision="autocast"),
    Case("decoder-layer", *(("large-v3", 512) if ON_GPU else ("base", 64)), precision="autocast"),
]
STEP = StepCase("small" if ON_GPU else "base", 4, "trim")


@pytest.mark.parametrize(
    ("case", "provider"),
    [pair for case in CASES for pair in itertools.product([case], providers(case, DEVICE))],
    ids=str,
)
def test_layer(benchmark, case, provider):
    benchmark.group = f"{case}, forward + backward"
    groups = make_operands(case, DEVICE)
    provided = [providers(case, DEVICE)[provider](group) for group in groups]
    for one, group in zip(provided, groups, strict=True):
        refuse_wrong(provider, one, group, case.compute_dtype)
    benchmark(_finished, passes(provided, groups)["both"])


@pytest.mark.parametrize("method", METHODS)
def test_step(benchmark, method):
    benchmark.group = str(STEP)
    benchmark.pedantic(build_step(method, STEP), rounds=5, warmup_rounds=2)


def _finished(call):
    call()
    if ON_GPU:
        torch.cuda.synchronize()
