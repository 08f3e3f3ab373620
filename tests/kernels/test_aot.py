"""Every kernel build that a GPU can be asked to run, compiled without one and read from its binary."""

import functools
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from fused_s2lora.kernels.configs import SHARED_MEMORY

TENSOR_CORES = {"80": "mma", "89": "mma", "90": "wgmma", "100": "tcgen05", "gfx942": "mfma"}


@functools.cache
def _reports() -> dict[str, list[dict]]:
    """All builds of all targets; in processes of their own, for there is no compiler in Triton's interpreter mode."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}

    def compiled(target: str) -> list[dict]:
        command = [sys.executable, "-m", "fused_s2lora.kernels.aot", "--target", target]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        return [json.loads(line) for line in done.stdout.splitlines()]

    with ThreadPoolExecutor(max_workers=2) as pool:
        return dict(zip(SHARED_MEMORY, pool.map(compiled, SHARED_MEMORY), strict=True))


@pytest.fixture(params=SHARED_MEMORY)
def reports(request) -> list[dict]:
    return _reports()[request.param]


def _name(report: dict) -> str:
    return " ".join(str(report[key]) for key in ("kernel", "config", "direction", "dtype", "R", "target"))


def test_every_direction_precision_and_rank_is_built(reports):
    linear = {(report["direction"], report["dtype"], report["R"]) for report in reports if report["kernel"] == "linear"}
    ranks = (16, 32, 64, 128, 256)
    expected = {(way, dtype, r) for way in ("forward", "input gradient") for dtype in ("bf16", "fp32") for r in ranks}
    assert linear == expected


def test_no_build_spills_registers(reports):
    spilling = {_name(report): report["spilled"] for report in reports if report["spilled"]}
    assert spilling == {}
    assert all(0 < report["registers"] <= 512 for report in reports)


def test_every_build_fits_shared_memory(reports):
    assert [_name(report) for report in reports if report["shared_memory"] > report["shared_memory_limit"]] == []


def _instruction(report: dict) -> str:
    """wgmma and tcgen05 take 64 rows or more: blocks of 32 use the instruction of a single warp."""
    of_target = TENSOR_CORES[report["target"]]
    return "mma" if report["config"] == "32 rows" and of_target in ("wgmma", "tcgen05") else of_target


def test_half_precision_builds_use_matrix_instructions(reports):
    half = [report for report in reports if report["dtype"] == "bf16"]
    without = [_name(report) for report in half if not report["matrix_instructions"][_instruction(report)]]
    assert half
    assert without == []


def test_interpreter_mode_is_refused(monkeypatch):
    from fused_s2lora.kernels.aot import compile_variant, variants

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="unset it"):
        compile_variant(variants("90")[0], "90")
