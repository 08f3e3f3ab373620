"""Launch grids: CUDA takes 2³¹ − 1 programs along the first axis and 65,535 along the others."""

import pytest
import torch

from fused_s2lora.kernels import adapter_gradients, device, project

ROWS = 2**23 + 1


@pytest.fixture
def grids(monkeypatch) -> list[tuple[int, ...]]:
    """The grids of what would be launched; nothing is."""
    seen: list[tuple[int, ...]] = []
    monkeypatch.setattr(device, "runs_triton", lambda x: True)
    for module in (adapter_gradients, project):
        monkeypatch.setattr(module, "launch", lambda kernel, grid, *_, **__: seen.append(grid))
    monkeypatch.setattr(adapter_gradients, "tall_product", lambda *_, **__: None)
    monkeypatch.setattr(adapter_gradients, "reduce_splits", lambda *_: None)
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [8, 64, 128])
def test_more_rows_than_programs_of_a_second_axis(grids, rank, dtype):
    rows = torch.empty(1, dtype=dtype).expand(ROWS, 1)
    wide = torch.empty(1).expand(ROWS, rank)
    project.project(rows, torch.empty(rank, 1))
    adapter_gradients.adapter_gradients(
        [rows] * 3, wide.to(dtype=dtype), torch.empty(1, rank), torch.empty(3, rank), None, None
    )
    assert len(grids) >= 2
    for grid in grids:
        assert grid[0] > 65_535
        assert all(programs <= 65_535 for programs in grid[1:])
