"""The fused strategy: the dense product, its low-rank path and z in one launch.

    z  = x Aᵀ        y  = x Wᵀ + b + (z ⊙ e) Bᵀ
    g  = dy B        dx = dy W + (g ⊙ e) A

dx is the forward operation on (Wᵀ, Bᵀ, Aᵀ, e), so one kernel serves both and the transposes are strides. There are two
variants: plain tiles, for any strides on any GPU, and the persistent kernel of `fused_persistent.py`. Weights that read
one x compute z once and give it to the others; weights whose input gradients meet in one x add into one dx.
"""

import itertools
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .configs import (
    LINEAR,
    SHARED_MEMORY,
    LinearConfig,
    cdiv,
    fused_config_name,
    fused_variant,
    persistent_obstacle,
    persistent_operand_obstacle,
    rank_block,
)
from .device import INTERPRETING, capability, multiprocessors, precision, shared_memory
from .fused_persistent import descriptors_serve, persistent_linear, tile_position
from .launch import launch
from .ops import kernel_op
from .variants import PRODUCT_DTYPES, TRITON_TYPES, Variant, precision_of

VARIANTS = ("auto", "tiles", "persistent")
_Z_BLOCK = 32  # ranks of a given z that plain tiles take at a time


@triton.jit
def _add_low_rank(
    acc,
    z_tile,
    coefficients_ptr,
    up_tile_ptr,
    offs_r,
    mask_n,
    rank,
    stride_ur,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """acc + (z ⊙ e) Bᵀ over the ranks `offs_r`; acc [BLOCK_M, BLOCK_N], z_tile [BLOCK_M, R]"""
    mask_r = offs_r < rank
    coefficients = tl.load(coefficients_ptr + offs_r, mask=mask_r, other=0.0).to(tl.float32)
    up_tile = tl.load(up_tile_ptr + offs_r[:, None] * stride_ur, mask=mask_r[:, None] & mask_n[None, :], other=0.0)
    scaled = (z_tile.to(tl.float32) * coefficients[None, :]).to(DTYPE)
    return tl.dot(scaled, up_tile.to(DTYPE), acc, input_precision=PRECISION)


@triton.jit
def _fused_tile_kernel(
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
    stride_ym,
    stride_yn,
    stride_zm,
    stride_zr,
    HAS_BIAS: tl.constexpr,
    HAS_Z: tl.constexpr,
    WRITE_Z: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    PRECISION: tl.constexpr,
    R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """y = x Wᵀ + b + (z ⊙ e) Bᵀ, z = x Aᵀ or given; with ACCUMULATE, y += that

    x [M, K], weight [N, K], bias [N], down [rank, K], up [N, rank], coefficients [rank] -> y [M, N], z [M, rank];
    R >= rank, or any R with HAS_Z
    """
    tile_m, tile_n = tile_position(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    offs_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
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
        if not HAS_Z:
            # Before the dense product: after it, Triton 3.6 makes a wrong z on Hopper where A is the transpose of a B.
            down_tile = tl.load(down_tile_ptr, mask=mask_k[:, None] & mask_r[None, :], other=0.0)
            z_acc = tl.dot(x_tile, down_tile.to(x_tile.dtype), z_acc, input_precision=PRECISION)
            down_tile_ptr += BLOCK_K * stride_dk
        acc = tl.dot(x_tile, weight_tile, acc, input_precision=PRECISION)
        x_tile_ptr += BLOCK_K * stride_xk
        weight_tile_ptr += BLOCK_K * stride_wk

    up_tile_ptr = up_ptr + rows_n[None, :] * stride_un
    if HAS_Z or WRITE_Z:
        z_tile_ptr = z_ptr + rows_m[:, None] * stride_zm
    if HAS_Z:
        for first_r in tl.range(0, rank, R, num_stages=1):
            offs_r = first_r + tl.arange(0, R)
            mask_z = mask_m[:, None] & (offs_r < rank)[None, :]
            z_tile = tl.load(z_tile_ptr + offs_r[None, :] * stride_zr, mask=mask_z, other=0.0)
            acc = _add_low_rank(
                acc, z_tile, coefficients_ptr, up_tile_ptr, offs_r, mask_n, rank, stride_ur, x_ptr.dtype.element_ty,
                PRECISION,
            )  # fmt: skip
    else:
        if WRITE_Z:  # noqa: SIM102 - known when compiling, which tile_n is not
            if tile_n == 0:
                mask_z = mask_m[:, None] & mask_r[None, :]
                tl.store(z_tile_ptr + offs_r[None, :] * stride_zr, z_acc.to(z_ptr.dtype.element_ty), mask=mask_z)
        acc = _add_low_rank(
            acc, z_acc, coefficients_ptr, up_tile_ptr, offs_r, mask_n, rank, stride_ur, x_ptr.dtype.element_ty,
            PRECISION,
        )  # fmt: skip
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    mask_y = mask_m[:, None] & mask_n[None, :]
    y_tile_ptr = y_ptr + rows_m[:, None] * stride_ym + rows_n[None, :] * stride_yn
    if ACCUMULATE:
        acc += tl.load(y_tile_ptr, mask=mask_y, other=0.0).to(tl.float32)
    tl.store(y_tile_ptr, acc.to(y_ptr.dtype.element_ty), mask=mask_y)


def tile_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    coefficients: Tensor,
    z: Tensor | None,
    y: Tensor,
    *,
    z_given: bool,
    accumulate: bool,
    padded_rank: int,
) -> None:
    """Writes y [M, N], or adds to it, and z [M, r] if there is one and it is not given. Any strides."""
    rows, inputs = x.shape
    outputs, rank = up.shape
    memory = shared_memory(x)
    if z_given:
        padded_rank = min(padded_rank, _Z_BLOCK)
    config: LinearConfig = LINEAR[fused_config_name(rows, padded_rank, x.dtype, memory, accumulate)]
    grid = (cdiv(rows, config.BLOCK_M) * cdiv(outputs, config.BLOCK_N),)
    launch(
        _fused_tile_kernel, grid,
        x, weight, bias, down, up, coefficients, y, z, rows, outputs, inputs, rank,
        *x.stride(), *weight.stride(), *down.stride(), *up.stride(), *y.stride(),
        *((0, 0) if z is None else z.stride()),
        HAS_BIAS=bias is not None, HAS_Z=z_given, WRITE_Z=z is not None, ACCUMULATE=accumulate,
        PRECISION=precision(x.dtype), R=padded_rank, **_tiles(config), num_warps=config.num_warps,
        num_stages=config.fitted_stages(padded_rank, x.element_size(), memory),
    )  # fmt: skip


def _tiles(config: LinearConfig) -> dict[str, int]:
    return {name: getattr(config, name) for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "GROUP_M")}


def _launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    coefficients: Tensor,
    z: Tensor | None,
    y: Tensor,
    want_z: bool,
    variant: str,
    accumulate: bool,
) -> Tensor:
    """Runs the variant that serves the operands; returns the z it wrote, [M, r], or an empty one."""
    rank = up.shape[1]
    z_given = z is not None
    own_z = x.new_empty(x.shape[0] if want_z and not z_given else 0, rank)
    if y.numel() == 0:
        # No tile of y would write z, but it exists where y merely has no columns.
        return own_z if own_z.numel() == 0 else own_z.copy_(x @ down.to(x.dtype).mT)
    if z is None and want_z:
        z = own_z
    coefficients = coefficients.contiguous()  # one scalar a weight arrives expanded
    bias = None if bias is None else bias.contiguous()
    padded_rank = rank_block(rank)
    run = persistent_linear if _variant(variant, x, weight, y, padded_rank) == "persistent" else tile_linear
    run(
        x, weight, bias, down, up, coefficients, z, y,
        z_given=z_given, accumulate=accumulate, padded_rank=padded_rank,
    )  # fmt: skip
    return own_z


def _variant(variant: str, x: Tensor, weight: Tensor, y: Tensor, padded_rank: int) -> str:
    """The variant to run.

    Raises:
        ValueError: no variant has that name, or the persistent one is asked for and cannot serve the operands.
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant is {variant!r}, not one of {', '.join(VARIANTS)}")
    if variant == "tiles":
        return variant
    found, descriptors = capability(x), descriptors_serve(x, weight, y)
    if variant == "auto":
        rows, outputs = y.shape
        return fused_variant(found, x.dtype, padded_rank, descriptors, rows, outputs, multiprocessors(x))
    if INTERPRETING:
        obstacle = persistent_operand_obstacle(padded_rank, descriptors)
    else:
        obstacle = persistent_obstacle(found, x.dtype, padded_rank, descriptors)
    if obstacle is not None:
        raise ValueError(f"variant='persistent' cannot serve these operands: {obstacle}")
    return variant


def _fake_fused_linear(x, weight, bias, down, up, coefficients, z, want_z, variant):
    rows = x.shape[0] if want_z and z is None else 0
    return x.new_empty(x.shape[0], weight.shape[0]), x.new_empty(rows, up.shape[1])


@kernel_op("fused_linear", _fake_fused_linear)
def fused_linear_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    coefficients: Tensor,
    z: Tensor | None,
    want_z: bool,
    variant: str,
) -> tuple[Tensor, Tensor]:
    """`fused_linear` without `out`; its z is [0, r] where it is given or not wanted."""
    y = x.new_empty(x.shape[0], weight.shape[0])
    return y, _launch(x, weight, bias, down, up, coefficients, z, y, want_z, variant, accumulate=False)


def _fake_fused_linear_add(x, weight, bias, down, up, coefficients, z, out, want_z, variant):
    return x.new_empty(x.shape[0] if want_z and z is None else 0, up.shape[1])


@kernel_op("fused_linear_add", _fake_fused_linear_add, mutates=("out",))
def fused_linear_add_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    coefficients: Tensor,
    z: Tensor | None,
    out: Tensor,
    want_z: bool,
    variant: str,
) -> Tensor:
    """`fused_linear` added to `out`; returns z, [0, r] where it is given or not wanted."""
    return _launch(x, weight, bias, down, up, coefficients, z, out, want_z, variant, accumulate=True)


def fused_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    coefficients: Tensor,
    z: Tensor | None = None,
    out: Tensor | None = None,
    *,
    want_z: bool = True,
    variant: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """One launch: y = x Wᵀ + b + (z ⊙ e) Bᵀ and z = x Aᵀ; the input gradient is this on dy, Wᵀ, None, Bᵀ, Aᵀ, e.

    Args:
        x: [M, K].
        weight: [N, K], in x's dtype.
        bias: [N] or None.
        down: [r, K]; in x's dtype it saves the persistent variant a copy, as does `up`.
        up: [N, r].
        coefficients: [r].
        z: [M, r] if it is known already: x and down are then not multiplied.
        out: [M, N], which y is added to, in place; the sum is rounded once.
        want_z: whether z is written, if it is not given.
        variant: "tiles", "persistent", or "auto" for what `configs.fused_variant` says of the operands.

    Returns:
        y [M, N], or `out`, and z [M, r] in x's dtype: the given one, else the new one, else None.

    Raises:
        ValueError: no such variant, or the persistent one cannot serve the operands.
    """
    operands = (x, weight, bias, down, up, coefficients, z)
    if out is None:
        y, new_z = fused_linear_op(*operands, want_z, variant)
    else:
        y, new_z = out, fused_linear_add_op(*operands, out, want_z, variant)
    return y, z if z is not None else new_z if want_z else None


_FORWARD: dict[str, Any] = {
    **dict.fromkeys(("stride_xk", "stride_wk", "stride_dk", "stride_ur", "stride_yn", "stride_zr"), 1),
    **{"HAS_BIAS": True, "WRITE_Z": True, "ACCUMULATE": False},
}
_NO_BIAS = {"HAS_BIAS": False, "bias_ptr": None}
_BACKWARD: dict[str, Any] = {
    **dict.fromkeys(("stride_xk", "stride_wn", "stride_dr", "stride_un", "stride_yn"), 1),
    **_NO_BIAS,
    **{"HAS_Z": False, "WRITE_Z": False, "z_ptr": None},
}
_WAYS: dict[str, dict[str, Any]] = {
    "forward": {**_FORWARD, "HAS_Z": False},
    "forward, z given": {**_FORWARD, "HAS_Z": True},
    "forward, no bias": {**_FORWARD, **_NO_BIAS, "HAS_Z": False},
    "forward, z given, no bias": {**_FORWARD, **_NO_BIAS, "HAS_Z": True},
    "input gradient": {**_BACKWARD, "ACCUMULATE": False},
    "input gradient, added": {**_BACKWARD, "ACCUMULATE": True},
}


def variants(target: str) -> list[Variant]:
    """What `_fused_forward` and `_fused_input_gradient` of `strategies.py` launch; a group's factors are cast."""
    memory = SHARED_MEMORY[target]
    strides = [f"stride_{tensor}{axis}" for tensor in "xwduyz" for axis in "mnkr"]
    found: dict[tuple, Variant] = {}
    for (name, dtype), rank, rows, (way, constants), are_cast in itertools.product(
        PRODUCT_DTYPES.items(), (16, 32, 64, 128, 256), (512, 24_000), _WAYS.items(), (False, True)
    ):
        added, half = constants["ACCUMULATE"], dtype.itemsize == 2
        if (constants["HAS_Z"] and rank > _Z_BLOCK) or are_cast > half or (added and half > are_cast):
            continue
        rare = (are_cast and not added) or way.endswith("no bias")
        if name == "fp16" and rare:
            continue
        config_name = fused_config_name(rows, rank, dtype, memory, added)
        config = LINEAR[config_name]
        factors = dict.fromkeys(("down_ptr", "up_ptr"), TRITON_TYPES[name if are_cast else "fp32"])
        direction = way + ", cast factors" * (are_cast and not added)
        found[config_name, direction, name, rank] = Variant(
            "fused tiles", config_name, direction, name, rank, _fused_tile_kernel,
            {**_tiles(config), **constants, "PRECISION": precision_of(name), "R": rank}, config.num_warps,
            config.fitted_stages(rank, dtype.itemsize, memory), {**factors, "coefficients_ptr": "*fp32"},
            ("M", "N", "K", *strides), rare=rare or name == "fp16",
        )  # fmt: skip
    return list(found.values())
