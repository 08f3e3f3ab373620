"""A launch looked up by sizes, strides, types and addresses is the one that Triton's own look at them makes."""

import os
import subprocess
import sys

import pytest
import torch

from fused_s2lora import s2_linear_group
from fused_s2lora.kernels import (
    activation,
    adapter_gradients,
    augmented,
    fused,
    launch,
    merge,
    project,
    row_sums,
)
from fused_s2lora.kernels.strategies import STRATEGIES
from tests.conftest import ROOT
from tests.kernels.operations import use_kernels

SCRIPT = """
import itertools
from unittest import mock

import torch

from bench.host import NoDriver, launches_do_nothing
from fused_s2lora import s2_linear_group
from fused_s2lora.kernels import launch
from fused_s2lora.kernels.producers import gelu_project, layer_norm_project

launched = []


def keep(name, grid_0, grid_1, grid_2, stream, function, packed, metadata, enter, leave, *arguments):
    seen = [(v.dtype, v.shape, v.stride()) if isinstance(v, torch.Tensor) else v for v in arguments]
    launched.append((name, grid_0, grid_1, grid_2, stream, function, packed, enter, leave, *map(str, seen)))


def calls():
    for strategy, group, rows, offset in itertools.product(("merged", "fused"), (1, 2), (16, 17, 32), (0, 1)):
        torch.manual_seed(rows)
        x = torch.zeros(rows * 64 + 8, dtype=torch.bfloat16)[offset : offset + rows * 64].view(rows, 64)
        x.requires_grad_()
        weights = [torch.zeros(48, 64, dtype=torch.bfloat16) for _ in range(group)]
        down, up = torch.zeros(8, 64, requires_grad=True), torch.zeros(48, 8, requires_grad=True)
        coefficients = [torch.zeros(8, requires_grad=True) for _ in range(group)]
        ys = s2_linear_group(x, weights, None, down, up, coefficients, backend=strategy)
        torch.autograd.backward(ys, [torch.zeros_like(y) for y in ys])
        h, _ = gelu_project(x, down.detach(), torch.bfloat16)
        h.backward(torch.zeros_like(h))
        ones = torch.ones(64, dtype=torch.bfloat16)
        layer_norm_project(x, ones, ones, 1e-5, down.detach(), torch.bfloat16)


def twice():
    launched.clear()
    calls(), calls()
    return list(launched)


class Forgetful(dict):
    def get(self, key):
        return None


with launches_do_nothing(NoDriver(keep)):
    looked_up = twice()
    found = len(launch._known)
    with mock.patch.object(torch.Tensor, "get_device", lambda tensor: 1):
        calls()
    assert len(launch._known) == 2 * found, "a build serves the GPU it was loaded on"
    launch._known = Forgetful()
    looked_at = twice()
assert found > 20, found
assert len({one[5] for one in looked_at}) > 15  # builds
print("equal" if looked_up == looked_at else "different")
"""


def both_ways(fault: str = "") -> str:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.replace("launched = []", f"launched = []\n{fault}", 1)],
        env={**environment, "CUDA_VISIBLE_DEVICES": ""}, cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


class Kernel:
    """Stands for one of Triton's; keeps what it is launched with."""

    def __getitem__(self, grid):
        return lambda *args, **constants: vars(self).update(constants)


@pytest.mark.parametrize(("most", "asked", "launched"), [(None, 4, 4), (2, 4, 2), (2, 1, 1)])
def test_pipelines_are_as_deep_as_the_device_has_room_for(monkeypatch, most, asked, launched):
    """On AMD no deeper than they are compiled ahead of time (`aot`), where all are found to fit."""
    monkeypatch.setattr(launch, "_most_stages", most)
    monkeypatch.setattr(launch.device, "INTERPRETING", True)
    kernel = Kernel()
    launch.launch(kernel, (1,), torch.zeros(1), num_warps=4, num_stages=asked)
    assert vars(kernel) == {"num_warps": 4, "num_stages": launched}


@pytest.mark.parametrize(("rank", "rows"), [(1, 64 * 65_536), (40, 16 * 65_536)])
@pytest.mark.parametrize("backend", STRATEGIES)
def test_grids_end_where_a_gpu_s_do(monkeypatch, backend, rank, rows):
    """CUDA takes 2³¹ - 1 programs along the first axis and 65,535 along the others, with any number of rows."""
    grids = []
    use_kernels(monkeypatch)
    for module in (activation, adapter_gradients, augmented, fused, merge, project, row_sums):
        monkeypatch.setattr(module, "launch", lambda kernel, grid, *_, **__: grids.append((kernel.fn.__name__, grid)))
    x = torch.zeros(rows, 2, requires_grad=True)
    down, up = torch.zeros(rank, 2, requires_grad=True), torch.zeros(2, rank, requires_grad=True)
    weights, coefficients = ([torch.zeros(*shape) for _ in range(2)] for shape in ((2, 2), (rank,)))
    ys = s2_linear_group(x, weights, None, down, up, coefficients, backend=backend)
    torch.autograd.backward(ys, [torch.zeros(1, 2).expand_as(y) for y in ys])
    assert "_output_gradients_kernel" in dict(grids)
    for name, grid in grids:
        assert grid[0] < 2**31, (name, grid)
        assert all(size <= 65_535 for size in grid[1:]), (name, grid)


def test_a_build_that_is_looked_up_is_the_one_triton_finds():
    assert both_ways() == "equal"


def test_a_lookup_that_forgets_alignment_is_caught():
    assert both_ways("launch._ALIGNED = 1") == "different"
