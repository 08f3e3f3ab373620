"""The ways to compute a group of S2 linear maps that read one x: its outputs, and the gradient of x.

    y_i = x W_iᵀ + b_i + ((x Aᵀ) ⊙ e_i) Bᵀ               dx = Σ_i dy_i W_i + (Σ_i (dy_i B) ⊙ e_i) A

`merged`, `split` and `augmented` are cuBLAS products (oneDNN's on a CPU), `fused` is one Triton kernel. What they have
in common, the gradients of A, B and e, is in `adapter_gradients.py`.
"""

from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from . import device
from .augmented import (
    AugmentedWeight,
    augmented_forward,
    augmented_input_gradient,
    spare_buffer,
    with_spare_columns,
)
from .fused import fused_linear
from .merge import merge_weights
from .producers import split_spare
from .project import project


@dataclass
class Group:
    """Operands of G maps of one shape: weights [N, K], down A [r, K], up B [N, r], coefficients e [G, r].

    `bias` is [G · N] or None. `seed` (int64, one element) draws the rounding of merged half-precision weights.
    """

    weights: Sequence[Tensor]
    bias: Tensor | None
    down: Tensor
    up: Tensor
    coefficients: Tensor
    seed: Tensor

    def biases(self) -> Sequence[Tensor | None]:
        """The part of `bias` that belongs to each weight."""
        count = len(self.weights)
        return [None] * count if self.bias is None else _parts(self.bias, count)

    def outputs(self, y: Tensor) -> list[Tensor]:
        """y [M, G · N] as one [M, N] for each weight."""
        return _parts(y, len(self.weights), dim=1)


def _parts(tensor: Tensor, count: int, dim: int = 0) -> list[Tensor]:
    """`tensor.chunk`, which takes microseconds to make one of one."""
    return [tensor] if count == 1 else list(tensor.chunk(count, dim))


@dataclass(frozen=True)
class Forward:
    """Outputs [M, N], and what the backward pass may want: z [M, r], and the dense weights [G · N, K] of a CPU."""

    ys: list[Tensor]
    z: Tensor | None = None
    dense: Tensor | None = None


@dataclass(frozen=True)
class Strategy:
    """`forward(x, group, z)` and `input_gradient(dys, group, g, dense, dx)`.

    z [M, r] is given where it is known already. `g` is Σ_i (dy_i B) ⊙ e_i, [M, r] in float32, for a strategy that
    `needs_g`. dx, if given, is added to in place.
    """

    forward: Callable[[Tensor, Group, Tensor | None], Forward]
    input_gradient: Callable[[Sequence[Tensor], Group, Tensor | None, Tensor | None, Tensor | None], Tensor]
    reads_z: bool = False  # whether the forward pass needs z
    needs_g: bool = False


def _merged_forward(x: Tensor, group: Group, z: Tensor | None) -> Forward:
    dense = _dense(x, group)
    y = _with_bias(x, dense, cast(group.bias, x.dtype))
    # A GPU writes the weights again in a few microseconds; on a CPU keeping them is the cheaper of the two.
    return Forward(group.outputs(y), z, None if _on_a_gpu(x) else dense)


def _on_a_gpu(x: Tensor) -> bool:
    return x.is_cuda or device.runs_triton(x)


def _with_bias(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x Wᵀ + b. On a CPU `F.linear` writes b into every row of a bfloat16 y first, which the product then adds to.

    oneDNN adds b while it makes y, by the operator that torch.compile puts in a linear map's place there. It reads b
    as if its entries were adjacent.
    """
    if bias is not None and device.adds_bias_at_once(x):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias.contiguous(), "none", [], "")
    return F.linear(x, weight, bias)


def _dense(x: Tensor, group: Group) -> Tensor:
    """W_i + B diag(e_i) A in x's dtype, stacked: [G · N, K]."""
    weights, down, up, coefficients = group.weights, group.down, group.up, group.coefficients
    stored = weights[0].dtype
    if device.runs_triton(x) or stored not in (torch.float32, torch.float64):
        return merge_weights(weights, down, up, coefficients, x.dtype, group.seed)
    down, up = down.to(stored), up.to(stored)
    size = len(up)
    dense = x.new_empty(len(weights) * size, down.shape[1])
    for index, (weight, e) in enumerate(zip(weights, coefficients.to(stored), strict=True)):
        dense[index * size : (index + 1) * size].copy_(torch.addmm(weight, up * e, down))  # cast as it is stacked
    return dense


def _merged_input_gradient(
    dys: Sequence[Tensor], group: Group, g: Tensor | None, dense: Tensor | None, dx: Tensor | None
) -> Tensor:
    dense = _dense(dys[0], group) if dense is None else dense
    for dy, weight in zip(dys, _parts(dense, len(dys)), strict=True):
        dx = dy @ weight if dx is None else dx.addmm_(dy, weight)
    assert dx is not None
    return dx


def _split_forward(x: Tensor, group: Group, z: Tensor | None) -> Forward:
    z = project(x, group.down) if z is None else z
    up = group.up.to(x.dtype).mT
    dense, weights = None, [weight.to(x.dtype) for weight in group.weights]
    if weights[0] is not group.weights[0] and not _on_a_gpu(x):
        dense = torch.cat(weights) if len(weights) > 1 else weights[0]  # on a CPU the cast is kept, as W' of `merged`
    ys = [
        _plus_product(F.linear(x, weight, cast(bias, x.dtype)), z * e, up)
        for weight, bias, e in zip(weights, group.biases(), group.coefficients.to(x.dtype), strict=True)
    ]
    return Forward(ys, z, dense)


def _plus_product(y: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """y + left right, in y's place where it may be.

    Not under torch.compile, for torch 2.11 makes a Function's gradients zero where it was, nor where a selective
    checkpoint keeps y, which would hand out the sum for it when it computes again.
    """
    apart = torch.compiler.is_compiling() or device.keeps_products()
    return torch.addmm(y, left, right) if apart else y.addmm_(left, right)


def _split_input_gradient(
    dys: Sequence[Tensor], group: Group, g: Tensor | None, dense: Tensor | None, dx: Tensor | None
) -> Tensor:
    assert g is not None
    dtype = dys[0].dtype
    weights = [weight.to(dtype) for weight in group.weights] if dense is None else dense.chunk(len(dys))
    for dy, weight in zip(dys, weights, strict=True):
        dx = dy @ weight if dx is None else dx.addmm_(dy, weight)
    assert dx is not None
    return dx.addmm_(g.to(dtype), group.down.to(dtype))


def _fused_forward(x: Tensor, group: Group, z: Tensor | None) -> Forward:
    ys = []
    down, up = _factors(group, x.dtype)
    for weight, bias, e in zip(group.weights, group.biases(), group.coefficients, strict=True):
        y, z = fused_linear(x, weight.to(x.dtype), bias, down, up, e, z)
        ys.append(y)
    return Forward(ys, z)


def _fused_input_gradient(
    dys: Sequence[Tensor], group: Group, g: Tensor | None, dense: Tensor | None, dx: Tensor | None
) -> Tensor:
    dtype = dys[0].dtype
    down, up = _factors(group, dtype)
    for dy, weight, e in zip(dys, group.weights, group.coefficients, strict=True):
        dx, _ = fused_linear(dy, weight.to(dtype).mT, None, up.mT, down.mT, e, out=dx, want_z=False)
    assert dx is not None
    return dx


def _factors(group: Group, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A and B as the launches of a group read them: cast once for several."""
    several = len(group.weights) > 1
    return (group.down.to(dtype), group.up.to(dtype)) if several else (group.down, group.up)


def cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The tensor in `dtype`, if there is one."""
    # `to` takes microseconds to find that there is nothing to do.
    return tensor if tensor is None or tensor.dtype == dtype else tensor.to(dtype)


_augmented_weights: MutableMapping[Tensor, AugmentedWeight] = WeakTensorKeyDictionary()


def _augmented(group: Group, dtype: torch.dtype) -> AugmentedWeight:
    """The copy of the group's weights with spare columns, made once, with B diag(e) in these."""
    found = _augmented_weights.get(group.weights[0])
    fits = found is not None and found.rank == len(group.down) and found.buffer.dtype == dtype
    if found is None or not fits or not found.is_copy_of(group.weights):
        found = _augmented_weights[group.weights[0]] = AugmentedWeight(group.weights, len(group.down), dtype)
    found.update(group.up, group.coefficients)
    return found


def _augmented_forward(x: Tensor, group: Group, z: Tensor | None) -> Forward:
    buffer = None if z is None else spare_buffer(x, z)
    if buffer is None:
        buffer = with_spare_columns(x, group.down)
    y = augmented_forward(buffer, _augmented(group, x.dtype), cast(group.bias, x.dtype))
    return Forward(group.outputs(y), split_spare(buffer, group.down)[1])


def _augmented_input_gradient(
    dys: Sequence[Tensor], group: Group, g: Tensor | None, dense: Tensor | None, dx: Tensor | None
) -> Tensor:
    # The spare columns are written anew: another use of these weights may have changed them since.
    own = augmented_input_gradient(dys, _augmented(group, dys[0].dtype), group.down)
    return own if dx is None else dx.add_(own)


STRATEGIES = {
    "merged": Strategy(_merged_forward, _merged_input_gradient),
    "split": Strategy(_split_forward, _split_input_gradient, reads_z=True, needs_g=True),
    "fused": Strategy(_fused_forward, _fused_input_gradient, reads_z=True),
    "augmented": Strategy(_augmented_forward, _augmented_input_gradient),
}
