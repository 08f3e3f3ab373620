"""How results are judged: against float64, by the error PyTorch itself makes in the same precision."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fused_s2lora import s2_linear_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLOOR = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
OPERANDS = ("x", "weight", "bias", "down", "up", "coefficients")
TRAINED = ("x", "down", "up", "coefficients")


@dataclass
class Problem:
    """Operands of one `s2_linear`, the output gradient, and the names of the operands that are trained."""

    operands: dict[str, Tensor | None]
    dy: Tensor
    trained: tuple[str, ...] = TRAINED


def make_problem(
    rows: int | tuple[int, ...],
    inputs: int,
    outputs: int,
    rank: int,
    dtype: torch.dtype,
    *,
    bias: bool = True,
    factor_dtype: torch.dtype = torch.float32,
    trained: tuple[str, ...] = TRAINED,
    padding: float = torch.nan,
    seed: int = 0,
) -> Problem:
    """Random operands on `DEVICE`; x and W lie in larger buffers of `padding`, so that reading past an edge shows."""
    generator = torch.Generator().manual_seed(seed)
    leading = (rows,) if isinstance(rows, int) else rows

    def normal(*shape: int, scale: float, dtype: torch.dtype) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(DEVICE, dtype)

    def padded(values: Tensor) -> Tensor:
        buffer = torch.full((*values.shape[:-1], values.shape[-1] + 7), padding, dtype=values.dtype, device=DEVICE)
        buffer[..., : values.shape[-1]] = values
        return buffer[..., : values.shape[-1]]

    operands: dict[str, Tensor | None] = {
        "x": padded(normal(*leading, inputs, scale=1.0, dtype=dtype)),
        "weight": padded(normal(outputs, inputs, scale=inputs**-0.5, dtype=dtype)),
        "bias": normal(outputs, scale=1.0, dtype=dtype) if bias else None,
        "down": normal(rank, inputs, scale=inputs**-0.5, dtype=factor_dtype),
        "up": normal(outputs, rank, scale=1.0, dtype=factor_dtype),
        "coefficients": normal(rank, scale=0.5, dtype=factor_dtype),
    }
    return Problem(operands, normal(*leading, outputs, scale=1.0, dtype=dtype), trained)


def run(problem: Problem, operation: Callable[..., Tensor], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Output "y" and the gradient of every trained operand, all operands first cast to `dtype` if given."""
    operands = {}
    for name, value in problem.operands.items():
        if value is not None:
            value = value.detach().to(dtype) if dtype is not None else value.detach()
            value.requires_grad_(name in problem.trained)
        operands[name] = value
    y = operation(**operands)
    results = {"y": y.detach()}
    if problem.trained:
        wanted = [operands[name] for name in problem.trained]
        gradients = torch.autograd.grad(y, wanted, problem.dy.to(y.dtype))
        results |= dict(zip(problem.trained, gradients, strict=True))
    return results


def check(problem: Problem, operation: Callable[..., Tensor]) -> None:
    """Fails unless `operation` gives the output and gradients of the equation.

    In every entry the error against float64 is at most twice the largest error of PyTorch's own composition in the
    problem's precision, and a floor for where that happens to be exact.
    """
    got = run(problem, operation)
    oracle = run(problem, s2_linear_reference, torch.float64)
    eager = run(problem, eager_linear)
    floor = FLOOR[problem.dy.dtype]
    for name, expected in oracle.items():
        check_close(name, got[name], expected, eager[name], floor)


def eager_linear(x: Tensor, down: Tensor, up: Tensor, coefficients: Tensor, **frozen: Tensor | None) -> Tensor:
    """PyTorch's own composition with every product in x's precision: the yardstick."""
    factors = {"down": down.to(x.dtype), "up": up.to(x.dtype), "coefficients": coefficients.to(x.dtype)}
    return s2_linear_reference(x, **frozen, **factors)


def check_close(
    name: str, got: Tensor, oracle: Tensor, eager: Tensor, floor: float, terms: Tensor | None = None
) -> None:
    """max|got − oracle| ≤ 2 · max|eager − oracle| + floor · max|terms|, everything finite, shapes and dtypes equal.

    `terms` is the oracle unless given. Give the sum of |terms| where an entry may be far smaller than what it sums and
    no other entry is larger, as of a single dot product: rounding is in proportion to it.
    """
    assert got.shape == oracle.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(oracle.shape)}"
    assert got.dtype == eager.dtype, f"{name}: {got.dtype}, expected {eager.dtype}"
    assert torch.isfinite(got).all(), f"{name}: not finite everywhere"
    if got.numel() == 0:
        return
    error = (got.double() - oracle).abs().max()
    scale = (oracle if terms is None else terms).abs().max()
    allowed = 2 * (eager.double() - oracle).abs().max() + floor * scale
    assert error <= allowed, f"{name}: off by {error:.3e}, {allowed:.3e} is allowed"
