"""The operation as the paper writes it, in plain PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import device


def s2_linear_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, coefficients: Tensor
) -> Tensor:
    """y = x Wᵀ + b + ((x Aᵀ) ⊙ e) Bᵀ;  x [..., K] -> y [..., N].

    weight W [N, K], bias b [N] or None, down A [r, K], up B [N, r], coefficients e [r]. Any floating dtype, float64
    included; differentiable any number of times. The low-rank path is computed in the widest dtype of A, B and e; the
    result has the dtype of x Wᵀ.
    """
    base = F.linear(x, weight, bias)
    if not down.dtype == up.dtype == coefficients.dtype:
        wide = torch.promote_types(torch.promote_types(down.dtype, up.dtype), coefficients.dtype)
        down, up, coefficients = down.to(wide), up.to(wide), coefficients.to(wide)
    # Autocast takes x as it is; a cast to float32 would be taken back at once.
    narrow = device.autocast_dtype(x) is not None
    low_rank = F.linear(F.linear(x if narrow else x.to(down.dtype), down) * coefficients, up)
    return base + low_rank.to(base.dtype)
