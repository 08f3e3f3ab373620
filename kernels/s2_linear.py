"""y = x Wᵀ + b + ((x Aᵀ) ⊙ e) Bᵀ as one differentiable operation with a frozen W and b.

`s2_linear` checks its arguments, picks the strategy and calls `S2LinearFunction`, whose forward and backward are the
strategy's: Triton kernels (`triton_linear.py`) or a merged weight in PyTorch (`merged.py`).
"""

from typing import Any, Literal

import torch
from torch import Tensor

from .merged import merged_backward, merged_forward
from .reference import s2_linear_reference
from .triton_linear import triton_backward, triton_forward, triton_is_usable

Backend = Literal["auto", "triton", "merged", "reference"]
BACKENDS = ("auto", "triton", "merged", "reference")
MAX_RANK = 256

STRATEGIES = {"merged": (merged_forward, merged_backward), "triton": (triton_forward, triton_backward)}


class S2LinearFunction(torch.autograd.Function):
    """x [M, K], weight [N, K], bias [N] or None, down [r, K], up [N, r], coefficients [r] -> y [M, N].

    Gradients flow to x, down, up and coefficients, each computed only if asked for.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        down: Tensor,
        up: Tensor,
        coefficients: Tensor,
        strategy: str,
    ) -> Tensor:
        y, extra = STRATEGIES[strategy][0](x, weight, bias, down, up, coefficients)
        # With frozen factors and coefficients the gradient of x needs neither x nor z.
        ctx.save_for_backward(x if any(ctx.needs_input_grad[3:6]) else None, weight, extra, down, up, coefficients)
        ctx.strategy = strategy
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("s2_linear has no second derivative; use backend='reference' with create_graph=True")
        x, weight, extra, down, up, coefficients = ctx.saved_tensors
        needs = (ctx.needs_input_grad[0], *ctx.needs_input_grad[3:6])
        backward = STRATEGIES[ctx.strategy][1]
        dx, d_down, d_up, d_coefficients = backward(dy, x, weight, extra, down, up, coefficients, needs)
        return dx, None, None, d_down, d_up, d_coefficients, None


def s2_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    coefficients: Tensor,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """A frozen linear map with a low-rank path in shared factors: y = x Wᵀ + b + ((x Aᵀ) ⊙ e) Bᵀ.

    The update B diag(e) A is the paper's ΔW (arXiv 2309.11756, section 2) with any scaling already in e.

    Args:
        x: [..., K], any leading dimensions and strides.
        weight: W, [N, K], frozen.
        bias: b, [N] or None, frozen.
        down: A, [r, K] with 1 <= r <= 256; its dtype may be wider than x's (fp32 factors on a half-precision model).
        up: B, [N, r].
        coefficients: e, [r].
        backend: "triton" runs the kernels or raises; "merged" forms the adapted weight in PyTorch; "reference" is plain
            PyTorch, differentiable twice; "auto" is Triton on a GPU and merged on a CPU.

    Returns:
        y, [..., N], in x's dtype; under `torch.autocast`, in its dtype, as `torch.nn.functional.linear`.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together; a weight or bias that requires a gradient.
        RuntimeError: backend "triton" where no Triton kernel can run.
    """
    _check(x, weight, bias, down, up, coefficients, backend)
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    elif x.dtype != weight.dtype:
        raise ValueError(f"x is {x.dtype} and weight {weight.dtype}: cast one of them or run under torch.autocast")
    if backend == "reference":
        return s2_linear_reference(x, weight, bias, down, up, coefficients)
    strategy = _strategy(x, backend)
    with torch.autocast(x.device.type, enabled=False):
        rows = x.reshape(-1, x.shape[-1])
        y = S2LinearFunction.apply(rows, weight, bias, down, up, coefficients, strategy)
    return y.view(*x.shape[:-1], weight.shape[0])


def _strategy(x: Tensor, backend: Backend) -> str:
    if backend == "triton":
        usable, reason = triton_is_usable(x)
        if not usable:
            raise RuntimeError(f"backend='triton' cannot run here: {reason}; use backend='auto'")
        return "triton"
    if backend == "merged":
        return "merged"
    return "triton" if x.is_cuda and triton_is_usable(x)[0] else "merged"


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    coefficients: Tensor,
    backend: str,
) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}, not one of {', '.join(BACKENDS)}")
    if weight.dim() != 2:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, not [N, K]")
    outputs, inputs = weight.shape
    if x.dim() < 1 or x.shape[-1] != inputs:
        raise ValueError(f"x has shape {tuple(x.shape)}, not [..., {inputs}] as weight {tuple(weight.shape)} needs")
    rank = coefficients.numel()
    if not 1 <= rank <= MAX_RANK:
        raise ValueError(f"coefficients has {rank} entries; a rank is between 1 and {MAX_RANK}")
    expected = {
        "bias": (bias, (outputs,)),
        "down": (down, (rank, inputs)),
        "up": (up, (outputs, rank)),
        "coefficients": (coefficients, (rank,)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            found, needed = tuple(tensor.shape), f"weight {(outputs, inputs)} and rank {rank} need"
            raise ValueError(f"{name} has shape {found}, not {shape} as {needed}")
        if tensor.device != weight.device:
            raise ValueError(f"{name} is on {tensor.device} and weight on {weight.device}: move them to one device")
    if x.device != weight.device:
        raise ValueError(f"x is on {x.device} and weight on {weight.device}: move them to one device")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.requires_grad:
            raise ValueError(
                f"{name} requires a gradient but s2_linear keeps it frozen: call {name}.requires_grad_(False)"
            )
