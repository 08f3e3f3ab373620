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
NORM = PassTiles(8, 128, num_warps=4)
NORM_INPUT_GRADIENT = PassTiles(4, 128, num_warps=4)
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


def rank_tile(rank: int, dtype: torch.dtype) -> int:
    """Ranks a step of the input gradient multiplies."""
    return 16 if dtype == torch.float32 else min(64, rank_block(rank))
