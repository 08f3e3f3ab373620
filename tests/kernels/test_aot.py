"""Every kernel build that a GPU can be asked to run, compiled without one and read from its binary."""

import functools
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from fused_s2lora.kernels.aot import TENSOR_MEMORY
from fused_s2lora.kernels.configs import SHARED_MEMORY

TENSOR_CORES = {"80": "mma", "89": "mma", "90": "wgmma", "100": "tcgen05", "gfx942": "mfma"}


# The kernels whose arithmetic is row sums or one multiplication an entry, bound by memory.
WITHOUT_PRODUCTS = ("merge", "layer norm", "spare columns", "input gradient of gelu")
LOW_RANK, EVERY_RANK = (0, 16), (0, 16, 32, 64, 128, 256)


@functools.cache
def _reports(ranks: tuple[int, ...]) -> dict[str, list[dict]]:
    """Builds of all targets; in processes of their own, for there is no compiler in Triton's interpreter mode."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}

    def compiled(target: str) -> list[dict]:
        command = [sys.executable, "-m", "fused_s2lora.kernels.aot", "--target", target, "--rank", *map(str, ranks)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        return [json.loads(line) for line in done.stdout.splitlines()]

    with ThreadPoolExecutor(max_workers=2) as pool:
        return dict(zip(SHARED_MEMORY, pool.map(compiled, SHARED_MEMORY), strict=True))


@pytest.fixture(
    params=[
        *(pytest.param((LOW_RANK, target), id=f"{target}, rank 16") for target in SHARED_MEMORY),
        *(pytest.param((EVERY_RANK, target), id=f"{target}", marks=pytest.mark.slow) for target in SHARED_MEMORY),
    ]
)
def reports(request) -> list[dict]:
    ranks, target = request.param
    return _reports(ranks)[target]


def _name(report: dict) -> str:
    return " ".join(str(report[key]) for key in ("kernel", "config", "direction", "dtype", "R", "target"))


def test_every_direction_and_precision_is_built_in_every_rank(reports):
    ways = ("forward", "forward, z given", "input gradient", "input gradient, added")
    tiles = {
        (report["direction"], report["dtype"], report["R"]) for report in reports if report["kernel"] == "fused tiles"
    }
    ranks = {report["R"] for report in reports} - {0}
    assert ranks in ({16}, {16, 32, 64, 128, 256})
    given = {(way, dtype, 16) for way in ways for dtype in ("bf16", "fp32")}
    assert tiles >= given
    computed = {(way, dtype, r) for way in ("forward", "input gradient") for dtype in ("bf16", "fp32") for r in ranks}
    assert tiles >= computed


def test_no_build_spills_registers(reports):
    spilling = {_name(report): report["spilled"] for report in reports if report["spilled"]}
    assert spilling == {}
    assert all(0 < report["registers"] <= 512 for report in reports)


def test_every_build_fits_shared_memory(reports):
    assert [_name(report) for report in reports if report["shared_memory"] > report["shared_memory_limit"]] == []


def test_half_precision_builds_use_matrix_instructions(reports):
    half = [
        report
        for report in reports
        if report["dtype"] == "bf16" and not {report["kernel"], report["direction"]} & set(WITHOUT_PRODUCTS)
    ]
    without = [_name(report) for report in half if not _matrix_instructions(report)]
    assert half
    assert without == []


def _matrix_instructions(report: dict) -> int:
    """Those of the target's newest kind; it takes 64 rows, so that blocks of fewer use the older `mma`."""
    counts = report["matrix_instructions"]
    of_few_rows = report["kernel"] in ("activation", "project", "output gradients")
    few_rows = of_few_rows and report["config"].startswith("few rows")
    return counts[TENSOR_CORES[report["target"]]] + (counts["mma"] if few_rows else 0)


def test_every_build_fits_tensor_memory(reports):
    assert [_name(report) for report in reports if report["tensor_memory"] > TENSOR_MEMORY] == []


def test_persistent_builds_move_tiles_by_tma_and_specialise_warps_on_blackwell(reports):
    persistent = [report for report in reports if report["kernel"] == "fused persistent"]
    target = reports[0]["target"]
    assert bool(persistent) == (target in ("90", "100"))
    assert [_name(report) for report in persistent if report["bulk_copies"] < 4] == []
    assert {report["partitions"] > 0 for report in persistent} <= {target == "100"}


def test_interpreter_mode_is_refused(monkeypatch):
    from fused_s2lora.kernels.aot import compile_variant, variants

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="unset it"):
        compile_variant(variants("90")[0], "90")
