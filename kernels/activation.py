"""An exact GELU, or a plain copy, that writes z = h Aᵀ of the linear map behind it along the way.

    h  = f(x)                               z  = h Aᵀ                     f = GELU: x Φ(x), or f(x) = x
    dx = dh ⊙ (Φ(x) + x φ(x)) of a GELU,    dh + ge A of a copy

ge is the gradient of z.
"""

import itertools
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .configs import (
    ACTIVATION,
    ACTIVATION_INPUT_GRADIENT,
    PassTiles,
    activation_config_name,
    activation_gradient_config_name,
    cdiv,
    gradient_rank_tile,
    rank_block,
)
from .device import precision
from .launch import launch
from .ops import kernel_op
from .project import project, unit_columns
from .variants import PRODUCT_DTYPES, TRITON_TYPES, Variant, precision_of


@triton.jit
def _normal_distribution(x):
    """Φ(x)"""
    return 0.5 * (1 + tl.erf(x * 0.7071067811865476))


@triton.jit
def gelu(x, dtype: tl.constexpr):
    """x Φ(x), computed in float32 and rounded to `dtype`"""
    wide = x.to(tl.float32)
    return (wide * _normal_distribution(wide)).to(dtype)


@triton.jit
def _activation_project_kernel(
    x_ptr,
    down_ptr,
    h_ptr,
    z_ptr,
    M,
    K,
    rank,
    z_columns,
    stride_xm,
    stride_dr,
    stride_dk,
    stride_hm,
    stride_zm,
    GELU: tl.constexpr,
    PRECISION: tl.constexpr,
    R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """h = x Φ(x) or x, z = h Aᵀ

    x [M, K], down [rank, K] -> h [M, K], z [M, z_columns], zero beyond `rank`
    """
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = tl.arange(0, R)
    mask_m = offs_m < M
    mask_r = offs_r < rank
    rows = offs_m.to(tl.int64)
    z_acc = tl.zeros((BLOCK_M, R), dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        offs_k = start + tl.arange(0, BLOCK_K)
        mask_k = offs_k < K
        mask = mask_m[:, None] & mask_k[None, :]
        x_tile_ptr = x_ptr + rows[:, None] * stride_xm + offs_k[None, :]
        x_tile = tl.load(x_tile_ptr, mask=mask, other=0.0)
        h_tile = gelu(x_tile, h_ptr.dtype.element_ty) if GELU else x_tile.to(h_ptr.dtype.element_ty)
        tl.store(h_ptr + rows[:, None] * stride_hm + offs_k[None, :], h_tile, mask=mask)
        down_tile_ptr = down_ptr + offs_k[:, None] * stride_dk + offs_r[None, :] * stride_dr
        down_tile = tl.load(down_tile_ptr, mask=mask_k[:, None] & mask_r[None, :], other=0.0)  # [BLOCK_K, R]
        z_acc = tl.dot(h_tile, down_tile.to(h_tile.dtype), z_acc, input_precision=PRECISION)
    z_tile_ptr = z_ptr + rows[:, None] * stride_zm + offs_r[None, :]
    tl.store(z_tile_ptr, z_acc.to(z_ptr.dtype.element_ty), mask=mask_m[:, None] & (offs_r < z_columns)[None, :])


@triton.jit
def _activation_input_gradient_kernel(
    dh_ptr,
    ge_ptr,
    down_ptr,
    x_ptr,
    dx_ptr,
    M,
    K,
    rank,
    stride_hm,
    stride_gm,
    stride_dr,
    stride_dk,
    stride_xm,
    stride_dxm,
    GELU: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dx = dh ⊙ (Φ(x) + x φ(x)) or, without GELU, dh + ge A; dx may be dh itself

    dh [M, K], ge [M, rank], down [rank, K], x [M, K] -> dx [M, K]
    """
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_m = offs_m < M
    mask_k = offs_k < K
    mask = mask_m[:, None] & mask_k[None, :]
    rows = offs_m.to(tl.int64)
    dh_tile_ptr = dh_ptr + rows[:, None] * stride_hm + offs_k[None, :]
    dx = tl.load(dh_tile_ptr, mask=mask, other=0.0).to(tl.float32)
    if not GELU:
        for start in range(0, rank, BLOCK_R):
            offs_r = start + tl.arange(0, BLOCK_R)
            mask_r = offs_r < rank
            ge_tile_ptr = ge_ptr + rows[:, None] * stride_gm + offs_r[None, :]
            ge_tile = tl.load(ge_tile_ptr, mask=mask_m[:, None] & mask_r[None, :], other=0.0)
            down_tile_ptr = down_ptr + offs_r[:, None] * stride_dr + offs_k[None, :] * stride_dk
            down_tile = tl.load(down_tile_ptr, mask=mask_r[:, None] & mask_k[None, :], other=0.0)  # [BLOCK_R, BLOCK_K]
            dx = tl.dot(ge_tile, down_tile.to(ge_tile.dtype), dx, input_precision=PRECISION)
    if GELU:
        x_tile_ptr = x_ptr + rows[:, None] * stride_xm + offs_k[None, :]
        x_tile = tl.load(x_tile_ptr, mask=mask, other=0.0).to(tl.float32)
        density = 0.3989422804014327 * tl.exp(-0.5 * x_tile * x_tile)
        dx *= _normal_distribution(x_tile) + x_tile * density
    tl.store(dx_ptr + rows[:, None] * stride_dxm + offs_k[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)


def _fake_activation_project(x, down, gelu, out_dtype, spare):
    return _outputs(x, down, out_dtype, spare)


@kernel_op("activation_project", _fake_activation_project)
def activation_project(
    x: Tensor, down: Tensor, gelu: bool, out_dtype: torch.dtype, spare: int
) -> tuple[Tensor, Tensor]:
    """x [M, K], down [r, K] -> h [M, K + spare] with z in its spare columns and zeros behind, z.

    z is [M, r] where there are no spare columns, otherwise [0, r]. One launch, but for a GELU without spare columns.
    """
    rows, inputs = x.shape
    rank = down.shape[0]
    if gelu and not spare:
        h = F.gelu(x).to(out_dtype)
        return h, project(h, down)
    h, z = _outputs(x, down, out_dtype, spare)
    if rows == 0:
        return h, z
    x = unit_columns(x)
    z_out = h[:, inputs:] if spare else z
    padded_rank = rank_block(rank)
    tiles = ACTIVATION[activation_config_name(rows, padded_rank, out_dtype)]
    launch(
        _activation_project_kernel, (cdiv(rows, tiles.BLOCK_M),),
        x, down, h, z_out, rows, inputs, rank, z_out.shape[1],
        x.stride(0), *down.stride(), h.stride(0), z_out.stride(0),
        GELU=gelu, PRECISION=precision(out_dtype), R=padded_rank, BLOCK_M=tiles.BLOCK_M, BLOCK_K=tiles.BLOCK_K,
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
    return h, z


def _outputs(x: Tensor, down: Tensor, out_dtype: torch.dtype, spare: int) -> tuple[Tensor, Tensor]:
    rows, inputs = x.shape
    h = x.new_empty(rows, inputs + spare, dtype=out_dtype)
    return h, x.new_empty(0 if spare else rows, down.shape[0], dtype=out_dtype)


def _fake_gelu_input_gradient(dh, x):
    return x.new_empty(x.shape)


@kernel_op("gelu_input_gradient", _fake_gelu_input_gradient)
def gelu_input_gradient(dh: Tensor, x: Tensor) -> Tensor:
    """One launch: dh [M, K], x [M, K] -> dx [M, K] in x's dtype."""
    dx = x.new_empty(x.shape)
    _launch_input_gradient(unit_columns(dh), None, None, unit_columns(x), dx)
    return dx


def _fake_add_low_rank(buffer, down):
    return None


@kernel_op("add_low_rank_", _fake_add_low_rank, mutates=("buffer",))
def add_low_rank_(buffer: Tensor, down: Tensor) -> None:
    """One launch, in place: buffer = [dh | ge] [M, K + R], down A [r, K]: dh += ge A."""
    rank, inputs = down.shape
    dh, ge = buffer[:, :inputs], buffer[:, inputs : inputs + rank]
    _launch_input_gradient(dh, ge, down, None, dh)


def _launch_input_gradient(dh: Tensor, ge: Tensor | None, down: Tensor | None, x: Tensor | None, dx: Tensor) -> None:
    rows, inputs = dx.shape
    if rows == 0:
        return
    rank, strides = 1, [0, 0, 0]
    if ge is not None and down is not None:
        rank, strides = down.shape[0], [ge.stride(0), *down.stride()]
    tiles = ACTIVATION_INPUT_GRADIENT[activation_gradient_config_name(dh.dtype)]
    launch(
        _activation_input_gradient_kernel, (cdiv(rows, tiles.BLOCK_M), cdiv(inputs, tiles.BLOCK_K)),
        dh, ge, down, x, dx, rows, inputs, rank,
        dh.stride(0), *strides, 0 if x is None else x.stride(0), dx.stride(0),
        GELU=x is not None, PRECISION=precision(dh.dtype),
        BLOCK_R=gradient_rank_tile(rank, dh.dtype), BLOCK_M=tiles.BLOCK_M, BLOCK_K=tiles.BLOCK_K,
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip


_DIVISIBLE = ("M", "K", "stride_xm", "stride_dr", "stride_hm", "stride_gm", "stride_dxm")


def variants(target: str) -> list[Variant]:
    """What LayerNorm, GELU and `augmented` launch; x of a GELU in h's dtype or in float32."""
    found: dict[tuple, Variant] = {}
    for (name, dtype), rank, x_type in itertools.product(
        PRODUCT_DTYPES.items(), (16, 32, 64, 128, 256), PRODUCT_DTYPES
    ):
        if x_type not in (name, "fp32") or (name == "tf32" and x_type == "fp32"):
            continue
        for rows, gelu in itertools.product((512, 24_000), (True, False)):
            config = activation_config_name(rows, rank, dtype)
            direction = "gelu" if gelu else "copy"
            constants: dict[str, Any] = {"GELU": gelu, "R": rank, "stride_dk": 1}
            found[config, direction, name, rank, x_type] = _variant(
                config, direction, name, x_type, rank, _activation_project_kernel, ACTIVATION[config], constants
            )
        config, block_r = activation_gradient_config_name(dtype), gradient_rank_tile(rank, dtype)
        for gelu in (True, False):
            if (gelu and name == "tf32") or (not gelu and x_type != name):  # no product; added in place
                continue
            direction = "input gradient of gelu" if gelu else "input gradient of copy with low rank"
            constants = {"GELU": gelu, "BLOCK_R": 16 if gelu else block_r}
            constants |= {"ge_ptr": None, "down_ptr": None} if gelu else {"x_ptr": None, "stride_dk": 1}
            padded_rank = 0 if gelu else block_r
            found[config, direction, name, padded_rank, x_type] = _variant(
                config, direction, name, x_type, padded_rank, _activation_input_gradient_kernel,
                ACTIVATION_INPUT_GRADIENT[config], constants,
            )  # fmt: skip
    return list(found.values())


def _variant(
    config: str, direction: str, name: str, x_type: str, rank: int, kernel: Any, tiles: PassTiles, constants: dict
) -> Variant:
    constants |= {"PRECISION": precision_of(name), "BLOCK_M": tiles.BLOCK_M, "BLOCK_K": tiles.BLOCK_K}
    types = {"down_ptr": "*fp32"}
    if constants.get("x_ptr", x_type) is not None:
        types |= dict.fromkeys(("x_ptr", "dx_ptr"), TRITON_TYPES[x_type])
    return Variant(
        "activation", f"{config}, x {x_type}", direction, name, rank, kernel, constants, tiles.num_warps,
        tiles.num_stages, types, _DIVISIBLE, rare=name == "fp16",
    )  # fmt: skip
