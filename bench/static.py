"""Section `static`: what the binaries of the shipped kernels show, compiled ahead of time without a GPU."""

import multiprocessing
import os
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from fused_s2lora.kernels import aot
from fused_s2lora.kernels.configs import rank_block, rank_tile

TARGETS = ("80", "89", "90", "100")


@dataclass(frozen=True)
class Multiprocessor:
    """What one multiprocessor has to share out (CUDA C++ programming guide, table of technical specifications)."""

    warps: int
    blocks: int
    shared_memory: int
    registers: int = 65_536


MULTIPROCESSORS = {
    "80": Multiprocessor(64, 32, 164 << 10),
    "89": Multiprocessor(48, 24, 100 << 10),
    "90": Multiprocessor(64, 32, 228 << 10),
    "100": Multiprocessor(64, 32, 228 << 10),
}
_WARP = 32
_REGISTER_UNIT = 256  # registers are handed out to a warp in units of so many
_RESERVED = 1 << 10  # shared memory the system keeps for itself in each block, bytes


def occupancy(target: str, registers: int, warps: int, shared_memory: int) -> tuple[int, float]:
    """Blocks of a kernel that fit one multiprocessor, and the share of its warps they fill."""
    limits = MULTIPROCESSORS[target]
    per_warp = -(-registers * _WARP // _REGISTER_UNIT) * _REGISTER_UNIT
    blocks = min(
        limits.blocks,
        limits.warps // warps,
        limits.registers // (per_warp * warps),
        limits.shared_memory // (shared_memory + _RESERVED),
    )
    return blocks, blocks * warps / limits.warps


def report(targets: Iterable[str] = TARGETS, ranks: Collection[int] = ()) -> Iterator[dict[str, Any]]:
    """A row for every build of every target, in order, as the builds end.

    With `ranks`, only what usual training steps with adapters of these ranks use: kernels of their padded ranks, or of
    the tiles these are taken in, and those that know no rank.
    """
    padded = {0, rank_block(1), *map(rank_block, ranks), *map(rank_tile, ranks)}
    jobs = [
        (target, index)
        for target in targets
        for index, variant in enumerate(aot.variants(target))
        if not ranks or (variant.R in padded and not variant.rare)
    ]
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn"), _compiling) as pool:
        for (target, _), found in zip(jobs, pool.map(_compile, jobs), strict=True):
            blocks, share = occupancy(target, found.registers, found.num_warps, found.shared_memory)
            yield {
                "section": "static",
                "provider": "s2-triton",
                "kind": "static",
                **asdict(found),
                "blocks_per_multiprocessor": blocks,
                "occupancy": round(share, 3),
            }


def _compiling() -> None:
    os.environ.pop("TRITON_INTERPRET", None)


def _compile(job: tuple[str, int]) -> aot.Report:
    target, index = job
    return aot.compile_variant(aot.variants(target)[index], target)
