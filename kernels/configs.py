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


# The adapter's gradients (adapter_gradients.py).
#
# One pass over dy in blocks of BLOCK_M rows writes zᵀ dy of each block, N · r floats, to a workspace that is read once
# again. In bfloat16 each is 2 · r / (BLOCK_M · group) of dy's bytes: at r = 8 12 % for one dy in blocks of 128 rows and
# 8 % for three in blocks of 64. M = 24,000 makes 188 (375) programs with two or three tiles of 16 (24) KiB in flight
# each, more than the 4 MB that hide the latency of 3 TB/s. A workspace of rank 32 costs as much as a second pass over
# dy; beyond, that pass is cheaper (r = 128: 2.2 passes in all, not 5).
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
    """Tiles of tallᵀ low: BLOCK_C columns of the tall operand, BLOCK_M rows a step."""

    BLOCK_C: int
    BLOCK_M: int
    num_warps: int
    num_stages: int

    def split_rows(self, rows: int, columns: int) -> int:
        """Rows of a split, so that splits times blocks of columns are about two programs a multiprocessor."""
        splits = max(1, 264 // -(-columns // self.BLOCK_C))
        return self.BLOCK_M * -(-rows // (splits * self.BLOCK_M))


PASS = {
    "many rows": PassConfig(128, 64, num_warps=8, num_stages=4),
    "many rows, group": PassConfig(64, 64, num_warps=8, num_stages=4),
    "many rows, rank 32": PassConfig(128, 32, num_warps=8, num_stages=4),
    "32 rows": PassConfig(32, 64, num_warps=4, num_stages=4),  # for few rows: 16 programs at M = 512, not 4
    "high rank": PassConfig(64, 64, num_warps=8, num_stages=3),
    "single precision": PassConfig(64, 32, num_warps=8, num_stages=2),
    "single precision, rank 32": PassConfig(64, 16, num_warps=8, num_stages=2),
    "single precision, group": PassConfig(32, 32, num_warps=8, num_stages=2),
    "single precision, high rank": PassConfig(16, 16, num_warps=8, num_stages=1),
}
TALL = {
    "low rank": TallConfig(128, 64, num_warps=4, num_stages=3),
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
    if dtype != torch.float32 and rows <= 4096:
        return "32 rows"
    name = "single precision" if dtype == torch.float32 else "many rows"
    return name + (", rank 32" if rank_tile == 32 else "" if group == 1 else ", group")


def tall_config_name(rank_tile: int, dtype: torch.dtype) -> str:
    """Which of `TALL` serves that part of the rank in `dtype`."""
    if dtype == torch.float32:
        return "single precision"
    return "low rank" if rank_tile <= 32 else "high rank"
