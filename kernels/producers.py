"""LayerNorm and GELU that make the input h of a linear map and z = h Aᵀ, of its low-rank part, in one pass.

    h  = LayerNorm(x) or GELU(x)            z  = h Aᵀ, from the rounded h

Two forms. In `*_project` z is a by-product without a gradient: what uses h and z returns as dh the gradient of its
whole map. In `*_augmented` h and z lie in one matrix [h | z | 0] that is differentiable as a whole. Its gradient
[dh | dz | ·] is what the product with [W | B diag(e)] gives in its backward, and dz A joins dh inside the LayerNorm's
or GELU's own backward, without a pass over dh.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import activation, device, layer_norm
from .configs import NORM_MAX_WIDTH, rank_block


class LayerNormProjectFunction(torch.autograd.Function):
    """x [M, K], weight [K], bias [K], down [r, K] -> h [M, K], z [M, r]; or [h | z | 0] [M, K + spare] if `augmented`.

    The gradient flows to x: from h alone, or from h and z if `augmented`.
    """

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
        augmented: bool,
    ) -> Tensor | tuple[Tensor, Tensor]:
        buffer, z, mean, rstd = layer_norm.layer_norm_project(x, weight, bias, eps, down, out_dtype, spare)
        ctx.save_for_backward(x, weight, down if augmented else None, mean, rstd)
        return buffer if augmented else _by_product(ctx, buffer, z, down, spare)

    @staticmethod
    def backward(ctx: Any, dh: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, weight, down, mean, rstd = ctx.saved_tensors
        dh, ge = (dh, None) if down is None else split_spare(dh, down)
        dx = layer_norm.layer_norm_input_gradient(dh, ge, down, x, weight, mean, rstd)
        return dx, None, None, None, None, None, None, None


class GeluProjectFunction(torch.autograd.Function):
    """x [M, K], down [r, K] -> h [M, K], z [M, r]; or [h | z | 0] [M, K + spare] if `augmented`.

    The gradient flows to x: from h alone, or from h and z if `augmented`.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, down: Tensor, out_dtype: torch.dtype, spare: int, augmented: bool
    ) -> Tensor | tuple[Tensor, Tensor]:
        buffer, z = activation.activation_project(x, down, True, out_dtype, spare)
        ctx.save_for_backward(x, down if augmented else None)
        return buffer if augmented else _by_product(ctx, buffer, z, down, spare)

    @staticmethod
    def backward(ctx: Any, dh: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, down = ctx.saved_tensors
        dh, ge = (dh, None) if down is None else split_spare(dh, down)
        return activation.gelu_input_gradient(dh, ge, down, x), None, None, None, None


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
        return LayerNormProjectFunction.apply(x, weight, bias, eps, down, out_dtype, spare, False)
    return _reference_project(_layer_norm(x, weight, bias, eps, out_dtype), down, spare)


def layer_norm_augmented(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, down: Tensor, out_dtype: torch.dtype
) -> Tensor:
    """[h | z | 0] [M, K + rank_block(r)] of `layer_norm_project`, differentiable in h and z with respect to x.

    A is constant here as there: what multiplies this matrix computes A's gradient, dA = dzᵀ h.
    """
    spare = rank_block(down.shape[0])
    _check(x, down, spare, weight=weight, bias=bias)
    if _fuses(x, out_dtype, NORM_MAX_WIDTH):
        return LayerNormProjectFunction.apply(x, weight, bias, eps, down, out_dtype, spare, True)
    return _reference_augmented(_layer_norm(x, weight, bias, eps, out_dtype), down, spare)


def gelu_project(x: Tensor, down: Tensor, out_dtype: torch.dtype, spare: int = 0) -> tuple[Tensor, Tensor]:
    """The exact GELU h = x Φ(x) of x [M, K], and z = h Aᵀ; otherwise as `layer_norm_project`."""
    _check(x, down, spare)
    if _fuses(x, out_dtype):
        return GeluProjectFunction.apply(x, down, out_dtype, spare, False)
    return _reference_project(F.gelu(x).to(out_dtype), down, spare)


def gelu_augmented(x: Tensor, down: Tensor, out_dtype: torch.dtype) -> Tensor:
    """[h | z | 0] [M, K + rank_block(r)] of `gelu_project`, differentiable in h and z with respect to x."""
    spare = rank_block(down.shape[0])
    _check(x, down, spare)
    if _fuses(x, out_dtype):
        return GeluProjectFunction.apply(x, down, out_dtype, spare, True)
    return _reference_augmented(F.gelu(x).to(out_dtype), down, spare)


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, out_dtype: torch.dtype) -> Tensor:
    return F.layer_norm(x, weight.shape, weight.to(x.dtype), bias.to(x.dtype), eps).to(out_dtype)


def _reference_project(h: Tensor, down: Tensor, spare: int) -> tuple[Tensor, Tensor]:
    if spare == 0:
        return h, F.linear(h.detach(), down.detach().to(h.dtype))
    h, z = split_spare(_reference_augmented(h, down, spare), down)
    return h, z.detach()


def _reference_augmented(h: Tensor, down: Tensor, spare: int) -> Tensor:
    z = F.linear(h, down.detach().to(h.dtype))
    return torch.cat([h, F.pad(z, (0, spare - down.shape[0]))], dim=1)


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
