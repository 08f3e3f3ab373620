"""A chooser of strategies with a file of its own, and a test run with kernels and without."""

from pathlib import Path

import pytest

from fused_s2lora.kernels.choice import VARIABLE, Chooser
from fused_s2lora.kernels.strategy_record import StrategyFile
from tests.kernels.choices import Timer
from tests.kernels.operations import ON_GPU, use_kernels


@pytest.fixture(autouse=True)
def no_override(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "cache" / "strategies.json"


@pytest.fixture
def make(path):
    """A chooser as a new process would have it."""

    def chooser(timer=None, *, table=None, name="GPU A") -> Chooser:
        return Chooser(StrategyFile(path), table=table or {}, timer=timer or Timer(), device_name=lambda device: name)

    return chooser


@pytest.fixture(params=["kernels", "PyTorch"])
def kernels(request, monkeypatch) -> bool:
    """Once with Triton's kernels, in its interpreter where there is no GPU, and once in plain PyTorch."""
    if request.param == "PyTorch" and ON_GPU:
        pytest.skip("on a GPU the kernels run")
    use_kernels(monkeypatch, request.param == "kernels")
    return request.param == "kernels"
