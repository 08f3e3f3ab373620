"""Every kernel build that a GPU can be asked to run, compiled without one and read from its binary."""

import functools
import itertools
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import triton

from fused_s2lora.kernels import aot, device, fused
from fused_s2lora.kernels.aot import TENSOR_MEMORY
from fused_s2lora.kernels.configs import PASS, PERSISTENT, PERSISTENT_MAX_RANK, SHARED_MEMORY
from fused_s2lora.kernels.producers import gelu_project, layer_norm_project
from fused_s2lora.kernels.s2_linear import s2_linear_group
from fused_s2lora.kernels.shared import share_input
from fused_s2lora.kernels.strategies import STRATEGIES
from fused_s2lora.kernels.variants import Variant

TENSOR_CORES = {
    "80": "mma", "86": "mma", "89": "mma", "90": "wgmma", "100": "tcgen05", "120": "mma", "gfx942": "mfma",
}  # fmt: skip
AT_EVERY_RUN = ("80", "89", "90", "100", "gfx942")  # of the others all is compiled, by the slow tests


# The kernels whose arithmetic is row sums or one multiplication an entry, bound by memory.
WITHOUT_PRODUCTS = ("merge", "layer norm", "spare columns", "reduce splits", "input gradient of gelu")
# Bytes a thread, by version of Triton: 3.6 comes with torch 2.11, 3.7 with torch 2.13 for CUDA, with older assemblers.
SPILLED = {
    "3.6": {  # of what a usual step launches, at rank 16; not all of the others were compiled
        "output gradients many rows group of 1, factor and coefficients bf16 16 80": 8,
        "output gradients many rows group of 1, factor and coefficients, added bf16 16 80": 8,
        "fused tiles single precision input gradient, added fp32 16 89": 8,
        "project many rows z bf16 16 100": 8,
        "activation many rows, x bf16 gelu bf16 16 100": 16,
        "activation many rows, x fp32 gelu bf16 16 100": 8,
    },
    "3.7": {
        "fused tiles high rank, low input gradient, cast factors bf16 256 80": 8,
        "output gradients many rows group of 1, factor and coefficients bf16 16 80": 8,
        "output gradients many rows group of 1, factor and coefficients, added bf16 16 80": 8,
        "output gradients many rows group of 1, factor and coefficients fp16 16 80": 8,
        "output gradients many rows group of 1, factor and coefficients, added fp16 16 80": 8,
        "fused tiles single precision, rank 256 input gradient fp32 256 90": 8,
        "fused tiles single precision, rank 256 input gradient, added fp32 256 90": 8,
        "output gradients single precision, group group of 3, factor fp32 16 90": 8,
        "output gradients single precision, group group of 3, factor, added fp32 16 90": 8,
        "fused tiles single precision input gradient fp32 16 100": 16,
        "fused tiles single precision input gradient, added fp32 16 100": 8,
        "fused tiles single precision, rank 32 forward, no bias fp32 32 100": 8,
        "output gradients few rows group of 1, factor and coefficients, no g bf16 16 100": 8,
        "output gradients single precision, group group of 2, factor and coefficients, no g fp32 16 100": 8,
        "output gradients single precision, group group of 3, factor and coefficients, no g fp32 16 100": 8,
        "output gradients single precision, rank 32 group of 1, factor fp32 32 100": 8,
    },
    "3.9": {
        "fused tiles few rows input gradient, cast factors bf16 32 120": 8,
        "fused tiles few rows input gradient, added bf16 32 120": 8,
        "fused tiles few rows input gradient, added fp16 32 120": 8,
        "fused tiles single precision forward, z given fp32 16 120": 24,
        "fused tiles single precision forward, z given, no bias fp32 16 120": 24,
        "output gradients many rows, rank 32 group of 1, factor bf16 32 120": 8,
        "output gradients single precision group of 1, factor and coefficients fp32 16 120": 16,
        "output gradients single precision group of 1, factor and coefficients, added fp32 16 120": 16,
        "activation many rows, x fp32 gelu bf16 32 120": 8,
        "activation high rank, x bf16 gelu bf16 256 120": 48,
        "activation high rank, x fp32 gelu bf16 256 120": 40,
        "activation many rows, x fp32 gelu fp16 32 120": 8,
        "activation high rank, x fp16 gelu fp16 256 120": 48,
        "activation high rank, x fp32 gelu fp16 256 120": 40,
    },
}
USUAL = ("--usual", "--rank", "0", "16")


@functools.cache
def _reports(selected: tuple[str, ...]) -> dict[str, list[dict]]:
    """Builds of all targets; in processes of their own, for there is no compiler in Triton's interpreter mode."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}

    def compiled(target: str) -> list[dict]:
        command = [sys.executable, "-m", "fused_s2lora.kernels.aot", "--target", target, *selected]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        return [json.loads(line) for line in done.stdout.splitlines()]

    targets = AT_EVERY_RUN if selected else tuple(SHARED_MEMORY)
    with ThreadPoolExecutor(max_workers=2) as pool:
        return dict(zip(targets, pool.map(compiled, targets), strict=True))


@pytest.fixture(
    params=[
        *(pytest.param((USUAL, target), id=f"{target}, rank 16") for target in AT_EVERY_RUN),
        *(pytest.param(((), target), id=f"{target}", marks=pytest.mark.slow) for target in SHARED_MEMORY),
    ]
)
def reports(request) -> list[dict]:
    selected, target = request.param
    return _reports(selected)[target]


def _name(report: dict) -> str:
    return " ".join(str(report[key]) for key in ("kernel", "config", "direction", "dtype", "R", "target"))


def test_every_direction_and_precision_is_built_in_every_rank(reports):
    ways = ("forward", "forward, z given", "input gradient", "input gradient, added")
    tiles = {
        (report["direction"], report["dtype"], report["R"]) for report in reports if report["kernel"] == "fused tiles"
    }
    ranks = {report["R"] for report in reports} - {0}
    assert ranks in ({16}, {16, 32, 64, 128, 256})
    dtypes = ("bf16", "fp32", "tf32")
    assert tiles >= {(way, dtype, 16) for way in ways for dtype in dtypes}
    assert tiles >= {(way, dtype, r) for way in ("forward", "input gradient") for dtype in dtypes for r in ranks}
    passes = {(report["direction"], report["dtype"]) for report in reports if report["kernel"] == "output gradients"}
    wanted = ("factor and coefficients", "factor and coefficients, added")
    assert passes >= {(f"group of {size}, {way}", dtype) for size in (1, 2, 3) for way in wanted for dtype in dtypes}


def test_no_build_spills_registers(reports):
    spilling = {_name(report): report["spilled"] for report in reports if report["spilled"]}
    assert spilling.items() <= SPILLED.get(triton.__version__.rpartition(".")[0], {}).items()
    assert all(0 < report["registers"] <= 512 for report in reports)


def test_every_build_fits_shared_memory(reports):
    assert [_name(report) for report in reports if report["shared_memory"] > report["shared_memory_limit"]] == []


def test_half_precision_and_tf32_builds_use_matrix_instructions(reports):
    products = [report for report in reports if not {report["kernel"], report["direction"]} & set(WITHOUT_PRODUCTS)]
    half = [report for report in products if report["dtype"] in ("bf16", "fp16")]
    tf32 = [report for report in products if report["dtype"] == "tf32"]
    assert half
    assert tf32
    assert [_name(report) for report in half if not _matrix_instructions(report)] == []
    assert [_name(report) for report in tf32 if not sum(report["matrix_instructions"].values())] == []


def _matrix_instructions(report: dict) -> int:
    """Those of the target's newest kind; it takes 64 rows, so that blocks of fewer use the older `mma`."""
    counts = report["matrix_instructions"]
    few_rows = report["kernel"] in ("activation", "project") and report["config"].startswith("few rows")
    if report["kernel"] == "output gradients":
        only_the_factor = report["direction"].endswith("factor, no g")  # zᵀ dy, of as many rows as the rank
        few_rows = PASS[report["config"]].BLOCK_M < 64 or only_the_factor
    return counts[TENSOR_CORES[report["target"]]] + (counts["mma"] if few_rows else 0)


def test_every_build_fits_tensor_memory(reports):
    assert [_name(report) for report in reports if report["tensor_memory"] > TENSOR_MEMORY] == []


def test_persistent_builds_move_tiles_by_tma_and_specialise_warps_on_blackwell(reports):
    persistent = [report for report in reports if report["kernel"] == "fused persistent"]
    target = reports[0]["target"]
    assert bool(persistent) == (target in {f"{major}0" for major in PERSISTENT})
    assert [_name(report) for report in persistent if report["bulk_copies"] < 4] == []
    assert {report["partitions"] > 0 for report in persistent} <= {target == "100"}


class Recorder:
    """Stands for a kernel: notes how it is launched and computes nothing."""

    def __init__(self, kernel, launches: dict):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        def launch(*arguments, **constants):
            given = zip(self.kernel.arg_names, arguments, strict=False)
            absent = {name for name, value in given if value is None}
            self.launches[repr((self.kernel, sorted(absent), constants))] = self.kernel, absent, constants

        return launch


def was_compiled(launch: tuple, variant: Variant) -> bool:
    """Whether the build has the launch's compile-time arguments; K, a LayerNorm's width, is only the largest."""
    kernel, absent, constants = launch
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    without = {name for name, value in variant.constants.items() if value is None}
    wanted = {name: value for name, value in constants.items() if name != "K"}
    return (
        kernel is variant.function
        and absent == without
        and {**variant.constants, **options, **wanted} == {**variant.constants, **options}
    )


@pytest.mark.parametrize(
    ("dtype", "precision", "variant"),
    [
        ("bfloat16", "ieee", "tiles"),
        ("bfloat16", "ieee", "persistent"),
        ("float32", "ieee", "tiles"),
        ("float32", "tf32", "tiles"),
    ],
)
def test_what_is_launched_is_what_is_compiled(dtype, precision, variant, monkeypatch):
    """Every way to train, with kernels that only say how they were launched, on a GPU of 9.0 as to shared memory."""
    launches: dict[str, tuple] = {}
    builds = aot.variants("90")
    for module in aot.MODULES:
        for name, kernel in list(vars(module).items()):
            if hasattr(kernel, "arg_names"):
                monkeypatch.setattr(module, name, Recorder(kernel, launches))
    monkeypatch.setattr(device, "runs_triton", lambda x: True)
    persistent = PERSISTENT_MAX_RANK if variant == "persistent" else 0
    monkeypatch.setattr(fused, "_variant", lambda *operands: "persistent" if operands[-1] <= persistent else "tiles")
    monkeypatch.setattr(device, "multiplies_as_tf32", lambda kind: kind == torch.float32 and precision == "tf32")
    monkeypatch.setattr(device, "INTERPRETING", True)
    kind = getattr(torch, dtype)
    for strategy, group, rows, rank, shares, known in itertools.product(
        STRATEGIES, (1, 2, 3), (40, 4100), (8, 32, 64), (False, True), (False, True)
    ):
        x = torch.zeros(rows, 32, dtype=kind, requires_grad=True)
        weights = [torch.zeros(16, 32, dtype=kind) for _ in range(group)]
        biases = None if known else torch.zeros(16 * group, dtype=kind)
        for trained in (("down", "up", "e"), ("e",), ("down", "up")):
            down = torch.zeros(rank, 32, requires_grad="down" in trained)
            up = torch.zeros(16, rank, requires_grad="up" in trained)
            coefficients = [torch.zeros(rank, requires_grad="e" in trained) for _ in range(group)]
            z = torch.zeros(rows, rank, dtype=kind) if known else None
            read = share_input(x, down) if shares else x
            ys = s2_linear_group(read, weights, biases, down, up, coefficients, z=z, backend=strategy)
            torch.autograd.backward(ys, [torch.zeros_like(y) for y in ys])
    gelu_project(x, down.detach(), kind)
    layer_norm_project(x.detach(), x[0].detach(), x[0].detach(), 1e-5, down.detach()[:16], kind)
    assert launches
    strange = [name for name, launch in launches.items() if not any(was_compiled(launch, build) for build in builds)]
    assert strange == []


def test_interpreter_mode_is_refused(monkeypatch):
    monkeypatch.setattr(device, "INTERPRETING", True)
    with pytest.raises(RuntimeError, match="unset it"):
        aot.compile_variant(aot.variants("90")[0], "90")
