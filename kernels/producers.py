"""LayerNorm and GELU that make the input h of a linear map and z = h Aᵀ, of its low-rank part.

    h  = LayerNorm(x) or GELU(x)            z  = h Aᵀ, from the rounded h

z is a by-product without a gradient: what uses h and z returns as dh the gradient of its whole map. A LayerNorm makes
it in its own pass. A GELU's rows are too long for that: a pass of its own, measured on an H100, costs less than erf, a
product and two streams in one kernel. With spare columns h and z lie in one matrix [h | z | 0], written in one pass, as
a product of depth K + R wants them (`augmented.py`).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import activation, device, layer_norm
from .configs import NORM_MAX_WIDTH, rank_block


class LayerNormProjectFunction(torch.autograd.Function):
    """x [M, K], weight [K], bias [K], down [r, K] -> h [M, K], z [M, r]. The gradient flows from h to x."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        eps: float,
        down: Tensor,
        out_dtype: torch.dtype,
        spare: int,
    ) -> tuple[Tensor, Tensor]:
        buffer, z, mean, rstd = layer_norm.layer_norm_project(x, weight, bias, eps, down, out_dtype, spare)
        ctx.save_for_backward(x, weight, mean, rstd)
        return _by_product(ctx, buffer, z, down, spare)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        dx = layer_norm.layer_norm_input_gradient(dh, *ctx.saved_tensors)
        return dx, None, None, None, None, None, None


class GeluProjectFunction(torch.autograd.Function):
    """x [M, K], down [r, K] -> h [M, K], z [M, r]. The gradient flows from h to x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, down: Tensor, out_dtype: torch.dtype, spare: int) -> tuple[Tensor, Tensor]:
        buffer, z = activation.activation_project(x, down, True, out_dtype, spare)
        ctx.save_for_backward(x)
        return _by_product(ctx, buffer, z, down, spare)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        return activation.gelu_input_gradient(dh, x), None, None, None


def _by_product(ctx: Any, buffer: Tensor, z: Tensor, down: Tensor, spare: int) -> tuple[Tensor, Tensor]:
    h, z = split_spare(buffer, down) if spare else (buffer, z)
    ctx.mark_non_differentiable(z)
    return h, z


def split_spare(buffer: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """[h | z | ·] [M, K + spare], down [r, K] -> h [M, K] and z [M, r], views."""
    rank, inputs = down.shape
    return buffer[:, :inputs], buffer[:, inputs : inputs + rank]


def layer_norm_project(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, down: Tensor, out_dtype: torch.dtype, spare: int = 0
) -> tuple[Tensor, Tensor]:
    """A frozen LayerNorm over the last dimension, and z = h Aᵀ of what it returns.

    Args:
        x: [M, K], float32 (as autocast leaves the residual stream) or half precision, any strides.
        weight: [K], frozen.
        bias: [K], frozen.
        eps: added to the variance.
        down: A, [r, K] with r <= 256. It gets no gradient here; what uses z computes it, dA = (g ⊙ e)ᵀ h.
        out_dtype: dtype of h and z.
        spare: 0, or `rank_block(r)`: h and z are then views of one matrix [h | z | 0] [M, K + spare].

    Returns:
        h [M, K] and z [M, r]; z has no gradient.

    Raises:
        ValueError: shapes that do not fit together; a weight or bias that requires a gradient.
    """
    _check(x, down, spare, weight=weight, bias=bias)
    if _fuses(x, out_dtype, NORM_MAX_WIDTH):
        return LayerNormProjectFunction.apply(x, weight, bias, eps, down, out_dtype, spare)
    return _reference_project(_layer_norm(x, weight, bias, eps, out_dtype), down, spare)


def gelu_project(x: Tensor, down: Tensor, out_dtype: torch.dtype, spare: int = 0) -> tuple[Tensor, Tensor]:
    """The exact GELU h = x Φ(x) of x [M, K], and z = h Aᵀ; otherwise as `layer_norm_project`."""
    _check(x, down, spare)
    if _fuses(x, out_dtype):
        return GeluProjectFunction.apply(x, down, out_dtype, spare)
    return _reference_project(F.gelu(x).to(out_dtype), down, spare)


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, out_dtype: torch.dtype) -> Tensor:
    return F.layer_norm(x, weight.shape, weight.to(x.dtype), bias.to(x.dtype), eps).to(out_dtype)


def _reference_project(h: Tensor, down: Tensor, spare: int) -> tuple[Tensor, Tensor]:
    z = F.linear(h.detach(), down.detach().to(h.dtype))
    if spare == 0:
        return h, z
    h, z = split_spare(torch.cat([h, F.pad(z, (0, spare - down.shape[0]))], dim=1), down)
    return h, z.detach()


def _fuses(x: Tensor, out_dtype: torch.dtype, widest: int | None = None) -> bool:
    usable = all(device.runs_triton(like) for like in (x, x.new_empty(0, dtype=out_dtype)))
    return usable and (widest is None or x.shape[1] <= widest)


def _check(x: Tensor, down: Tensor, spare: int, **frozen: Tensor) -> None:
    if x.dim() != 2 or down.dim() != 2 or x.shape[1] != down.shape[1]:
        raise ValueError(f"x has shape {tuple(x.shape)} and down {tuple(down.shape)}, not [M, K] and [r, K]")
    if spare not in (0, rank_block(down.shape[0])):
        raise ValueError(f"spare is {spare}, not 0 or {rank_block(down.shape[0])} as down {tuple(down.shape)} needs")
    for name, tensor in frozen.items():
        if tuple(tensor.shape) != (x.shape[1],):
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, not ({x.shape[1]},) as x {tuple(x.shape)} needs")
        if tensor.requires_grad:
            raise ValueError(f"{name} requires a gradient but is kept frozen here: use torch.nn.functional.layer_norm")
