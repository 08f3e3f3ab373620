"""The operation as the paper writes it, in plain PyTorch."""

import torch.nn.functional as F
from torch import Tensor

from . import device


def s2_linear_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, coefficients: Tensor
) -> Tensor:
    """y = x Wᵀ + b + ((x Aᵀ) ⊙ e) Bᵀ;  x [..., K] -> y [..., N].

    weight W [N, K], bias b [N] or None, down A [r, K], up B [N, r], coefficients e [r]. Any floating dtype, float64
    included; differentiable any number of times. Mixed dtypes follow PyTorch's promotion in the low-rank path, and the
    result has the dtype of x Wᵀ.
    """
    base = F.linear(x, weight, bias)
    # Autocast takes x as it is; a cast to float32 would be taken back at once.
    narrow = device.autocast_dtype(x) is not None
    low_rank = F.linear(F.linear(x if narrow else x.to(down.dtype), down) * coefficients, up)
    return base + low_rank.to(base.dtype)
