"""The operation in Triton, forward and backward.

    z  = x Aᵀ                     y  = x Wᵀ + b + (z ⊙ e) Bᵀ
    g  = dy B                     dx = dy W + (g ⊙ e) A
    P  = dyᵀ z                    dB = P diag(e)      de = colsum(B ⊙ P)      dA = diag(e) (xᵀ g)ᵀ

dx is the forward operation on (Wᵀ, Bᵀ, Aᵀ, e), so one kernel serves both and the transposes are strides. P and xᵀ g are
the same tall product, summed over rows in fixed splits and then over the splits: deterministic, no atomics.
"""

import itertools
import os
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import (
    FACTOR,
    LINEAR,
    SHARED_MEMORY,
    FactorConfig,
    LinearConfig,
    factor_config_name,
    linear_config_name,
    rank_block,
)
from .variants import Variant

REDUCE_BLOCK = 32


@triton.jit
def _s2_linear_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    down_ptr,
    up_ptr,
    coefficients_ptr,
    y_ptr,
    z_ptr,
    M,
    N,
    K,
    rank,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    stride_dr,
    stride_dk,
    stride_un,
    stride_ur,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """y = x Wᵀ + b + (z ⊙ e) Bᵀ, z = x Aᵀ

    x [M, K], weight [N, K], bias [N], down [rank, K], up [N, rank], coefficients [rank] -> y [M, N], z [M, rank]
    """
    # Tiles in groups of GROUP_M rows, so that neighbouring programs share x and W in the L2 cache.
    pid = tl.program_id(0)
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    group = pid // (GROUP_M * tiles_n)
    first_m = group * GROUP_M
    group_size = tl.minimum(tiles_m - first_m, GROUP_M)
    pid_m = first_m + (pid % (GROUP_M * tiles_n)) % group_size
    pid_n = (pid % (GROUP_M * tiles_n)) // group_size

    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_r = tl.arange(0, R)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m = offs_m < M
    mask_n = offs_n < N
    mask_r = offs_r < rank
    rows_m = offs_m.to(tl.int64)
    rows_n = offs_n.to(tl.int64)

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    z_acc = tl.zeros((BLOCK_M, R), dtype=tl.float32)
    x_tile_ptr = x_ptr + rows_m[:, None] * stride_xm + offs_k[None, :] * stride_xk
    weight_tile_ptr = weight_ptr + offs_k[:, None] * stride_wk + rows_n[None, :] * stride_wn
    down_tile_ptr = down_ptr + offs_k[:, None] * stride_dk + offs_r[None, :] * stride_dr
    for k in range(0, K, BLOCK_K):
        mask_k = offs_k < K - k
        x_tile = tl.load(x_tile_ptr, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        weight_tile = tl.load(weight_tile_ptr, mask=mask_k[:, None] & mask_n[None, :], other=0.0)
        down_tile = tl.load(down_tile_ptr, mask=mask_k[:, None] & mask_r[None, :], other=0.0)
        acc = tl.dot(x_tile, weight_tile, acc, input_precision=PRECISION)
        z_acc = tl.dot(x_tile, down_tile.to(x_tile.dtype), z_acc, input_precision=PRECISION)
        x_tile_ptr += BLOCK_K * stride_xk
        weight_tile_ptr += BLOCK_K * stride_wk
        down_tile_ptr += BLOCK_K * stride_dk

    coefficients = tl.load(coefficients_ptr + offs_r, mask=mask_r, other=0.0).to(tl.float32)
    up_tile_ptr = up_ptr + offs_r[:, None] * stride_ur + rows_n[None, :] * stride_un
    up_tile = tl.load(up_tile_ptr, mask=mask_r[:, None] & mask_n[None, :], other=0.0)  # [R, BLOCK_N]
    scaled = (z_acc * coefficients[None, :]).to(x_ptr.dtype.element_ty)
    acc = tl.dot(scaled, up_tile.to(x_ptr.dtype.element_ty), acc, input_precision=PRECISION)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    y_tile_ptr = y_ptr + rows_m[:, None] * N + offs_n[None, :]
    tl.store(y_tile_ptr, acc.to(y_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])
    if pid_n == 0:
        z_tile_ptr = z_ptr + rows_m[:, None] * rank + offs_r[None, :]
        tl.store(z_tile_ptr, z_acc.to(z_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_r[None, :])


@triton.jit
def _s2_linear_bwd_factor_kernel(
    tall_ptr,
    low_ptr,
    partial_ptr,
    M,
    C,
    rank,
    stride_tm,
    stride_tc,
    PRECISION: tl.constexpr,
    R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SPLIT_ROWS: tl.constexpr,
):
    """partial[s] = tallᵀ low over the rows of split s

    tall [M, C], low [M, rank] -> partial [splits, C, R], float32; columns beyond `rank` are zero
    """
    pid_c = tl.program_id(0)
    split = tl.program_id(1)
    offs_c = pid_c * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_r = tl.arange(0, R)
    mask_c = offs_c < C
    mask_r = offs_r < rank
    acc = tl.zeros((BLOCK_C, R), dtype=tl.float32)
    for step in range(0, SPLIT_ROWS, BLOCK_M):
        offs_m = split * SPLIT_ROWS + step + tl.arange(0, BLOCK_M)
        mask_m = offs_m < M
        rows_m = offs_m.to(tl.int64)
        tall_tile_ptr = tall_ptr + rows_m[None, :] * stride_tm + offs_c[:, None] * stride_tc
        tall_tile = tl.load(tall_tile_ptr, mask=mask_c[:, None] & mask_m[None, :], other=0.0)  # [BLOCK_C, BLOCK_M]
        low_tile_ptr = low_ptr + rows_m[:, None] * rank + offs_r[None, :]
        low_tile = tl.load(low_tile_ptr, mask=mask_m[:, None] & mask_r[None, :], other=0.0)  # [BLOCK_M, R]
        acc = tl.dot(tall_tile, low_tile, acc, input_precision=PRECISION)
    offs_out = split.to(tl.int64) * C * R + offs_c[:, None].to(tl.int64) * R + offs_r[None, :]
    tl.store(partial_ptr + offs_out, acc, mask=mask_c[:, None])


@triton.jit
def _s2_linear_bwd_reduce_kernel(
    partial_ptr,
    factor_ptr,
    coefficients_ptr,
    d_factor_ptr,
    d_coefficients_ptr,
    splits,
    C,
    rank,
    stride_fc,
    stride_fr,
    HAS_FACTOR: tl.constexpr,
    R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """P = Σ_s partial[s],  d_factor = P diag(e),  d_coefficients[block] = colsum(factor ⊙ P) over the block's rows

    partial [splits, C, R], factor [C, rank] -> d_factor [C, rank], d_coefficients [blocks, rank], float32
    """
    pid = tl.program_id(0)
    offs_c = pid * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_r = tl.arange(0, R)
    mask_r = offs_r < rank
    mask = (offs_c < C)[:, None] & mask_r[None, :]
    rows_c = offs_c.to(tl.int64)
    product = tl.zeros((BLOCK_C, R), dtype=tl.float32)
    partial_tile_ptr = partial_ptr + rows_c[:, None] * R + offs_r[None, :]
    for _ in range(splits):
        product += tl.load(partial_tile_ptr, mask=mask, other=0.0)
        partial_tile_ptr += C * R
    coefficients = tl.load(coefficients_ptr + offs_r, mask=mask_r, other=0.0).to(tl.float32)
    d_factor_tile_ptr = d_factor_ptr + rows_c[:, None] * rank + offs_r[None, :]
    tl.store(d_factor_tile_ptr, product * coefficients[None, :], mask=mask)
    if HAS_FACTOR:
        factor_tile_ptr = factor_ptr + rows_c[:, None] * stride_fc + offs_r[None, :] * stride_fr
        factor = tl.load(factor_tile_ptr, mask=mask, other=0.0).to(tl.float32)
        tl.store(d_coefficients_ptr + pid * rank + offs_r, tl.sum(factor * product, axis=0), mask=mask_r)


def triton_is_usable(x: Tensor) -> tuple[bool, str]:
    """Whether the kernels run on x's device and dtype, and if not, why."""
    interpreting = os.environ.get("TRITON_INTERPRET") == "1"
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return False, f"no kernel for {x.dtype}"
    if not x.is_cuda and not interpreting:
        return False, f"x is on {x.device.type}, and Triton's interpreter (TRITON_INTERPRET=1) is off"
    if interpreting and x.dtype == torch.bfloat16:
        return False, "Triton's interpreter multiplies bfloat16 wrongly"
    return True, ""


def _shared_memory(x: Tensor) -> int:
    if not x.is_cuda:
        return SHARED_MEMORY["90"]
    return triton.runtime.driver.active.utils.get_device_properties(x.get_device())["max_shared_mem"]


def _precision(dtype: torch.dtype) -> str:
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


@torch.library.custom_op("fused_s2lora::linear", mutates_args=())
def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, coefficients: Tensor
) -> tuple[Tensor, Tensor]:
    """One launch: x [M, K], weight [N, K], down [r, K], up [N, r] -> y [M, N] and z [M, r], in x's dtype."""
    rows, inputs = x.shape
    outputs, rank = up.shape
    y, z = x.new_empty(rows, outputs), x.new_empty(rows, rank)
    if rows == 0:
        return y, z
    padded_rank, shared_memory = rank_block(rank), _shared_memory(x)
    config: LinearConfig = LINEAR[linear_config_name(rows, padded_rank, x.dtype, shared_memory)]
    grid = (triton.cdiv(rows, config.BLOCK_M) * triton.cdiv(outputs, config.BLOCK_N),)
    _s2_linear_kernel[grid](
        x, weight, bias, down, up, coefficients, y, z, rows, outputs, inputs, rank,
        *x.stride(), *weight.stride(), *down.stride(), *up.stride(),
        HAS_BIAS=bias is not None, PRECISION=_precision(x.dtype), R=padded_rank,
        BLOCK_M=config.BLOCK_M, BLOCK_N=config.BLOCK_N, BLOCK_K=config.BLOCK_K, GROUP_M=config.GROUP_M,
        num_warps=config.num_warps,
        num_stages=config.fitted_stages(padded_rank, x.element_size(), shared_memory),
    )  # fmt: skip
    return y, z


@linear.register_fake
def _(x, weight, bias, down, up, coefficients):
    return x.new_empty(x.shape[0], up.shape[0]), x.new_empty(x.shape[0], up.shape[1])


@torch.library.custom_op("fused_s2lora::factor_gradient", mutates_args=())
def factor_gradient(tall: Tensor, low: Tensor, factor: Tensor | None, coefficients: Tensor) -> tuple[Tensor, Tensor]:
    """P = tallᵀ low -> P diag(e) [C, r] and colsum(factor ⊙ P) [r], both in float32.

    tall [M, C], low [M, r] contiguous, factor [C, r]; without a factor the second result is zero.
    """
    rows, columns = tall.shape
    rank = low.shape[1]
    padded_rank = rank_block(rank)
    config: FactorConfig = FACTOR[factor_config_name(padded_rank, tall.dtype)]
    splits = triton.cdiv(rows, config.SPLIT_ROWS)
    blocks = triton.cdiv(columns, REDUCE_BLOCK)
    partial = torch.empty(splits, columns, padded_rank, device=tall.device)
    d_factor = torch.empty(columns, rank, device=tall.device)
    d_coefficients = torch.zeros(blocks, rank, device=tall.device)
    if splits > 0:
        _s2_linear_bwd_factor_kernel[(triton.cdiv(columns, config.BLOCK_C), splits)](
            tall, low, partial, rows, columns, rank, *tall.stride(),
            PRECISION=_precision(tall.dtype), R=padded_rank, BLOCK_C=config.BLOCK_C, BLOCK_M=config.BLOCK_M,
            SPLIT_ROWS=config.SPLIT_ROWS, num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    factor_strides = (0, 0) if factor is None else factor.stride()
    _s2_linear_bwd_reduce_kernel[(blocks,)](
        partial, factor, coefficients, d_factor, d_coefficients, splits, columns, rank, *factor_strides,
        HAS_FACTOR=factor is not None, R=padded_rank, BLOCK_C=REDUCE_BLOCK, num_warps=4,
    )  # fmt: skip
    return d_factor, d_coefficients.sum(0)


@factor_gradient.register_fake
def _(tall, low, factor, coefficients):
    columns, rank = tall.shape[1], low.shape[1]
    return tall.new_empty(columns, rank, dtype=torch.float32), tall.new_empty(rank, dtype=torch.float32)


def triton_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, coefficients: Tensor
) -> tuple[Tensor, Tensor]:
    """x [M, K], weight [N, K] -> y [M, N] and z = x Aᵀ [M, r], both in x's dtype."""
    return linear(x, weight.to(x.dtype), bias, down, up, coefficients)


def triton_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    z: Tensor,
    down: Tensor,
    up: Tensor,
    coefficients: Tensor,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x [M, K], down [r, K], up [N, r] and coefficients [r]; None where `needs` is False."""
    needs_x, needs_down, needs_up, needs_coefficients = needs
    dx = d_down = d_up = d_coefficients = None
    if needs_x:
        dx, g = linear(dy, weight.to(dy.dtype).mT, None, up.mT, down.mT, coefficients)
    elif needs_down:
        g = dy @ up.to(dy.dtype)
    if needs_down:
        columns, _ = factor_gradient(x, g, None, coefficients)
        d_down = columns.mT.to(down.dtype)
    if needs_up or needs_coefficients:
        d_up, d_coefficients = factor_gradient(dy, z, up, coefficients)
        d_up, d_coefficients = d_up.to(up.dtype), d_coefficients.to(coefficients.dtype)
    return dx, d_down, d_up if needs_up else None, d_coefficients if needs_coefficients else None


_UNIT_STRIDES = {
    "forward": ("stride_xk", "stride_wk", "stride_dk", "stride_ur"),
    "input gradient": ("stride_xk", "stride_wn", "stride_dr", "stride_un"),
}
_FULL_PRECISION = dict.fromkeys(
    ("down_ptr", "up_ptr", "coefficients_ptr", "partial_ptr", "factor_ptr", "d_factor_ptr", "d_coefficients_ptr"),
    "*fp32",
)
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def variants(target: str) -> list[Variant]:
    """Every specialisation that a GPU of this kind can be asked to run."""
    memory = SHARED_MEMORY[target]
    found: dict[tuple, Variant] = {}
    for (name, dtype), rank in itertools.product(_DTYPES.items(), (16, 32, 64, 128, 256)):
        precision = {"PRECISION": "ieee", "R": rank}
        for rows, direction in itertools.product((512, 24_000), _UNIT_STRIDES):
            config = linear_config_name(rows, rank, dtype, memory)
            linear = LINEAR[config]
            constants: dict[str, Any] = {
                **{tile: getattr(linear, tile) for tile in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "GROUP_M")},
                **precision,
                **dict.fromkeys(_UNIT_STRIDES[direction], 1),
                "HAS_BIAS": direction == "forward",
            }
            if direction != "forward":
                constants["bias_ptr"] = None
            found["linear", config, direction, name, rank] = Variant(
                "linear", config, direction, name, rank, _s2_linear_kernel, constants, linear.num_warps,
                linear.fitted_stages(rank, dtype.itemsize, memory), _FULL_PRECISION, _strides_and("M", "N", "K"),
            )  # fmt: skip
        config = factor_config_name(rank, dtype)
        factor = FACTOR[config]
        tiles = {tile: getattr(factor, tile) for tile in ("BLOCK_C", "BLOCK_M", "SPLIT_ROWS")}
        found["factor", name, rank] = Variant(
            "factor", config, "factor gradient", name, rank, _s2_linear_bwd_factor_kernel,
            {**tiles, **precision, "stride_tc": 1}, factor.num_warps, factor.num_stages, _FULL_PRECISION,
            _strides_and("M", "C"),
        )  # fmt: skip
        found["reduce", rank] = Variant(
            "reduce", "all", "factor gradient", "fp32", rank, _s2_linear_bwd_reduce_kernel,
            {"HAS_FACTOR": True, "R": rank, "BLOCK_C": REDUCE_BLOCK, "stride_fr": 1}, 4, 3, _FULL_PRECISION,
            _strides_and("C"),
        )  # fmt: skip
    return list(found.values())


def _strides_and(*names: str) -> tuple[str, ...]:
    strides = [f"stride_{tensor}{axis}" for tensor in "xwduft" for axis in "mnkrc"]
    return (*names, *strides)
