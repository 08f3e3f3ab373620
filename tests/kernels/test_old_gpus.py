"""GPUs for which Triton has no matrix instructions: PyTorch's products there, and `fused` is not tried."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fused_s2lora import s2_linear, s2_linear_group
from fused_s2lora.kernels import device, strategies
from fused_s2lora.kernels.choice import VARIABLE
from fused_s2lora.kernels.strategies import STRATEGIES


@pytest.fixture
def operands(monkeypatch):
    """What `s2_linear` takes, without data, on a GPU of a compute capability that can be given."""

    def make(*capability: int) -> list:
        monkeypatch.setattr(device, "_capability", lambda index: capability)
        device._too_old.cache_clear()
        sizes = (300, 48), (32, 48), (32,), (8, 48), (32, 8), (8,)
        return [torch.empty(*size, dtype=torch.float16, device="cuda") for size in sizes]

    with FakeTensorMode():
        yield make
    device._too_old.cache_clear()


@pytest.fixture
def candidates(monkeypatch):
    """The names that were chosen from."""
    asked = []

    def pick(backend, shape, of, names):
        asked.append(tuple(names))
        return "merged"

    monkeypatch.setattr("fused_s2lora.kernels.s2_linear.pick", pick)
    return asked


@pytest.mark.parametrize(("capability", "runs"), [((7, 0), False), ((7, 5), False), ((8, 0), True), ((12, 0), True)])
def test_triton_multiplies_from_compute_capability_8_on(operands, candidates, capability, runs):
    x, weight, bias, *factors, e = operands(*capability)
    assert device.runs_triton(x) == runs
    y, *_ = s2_linear_group(x, [weight], bias, *factors, [e])
    assert y.shape == (300, 32)
    assert candidates == [tuple(name for name in ("reference", *STRATEGIES) if runs or name != "fused")]


def test_fused_says_why_it_cannot_run(operands, monkeypatch):
    with pytest.raises(
        RuntimeError, match=r"backend='fused' cannot run here: Triton .* capability 7\.5, it needs 8\.0;"
    ):
        s2_linear(*operands(7, 5), backend="fused")
    monkeypatch.setenv(VARIABLE, "fused")
    with pytest.raises(RuntimeError, match=rf"variable {VARIABLE}=fused cannot .* it needs 8\.0; unset it"):
        s2_linear(*operands(7, 5))


@pytest.mark.parametrize(("name", "stored"), [("merged", torch.float16), ("split", torch.float32)])
def test_dense_weights_are_not_kept(operands, name, stored):
    """On a CPU they are; an old GPU has little memory."""
    x, weight, bias, down, up, e = operands(7, 5)
    seed = torch.zeros(1, dtype=torch.int64, device="cpu")
    group = strategies.Group([weight.to(stored)], bias, down, up, e.unsqueeze(0), seed)
    assert STRATEGIES[name].forward(x, group, None).dense is None
