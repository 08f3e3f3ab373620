"""A frozen LayerNorm that writes z = h Aᵀ of the linear map behind it along the way.

    n  = (x − mean(x)) · rstd(x)            h  = n ⊙ w + b                z  = h Aᵀ
    d  = dh ⊙ w                             dx = rstd · (d − mean(d) − n · mean(d ⊙ n))

Means are over a row.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import NORM, NORM_INPUT_GRADIENT, NORM_MAX_RANK, NORM_MAX_WIDTH, PassTiles, cdiv, rank_block
from .launch import launch
from .ops import kernel_op
from .project import unit_columns
from .variants import Variant


@triton.jit
def _layer_norm_project_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    down_ptr,
    h_ptr,
    z_ptr,
    mean_ptr,
    rstd_ptr,
    M,
    rank,
    z_columns,
    eps,
    stride_xm,
    stride_dr,
    stride_dk,
    stride_hm,
    stride_zm,
    K: tl.constexpr,
    R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """h = (x − mean) · rstd ⊙ weight + bias, z = h Aᵀ

    x [M, K], weight [K], bias [K], down [rank, K] -> h [M, K], z [M, z_columns], zero beyond `rank`, mean [M], rstd [M]
    """
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = tl.arange(0, R)
    mask_m = offs_m < M
    rows = offs_m.to(tl.int64)

    # Whole rows in registers, as a tuple of tiles: x is read once, and no width is padded to a power of two.
    x_tiles = ()
    total = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
    for start in tl.static_range(0, K, BLOCK_K):
        offs_k = start + tl.arange(0, BLOCK_K)
        x_tile_ptr = x_ptr + rows[:, None] * stride_xm + offs_k[None, :]
        x_tile = tl.load(x_tile_ptr, mask=mask_m[:, None] & (offs_k < K)[None, :], other=0.0).to(tl.float32)
        total += x_tile
        x_tiles += (x_tile,)  # type: ignore[assignment]
    mean = tl.sum(total, axis=1) / K

    total = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
    for start in tl.static_range(0, K, BLOCK_K):
        mask_k = start + tl.arange(0, BLOCK_K) < K
        centred = tl.where(mask_k[None, :], x_tiles[start // BLOCK_K] - mean[:, None], 0.0)
        total += centred * centred
    rstd = 1 / tl.sqrt(tl.sum(total, axis=1) / K + eps)
    tl.store(mean_ptr + rows, mean, mask=mask_m)
    tl.store(rstd_ptr + rows, rstd, mask=mask_m)

    h_tiles = ()
    for start in tl.static_range(0, K, BLOCK_K):
        offs_k = start + tl.arange(0, BLOCK_K)
        mask_k = offs_k < K
        weight = tl.load(weight_ptr + offs_k, mask=mask_k, other=0.0).to(tl.float32)
        bias = tl.load(bias_ptr + offs_k, mask=mask_k, other=0.0).to(tl.float32)
        normal = (x_tiles[start // BLOCK_K] - mean[:, None]) * rstd[:, None]
        h_tile = (normal * weight[None, :] + bias[None, :]).to(h_ptr.dtype.element_ty)
        h_tile_ptr = h_ptr + rows[:, None] * stride_hm + offs_k[None, :]
        tl.store(h_tile_ptr, h_tile, mask=mask_m[:, None] & mask_k[None, :])
        h_tiles += (h_tile.to(tl.float32),)  # type: ignore[assignment]

    z = tl.zeros((BLOCK_M, R), dtype=tl.float32)
    for j in range(rank):
        products = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
        for start in tl.static_range(0, K, BLOCK_K):
            offs_k = start + tl.arange(0, BLOCK_K)
            down_row = tl.load(down_ptr + j * stride_dr + offs_k * stride_dk, mask=offs_k < K, other=0.0)
            products += h_tiles[start // BLOCK_K] * down_row.to(tl.float32)[None, :]
        z = tl.where((offs_r == j)[None, :], tl.sum(products, axis=1)[:, None], z)
    z_tile_ptr = z_ptr + rows[:, None] * stride_zm + offs_r[None, :]
    tl.store(z_tile_ptr, z.to(z_ptr.dtype.element_ty), mask=mask_m[:, None] & (offs_r < z_columns)[None, :])


@triton.jit
def _layer_norm_input_gradient_kernel(
    dh_ptr,
    x_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,
    M,
    stride_hm,
    stride_xm,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """d = dh ⊙ weight, dx = rstd · (d − mean(d) − n · mean(d ⊙ n)), n = (x − mean) · rstd

    dh [M, K], x [M, K], weight [K], mean [M], rstd [M] -> dx [M, K]
    """
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    rows = offs_m.to(tl.int64)
    mean = tl.load(mean_ptr + rows, mask=mask_m, other=0.0)
    rstd = tl.load(rstd_ptr + rows, mask=mask_m, other=0.0)

    d_tiles = ()
    normals = ()
    total = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
    total_normal = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
    for start in tl.static_range(0, K, BLOCK_K):
        offs_k = start + tl.arange(0, BLOCK_K)
        mask_k = offs_k < K
        mask = mask_m[:, None] & mask_k[None, :]
        x_tile_ptr = x_ptr + rows[:, None] * stride_xm + offs_k[None, :]
        normal = (tl.load(x_tile_ptr, mask=mask, other=0.0).to(tl.float32) - mean[:, None]) * rstd[:, None]
        dh_tile_ptr = dh_ptr + rows[:, None] * stride_hm + offs_k[None, :]
        d_tile = tl.load(dh_tile_ptr, mask=mask, other=0.0).to(tl.float32)
        d_tile *= tl.load(weight_ptr + offs_k, mask=mask_k, other=0.0).to(tl.float32)[None, :]
        total += d_tile
        total_normal += d_tile * normal
        d_tiles += (d_tile,)  # type: ignore[assignment]
        normals += (normal,)  # type: ignore[assignment]
    mean_d = tl.sum(total, axis=1) / K
    mean_dn = tl.sum(total_normal, axis=1) / K

    for start in tl.static_range(0, K, BLOCK_K):
        offs_k = start + tl.arange(0, BLOCK_K)
        d_tile = d_tiles[start // BLOCK_K]
        dx = (d_tile - mean_d[:, None] - normals[start // BLOCK_K] * mean_dn[:, None]) * rstd[:, None]
        dx_tile_ptr = dx_ptr + rows[:, None] * K + offs_k[None, :]
        tl.store(dx_tile_ptr, dx.to(dx_ptr.dtype.element_ty), mask=mask_m[:, None] & (offs_k < K)[None, :])


def _fake_layer_norm_project(x, weight, bias, eps, down, out_dtype, spare):
    return _outputs(x, down, out_dtype, spare)


@kernel_op("layer_norm_project", _fake_layer_norm_project)
def layer_norm_project(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, down: Tensor, out_dtype: torch.dtype, spare: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [M, K], down [r, K] -> h [M, K + spare] with z in its spare columns and zeros behind, z, mean [M], rstd [M].

    z is [M, r] where there are no spare columns, otherwise [0, r]. One launch up to rank `NORM_MAX_RANK`, two beyond.
    """
    rows, inputs = x.shape
    rank = down.shape[0]
    h, z, mean, rstd = _outputs(x, down, out_dtype, spare)
    if rows == 0:
        return h, z, mean, rstd
    x = unit_columns(x)
    z_out = h[:, inputs:] if spare else z
    tiles = NORM
    fused = rank <= NORM_MAX_RANK
    launch(
        _layer_norm_project_kernel, (cdiv(rows, tiles.BLOCK_M),),
        x, weight.contiguous(), bias.contiguous(), down, h, z_out, mean, rstd,
        rows, rank if fused else 0, z_out.shape[1], eps, x.stride(0), *down.stride(), h.stride(0), z_out.stride(0),
        K=inputs, R=rank_block(rank), BLOCK_M=tiles.BLOCK_M, BLOCK_K=tiles.BLOCK_K, num_warps=tiles.num_warps,
    )  # fmt: skip
    if not fused:
        torch.mm(h[:, :inputs], down.to(out_dtype).mT, out=z_out[:, :rank])
    return h, z, mean, rstd


def _outputs(x: Tensor, down: Tensor, out_dtype: torch.dtype, spare: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, inputs = x.shape
    h = x.new_empty(rows, inputs + spare, dtype=out_dtype)
    z = x.new_empty(0 if spare else rows, down.shape[0], dtype=out_dtype)
    return h, z, x.new_empty(rows, dtype=torch.float32), x.new_empty(rows, dtype=torch.float32)


def _fake_layer_norm_input_gradient(dh, x, weight, mean, rstd):
    return x.new_empty(x.shape)


@kernel_op("layer_norm_input_gradient", _fake_layer_norm_input_gradient)
def layer_norm_input_gradient(dh: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    """One launch: dh [M, K], x [M, K], weight [K], mean [M], rstd [M] -> dx [M, K] in x's dtype."""
    rows, inputs = x.shape
    dx = x.new_empty(rows, inputs)
    if rows == 0:
        return dx
    dh, x, tiles = unit_columns(dh), unit_columns(x), NORM_INPUT_GRADIENT
    launch(
        _layer_norm_input_gradient_kernel, (cdiv(rows, tiles.BLOCK_M),),
        dh, x, weight.contiguous(), mean, rstd, dx, rows, dh.stride(0), x.stride(0),
        K=inputs, BLOCK_M=tiles.BLOCK_M, BLOCK_K=tiles.BLOCK_K, num_warps=tiles.num_warps,
    )  # fmt: skip
    return dx


def variants(target: str) -> list[Variant]:
    """Rows of the largest Whisper, which need most registers; x in h's dtype and, as under autocast, in float32."""
    found = []
    for dtype, x_type in (
        ("bf16", "bf16"), ("bf16", "fp32"), ("fp16", "fp16"), ("fp16", "fp32"), ("fp32", "fp32"),
    ):  # fmt: skip
        types = {"down_ptr": "*fp32", "mean_ptr": "*fp32", "rstd_ptr": "*fp32", "eps": "fp32"}
        types |= dict.fromkeys(("x_ptr", "weight_ptr", "bias_ptr", "dx_ptr"), f"*{x_type}")
        for rank in (16, 32, 256):
            constants: dict[str, Any] = {"R": rank, "stride_dk": 1}
            found.append(_variant("forward", dtype, x_type, rank, _layer_norm_project_kernel, NORM, constants, types))
        kernel = _layer_norm_input_gradient_kernel
        found.append(_variant("input gradient", dtype, x_type, 16, kernel, NORM_INPUT_GRADIENT, {}, types))
    return found


def _variant(
    direction: str, dtype: str, x_type: str, rank: int, kernel: Any, tiles: PassTiles, constants: dict, types: dict
) -> Variant:
    constants |= {"K": NORM_MAX_WIDTH, "BLOCK_M": tiles.BLOCK_M, "BLOCK_K": tiles.BLOCK_K}
    return Variant(
        "layer norm", f"x {x_type}", direction, dtype, rank, kernel, constants, tiles.num_warps, tiles.num_stages,
        types, ("M", "stride_xm", "stride_dr", "stride_hm"), rare=dtype == "fp16",
    )  # fmt: skip
