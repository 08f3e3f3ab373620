"""Tile sizes of the kernels. Chosen by arithmetic until they are measured; `aot.py` compiles every one of them."""

from dataclasses import dataclass

import torch
import triton

# Shared memory one program may use, bytes, by compute capability; AMD's gfx942 has 64 KiB of LDS.
SHARED_MEMORY = {
    "80": 163 << 10, "86": 99 << 10, "89": 99 << 10, "90": 227 << 10, "100": 227 << 10, "120": 99 << 10,
    "gfx942": 64 << 10,
}  # fmt: skip


@dataclass(frozen=True)
class LinearConfig:
    """Tiles of the dense product with its low-rank path: y [BLOCK_M, BLOCK_N], depth BLOCK_K."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    GROUP_M: int
    num_warps: int
    num_stages: int

    def fitted_stages(self, rank_block: int, element_bytes: int, shared_memory: int) -> int:
        """Pipeline depth whose x, W and A tiles fit `shared_memory` bytes, at most `num_stages`, at least 1."""
        stage = (self.BLOCK_M + self.BLOCK_N + rank_block) * self.BLOCK_K * element_bytes
        return max(1, min(self.num_stages, shared_memory // stage))


def cdiv(size: int, block: int) -> int:
    """How many blocks cover `size`. Triton's own `cdiv` looks for constants of kernels first, and takes 8 µs."""
    return -(-size // block)


GRID_AXIS = 65_535  # programs that CUDA takes along a grid's second and third axis


def two_axes(blocks: int) -> tuple[int, int]:
    """The second and third axis of a grid for so many blocks, or a few more."""
    layers = cdiv(max(1, blocks), GRID_AXIS)
    return cdiv(blocks, layers), layers


LINEAR = {
    "wide": LinearConfig(128, 256, 64, 8, num_warps=8, num_stages=4),
    "square": LinearConfig(128, 128, 64, 8, num_warps=8, num_stages=3),
    "few rows": LinearConfig(64, 64, 64, 4, num_warps=4, num_stages=4),
    "few rows, deep": LinearConfig(64, 128, 128, 4, num_warps=4, num_stages=3),  # 0.8 of the time of "few rows" on 9.0
    "high rank": LinearConfig(64, 64, 32, 8, num_warps=8, num_stages=3),
    # Where compute capability 8.x spills with "square" and "high rank".
    "square, shallow": LinearConfig(128, 128, 32, 8, num_warps=8, num_stages=3),
    "high rank, low": LinearConfig(32, 64, 32, 8, num_warps=8, num_stages=2),
    # Tiles and warps of float32 are those with which no target spills.
    "single precision": LinearConfig(64, 64, 32, 8, num_warps=8, num_stages=2),
    "single precision, rank 32": LinearConfig(64, 32, 32, 8, num_warps=8, num_stages=2),
    "single precision, rank 64": LinearConfig(16, 16, 16, 8, num_warps=8, num_stages=1),
    "single precision, rank 128": LinearConfig(16, 16, 16, 8, num_warps=4, num_stages=1),
    "single precision, rank 256": LinearConfig(16, 32, 16, 8, num_warps=8, num_stages=1),
}


def rank_block(rank: int) -> int:
    """The rank padded to what a matrix instruction takes: a power of two, at least 16."""
    return max(16, 1 << (rank - 1).bit_length())


def linear_config_name(rows: int, padded_rank: int, dtype: torch.dtype, shared_memory: int) -> str:
    """Which of `LINEAR` serves M = `rows` rows in `dtype` on a GPU with that much shared memory a program."""
    large = shared_memory >= SHARED_MEMORY["90"]
    if dtype == torch.float32:
        return "single precision" + (f", rank {padded_rank}" if padded_rank > 16 else "")
    small = SHARED_MEMORY["89"] <= shared_memory < SHARED_MEMORY["90"]
    if padded_rank > 32:
        return "high rank, low" if small and padded_rank > 64 else "high rank"
    if rows <= 1024:
        return "few rows, deep" if large else "few rows"
    if large:
        return "wide"
    return "square, shallow" if small and padded_rank == 32 else "square"


@dataclass(frozen=True)
class MergeConfig:
    """Tile of the merged weight, [BLOCK_N, BLOCK_K]."""

    BLOCK_N: int
    BLOCK_K: int
    num_warps: int


# A row of A that is no longer than the program's threads is loaded in the layout of the tile, without shared memory.
MERGE = MergeConfig(64, 64, num_warps=4)


# The adapter's gradients (adapter_gradients.py).
#
# One pass over dy in blocks of BLOCK_M rows writes zᵀ dy of each block, N · r floats, to a workspace that is read once
# again. In bfloat16 each is 2 · r / (BLOCK_M · group) of dy's bytes: at r = 8 12.5 % for one dy in blocks of 128 rows,
# 17 % for three in blocks of 32, which was faster all the same than 8 % in blocks of 64. M = 24,000 makes 188 (750)
# programs, each with three tiles in flight: more than the 4 MB that hide the latency of 3 TB/s. A workspace of rank 32
# costs as much as a second pass over dy; beyond, that pass is cheaper (r = 128: little more than two passes, not five).
ONE_PASS_RANK = 32
# A launch holds the g of all outputs of a group in registers; beyond this rank it takes them one by one.
GROUP_RANK = 16
# Summing splits: a program adds up 32 neighbouring floats (a cache line) of 128 splits at a time: at M = 24,000, r = 8,
# N = 1280 (5120) 320 (1280) programs of two steps each.
REDUCE_BLOCK = 32
REDUCE_SPLITS = 128


@dataclass(frozen=True)
class PassConfig:
    """Tiles of one pass over [M, N]: a program owns BLOCK_M rows and walks along them BLOCK_N columns a step."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int

    def fitted_stages(self, group: int, rank_tile: int, element_bytes: int, shared_memory: int) -> int:
        """Pipeline depth, one more than the tiles in flight, with which two programs share `shared_memory` bytes.

        At least two, one tile in flight, where that fits one program.
        """
        stage = self.BLOCK_N * (group * self.BLOCK_M * element_bytes + 4 * rank_tile)
        kept = 2 * rank_tile * max(self.BLOCK_M, self.BLOCK_N) * element_bytes
        half, whole = (shared_memory // 2 - kept) // stage, (shared_memory - kept) // stage
        return max(1, min(self.num_stages, max(half + 1, min(2, whole))))


@dataclass(frozen=True)
class TallConfig:
    """Tiles of tallᵀ low: BLOCK_C columns of the tall operand, BLOCK_M rows a step, by about so many programs."""

    BLOCK_C: int
    BLOCK_M: int
    num_warps: int
    num_stages: int
    programs: int = 264  # two a multiprocessor of an H100

    def split_rows(self, rows: int, columns: int) -> int:
        """Rows of a split, so that splits times blocks of columns are about `programs`."""
        splits = max(1, self.programs // cdiv(columns, self.BLOCK_C))
        return self.BLOCK_M * cdiv(rows, splits * self.BLOCK_M)


PASS = {
    "many rows": PassConfig(128, 64, num_warps=8, num_stages=4),
    "many rows, group": PassConfig(32, 64, num_warps=4, num_stages=4),
    "many rows, rank 32": PassConfig(128, 32, num_warps=8, num_stages=4),
    "few rows": PassConfig(16, 128, num_warps=4, num_stages=3),  # 32 programs at M = 512, not 4
    "few rows, group": PassConfig(16, 128, num_warps=8, num_stages=3),
    "few rows, rank 32": PassConfig(32, 64, num_warps=4, num_stages=4),
    "high rank": PassConfig(64, 64, num_warps=8, num_stages=3),
    "single precision": PassConfig(64, 32, num_warps=8, num_stages=2),
    "single precision, rank 32": PassConfig(64, 16, num_warps=8, num_stages=2),
    # Taller, wider or with four warps, groups of two or three spill on 9.0 or 10.0, in TF32 or in float32.
    "single precision, group": PassConfig(16, 16, num_warps=8, num_stages=2),
    "single precision, high rank": PassConfig(16, 16, num_warps=8, num_stages=1),
}
# z = x Aᵀ (project.py) walks along x as the pass over one dy does, with less in registers.
PROJECT = {
    **PASS,
    "many rows": PassConfig(64, 128, num_warps=4, num_stages=3),
    "few rows": PassConfig(16, 128, num_warps=4, num_stages=4),
}
TALL = {
    "low rank": TallConfig(256, 64, num_warps=8, num_stages=3),
    "low rank, GELU": TallConfig(128, 32, num_warps=8, num_stages=4, programs=528),
    "high rank": TallConfig(64, 64, num_warps=4, num_stages=2),
    "single precision": TallConfig(32, 16, num_warps=8, num_stages=1),
}


def rank_tile(rank: int) -> int:
    """How much of the rank a program takes, padded to what a matrix instruction takes; others take the rest."""
    return min(64, rank_block(rank))


def pass_config_name(rows: int, group: int, rank_tile: int, dtype: torch.dtype) -> str:
    """Which of `PASS` serves a group of [M, N] with M = `rows` in `dtype`."""
    if dtype == torch.float32 and rank_tile > 32:
        return "single precision, high rank"
    if rank_tile > 32:
        return "high rank"
    few = "few rows" if rows <= 4096 else "many rows"
    name = "single precision" if dtype == torch.float32 else few
    return name + (", rank 32" if rank_tile == 32 else "" if group == 1 else ", group")


def tall_config_name(rank_tile: int, dtype: torch.dtype, of_gelu: bool = False) -> str:
    """Which of `TALL` serves that part of the rank in `dtype`."""
    if dtype == torch.float32:
        return "single precision"
    if rank_tile > 32:
        return "high rank"
    return "low rank, GELU" if of_gelu else "low rank"


# --- fused: y, z and dx in one launch; its plain tiles are those of `LINEAR` ---


def fused_config_name(rows: int, padded_rank: int, dtype: torch.dtype, shared_memory: int, accumulate: bool) -> str:
    """Which of `LINEAR` serves plain tiles; what adds to y needs registers for its old tile too, so not the widest."""
    name = linear_config_name(rows, padded_rank, dtype, shared_memory)
    return "square" if accumulate and name == "wide" else name


@dataclass(frozen=True)
class PersistentConfig:
    """Tiles of the persistent product, and how its loop over tiles is compiled.

    FLATTEN makes one loop of tiles and depth, so that the next tile's loads start under this tile's epilogue;
    WARP_SPECIALIZE gives loads, products and epilogue warps of their own, which does the same and more.
    """

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    GROUP_M: int
    FLATTEN: bool
    WARP_SPECIALIZE: bool
    num_warps: int
    num_stages: int


# By the major number of the compute capability. Hopper: Triton 3.9 specialises only kernels of 4 warps there, and fails
# on this one. Blackwell: two accumulators each of y and z fill the 512 columns of tensor memory, so BLOCK_N cannot be
# 256; flattened and specialised at once does not compile.
PERSISTENT = {
    9: PersistentConfig(128, 256, 64, 8, FLATTEN=True, WARP_SPECIALIZE=False, num_warps=8, num_stages=3),
    10: PersistentConfig(128, 128, 64, 8, FLATTEN=False, WARP_SPECIALIZE=True, num_warps=8, num_stages=4),
}
if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7):  # fails on Blackwell's
    del PERSISTENT[10]
PERSISTENT_MAX_RANK = 32


def persistent_obstacle(
    capability: tuple[int, int] | None, dtype: torch.dtype, padded_rank: int, descriptors: bool
) -> str | None:
    """Why the persistent variant cannot serve these operands on a GPU of that capability; None if it can."""
    if capability is None or capability[0] not in PERSISTENT:
        return f"it needs compute capability {' or '.join(f'{major}.x' for major in PERSISTENT)}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"its tiles hold half precision, not {dtype}"
    return persistent_operand_obstacle(padded_rank, descriptors)


def persistent_operand_obstacle(padded_rank: int, descriptors: bool) -> str | None:
    """The part of `persistent_obstacle` that holds in Triton's interpreter as well."""
    if padded_rank > PERSISTENT_MAX_RANK:
        return f"its rank is at most {PERSISTENT_MAX_RANK}"
    if not descriptors:
        return "x, weight and y need unit strides along one axis, 16-byte steps along the other and aligned starts"
    return None


def fused_variant(
    capability: tuple[int, int] | None,
    dtype: torch.dtype,
    padded_rank: int,
    descriptors: bool,
    rows: int,
    outputs: int,
    multiprocessors: int,
) -> str:
    """Which variant "auto" means, "persistent" or "tiles", for y [rows, outputs].

    Persistent where it can serve and every multiprocessor gets a tile; with fewer tiles smaller ones spread better.
    """
    if capability is None or persistent_obstacle(capability, dtype, padded_rank, descriptors) is not None:
        return "tiles"
    config = PERSISTENT[capability[0]]
    tiles = cdiv(rows, config.BLOCK_M) * cdiv(outputs, config.BLOCK_N)
    return "persistent" if tiles >= multiprocessors else "tiles"


# What makes the input of a linear map and its z in one pass (layer_norm.py, activation.py).
#
# A LayerNorm's rows lie in registers, BLOCK_M of them, and twice that in its backward; up to the width of the largest
# Whisper. Its z is formed without matrix instructions, r · K multiplications a row, which hide behind the memory's time
# up to about rank 32; beyond, a product of its own is cheaper.
NORM_MAX_WIDTH = 1280
NORM_MAX_RANK = 32


@dataclass(frozen=True)
class PassTiles:
    """Tiles [BLOCK_M, BLOCK_K] of a pass over rows."""

    BLOCK_M: int
    BLOCK_K: int
    num_warps: int
    num_stages: int = 1


# Columns of a LayerNorm's tile: no more than threads, so that a row of A is loaded in the tile's layout, without
# shared memory.
NORM = PassTiles(8, 128, num_warps=8)
NORM_INPUT_GRADIENT = PassTiles(8, 128, num_warps=8)
ACTIVATION = {
    "many rows": PassTiles(64, 64, num_warps=4, num_stages=3),
    "few rows": PassTiles(16, 128, num_warps=8, num_stages=3),
    "high rank": PassTiles(64, 32, num_warps=8),  # a deeper pipeline spills on compute capability 10.0
    "single precision": PassTiles(16, 32, num_warps=8),
}
ACTIVATION_INPUT_GRADIENT = {
    "half precision": PassTiles(64, 64, num_warps=4),
    "single precision": PassTiles(16, 32, num_warps=8),
}
SPARE_BLOCK_N = 32  # rows of W whose spare columns a program writes


def activation_config_name(rows: int, padded_rank: int, dtype: torch.dtype) -> str:
    """Which of `ACTIVATION` serves M = `rows` rows where h is of `dtype`."""
    if dtype == torch.float32:
        return "single precision"
    if padded_rank > 32:
        return "high rank"
    return "few rows" if rows <= 4096 else "many rows"


def activation_gradient_config_name(dtype: torch.dtype) -> str:
    """Which of `ACTIVATION_INPUT_GRADIENT` serves dh of `dtype`."""
    return "single precision" if dtype == torch.float32 else "half precision"


def gradient_rank_tile(rank: int, dtype: torch.dtype) -> int:
    """Ranks a step of the input gradient multiplies."""
    return 16 if dtype == torch.float32 else min(64, rank_block(rank))
