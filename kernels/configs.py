"""Tile sizes of the kernels. Chosen by arithmetic until they are measured; `aot.py` compiles every one of them."""

from dataclasses import dataclass

import torch

# Shared memory one program may use, bytes, by compute capability; AMD's gfx942 has 64 KiB of LDS.
SHARED_MEMORY = {"80": 163 << 10, "89": 99 << 10, "90": 227 << 10, "100": 227 << 10, "gfx942": 64 << 10}


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


@dataclass(frozen=True)
class FactorConfig:
    """Tiles of the factor gradients: columns BLOCK_C of the tall operand, BLOCK_M rows a step, SPLIT_ROWS a program."""

    BLOCK_C: int
    BLOCK_M: int
    SPLIT_ROWS: int
    num_warps: int
    num_stages: int


LINEAR = {
    "wide": LinearConfig(128, 256, 64, 8, num_warps=8, num_stages=4),
    "square": LinearConfig(128, 128, 64, 8, num_warps=8, num_stages=3),
    "few rows": LinearConfig(64, 64, 64, 4, num_warps=4, num_stages=4),
    "high rank": LinearConfig(64, 64, 32, 8, num_warps=8, num_stages=3),
    "single precision": LinearConfig(64, 64, 32, 8, num_warps=8, num_stages=2),
    # Warps of these two are those with which no target spills: four do at rank 64 and 256, eight at 128.
    "single precision, high rank": LinearConfig(16, 16, 16, 8, num_warps=8, num_stages=1),
    "single precision, rank 128": LinearConfig(16, 16, 16, 8, num_warps=4, num_stages=1),
}
FACTOR = {
    "low rank": FactorConfig(128, 64, 1024, num_warps=4, num_stages=3),
    "middle rank": FactorConfig(64, 64, 1024, num_warps=4, num_stages=2),
    "high rank": FactorConfig(64, 64, 1024, num_warps=8, num_stages=2),
    "single precision": FactorConfig(32, 16, 1024, num_warps=8, num_stages=1),
}


def rank_block(rank: int) -> int:
    """The rank padded to what a matrix instruction takes: a power of two, at least 16."""
    return max(16, 1 << (rank - 1).bit_length())


def linear_config_name(rows: int, padded_rank: int, dtype: torch.dtype, shared_memory: int) -> str:
    """Which of `LINEAR` serves M = `rows` rows in `dtype` on a GPU with that much shared memory a program."""
    if dtype == torch.float32:
        if padded_rank == 128:
            return "single precision, rank 128"
        return "single precision" if padded_rank <= 32 else "single precision, high rank"
    if padded_rank > 32:
        return "high rank"
    if rows <= 1024:
        return "few rows"
    return "wide" if shared_memory >= SHARED_MEMORY["90"] else "square"


def factor_config_name(padded_rank: int, dtype: torch.dtype) -> str:
    """Which of `FACTOR` serves that padded rank in `dtype`."""
    if dtype == torch.float32:
        return "single precision"
    return "low rank" if padded_rank <= 32 else "middle rank" if padded_rank <= 128 else "high rank"


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
    tiles = -(-rows // config.BLOCK_M) * -(-outputs // config.BLOCK_N)
    return "persistent" if tiles >= multiprocessors else "tiles"
