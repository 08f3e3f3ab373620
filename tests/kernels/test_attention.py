"""Attention in blocks of heads against float64, by the error of the same attention written out in PyTorch."""

import pytest
import torch
from torch import Tensor

from fused_s2lora.kernels import attention as attention_module
from fused_s2lora.kernels.attention import attention
from fused_s2lora.kernels.device import attends_in_blocks
from tests.oracle import FLOOR, check_close

NAMES = ("o", "q", "k", "v")
# batch, heads, T, S, D
CASES = {
    "encoder": (2, 3, 75, 75, 16),
    "cross-attention": (2, 3, 5, 150, 16),
    "one query": (3, 2, 1, 63, 64),
    "one key": (1, 2, 9, 1, 8),
    "one head at a time": (1, 3, 130, 130, 8),
    "30 s": (1, 2, 1500, 1500, 64),
    "no batch": (0, 2, 4, 4, 8),
}


def written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT, -1) @ v


def operands(case: tuple[int, ...]) -> tuple[list[Tensor], Tensor]:
    """q, k, v and do as views of wider buffers of NaN, heads and positions swapped in memory as models have them."""
    batch, heads, rows, columns, width = case
    generator = torch.Generator().manual_seed(0)

    def normal(length: int) -> Tensor:
        buffer = torch.full((batch, length, heads, width + 3), torch.nan, dtype=torch.bfloat16)
        buffer[..., :width] = torch.randn(batch, length, heads, width, generator=generator)
        return buffer[..., :width].transpose(1, 2)

    q, k, v, do = (normal(length) for length in (rows, columns, columns, rows))
    return [q * width**-0.25, k, v], do


def results(operation, inputs: list[Tensor], do: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in inputs]
    o = operation(*leaves)
    return dict(zip(NAMES, (o.detach(), *torch.autograd.grad(o, leaves, do.to(dtype))), strict=True))


def check_attention(operation, case: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> None:
    inputs, do = operands(case)
    got = results(operation, inputs, do, dtype)
    oracle, eager = (results(written_out, inputs, do, which) for which in (torch.float64, dtype))
    for name, expected in oracle.items():
        check_close(name, got[name], expected, eager[name], FLOOR[dtype])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_attention_and_its_gradients(case, dtype, monkeypatch):
    monkeypatch.setattr(attention_module, "_SCORES_A_THREAD", 2**13)  # several blocks of several heads, too
    check_attention(attention, case, dtype)


@pytest.mark.parametrize(
    "fault",
    [
        lambda q, k, v: attention(q, v, k),
        lambda q, k, v: attention(q, k.roll(1, 2), v),
        lambda q, k, v: torch.cat([attention(q, k, v)[:, :1], attention(q, k, v)[:, 1:] * 0], 1),
        lambda q, k, v: attention(q, k.detach(), v) + 0 * k.sum(),
    ],
    ids=["k and v swapped", "keys shifted", "heads lost", "no gradient of k"],
)
def test_a_fault_shows(fault):
    with pytest.raises(AssertionError):
        check_attention(fault, CASES["encoder"])


def test_autocast_changes_nothing():
    inputs, _ = operands(CASES["encoder"])
    plain = attention(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attention(*inputs), plain)


def test_no_second_derivative():
    q, k, v = (torch.randn(1, 1, 2, 2, requires_grad=True) for _ in "qkv")
    (dq,) = torch.autograd.grad(attention(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dq.sum().backward()


def test_operands_that_do_not_fit_are_named():
    q = torch.zeros(1, 2, 3, 4)
    with pytest.raises(ValueError, match=r"q \(1, 2, 3, 4\), k \(1, 2, 5, 8\)"):
        attention(q, torch.zeros(1, 2, 5, 8), torch.zeros(1, 2, 5, 8))
    with pytest.raises(ValueError, match="cast them to one dtype"):
        attention(q, q.double(), q.double())


def test_only_bfloat16_on_a_cpu_that_multiplies_it(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    q = torch.zeros(1, 1, 1, 1, dtype=torch.bfloat16)
    assert attends_in_blocks(q)
    assert not attends_in_blocks(q.float())
    assert not attends_in_blocks(q.to("meta"))
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert not attends_in_blocks(q)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert not attends_in_blocks(q)
