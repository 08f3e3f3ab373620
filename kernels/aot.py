"""Every shipped kernel configuration compiled ahead of time, without a GPU, and what its binary shows.

    python -m fused_s2lora.kernels.aot [--target 90]

prints one JSON line a build: registers, spilled bytes, shared memory, and how many matrix instructions it holds.
"""

import argparse
import itertools
import json
import os
import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .configs import FACTOR, LINEAR, SHARED_MEMORY, factor_config_name, linear_config_name
from .triton_linear import (
    REDUCE_BLOCK,
    _s2_linear_bwd_factor_kernel,
    _s2_linear_bwd_reduce_kernel,
    _s2_linear_kernel,
)

_AMD_STAGES = 2  # AMD's pipeliner keeps one stage in registers; deeper ones do not fit 64 KiB of LDS
_MATRIX_INSTRUCTIONS = {
    "wgmma": r"wgmma\.mma_async",
    "tcgen05": r"tcgen05\.mma",
    "mma": r"\bmma\.sync",
    "mfma": r"v_mfma",
}
_DIVISIBLE = ("M", "N", "K", "C")
_STEPS = {
    "forward": ("stride_xk", "stride_wk", "stride_dk", "stride_ur"),
    "input gradient": ("stride_xk", "stride_wn", "stride_dr", "stride_un"),
}
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Build:
    """One kernel, configuration and direction to compile, for operands of `dtype` and padded rank `R`."""

    kernel: str
    config: str
    direction: str
    dtype: str
    R: int


@dataclass(frozen=True)
class Report:
    """What the binary of a build for `target` shows; memory in bytes, registers a thread."""

    kernel: str
    config: str
    direction: str
    dtype: str
    R: int
    target: str
    num_warps: int
    num_stages: int
    registers: int
    spilled: int
    shared_memory: int
    shared_memory_limit: int
    matrix_instructions: dict[str, int]


def builds(target: str) -> list[Build]:
    """Every build that a GPU of this kind can be asked to run, as the choice in `configs.py` has it."""
    memory = SHARED_MEMORY[target]
    found: dict[Build, None] = {}
    for dtype, rank in itertools.product(_DTYPES, (16, 32, 64, 128, 256)):
        for rows, direction in itertools.product((512, 24_000), _STEPS):
            name = linear_config_name(rows, rank, _DTYPES[dtype], memory)
            found[Build("linear", name, direction, dtype, rank)] = None
        found[Build("factor", factor_config_name(rank, _DTYPES[dtype]), "factor gradient", dtype, rank)] = None
        found[Build("reduce", "all", "factor gradient", "fp32", rank)] = None
    return list(found)


def compile_build(build: Build, target: str) -> Report:
    """Compiles for "80", "89", "90", "100" (CUDA compute capability × 10) or "gfx942" and reads the binary.

    Raises:
        RuntimeError: kernels are in interpreter mode (TRITON_INTERPRET=1), where nothing can be compiled.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET=1 replaces the compiler: unset it to compile ahead of time")
    amd = target.startswith("gfx")
    limit = SHARED_MEMORY[target]
    kernel, constants, ones, options = _specialised(build, limit, amd)
    names = kernel.arg_names
    constants |= dict.fromkeys(ones, 1)
    signature = {name: "constexpr" if name in constants else _type_of(name, build.dtype) for name in names}
    divisible = [
        index
        for index, name in enumerate(names)
        if name not in constants and (name.endswith("_ptr") or name in _DIVISIBLE or name.startswith("stride"))
    ]
    source = ASTSource(
        kernel,
        signature,
        {(names.index(name),): value for name, value in constants.items()},
        {(index,): [["tt.divisibility", 16]] for index in divisible},
    )
    gpu = GPUTarget("hip", target, 64) if amd else GPUTarget("cuda", int(target), 32)
    compiled = triton.compile(source, target=gpu, options=options)
    assembly = compiled.asm["amdgcn" if amd else "ptx"]
    registers, spilled = _amd_resources(assembly) if amd else _cuda_resources(compiled.asm["cubin"])
    return Report(
        **asdict(build),
        target=target,
        num_warps=options["num_warps"],
        num_stages=options["num_stages"],
        registers=registers,
        spilled=spilled,
        shared_memory=compiled.metadata.shared,
        shared_memory_limit=limit,
        matrix_instructions={name: len(re.findall(code, assembly)) for name, code in _MATRIX_INSTRUCTIONS.items()},
    )


def _specialised(build: Build, limit: int, amd: bool) -> tuple[Any, dict[str, Any], tuple[str, ...], dict[str, int]]:
    """Kernel, compile-time constants, strides that are 1, and compile options of a build."""
    precision = {"PRECISION": "ieee", "R": build.R}
    if build.kernel == "linear":
        linear = LINEAR[build.config]
        stages = linear.fitted_stages(build.R, _DTYPES[build.dtype].itemsize, limit)
        tiles = {name: getattr(linear, name) for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "GROUP_M")}
        bias: dict[str, Any] = {"HAS_BIAS": True}
        if build.direction == "input gradient":
            bias = {"HAS_BIAS": False, "bias_ptr": None}
        options = {"num_warps": linear.num_warps, "num_stages": min(stages, _AMD_STAGES) if amd else stages}
        return _s2_linear_kernel, tiles | bias | precision, _STEPS[build.direction], options
    if build.kernel == "factor":
        factor = FACTOR[build.config]
        tiles = {name: getattr(factor, name) for name in ("BLOCK_C", "BLOCK_M", "SPLIT_ROWS")}
        stages = min(factor.num_stages, _AMD_STAGES) if amd else factor.num_stages
        options = {"num_warps": factor.num_warps, "num_stages": stages}
        return _s2_linear_bwd_factor_kernel, tiles | precision, ("stride_tc",), options
    constants = {"HAS_FACTOR": True, "R": build.R, "BLOCK_C": REDUCE_BLOCK}
    return _s2_linear_bwd_reduce_kernel, constants, ("stride_fr",), {"num_warps": 4, "num_stages": 3}


def _type_of(name: str, dtype: str) -> str:
    """Triton's type of a kernel argument: factors, coefficients and workspaces are float32, x and its like `dtype`."""
    if not name.endswith("_ptr"):
        return "i32"
    full = ("down_ptr", "up_ptr", "coefficients_ptr", "partial_ptr", "factor_ptr", "d_factor_ptr", "d_coefficients_ptr")
    return "*fp32" if name in full else f"*{dtype}"


def _cuda_resources(cubin: bytes) -> tuple[int, int]:
    """Registers a thread and bytes of local memory (spills) that NVIDIA's cuobjdump reads from the binary."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        output = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    text = output.stdout + output.stderr
    registers = re.search(r"REG:(\d+)", text)
    stack = re.search(r"STACK:(\d+)", text)
    local = re.search(r"LOCAL:(\d+)", text)
    if not (registers and stack and local):
        raise RuntimeError(f"cuobjdump shows no resource usage: {text[:200]}")
    return int(registers[1]), int(stack[1]) + int(local[1])


def _amd_resources(assembly: str) -> tuple[int, int]:
    """Vector registers a thread and registers spilled, in bytes, from the metadata of AMD's assembly."""
    registers = re.search(r"\.vgpr_count:\s+(\d+)", assembly)
    spilled = re.search(r"\.vgpr_spill_count:\s+(\d+)", assembly)
    if not (registers and spilled):
        raise RuntimeError("the assembly has no register metadata")
    return int(registers[1]), 4 * int(spilled[1])


def main() -> None:
    """Command line: compiles everything for the targets asked for, one JSON line a build."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=SHARED_MEMORY, nargs="+", default=list(SHARED_MEMORY))
    for target in parser.parse_args().target:
        for build in builds(target):
            print(json.dumps(asdict(compile_build(build, target))), flush=True)


if __name__ == "__main__":
    main()
