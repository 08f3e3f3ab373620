"""Every shipped kernel configuration compiled ahead of time, without a GPU, and what its binary shows.

    python -m fused_s2lora.kernels.aot [--target 90]

prints one JSON line a build: registers, spilled bytes, shared memory, and how many matrix instructions it holds.
"""

import argparse
import json
import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import (
    activation,
    adapter_gradients,
    augmented,
    device,
    fused,
    fused_persistent,
    layer_norm,
    merge,
    project,
    row_sums,
)
from .configs import SHARED_MEMORY
from .variants import Variant

MODULES = (fused, fused_persistent, merge, project, adapter_gradients, row_sums, layer_norm, activation, augmented)
TENSOR_MEMORY = 512  # columns of it that one program may hold on Blackwell; a build that needs more is an empty kernel
_MATRIX_INSTRUCTIONS = {
    "wgmma": r"wgmma\.mma_async",
    "tcgen05": r"tcgen05\.mma",
    "mma": r"\bmma\.sync",
    "mfma": r"v_mfma",
}


@dataclass(frozen=True)
class Report:
    """What the binary of a variant for `target` shows; memory in bytes, registers a thread.

    `tensor_memory` counts columns, `bulk_copies` the TMA loads and stores in the code, `partitions` the parts of the
    loop that have warps of their own beside the default ones (0: not warp-specialised).
    """

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
    tensor_memory: int
    bulk_copies: int
    partitions: int


def variants(target: str) -> list[Variant]:
    """Every specialisation that a GPU of this kind can be asked to run, as the choice in `configs.py` has it."""
    return [variant for module in MODULES for variant in module.variants(target)]


def compile_variant(variant: Variant, target: str) -> Report:
    """Compiles for a target of `SHARED_MEMORY`, CUDA compute capability × 10 or "gfx942", and reads the binary.

    Raises:
        RuntimeError: kernels are in interpreter mode (TRITON_INTERPRET=1), where nothing can be compiled.
    """
    if device.INTERPRETING:
        raise RuntimeError("TRITON_INTERPRET=1 replaces the compiler: unset it to compile ahead of time")
    amd = target.startswith("gfx")
    names = variant.function.arg_names
    aligned = [
        index
        for index, name in enumerate(names)
        if name not in variant.constants and (name.endswith("_ptr") or name in variant.divisible)
    ]
    source = ASTSource(
        variant.function,
        variant.signature(),
        {(names.index(name),): value for name, value in variant.constants.items()},
        {(index,): [["tt.divisibility", 16]] for index in aligned},
    )
    stages = min(variant.num_stages, device.AMD_STAGES) if amd else variant.num_stages
    gpu = GPUTarget("hip", target, 64) if amd else GPUTarget("cuda", int(target), 32)
    compiled = triton.compile(source, target=gpu, options={"num_warps": variant.num_warps, "num_stages": stages})
    assembly = compiled.asm["amdgcn" if amd else "ptx"]
    registers, spilled = _amd_resources(assembly) if amd else _cuda_resources(compiled.asm["cubin"])
    return Report(
        kernel=variant.kernel,
        config=variant.config,
        direction=variant.direction,
        dtype=variant.dtype,
        R=variant.R,
        target=target,
        num_warps=variant.num_warps,
        num_stages=stages,
        registers=registers,
        spilled=spilled,
        shared_memory=compiled.metadata.shared,
        shared_memory_limit=SHARED_MEMORY[target],
        matrix_instructions={name: len(re.findall(code, assembly)) for name, code in _MATRIX_INSTRUCTIONS.items()},
        tensor_memory=getattr(compiled.metadata, "tmem_size", None) or 0,
        bulk_copies=len(re.findall(r"cp\.async\.bulk\.tensor", assembly)),
        partitions=len(re.findall(r"^\s*partition\d+\(", compiled.asm["ttgir"], re.MULTILINE)),
    )


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
    parser.add_argument("--rank", type=int, nargs="+", help="padded ranks, 0 for kernels of any rank; default: all")
    parser.add_argument("--usual", action="store_true", help="only what ordinary training steps launch")
    arguments = parser.parse_args()
    for target in arguments.target:
        for variant in variants(target):
            if (arguments.rank and variant.R not in arguments.rank) or (arguments.usual and variant.rare):
                continue
            print(json.dumps(asdict(compile_variant(variant, target))), flush=True)


if __name__ == "__main__":
    main()
