"""z = x Aᵀ where nothing that makes x computed it already (`producers.py`): one pass over x."""

import itertools
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from . import device
from .configs import PROJECT, SHARED_MEMORY, cdiv, pass_config_name, rank_tile, two_axes
from .launch import launch
from .ops import kernel_op
from .variants import PRODUCT_DTYPES, Variant, precision_of


@triton.jit
def _project_kernel(
    x_ptr,
    down_ptr,
    z_ptr,
    M,
    K,
    rank,
    stride_xm,
    stride_dr,
    stride_dk,
    PRECISION: tl.constexpr,
    R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """z = x Aᵀ

    x [M, K], down [rank, K] -> z [M, rank]
    """
    # Neighbouring programs share the rows: what the first reads is in the L2 cache for the others.
    offs_r = tl.program_id(0) * R + tl.arange(0, R)
    pid = tl.program_id(1) + tl.program_id(2) * tl.num_programs(1)
    offs_m = pid * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m = offs_m < M
    mask_r = offs_r < rank
    rows_m = offs_m.to(tl.int64)
    x_tile_ptr = x_ptr + rows_m[:, None] * stride_xm + offs_k[None, :]
    offs_down = offs_k[:, None] * stride_dk + offs_r[None, :] * stride_dr
    acc = tl.zeros((BLOCK_M, R), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        mask_k = offs_k < K - k
        x_tile = tl.load(x_tile_ptr, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        down_tile = tl.load(down_ptr + offs_down, mask=mask_k[:, None] & mask_r[None, :], other=0.0)  # [BLOCK_K, R]
        acc = tl.dot(x_tile, down_tile.to(x_tile.dtype), acc, input_precision=PRECISION)
        x_tile_ptr += BLOCK_K
        down_ptr += BLOCK_K * stride_dk
    z_tile_ptr = z_ptr + rows_m[:, None] * rank + offs_r[None, :]
    tl.store(z_tile_ptr, acc.to(z_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_r[None, :])


def _fake_project(x, down):
    return x.new_empty(x.shape[0], down.shape[0])


@kernel_op("project", _fake_project)
def project(x: Tensor, down: Tensor) -> Tensor:
    """z = x Aᵀ in one launch: x [M, K], down [r, K] of any strides -> z [M, r] in x's dtype."""
    if not device.runs_triton(x):
        return (down.to(x.dtype) @ x.mT).mT.contiguous()  # a CPU multiplies faster with the few rows on the left
    rows, inputs = x.shape
    rank = down.shape[0]
    z = x.new_empty(rows, rank)
    if rows == 0:
        return z
    x = unit_columns(x)
    R = rank_tile(rank)
    config = PROJECT[pass_config_name(rows, 1, R, x.dtype)]
    launch(
        _project_kernel, (cdiv(rank, R), *two_axes(cdiv(rows, config.BLOCK_M))),
        x, down, z, rows, inputs, rank, x.stride(0), *down.stride(),
        PRECISION=device.precision(x.dtype), R=R, BLOCK_M=config.BLOCK_M, BLOCK_K=config.BLOCK_N,
        num_warps=config.num_warps, num_stages=config.fitted_stages(1, R, x.element_size(), device.shared_memory(x)),
    )  # fmt: skip
    return z


def unit_columns(rows: Tensor) -> Tensor:
    """`rows` itself if its columns are adjacent in memory, as all that a layer produces, else a copy."""
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def variants(target: str) -> list[Variant]:
    """What training and inference launch."""
    found: dict[tuple, Variant] = {}
    for (name, dtype), R, rows in itertools.product(PRODUCT_DTYPES.items(), (16, 32, 64), (512, 24_000)):
        config = pass_config_name(rows, 1, R, dtype)
        tiles = PROJECT[config]
        constants: dict[str, Any] = {"PRECISION": precision_of(name), "R": R, "BLOCK_M": tiles.BLOCK_M}
        constants |= {"BLOCK_K": tiles.BLOCK_N, "stride_dk": 1}
        found[config, name, R] = Variant(
            "project", config, "z", name, R, _project_kernel, constants, tiles.num_warps,
            tiles.fitted_stages(1, R, dtype.itemsize, SHARED_MEMORY[target]), {"down_ptr": "*fp32"},
            ("M", "K", "stride_xm"), rare=name == "fp16",
        )  # fmt: skip
    return list(found.values())
