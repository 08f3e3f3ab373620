"""The adapted map as one dense product, in PyTorch: the fast path where no Triton kernel runs.

    W' = W + B diag(e) A                 y  = x W'ᵀ + b          dx = dy W'
    P  = dyᵀ (x Aᵀ)                      dB = P diag(e)          de = colsum(B ⊙ P)
    dA = ((dy B) ⊙ e)ᵀ x

W' costs one pass over the weight, whatever the number of rows. It is formed in W's precision and rounded once, to the
dtype of the product. Where W itself is stored in half precision that rounding would swallow small updates, so there the
low-rank path is added to the product instead, and W is used as it is.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def _merges(weight: Tensor) -> bool:
    return weight.dtype in (torch.float32, torch.float64)


def merged_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, coefficients: Tensor
) -> tuple[Tensor, Tensor]:
    """x [M, K], weight [N, K] -> y [M, N] and the dense weight [N, K] of the product, both in x's dtype."""
    dtype = x.dtype
    bias = None if bias is None else bias.to(dtype)
    if _merges(weight):
        dense = torch.addmm(weight, (up * coefficients).to(weight.dtype), down.to(weight.dtype)).to(dtype)
        return F.linear(x, dense, bias), dense
    z = F.linear(x, down.to(dtype)) * coefficients.to(dtype)  # [M, r]
    return torch.addmm(F.linear(x, weight, bias), z, up.to(dtype).mT), weight


def merged_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    dense: Tensor,
    down: Tensor,
    up: Tensor,
    coefficients: Tensor,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x [M, K], down [r, K], up [N, r] and coefficients [r]; None where `needs` is False."""
    needs_x, needs_down, needs_up, needs_coefficients = needs
    dtype = dy.dtype
    dx = d_down = d_up = d_coefficients = None
    if needs_down or (needs_x and not _merges(weight)):
        g = (dy @ up.to(dtype)) * coefficients.to(dtype)  # [M, r]
    if needs_x:
        dx = dy @ dense if _merges(weight) else torch.addmm(dy @ dense, g, down.to(dtype))
    if needs_down:
        d_down = (g.mT @ x).to(down.dtype)
    if needs_up or needs_coefficients:
        products = (dy.mT @ F.linear(x, down.to(dtype))).to(up.dtype)  # P, [N, r]
        if needs_up:
            d_up = products * coefficients
        if needs_coefficients:
            d_coefficients = (up * products).sum(0).to(coefficients.dtype)
    return dx, d_down, d_up, d_coefficients
