"""Sums over all rows without atomics: a product over splits of the rows into a workspace, then over the splits.

    lowᵀ tall = Σ_s lowᵀ tall over the rows of split s

Fixed splits, so equal inputs give equal bits.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activation import gelu
from .configs import ONE_PASS_RANK, REDUCE_BLOCK, REDUCE_SPLITS, TALL, cdiv, rank_tile, tall_config_name
from .device import precision
from .launch import launch
from .variants import PRODUCT_DTYPES, Variant, precision_of


@triton.jit
def _tall_product_kernel(
    tall_ptr,
    low_ptr,
    coefficients_ptr,
    product_ptr,
    M,
    C,
    rank,
    split_rows,
    stride_tm,
    stride_lm,
    GELU: tl.constexpr,
    HAS_COEFFICIENTS: tl.constexpr,
    PRECISION: tl.constexpr,
    R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """product[s] = diag(e) lowᵀ tall over the `split_rows` rows of split s; with GELU, lowᵀ GELU(tall)

    tall [M, C], low [M, rank], coefficients [rank] -> product [splits, rank, C], float32
    """
    offs_r = tl.program_id(0) * R + tl.arange(0, R)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    split = tl.program_id(2)
    mask_c = offs_c < C
    mask_r = offs_r < rank
    acc = tl.zeros((BLOCK_C, R), dtype=tl.float32)
    for step in range(0, split_rows, BLOCK_M):
        offs_m = split * split_rows + step + tl.arange(0, BLOCK_M)
        mask_m = offs_m < M
        rows_m = offs_m.to(tl.int64)
        tall_tile_ptr = tall_ptr + rows_m[:, None] * stride_tm + offs_c[None, :]
        tall_tile = tl.load(tall_tile_ptr, mask=mask_m[:, None] & mask_c[None, :], other=0.0)  # [BLOCK_M, BLOCK_C]
        if GELU:
            tall_tile = gelu(tall_tile, tall_ptr.dtype.element_ty)
        low_tile_ptr = low_ptr + rows_m[:, None] * stride_lm + offs_r[None, :]
        low_tile = tl.load(low_tile_ptr, mask=mask_m[:, None] & mask_r[None, :], other=0.0)  # [BLOCK_M, R]
        acc = tl.dot(tl.trans(tall_tile), low_tile.to(tall_tile.dtype), acc, input_precision=PRECISION)
    if HAS_COEFFICIENTS:
        acc *= tl.load(coefficients_ptr + offs_r, mask=mask_r, other=0.0).to(tl.float32)[None, :]
    product_tile_ptr = product_ptr + split.to(tl.int64) * rank * C + offs_r[None, :] * C + offs_c[:, None]
    tl.store(product_tile_ptr, acc, mask=mask_c[:, None] & mask_r[None, :])


@triton.jit
def _sum_splits(partial_ptr, offsets, splits, size, BLOCK: tl.constexpr, SPLITS: tl.constexpr):
    """Σ_s partial[s, offsets];  partial [splits, size] -> [BLOCK]"""
    offs_s = tl.arange(0, SPLITS)
    acc = tl.zeros((SPLITS, BLOCK), dtype=tl.float32)
    for s in range(0, splits, SPLITS):
        tile_ptr = partial_ptr + (s + offs_s)[:, None].to(tl.int64) * size + offsets[None, :]
        acc += tl.load(tile_ptr, mask=(offs_s < splits - s)[:, None] & (offsets < size)[None, :], other=0.0)
    return tl.sum(acc, axis=0)


@triton.jit(do_not_specialize=["stride_0r", "stride_0c", "stride_1r", "stride_1c"])
def _reduce_kernel(
    product0_ptr,
    product1_ptr,
    partial_ptr,
    d_factor0_ptr,
    d_factor1_ptr,
    d_coefficients_ptr,
    splits0,
    splits1,
    splits_e,
    size0,
    size1,
    size_e,
    C0,
    C1,
    stride_0r,
    stride_1r,
    stride_0c,
    stride_1c,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """d_factorᵢ += Σ_s productᵢ[s],  d_coefficients = Σ_s partial[s]

    product0..1 [splits, rank, C], partial [splits, GROUP, rank] -> d_factor0..1 [rank, C], d_coefficients [GROUP, rank]
    """
    pid = tl.program_id(0)
    blocks_0, blocks_1 = tl.cdiv(size0, BLOCK), tl.cdiv(size1, BLOCK)
    if pid < blocks_0:
        _add_sum(product0_ptr, d_factor0_ptr, pid, splits0, size0, C0, stride_0r, stride_0c, BLOCK, SPLITS)
    elif pid < blocks_0 + blocks_1:
        block = pid - blocks_0
        _add_sum(product1_ptr, d_factor1_ptr, block, splits1, size1, C1, stride_1r, stride_1c, BLOCK, SPLITS)
    else:
        offsets = (pid - blocks_0 - blocks_1) * BLOCK + tl.arange(0, BLOCK)
        total = _sum_splits(partial_ptr, offsets, splits_e, size_e, BLOCK, SPLITS)
        tl.store(d_coefficients_ptr + offsets, total, mask=offsets < size_e)


@triton.jit
def _add_sum(
    product_ptr, d_factor_ptr, block, splits, size, C, stride_r, stride_c, BLOCK: tl.constexpr, SPLITS: tl.constexpr
):
    """d_factor += Σ_s product[s] of one block of entries:  product [splits, rank, C], d_factor [rank, C]"""
    offsets = block * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < size
    total = _sum_splits(product_ptr, offsets, splits, size, BLOCK, SPLITS)
    row, column = (offsets // C).to(tl.int64), (offsets % C).to(tl.int64)
    d_factor_block_ptr = d_factor_ptr + row * stride_r + column * stride_c
    tl.store(d_factor_block_ptr, tl.load(d_factor_block_ptr, mask=mask, other=0.0) + total, mask=mask)


def tall_product(talls: Sequence[Tensor], low: Tensor, coefficients: Tensor | None, *, of_gelu: bool = False) -> Tensor:
    """diag(eᵢ) lowᵀ tallᵢ over splits of the rows, a launch each: [M, C], [M, r], [G, r] -> [G · splits, r, C].

    `of_gelu`: of GELU(tallᵢ), rounded to its dtype, instead.
    """
    (rows, columns), rank = talls[0].shape, low.shape[1]
    R = rank_tile(rank)
    config = TALL[tall_config_name(R, talls[0].dtype, of_gelu)]
    split_rows = config.split_rows(rows, columns)
    splits = cdiv(rows, split_rows)
    product = low.new_empty(len(talls) * splits, rank, columns, dtype=torch.float32)
    for i, tall in enumerate(talls):
        e = None if coefficients is None else coefficients[i]
        part = product if len(talls) == 1 else product[i * splits :]
        launch(
            _tall_product_kernel, (cdiv(rank, R), cdiv(columns, config.BLOCK_C), splits),
            tall, low, e, part, rows, columns, rank, split_rows, tall.stride(0), low.stride(0),
            GELU=of_gelu, HAS_COEFFICIENTS=e is not None, PRECISION=precision(tall.dtype), R=R, BLOCK_C=config.BLOCK_C,
            BLOCK_M=config.BLOCK_M, num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return product


def reduce_splits(
    factors: Sequence[tuple[Tensor, Tensor]], partial: Tensor | None = None, d_coefficients: Tensor | None = None
) -> None:
    """All sums over splits in one launch: of up to two (product [splits, r, C], d_factor [r, C]), added to d_factor,
    and of partial [splits, G, r], written to d_coefficients."""
    # What is not there has no entries, but its pointer is a pointer to floats in every build.
    floats = factors[0][0] if factors else partial
    given: list[tuple[Any, ...]] = [(product, d, *product.shape, *d.stride()) for product, d in factors]
    absent = (floats, floats, 0, 0, 1, 0, 0)
    products, targets, splits, ranks, columns, strides_r, strides_c = zip(*[*given, absent, absent][:2], strict=True)
    splits_e, group, rank = (0, 0, 0) if partial is None else partial.shape
    sizes = [ranks[0] * columns[0], ranks[1] * columns[1], group * rank]
    launch(
        _reduce_kernel, (sum(cdiv(size, REDUCE_BLOCK) for size in sizes),),
        *products, floats if partial is None else partial,
        *targets, floats if d_coefficients is None else d_coefficients,
        *splits, splits_e, *sizes, *columns, *strides_r, *strides_c,
        BLOCK=REDUCE_BLOCK, SPLITS=REDUCE_SPLITS, num_warps=4,
    )  # fmt: skip


_FLOATS = dict.fromkeys(("coefficients_ptr", "product_ptr"), "*fp32")
_REDUCED = dict.fromkeys((name for name in _reduce_kernel.arg_names if name.endswith("_ptr")), "*fp32")


def variants(target: str) -> list[Variant]:
    """What the gradients of factors launch."""
    constants: dict[str, Any] = {"BLOCK": REDUCE_BLOCK, "SPLITS": REDUCE_SPLITS}
    found = [
        Variant(
            "reduce splits", "all", "any strides", "fp32", 16, _reduce_kernel, constants, 4, 3, _REDUCED, ("C0", "C1")
        )
    ]
    for (name, dtype), rank in itertools.product(PRODUCT_DTYPES.items(), (16, 32, 64)):
        for direction in ("input", "input, GELU", "output") if rank > ONE_PASS_RANK else ("input", "input, GELU"):
            weighted, of_gelu = direction == "output", "GELU" in direction
            config = tall_config_name(rank, dtype, of_gelu)
            tall = TALL[config]
            constants = {"PRECISION": precision_of(name), "R": rank, "BLOCK_C": tall.BLOCK_C, "BLOCK_M": tall.BLOCK_M}
            constants |= {"HAS_COEFFICIENTS": weighted, **({} if weighted else {"coefficients_ptr": None})}
            constants |= {"GELU": of_gelu}
            found.append(Variant(
                "tall product", config, direction, name, rank, _tall_product_kernel, constants,
                tall.num_warps, tall.num_stages, _FLOATS if weighted else {**_FLOATS, "low_ptr": "*fp32"},
                ("M", "C", "stride_tm"), rare=name == "fp16",
            ))  # fmt: skip
    return found
