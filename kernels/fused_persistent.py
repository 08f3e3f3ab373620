"""The fused product for Hopper and Blackwell: a persistent grid whose tiles move by TMA.

    z = x Aᵀ          y = x Wᵀ + b + (z ⊙ e) Bᵀ

One program a multiprocessor takes tile after tile of y. x, W, A, B and y move through tensor descriptors made on the
host: they are kernel arguments, so no program builds or fences one and no workspace is allocated. A is read in x's
dtype, since a conversion between its load and the tensor cores would make every step wait.
"""

import itertools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .configs import PERSISTENT, PersistentConfig, cdiv
from .device import capability, multiprocessors, precision
from .variants import Variant, precision_of

_ALIGNMENT = 16  # bytes: of a descriptor's base and of its outer stride


@triton.jit
def tile_position(tile, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Row and column of a tile of [M, N], in groups of GROUP_M rows: neighbours share x and W in the L2 cache."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    group = tile // (GROUP_M * tiles_n)
    first_m = group * GROUP_M
    group_size = tl.minimum(tiles_m - first_m, GROUP_M)
    tile_m = first_m + (tile % (GROUP_M * tiles_n)) % group_size
    tile_n = (tile % (GROUP_M * tiles_n)) // group_size
    return tile_m, tile_n


@triton.jit
def _store_half(
    half, bias_ptr, y_desc, first_m, first_n, N, HAS_BIAS: tl.constexpr, ACCUMULATE: tl.constexpr, COLUMNS: tl.constexpr
):
    """y = half + b, or y += half + b; half [BLOCK_M, COLUMNS] at (first_m, first_n)"""
    if HAS_BIAS:
        offs_n = first_n + tl.arange(0, COLUMNS)
        half += tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
    if ACCUMULATE:
        half += y_desc.load([first_m, first_n]).to(tl.float32)
    y_desc.store([first_m, first_n], half.to(y_desc.dtype))


@triton.jit
def _fused_persistent_kernel(
    x_desc,
    weight_desc,
    down_desc,
    up_desc,
    y_desc,
    bias_ptr,
    coefficients_ptr,
    z_ptr,
    M,
    N,
    K,
    rank,
    stride_zm,
    stride_zr,
    HAS_BIAS: tl.constexpr,
    HAS_Z: tl.constexpr,
    WRITE_Z: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    WEIGHT_TRANSPOSED: tl.constexpr,
    DOWN_TRANSPOSED: tl.constexpr,
    UP_TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
    R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    FLATTEN: tl.constexpr,
    WARP_SPECIALIZE: tl.constexpr,
):
    """y = x Wᵀ + b + (z ⊙ e) Bᵀ, z = x Aᵀ or given; with ACCUMULATE, y += that

    x [M, K], weight [N, K], bias [N], down [rank, K], up [N, rank], coefficients [rank] -> y [M, N], z [M, rank];
    *_TRANSPOSED: the descriptor's axes are [K, N], [K, rank], [rank, N]
    """
    offs_r = tl.arange(0, R)
    mask_r = offs_r < rank
    coefficients = tl.load(coefficients_ptr + offs_r, mask=mask_r, other=0.0).to(tl.float32)
    steps = tl.cdiv(K, BLOCK_K)
    tl.assume(steps > 0)  # without it the flattened loop gets a second, unpipelined copy
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLATTEN, warp_specialize=WARP_SPECIALIZE):
        tile_m, tile_n = tile_position(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        first_m = tile_m * BLOCK_M
        first_n = tile_n * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        z_acc = tl.zeros((BLOCK_M, R), dtype=tl.float32)
        for step in range(0, steps):
            first_k = step * BLOCK_K
            x_tile = x_desc.load([first_m, first_k])
            # [BLOCK_K, BLOCK_N] and, below, [BLOCK_K, R]
            weight_tile = (
                weight_desc.load([first_k, first_n]) if WEIGHT_TRANSPOSED else weight_desc.load([first_n, first_k]).T
            )
            acc = tl.dot(x_tile, weight_tile, acc, input_precision=PRECISION)
            if not HAS_Z:
                down_tile = down_desc.load([first_k, 0]) if DOWN_TRANSPOSED else down_desc.load([0, first_k]).T
                z_acc = tl.dot(x_tile, down_tile, z_acc, input_precision=PRECISION)

        offs_m = first_m + tl.arange(0, BLOCK_M)
        mask_z = (offs_m < M)[:, None] & mask_r[None, :]
        if HAS_Z or WRITE_Z:
            z_tile_ptr = z_ptr + offs_m.to(tl.int64)[:, None] * stride_zm + offs_r[None, :] * stride_zr
        if HAS_Z:
            z_acc = tl.load(z_tile_ptr, mask=mask_z, other=0.0).to(tl.float32)
        elif WRITE_Z:  # noqa: SIM102 - known when compiling, which tile_n is not
            if tile_n == 0:
                tl.store(z_tile_ptr, z_acc.to(z_ptr.dtype.element_ty), mask=mask_z)
        up_tile = up_desc.load([0, first_n]) if UP_TRANSPOSED else up_desc.load([first_n, 0]).T  # [R, BLOCK_N]
        scaled = (z_acc * coefficients[None, :]).to(up_tile.dtype)
        acc = tl.dot(scaled, up_tile, acc, input_precision=PRECISION)
        # Two halves of the columns: half the shared memory between registers and y, which the pipeline keeps.
        left, right = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))
        _store_half(left, bias_ptr, y_desc, first_m, first_n, N, HAS_BIAS, ACCUMULATE, BLOCK_N // 2)
        _store_half(right, bias_ptr, y_desc, first_m, first_n + BLOCK_N // 2, N, HAS_BIAS, ACCUMULATE, BLOCK_N // 2)


def describable(matrix: Tensor) -> bool:
    """Whether TMA reads the matrix as it lies: unit stride in a row, 16-byte steps between rows, aligned start."""
    return (
        matrix.stride(1) == 1
        and matrix.stride(0) * matrix.element_size() % _ALIGNMENT == 0
        and matrix.stride(0) >= matrix.shape[1]
        and matrix.data_ptr() % _ALIGNMENT == 0
        and min(matrix.shape) > 0
    )


def descriptors_serve(x: Tensor, weight: Tensor, y: Tensor) -> bool:
    """Whether x [M, K], weight [N, K], either way round, and y [M, N] can be moved by TMA."""
    return describable(x) and (describable(weight) or describable(weight.mT)) and describable(y)


def _factor(factor: Tensor, dtype: torch.dtype) -> tuple[Tensor, bool]:
    """A factor in `dtype`, for a descriptor, and whether that is its transpose; a copy only if it must be."""
    transposed = factor.stride(1) != 1 and factor.stride(0) == 1
    natural = factor.mT if transposed else factor
    if natural.dtype != dtype or not describable(natural):
        columns = _ALIGNMENT // dtype.itemsize
        padded = natural.new_empty(natural.shape[0], cdiv(natural.shape[1], columns) * columns, dtype=dtype)
        natural = padded[:, : natural.shape[1]].copy_(natural)
    return natural, transposed


def persistent_linear(
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
    """Writes y [M, N], or adds to it, and z [M, r] if there is one and it is not given.

    x, weight and y as `descriptors_serve` wants them. Factors in another dtype than x's, or that a descriptor cannot
    read, are copied first, in a launch each: r × K and N × r elements.
    """
    major = (capability(x) or (9, 0))[0]
    config: PersistentConfig = PERSISTENT[major]
    rows, inputs = x.shape
    outputs, rank = up.shape
    weight_transposed = not describable(weight)
    natural_weight = weight.mT if weight_transposed else weight
    natural_down, down_transposed = (None, False) if z_given else _factor(down, x.dtype)
    natural_up, up_transposed = _factor(up, x.dtype)
    blocks = _blocks(config, padded_rank, weight_transposed, down_transposed, up_transposed)
    tiles = cdiv(rows, config.BLOCK_M) * cdiv(outputs, config.BLOCK_N)
    _fused_persistent_kernel[(min(tiles, multiprocessors(x)),)](
        TensorDescriptor.from_tensor(x, blocks["x_desc"]),
        TensorDescriptor.from_tensor(natural_weight, blocks["weight_desc"]),
        None if natural_down is None else TensorDescriptor.from_tensor(natural_down, blocks["down_desc"]),
        TensorDescriptor.from_tensor(natural_up, blocks["up_desc"]),
        TensorDescriptor.from_tensor(y, blocks["y_desc"]),
        bias, coefficients, z, rows, outputs, inputs, rank, *((0, 0) if z is None else z.stride()),
        HAS_BIAS=bias is not None, HAS_Z=z_given, WRITE_Z=z is not None, ACCUMULATE=accumulate,
        WEIGHT_TRANSPOSED=weight_transposed, DOWN_TRANSPOSED=down_transposed, UP_TRANSPOSED=up_transposed,
        PRECISION=precision(x.dtype), R=padded_rank, **_tiles(config),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


def _blocks(
    config: PersistentConfig, padded_rank: int, weight_transposed: bool, down_transposed: bool, up_transposed: bool
) -> dict[str, list[int]]:
    """What one load or store through each descriptor moves."""

    def block(rows: int, columns: int, transposed: bool = False) -> list[int]:
        return [columns, rows] if transposed else [rows, columns]

    return {
        "x_desc": block(config.BLOCK_M, config.BLOCK_K),
        "weight_desc": block(config.BLOCK_N, config.BLOCK_K, weight_transposed),
        "down_desc": block(padded_rank, config.BLOCK_K, down_transposed),
        "up_desc": block(config.BLOCK_N, padded_rank, up_transposed),
        "y_desc": block(config.BLOCK_M, config.BLOCK_N // 2),
    }


def _tiles(config: PersistentConfig) -> dict[str, Any]:
    names = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "GROUP_M", "FLATTEN", "WARP_SPECIALIZE")
    return {name: getattr(config, name) for name in names}


def variants(target: str) -> list[Variant]:
    """What a GPU of this kind is asked to run, with operands as the layers hold them."""
    config = PERSISTENT.get(int(target) // 10) if target.isdigit() else None
    if config is None:
        return []
    found = []
    forward: dict[str, Any] = {"HAS_BIAS": True, "WRITE_Z": True, "ACCUMULATE": False, "stride_zr": 1}
    no_bias: dict[str, Any] = {"HAS_BIAS": False, "bias_ptr": None}
    backward = {**no_bias, "HAS_Z": False, "WRITE_Z": False, "z_ptr": None}
    z_given: dict[str, Any] = {"HAS_Z": True, "down_desc": None}
    ways = {
        "forward": {**forward, "HAS_Z": False},
        "forward, z given": {**forward, **z_given},
        "forward, no bias": {**forward, **no_bias, "HAS_Z": False},
        "forward, z given, no bias": {**forward, **no_bias, **z_given},
        "input gradient": {**backward, "ACCUMULATE": False},
        "input gradient, added": {**backward, "ACCUMULATE": True},
    }
    for (direction, constants), rank, dtype in itertools.product(ways.items(), (16, 32), ("bf16", "fp16")):
        rare = direction.endswith("no bias")
        if dtype == "fp16" and rare:
            continue
        transposed = "gradient" in direction
        blocks = _blocks(config, rank, transposed, transposed, transposed)
        types = {name: f"tensordesc<{dtype}{block}>".replace(" ", "") for name, block in blocks.items()}
        axes = dict.fromkeys(("WEIGHT_TRANSPOSED", "DOWN_TRANSPOSED", "UP_TRANSPOSED"), transposed)
        variant = Variant(
            "fused persistent", f"capability {target[:-1]}", direction, dtype, rank, _fused_persistent_kernel,
            {**_tiles(config), **constants, **axes, "PRECISION": precision_of(dtype), "R": rank},
            config.num_warps, config.num_stages, {**types, "coefficients_ptr": "*fp32"},
            ("M", "N", "K", "stride_zm"), rare=rare or dtype == "fp16",
        )  # fmt: skip
        found.append(variant)
    return found
