"""The adapter's gradients: each of x and dy read once, sums kept in float32 buffers that other layers may share.

    gᵢ = dyᵢ B                    g  += Σᵢ gᵢ ⊙ eᵢ                 deᵢ = colsum(z ⊙ gᵢ)
    Pᵢ = dyᵢᵀ z                   dB += Σᵢ Pᵢ diag(eᵢ)             dA += gᵀ x

z = x Aᵀ is made by `project.py`; i runs over a group of one to three weights that read one x and share A and B. Sums
over all rows are formed over blocks of rows into a workspace and then, of all three in one launch, over the blocks:
deterministic, no atomics.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from . import device
from .arguments import MAX_GROUP
from .configs import GROUP_RANK, ONE_PASS_RANK, PASS, SHARED_MEMORY, cdiv, pass_config_name, rank_tile, two_axes
from .launch import launch
from .ops import kernel_op
from .project import unit_columns
from .row_sums import reduce_splits, tall_product
from .variants import PRODUCT_DTYPES, Variant, precision_of


@triton.jit
def _one_output(
    dy_tile_ptr,
    mask,
    up_tile,
    z_transposed,
    coefficients,
    g,
    PRECISION: tl.constexpr,
    HAS_PRODUCT: tl.constexpr,
):
    """g + dy B and diag(e) zᵀ dy of one tile of dy, which is loaded once for both."""
    dy_tile = tl.load(dy_tile_ptr, mask=mask, other=0.0)  # [BLOCK_M, BLOCK_N]
    g = tl.dot(dy_tile, up_tile, g, input_precision=PRECISION)
    product = g
    if HAS_PRODUCT:
        product = tl.dot(z_transposed, dy_tile, input_precision=PRECISION) * coefficients[:, None]  # [R, BLOCK_N]
    return g, product


@triton.jit
def _output_gradients_kernel(
    dy0_ptr,
    dy1_ptr,
    dy2_ptr,
    z_ptr,
    up_ptr,
    coefficients_ptr,
    g_ptr,
    product_ptr,
    d_coefficients_ptr,
    M,
    N,
    rank,
    stride_0m,
    stride_1m,
    stride_2m,
    stride_zm,
    stride_un,
    stride_ur,
    stride_gm,
    stride_dm,
    GROUP: tl.constexpr,
    HAS_G: tl.constexpr,
    ADD_TO_G: tl.constexpr,
    HAS_PRODUCT: tl.constexpr,
    HAS_COEFFICIENTS: tl.constexpr,
    PRECISION: tl.constexpr,
    R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """For a block of rows: gᵢ = dyᵢ B, g += Σᵢ gᵢ ⊙ eᵢ, product = Σᵢ diag(eᵢ) zᵀ dyᵢ, d_coefficientsᵢ = colsum(z ⊙ gᵢ)

    dy0..2 [M, N], z [M, rank], up [N, rank], coefficients [GROUP, rank]
    -> g [M, rank], product [blocks, rank, N], d_coefficients [blocks, GROUP, rank], all float32
    """
    pid = tl.program_id(1) + tl.program_id(2) * tl.num_programs(1)
    dtype: tl.constexpr = dy0_ptr.dtype.element_ty
    offs_r = tl.program_id(0) * R + tl.arange(0, R)
    offs_m = pid * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    mask_m = offs_m < M
    mask_r = offs_r < rank
    mask_mr = mask_m[:, None] & mask_r[None, :]
    rows_m = offs_m.to(tl.int64)

    z_transposed = tl.zeros((R, BLOCK_M), dtype=dtype)
    if HAS_PRODUCT:
        z_tile_ptr = z_ptr + rows_m[:, None] * stride_zm + offs_r[None, :]
        z_transposed = tl.trans(tl.load(z_tile_ptr, mask=mask_mr, other=0.0).to(dtype))
    coefficients_0 = tl.load(coefficients_ptr + offs_r, mask=mask_r, other=0.0).to(tl.float32)
    g_0 = tl.zeros((BLOCK_M, R), dtype=tl.float32)
    dy0_tile_ptr = dy0_ptr + rows_m[:, None] * stride_0m + offs_n[None, :]
    if GROUP > 1:
        coefficients_1 = tl.load(coefficients_ptr + rank + offs_r, mask=mask_r, other=0.0).to(tl.float32)
        g_1 = tl.zeros((BLOCK_M, R), dtype=tl.float32)
        dy1_tile_ptr = dy1_ptr + rows_m[:, None] * stride_1m + offs_n[None, :]
    if GROUP > 2:
        coefficients_2 = tl.load(coefficients_ptr + 2 * rank + offs_r, mask=mask_r, other=0.0).to(tl.float32)
        g_2 = tl.zeros((BLOCK_M, R), dtype=tl.float32)
        dy2_tile_ptr = dy2_ptr + rows_m[:, None] * stride_2m + offs_n[None, :]
    offs_up = offs_n[:, None] * stride_un + offs_r[None, :] * stride_ur
    product_tile_ptr = product_ptr + pid.to(tl.int64) * N * rank + offs_r[:, None] * N + offs_n[None, :]

    for n in range(0, N, BLOCK_N):
        mask_n = offs_n < N - n
        mask_nr = mask_n[:, None] & mask_r[None, :]
        mask = mask_m[:, None] & mask_n[None, :]
        up_tile = tl.load(up_ptr + offs_up, mask=mask_nr, other=0.0).to(dtype)
        g_0, product = _one_output(
            dy0_tile_ptr, mask, up_tile, z_transposed, coefficients_0, g_0, PRECISION, HAS_PRODUCT
        )
        dy0_tile_ptr += BLOCK_N
        if GROUP > 1:
            g_1, product_1 = _one_output(
                dy1_tile_ptr, mask, up_tile, z_transposed, coefficients_1, g_1, PRECISION, HAS_PRODUCT
            )
            product += product_1
            dy1_tile_ptr += BLOCK_N
        if GROUP > 2:
            g_2, product_2 = _one_output(
                dy2_tile_ptr, mask, up_tile, z_transposed, coefficients_2, g_2, PRECISION, HAS_PRODUCT
            )
            product += product_2
            dy2_tile_ptr += BLOCK_N
        if HAS_PRODUCT:
            tl.store(product_tile_ptr, product, mask=mask_r[:, None] & mask_n[None, :])
            product_tile_ptr += BLOCK_N
        up_ptr += BLOCK_N * stride_un

    if HAS_COEFFICIENTS:
        # Loaded once more: kept in registers all along it would cost more than this.
        z_tile_ptr = z_ptr + rows_m[:, None] * stride_zm + offs_r[None, :]
        z_tile = tl.load(z_tile_ptr, mask=mask_mr, other=0.0).to(tl.float32)
        d_coefficients_row_ptr = d_coefficients_ptr + pid * stride_dm + offs_r
        tl.store(d_coefficients_row_ptr, tl.sum(z_tile * g_0, axis=0), mask=mask_r)
        if GROUP > 1:
            tl.store(d_coefficients_row_ptr + rank, tl.sum(z_tile * g_1, axis=0), mask=mask_r)
        if GROUP > 2:
            tl.store(d_coefficients_row_ptr + 2 * rank, tl.sum(z_tile * g_2, axis=0), mask=mask_r)
    if HAS_G:
        g = g_0 * coefficients_0[None, :]
        if GROUP > 1:
            g += g_1 * coefficients_1[None, :]
        if GROUP > 2:
            g += g_2 * coefficients_2[None, :]
        g_tile_ptr = g_ptr + rows_m[:, None] * stride_gm + offs_r[None, :]
        if ADD_TO_G:
            g += tl.load(g_tile_ptr, mask=mask_mr, other=0.0)
        tl.store(g_tile_ptr, g, mask=mask_mr)


def _fake_adapter_gradients(
    dys, z, up, coefficients, g, d_up, x, d_down, *, needs_coefficients=True, add_to_g=True, of_gelu=False
):
    group, rank = coefficients.shape
    wide = torch.promote_types(dys[0].dtype, torch.float32)
    return coefficients.new_empty(group if needs_coefficients and z is not None else 0, rank, dtype=wide)


@kernel_op("adapter_gradients", _fake_adapter_gradients, mutates=("g", "d_up", "d_down"))
def adapter_gradients(
    dys: Sequence[Tensor],
    z: Tensor | None,
    up: Tensor,
    coefficients: Tensor,
    g: Tensor | None,
    d_up: Tensor | None,
    x: Tensor | None,
    d_down: Tensor | None,
    *,
    needs_coefficients: bool = True,
    add_to_g: bool = True,
    of_gelu: bool = False,
) -> Tensor:
    """g += Σᵢ (dyᵢ B) ⊙ eᵢ, d_up += Σᵢ dyᵢᵀ z diag(eᵢ), d_down += gᵀ x, in place; returns deᵢ = colsum(z ⊙ (dyᵢ B)).

    Up to rank 16 three launches: a pass over all dy, one over x, the sums over blocks; one launch where only g is
    wanted. Up to rank 32 each dy has a launch of its own; beyond, d_up is a second pass (see `configs.py`).

    Args:
        dys: one to three [M, N] of one dtype, each with its own row stride.
        z: x Aᵀ, [M, r]; may be None where neither d_up nor the coefficients' gradient is wanted.
        up: B, [N, r], any strides.
        coefficients: e, [G, r], a row for each of `dys`.
        g: [M, r] float32 with unit column stride, or None: not wanted.
        d_up: [N, r] float32, any strides, or None: not wanted.
        x: [M, K]; may be None where d_down is not wanted.
        d_down: [r, K] float32, any strides, or None: not wanted. It takes g as it is in the end.
        needs_coefficients: whether the coefficients' gradient is wanted; without z it is not computed.
        add_to_g: False overwrites g, which then need not be initialised.
        of_gelu: d_down += gᵀ GELU(x) instead, with GELU(x) rounded to x's dtype.

    Returns:
        The coefficients' gradient, [G, r] float32; [0, r] where it is not computed.
    """
    needs_coefficients = needs_coefficients and z is not None
    if not device.runs_triton(dys[0]):
        d_coefficients = _plain_output_gradients(dys, z, up, coefficients, g, d_up, needs_coefficients, add_to_g)
        if d_down is not None:
            assert x is not None
            assert g is not None
            _plain_input_gradient_factor(x, g, d_down, of_gelu)
        return d_coefficients
    (rows, outputs), (group, rank) = dys[0].shape, coefficients.shape
    counted = group if needs_coefficients else 0
    d_coefficients = coefficients.new_empty(counted, rank, dtype=torch.float32)
    if rows == 0:
        return d_coefficients.zero_()
    dys = [unit_columns(dy) for dy in dys]
    z = None if z is None else unit_columns(z)
    coefficients = coefficients.contiguous()
    one_pass = rank <= ONE_PASS_RANK
    together = group if rank <= GROUP_RANK else 1  # outputs a launch
    config = PASS[pass_config_name(rows, together, rank_tile(rank), dys[0].dtype)]
    blocks = math.prod(two_axes(cdiv(rows, config.BLOCK_M)))  # those without rows add nothing
    partial = d_coefficients.new_empty(blocks, counted, rank)
    launches = group // together if one_pass and d_up is not None else 0
    product = d_coefficients.new_empty(launches * blocks, rank, outputs)
    if g is not None or needs_coefficients or launches:
        if together == group:
            _launch_pass(dys, z, up, coefficients, g, product, partial, add_to_g)
        else:
            for i, (dy, e) in enumerate(zip(dys, coefficients.split(1), strict=True)):
                part = product[i * blocks : (i + 1) * blocks]
                _launch_pass([dy], z, up, e, g, part, partial[:, i : i + 1], add_to_g or i > 0)
    factors = []
    if d_up is not None:
        if not one_pass:
            assert z is not None
            product = tall_product(dys, z, coefficients)
        factors.append((product, d_up.mT))
    if d_down is not None:
        assert x is not None
        assert g is not None
        factors.append((tall_product([unit_columns(x)], g, None, of_gelu=of_gelu), d_down))
    if factors or needs_coefficients:
        reduce_splits(factors, partial, d_coefficients)
    return d_coefficients


def _fake_input_gradient_factor(x, g, d_down):
    return None


@kernel_op("input_gradient_factor", _fake_input_gradient_factor, mutates=("d_down",))
def input_gradient_factor(x: Tensor, g: Tensor, d_down: Tensor) -> None:
    """d_down += gᵀ x, in place, in two launches: x [M, K], g [M, r] float32, d_down [r, K] float32 of any strides.

    For a g that several operations have added to; that of one is part of `adapter_gradients`.
    """
    if not device.runs_triton(x):
        _plain_input_gradient_factor(x, g, d_down, of_gelu=False)
    elif x.shape[0] > 0:
        product = tall_product([unit_columns(x)], unit_columns(g), None)
        reduce_splits([(product, d_down)])


def _plain_input_gradient_factor(x: Tensor, g: Tensor, d_down: Tensor, of_gelu: bool) -> None:
    """The same in PyTorch."""
    x = F.gelu(x) if of_gelu else x
    d_down += (g.to(x.dtype).mT.contiguous() @ x).to(d_down.dtype)


def _plain_output_gradients(
    dys: Sequence[Tensor],
    z: Tensor | None,
    up: Tensor,
    coefficients: Tensor,
    g: Tensor | None,
    d_up: Tensor | None,
    needs_coefficients: bool,
    add_to_g: bool,
) -> Tensor:
    """The gradients of the outputs' side in PyTorch, every product in dy's precision."""
    dtype = dys[0].dtype
    wide = torch.promote_types(dtype, torch.float32)
    coefficients = coefficients.to(wide)
    if g is not None and not add_to_g:
        g.zero_()
    d_coefficients = []
    for dy, e in zip(dys, coefficients, strict=True):
        if g is not None or needs_coefficients:
            dy_up = (up.to(dtype).mT @ dy.mT).mT.contiguous().to(wide)  # [M, r]
        if g is not None:
            g += dy_up * e
        if needs_coefficients:
            assert z is not None
            d_coefficients.append((z.to(wide) * dy_up).sum(0))
        if d_up is not None:
            assert z is not None
            d_up += (z.to(dtype).mT.contiguous() @ dy).mT.to(wide) * e
    return torch.stack(d_coefficients) if needs_coefficients else coefficients.new_empty(0, coefficients.shape[1])


def _launch_pass(
    dys: Sequence[Tensor],
    z: Tensor | None,
    up: Tensor,
    coefficients: Tensor,
    g: Tensor | None,
    product: Tensor,
    partial: Tensor,
    add_to_g: bool,
) -> None:
    (rows, outputs), rank, group = dys[0].shape, up.shape[1], len(dys)
    R, blocks = rank_tile(rank), partial.shape[0]
    config = PASS[pass_config_name(rows, group, R, dys[0].dtype)]
    memory = device.shared_memory(dys[0])
    has_product, has_coefficients = product.shape[0] > 0, partial.shape[1] > 0
    if not (has_product or has_coefficients):
        z = None
    given = [*dys, *(None,) * (MAX_GROUP - group)]
    launch(
        _output_gradients_kernel, (cdiv(rank, R), *two_axes(blocks)),
        *given, z, up, coefficients, g, product, partial, rows, outputs, rank,
        *(0 if dy is None else dy.stride(0) for dy in given), 0 if z is None else z.stride(0), *up.stride(),
        0 if g is None else g.stride(0), partial.stride(0),
        GROUP=group, HAS_G=g is not None, ADD_TO_G=g is not None and add_to_g, HAS_PRODUCT=has_product,
        HAS_COEFFICIENTS=has_coefficients, PRECISION=device.precision(dys[0].dtype), R=R,
        BLOCK_M=config.BLOCK_M, BLOCK_N=config.BLOCK_N, num_warps=config.num_warps,
        num_stages=config.fitted_stages(group, R, dys[0].element_size(), memory),
    )  # fmt: skip


_FLOATS = dict.fromkeys(("up_ptr", "coefficients_ptr", "g_ptr", "product_ptr", "d_coefficients_ptr"), "*fp32")
_DIVISIBLE = ("M", "N", "stride_0m", "stride_1m", "stride_2m")


def _kinds() -> dict[str, dict[str, bool]]:
    """What a launch may write, by name, and the flags for it.

    "Added": to a g of maps that share the input, or of those before in a group above rank 16.
    """
    kinds = {}
    for has_product, has_coefficients, g in itertools.product((True, False), (True, False), ("", ", added", ", no g")):
        names = ["factor"] * has_product + ["coefficients"] * has_coefficients
        if names or g != ", no g":
            flags = {"HAS_PRODUCT": has_product, "HAS_COEFFICIENTS": has_coefficients}
            flags |= {"HAS_G": g != ", no g", "ADD_TO_G": g == ", added"}
            kinds[(" and ".join(names) or "g") + g] = flags
    return kinds


_KINDS = _kinds()
_USUAL = ("factor and coefficients", "factor and coefficients, added", "coefficients")
_USUAL_IN_TWO_PASSES = ("coefficients", "coefficients, added")


def variants(target: str) -> list[Variant]:
    """What training launches; usual is that all are trained, or the coefficients alone."""
    found: dict[tuple, Variant] = {}
    for (name, dtype), R, rows in itertools.product(PRODUCT_DTYPES.items(), (16, 32, 64), (512, 24_000)):
        usual = _USUAL if R <= ONE_PASS_RANK else _USUAL_IN_TWO_PASSES
        for group in range(1, MAX_GROUP + 1) if R <= GROUP_RANK else (1,):
            config = pass_config_name(rows, group, R, dtype)
            for kind in _KINDS:
                exists = R <= ONE_PASS_RANK or not kind.startswith("factor")
                rare = name == "fp16" or kind not in usual or (kind == "coefficients" and group == 2)
                if exists and (name != "fp16" or kind in usual):
                    variant = _variant(config, name, R, group, kind, SHARED_MEMORY[target], rare)
                    found[config, name, R, group, kind] = variant
    return list(found.values())


def _variant(config: str, dtype: str, R: int, group: int, kind: str, memory: int, rare: bool) -> Variant:
    tiles = PASS[config]
    stages = tiles.fitted_stages(group, R, PRODUCT_DTYPES[dtype].itemsize, memory)
    flags = _KINDS[kind]
    constants: dict[str, Any] = {"PRECISION": precision_of(dtype), "R": R, "BLOCK_M": tiles.BLOCK_M}
    constants |= {"BLOCK_N": tiles.BLOCK_N, "stride_ur": 1, "GROUP": group, **flags}
    constants |= {} if flags["HAS_G"] else {"g_ptr": None}
    constants |= {} if flags["HAS_PRODUCT"] or flags["HAS_COEFFICIENTS"] else {"z_ptr": None}
    constants |= dict.fromkeys(("dy1_ptr", "dy2_ptr")[group - 1 :])
    return Variant(
        "output gradients", config, f"group of {group}, {kind}", dtype, R, _output_gradients_kernel, constants,
        tiles.num_warps, stages, _FLOATS, _DIVISIBLE, rare,
    )  # fmt: skip
