"""The adapted weights of a group as one stack, in one launch.

    W_eff[i] = cast(W_i + B diag(e_i) A)        i = 0, 1, 2

The sum is formed in float32 and rounded once. A weight that is wider than the result is rounded to nearest. A weight
stored in half precision lies on the grid of the result already, so rounding to nearest would take away every update
below half a step; there each entry goes to one of its two neighbours, up with probability (entry - lower) / step, so
that the mean over seeds is the sum itself and an entry on the grid stays.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import device
from .arguments import MAX_GROUP
from .configs import MERGE, cdiv
from .launch import launch
from .ops import kernel_op
from .variants import TRITON_TYPES, Variant

_HALF = (torch.float16, torch.bfloat16)


# Untyped, a seed of 1 would be a constant and one beyond 32 bits another build.
@triton.jit(do_not_specialize=["seed"])
def _merge_kernel(
    weight0_ptr,
    weight1_ptr,
    weight2_ptr,
    down_ptr,
    up_ptr,
    coefficients_ptr,
    merged_ptr,
    seed: tl.int64,
    N,
    K,
    rank,
    stride_wn,
    stride_wk,
    stride_dr,
    stride_dk,
    stride_un,
    stride_ur,
    stride_eg,
    stride_er,
    GROUP: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """merged[i] = cast(weight_i + up diag(coefficients[i]) down)

    weight0, 1, 2 [N, K], down [rank, K], up [N, rank], coefficients [GROUP, rank] -> merged [GROUP, N, K]
    """
    pid = tl.program_id(0)
    member = tl.program_id(1)
    tiles_k = tl.cdiv(K, BLOCK_K)
    pid_n = pid // tiles_k
    pid_k = pid % tiles_k
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_n = offs_n < N
    mask_k = offs_k < K
    mask = mask_n[:, None] & mask_k[None, :]
    rows_n = offs_n.to(tl.int64)
    columns_k = offs_k.to(tl.int64)

    weight_ptr = weight0_ptr
    if GROUP > 1 and member == 1:
        weight_ptr = weight1_ptr
    if GROUP > 2 and member == 2:
        weight_ptr = weight2_ptr
    weight_tile_ptr = weight_ptr + rows_n[:, None] * stride_wn + columns_k[None, :] * stride_wk
    weight_tile = tl.load(weight_tile_ptr, mask=mask, other=0.0).to(tl.float32)

    # Outer products and no tl.dot: an entry that moves 6 bytes leaves an H100 (3 TB/s) time for some 60 multiply-adds
    # on its CUDA cores, 20 with their loads from L1. Ranks beyond pay for each live one; a pruned one costs a scalar
    # load. Starting from W keeps its bits where every coefficient is zero, and the loop in the layout of W.
    merged = weight_tile
    coefficient_ptr = coefficients_ptr + member.to(tl.int64) * stride_eg
    up_column_ptr = up_ptr + rows_n * stride_un
    down_row_ptr = down_ptr + columns_k * stride_dk
    for _ in range(rank):
        coefficient = tl.load(coefficient_ptr).to(tl.float32)
        if coefficient != 0.0:
            up_column = tl.load(up_column_ptr, mask=mask_n, other=0.0).to(tl.float32) * coefficient
            down_row = tl.load(down_row_ptr, mask=mask_k, other=0.0).to(tl.float32)
            merged = tl.fma(up_column[:, None], down_row[None, :], merged)
        coefficient_ptr += stride_er
        up_column_ptr += stride_ur
        down_row_ptr += stride_dr

    if STOCHASTIC:
        random = _random_bits(seed, member, offs_n, pid_k, BLOCK_N, BLOCK_K)
        merged = _round_stochastically(merged, random, merged_ptr.dtype.element_ty)
    merged_tile_ptr = merged_ptr + (member.to(tl.int64) * N + rows_n[:, None]) * K + columns_k[None, :]
    tl.store(merged_tile_ptr, merged.to(merged_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _random_bits(seed, member, offs_n, pid_k, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Philox at counter (column // 8, row, member): four words, each for two entries -> uint32 [BLOCK_N, BLOCK_K]

    The upper half of each entry is its own; rounding to bfloat16 reads 16 bits, to float16 13.
    """
    eighths = pid_k * (BLOCK_K // 8) + tl.arange(0, BLOCK_K // 8)
    zeros = tl.zeros((BLOCK_N, BLOCK_K // 8), dtype=tl.int32)
    word0, word1, word2, word3 = tl.philox(
        seed, zeros + eighths[None, :], zeros + offs_n[:, None], zeros + member, zeros
    )
    words = tl.join(tl.join(word0, word1), tl.join(word2, word3))
    return tl.join(words, words << 16).reshape(BLOCK_N, BLOCK_K)


@triton.jit
def _round_stochastically(value, random, dtype: tl.constexpr):
    """One of the two neighbours of value in dtype, in float32; beyond the largest finite number, value itself."""
    CUT: tl.constexpr = 16 if dtype == tl.bfloat16 else 13
    LARGEST: tl.constexpr = 3.3895313892515355e38 if dtype == tl.bfloat16 else 65504.0
    bits = value.to(tl.uint32, bitcast=True)
    rounded = (((bits + (random >> (32 - CUT))) >> CUT) << CUT).to(tl.float32, bitcast=True)
    if dtype == tl.float16:
        # Below 2**-14 float16 is subnormal: its steps are 2**-24 whatever the exponent.
        steps = tl.abs(value) * 16777216.0
        lower = tl.floor(steps)
        goes_up = (random >> 8).to(tl.float32) < (steps - lower) * 16777216.0
        subnormal = (lower + goes_up.to(tl.float32)) * 5.9604644775390625e-08
        sign = bits & 0x80000000
        subnormal = (subnormal.to(tl.uint32, bitcast=True) | sign).to(tl.float32, bitcast=True)
        rounded = tl.where(steps < 1024.0, subnormal, rounded)
    return tl.where(tl.abs(value) <= LARGEST, rounded, value)


def _fake_merge(weights, down, up, coefficients, dtype, seed):
    outputs, inputs = weights[0].shape
    return weights[0].new_empty(len(weights) * outputs, inputs, dtype=dtype)


@kernel_op("merge", _fake_merge)
def merge(
    weights: Sequence[Tensor], down: Tensor, up: Tensor, coefficients: Tensor, dtype: torch.dtype, seed: Tensor
) -> Tensor:
    """One launch where Triton runs: `merge_weights` without its checks."""
    weight, group = weights[0], len(weights)
    if not _kernel_serves(weight, dtype):
        return merge_weights_reference(weights, down, up, coefficients, dtype, seed)
    outputs, inputs = weight.shape
    merged = weight.new_empty(group * outputs, inputs, dtype=dtype)
    if merged.numel() == 0:
        return merged
    tiles = cdiv(outputs, MERGE.BLOCK_N) * cdiv(inputs, MERGE.BLOCK_K)
    launch(
        _merge_kernel, (tiles, group),
        weight, weights[min(1, group - 1)], weights[-1], down, up, coefficients, merged, seed.item(),
        outputs, inputs, up.shape[1], *weight.stride(), *down.stride(), *up.stride(), *coefficients.stride(),
        GROUP=group, STOCHASTIC=_rounds_stochastically(weight, dtype), BLOCK_N=MERGE.BLOCK_N, BLOCK_K=MERGE.BLOCK_K,
        num_warps=MERGE.num_warps, any_value=7,  # the seed
    )  # fmt: skip
    return merged


def merge_weights(
    weights: Sequence[Tensor], down: Tensor, up: Tensor, coefficients: Tensor, dtype: torch.dtype, seed: Tensor
) -> Tensor:
    """W_eff[i] = cast(W_i + B diag(e_i) A), stacked: [G · N, K], contiguous, in `dtype`.

    Args:
        weights: W_i, one to three of [N, K], equal in shape, dtype and device. Those laid out unlike each other are
            copied first.
        down: A, [r, K], any strides; its dtype may be wider than the weights'.
        up: B, [N, r], any strides.
        coefficients: e_i, [G, r].
        dtype: of the result. Half-precision weights with a half-precision result are rounded stochastically, everything
            else once to nearest.
        seed: int64 [1] on the CPU. Equal seeds give equal bits, so a backward can form the forward's W_eff again.

    Raises:
        ValueError: not one to three weights, or weights that differ in shape or dtype.
    """
    if not 1 <= len(weights) <= MAX_GROUP:
        raise ValueError(f"weights holds {len(weights)}; a group is 1 to {MAX_GROUP}")
    first = weights[0]
    for index, weight in enumerate(weights[1:], 1):
        if (weight.shape, weight.dtype) != (first.shape, first.dtype):
            found, needed = (f"{tuple(w.shape)} {w.dtype}" for w in (weight, first))
            raise ValueError(f"weights[{index}] is {found} and weights[0] {needed}: shape and dtype must be equal")
    if any(weight.stride() != first.stride() for weight in weights[1:]):
        weights = [weight.contiguous() for weight in weights]  # one launch has the strides of one
    return merge(weights, down, up, coefficients, dtype, seed)


def merge_weights_reference(
    weights: Sequence[Tensor], down: Tensor, up: Tensor, coefficients: Tensor, dtype: torch.dtype, seed: Tensor
) -> Tensor:
    """`merge_weights` in PyTorch. The sum has float32 or wider: float64 with a `dtype` of float64.

    Stochastic rounding draws from PyTorch's generator: equal statistics, not the kernel's bits. On a CPU that generator
    takes the low 32 bits of the seed.
    """
    precision = torch.promote_types(torch.promote_types(dtype, weights[0].dtype), torch.float32)
    down, up = down.to(precision), up.to(precision)
    sums = []
    for weight, e in zip(weights, coefficients.to(precision), strict=True):
        update = (up * e) @ down
        sums.append(torch.where(update == 0, weight.to(precision), weight + update))
    stacked = torch.cat(sums)
    if not _rounds_stochastically(weights[0], dtype):
        return stacked.to(dtype)
    generator = torch.Generator(stacked.device).manual_seed(int(seed.item()))
    return round_stochastically(stacked, dtype, generator)


def round_stochastically(value: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Each entry goes to one of its neighbours in `dtype`, the nearest n or the other side's m.

    It goes to m with probability |value - n| / |m - n|, so that the mean is the value. NaN, infinities and what lies
    beyond the largest finite number go to n.
    """
    nearest = value.to(dtype)
    beyond = torch.where(value > nearest.to(value.dtype), torch.inf, -torch.inf).to(dtype)
    other = torch.nextafter(nearest, beyond)
    fraction = (value - nearest).abs() / (other.to(value.dtype) - nearest).abs()
    goes = torch.rand(value.shape, dtype=value.dtype, device=value.device, generator=generator) < fraction
    return torch.where(goes & other.isfinite(), other, nearest)


def _rounds_stochastically(weight: Tensor, dtype: torch.dtype) -> bool:
    return weight.dtype in _HALF and dtype in _HALF


def _kernel_serves(weight: Tensor, dtype: torch.dtype) -> bool:
    runs = weight.is_cuda or device.INTERPRETING
    return runs and torch.float64 not in (weight.dtype, dtype)


def variants(target: str) -> list[Variant]:
    """What merged weights launch; ranks are no part of it."""
    dtypes = [("fp32", "bf16"), ("fp32", "fp16"), ("fp32", "fp32"), ("bf16", "bf16"), ("fp16", "fp16")]
    straight = {"stride_wk": 1, "stride_dk": 1, "stride_ur": 1, "stride_er": 1}
    tied = {"stride_wk": 1, "stride_dr": 1, "stride_un": 1, "stride_er": 1}  # a transposed pair: A is another B's view
    cases = [(*pair, "fp32", group, "straight", straight) for pair in dtypes for group in range(1, MAX_GROUP + 1)]
    cases += [(*pair, "fp32", 1, "tied", tied) for pair in dtypes]
    cases += [(half, half, half, 1, "straight", straight) for half in ("bf16", "fp16")]
    return [
        Variant(
            "merge", "all", f"{stored} to {result}, {factors} factors, group of {group}, {strides}", stored, 0,
            _merge_kernel,
            {
                "GROUP": group, "STOCHASTIC": stored != "fp32", "BLOCK_N": MERGE.BLOCK_N, "BLOCK_K": MERGE.BLOCK_K,
                **unit_strides,
            },
            MERGE.num_warps, 3,
            {
                **dict.fromkeys(("down_ptr", "up_ptr", "coefficients_ptr"), TRITON_TYPES[factors]),
                "merged_ptr": TRITON_TYPES[result], "seed": "i64",
            },
            ("N", "K", "stride_wn", "stride_dr"),
            rare=strides == "tied" or group == 2 or "fp16" in (stored, result) or factors != "fp32",
        )
        for stored, result, factors, group, strides, unit_strides in cases
    ]  # fmt: skip
