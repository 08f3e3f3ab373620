"""Tiles tried beside those in use: each kernel is called with the tiles named, and those in use come back."""

import pytest
import torch

from bench import tiles
from fused_s2lora.kernels import configs, device, layer_norm, merge

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def kernels_run(monkeypatch):
    """In the interpreter where there is no GPU."""
    monkeypatch.setattr(device, "runs_triton", lambda x: device.triton_is_usable(x)[0])


def firsts() -> dict[str, tiles.Trial]:
    found: dict[str, tiles.Trial] = {}
    for trial in tiles.trials((96,), 32):
        found.setdefault(trial.kernel, trial)
    return found


def test_many_rows_and_few_have_trials():
    sizes = {(trial.kernel, trial.sizes.get("M")) for trial in tiles.trials((24_000, 512), 1280)}
    assert ("fused tiles", 512) in sizes
    assert {("output gradients", 24_000), ("tall product, GELU", 512), ("merge", None)} <= sizes


@pytest.mark.parametrize("kernel", firsts())
def test_the_tiles_in_use_come_first_and_run(kernel):
    trial = firsts()[kernel]
    kept = [configs.PASS, configs.PROJECT, configs.TALL, configs.LINEAR, configs.ACTIVATION_INPUT_GRADIENT]
    tables = [*(dict(table) for table in kept), merge.MERGE, layer_norm.NORM, layer_norm.NORM_INPUT_GRADIENT]
    assert any(trial.tiles in (table.values() if isinstance(table, dict) else [table]) for table in tables)
    called = []
    row = tiles.run(trial, lambda call: called.append(call()) or 0.5, DEVICE, torch.float16)
    assert row.get("reason") is None
    assert (row["kind"], row["us"], len(called)) == ("measured", 500.0, 1)
    after = [*(dict(table) for table in kept), merge.MERGE, layer_norm.NORM, layer_norm.NORM_INPUT_GRADIENT]
    assert after == tables


def test_other_tiles_are_those_that_are_launched(monkeypatch):
    seen = []

    def launch(kernel, grid, *args, **constants):
        seen.append((constants.get("BLOCK_M"), constants.get("BLOCK_N"), constants["num_warps"]))

    monkeypatch.setattr("fused_s2lora.kernels.adapter_gradients.launch", launch)
    wanted = [t for t in tiles.trials((96,), 32) if t.kernel == "output gradients" and t.sizes["G"] == 3]
    for trial in wanted[:4]:
        tiles.run(trial, lambda call: 0.0, DEVICE, torch.float16)
        assert seen[-1] == (trial.tiles.BLOCK_M, trial.tiles.BLOCK_N, trial.tiles.num_warps)
    assert len({seen[-1], *seen}) > 1


def test_what_cannot_be_used_says_why():
    trial = firsts()["merge"]

    def fail(*arguments, **sizes):
        raise RuntimeError("out of resource: shared memory")

    broken = tiles.Trial(trial.kernel, trial.sizes, trial.tiles, trial.place, fail)
    row = tiles.run(broken, lambda call: 0.0, DEVICE, torch.float16)
    assert (row["kind"], row["reason"]) == ("refused", "RuntimeError: out of resource: shared memory")


@pytest.mark.skipif(not device.INTERPRETING, reason="there is a GPU")
def test_without_a_gpu_nothing_is_timed():
    with pytest.raises(tiles.typer.BadParameter, match="torch sees none"):
        tiles.main()
