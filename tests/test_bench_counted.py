"""What the benchmarks count without running anything."""

import pytest
import torch
from torch import nn

from bench import cases, counted, layer, step
from bench.cases import Case
from bench.counter import count
from bench.roofline import DataSheet
from bench.step import StepCase
from fused_s2lora.kernels import device as kernels_device
from fused_s2lora.kernels import strategies
from fused_s2lora.kernels.strategies import STRATEGIES
from tests.bench_cases import TINY, built


@pytest.fixture(autouse=True)
def small_sizes(monkeypatch):
    monkeypatch.setitem(cases.SIZES, "tiny", TINY)
    monkeypatch.setitem(cases.SIZES, "base", (64, 1, 1, 80))


def test_counter_adds_up_a_small_network():
    x = torch.randn(10, 8, requires_grad=True)
    linear = nn.Linear(8, 4)

    def call() -> None:
        linear(x).view(-1, 2, 2).relu().sum().backward()

    counted_call = count(call)
    names = [launch.name for launch in counted_call.launches]
    assert names[:3] == ["aten.addmm", "aten.relu", "aten.sum"]
    assert not {"aten.view", "aten.t", "aten.detach"} & set(names)
    assert counted_call.launches[0].bytes == 4 * (10 * 8 + 8 * 4 + 4 + 10 * 4)
    assert counted_call.launches[0].flops == 2 * 10 * 8 * 4
    assert counted_call.launches[1].bytes == 4 * 2 * 10 * 4
    # One product forward, two backward.
    assert counted_call.flops == 3 * 2 * 10 * 8 * 4


def test_counter_follows_what_is_held():
    def chain(steps: int) -> None:
        x = torch.ones(1024, dtype=torch.int8)
        for _ in range(steps):
            x = x + 1

    def kept(steps: int) -> None:
        _ = [torch.ones(1024, dtype=torch.int8) for _ in range(steps)]

    assert count(lambda: chain(10)).peak_bytes == 2048
    assert count(lambda: kept(10)).peak_bytes == 10 * 1024
    assert count(lambda: kept(10)).held_bytes == 0
    mine = []
    assert count(lambda: mine.append(torch.ones(1024, dtype=torch.int8))).held_bytes == 1024
    x = torch.ones(1024, requires_grad=True)
    # exp keeps its result for the backward pass, so that four are held at once.
    assert count(lambda: x.exp().exp().exp().exp()).peak_bytes == 4 * 4096


def test_counting_without_data_agrees_with_counting_a_run():
    case = Case("encoder-layer", "tiny", 48, 4, "autocast")
    rows = {row["provider"]: row for row in counted.count_layer(case)}
    assert rows["s2-compiled"]["kind"] == "not counted"
    found, groups = built(case)
    for name in ("frozen", "addmm-lora", "peft-lora", "peft-adalora", "peft-vera", "s2-reference"):
        run_count = count(layer.passes(found[name], groups)["both"])
        assert rows[name]["counted_launches"] == len(run_count.launches), name
        assert rows[name]["counted_bytes"] == run_count.bytes, name
        assert rows[name]["counted_peak_mib"] == pytest.approx(run_count.peak_bytes / 2**20, abs=0.06), name


def test_counting_kernels_without_data_agrees_with_counting_them_run(monkeypatch):
    monkeypatch.setattr(kernels_device, "runs_triton", lambda x: True)  # in Triton's interpreter where there is no GPU
    case = Case("encoder-layer", "tiny", 48, 4, "fp32")
    rows = {row["provider"]: row for row in counted.count_layer(case)}
    found, groups = built(case)
    for name in ("s2-merged", "s2-split"):
        run_count = count(layer.passes(found[name], groups)["both"])
        assert rows[name]["counted_launches"] == len(run_count.launches), name
        assert rows[name]["counted_bytes"] == run_count.bytes, name


def test_the_kernels_move_little_beyond_the_frozen_maps():
    rows = {row["provider"]: row for row in counted.count_layer(Case("encoder-layer", "large-v3", 24_000))}
    beyond = {
        name: row["counted_bytes"] - rows["frozen"]["counted_bytes"]
        for name, row in rows.items()
        if "counted_bytes" in row
    }
    for name in ("s2-merged", "s2-split", "s2-fused"):
        assert beyond[name] <= beyond["peft-lora"] / 3, name
    launches = {
        name: row["counted_launches"] - rows["frozen"]["counted_launches"]
        for name, row in rows.items()
        if name in beyond
    }
    assert launches["s2-merged"] <= launches["peft-lora"] / 3
    least = rows["frozen"]["counted_bytes"]
    minimum = sum(Case("encoder-layer", "large-v3", 24_000).minimum(backward)[0] for backward in (False, True))
    assert 0.7 * least < minimum < rows["s2-fused"]["counted_bytes"]


def test_counted_steps_name_the_strategy_and_the_optimizer():
    rows = {row["provider"]: row for row in counted.count_step(StepCase("tiny", 1, "trim"), ["frozen", "s2lora"])}
    assert set(rows) == {"frozen", "s2lora-merged", "s2lora-split", "s2lora-fused", "s2lora-augmented"}
    assert rows["frozen"]["state_mib"] == 0 < rows["s2lora-fused"]["trainable"]
    assert rows["s2lora-merged"]["counted_launches"] < rows["s2lora-split"]["counted_launches"]


def test_counted_augmented_steps_copy_weights_once_and_inputs_only_of_attention(monkeypatch):
    copies = []
    copy = strategies.with_spare_columns
    monkeypatch.setattr(strategies, "with_spare_columns", lambda x, down: copies.append(x.shape) or copy(x, down))
    rows = {row["provider"]: row for row in counted.count_step(StepCase("tiny", 1, "trim"), ["s2lora"])}
    # One encoder and one decoder layer. What attention makes, for three out projections, has no producer, nor, where it
    # is shared, the encoder's output; the step is taken twice.
    assert len(copies) == 2 * (3 + 1)
    state = {name: row["state_mib"] for name, row in rows.items()}
    assert state["s2lora-augmented"] > 1.5 * state["s2lora-merged"]


@pytest.mark.parametrize("strategy", [None, *STRATEGIES])
def test_a_counted_step_holds_nothing_when_it_is_over(strategy):
    call = step.Step("s2lora" if strategy else "lora-six", StepCase("tiny", 1, "trim"), "cpu", initialised=False)
    if strategy:
        counted.use_strategy(call, strategy)
    with counted.as_on_a_gpu(), counted.without_data():
        count(lambda: counted.gradients(call))  # makes what is made once, such as the biases of a group
        found = count(lambda: counted.gradients(call))
    scalars = 16  # the last loss's penalties
    assert found.held_bytes <= scalars < found.peak_bytes


def test_implied_time_is_the_larger_of_memory_and_arithmetic():
    x, y = torch.ones(64, 64, dtype=torch.bfloat16), torch.ones(64, 64, dtype=torch.bfloat16)
    product = count(lambda: x @ y)
    assert DataSheet(1, 1e9, 1e9).floor_ms(product) == pytest.approx(3 * 64 * 64 * 2 / 1e9 * 1e3)
    assert DataSheet(1e9, 1e-3, 1e9).floor_ms(product) == pytest.approx(2 * 64**3 / 1e9 * 1e3)
    wide = count(lambda: x.float() @ y.float())
    assert DataSheet(1e9, 1e9, 1e-3).floor_ms(wide) == pytest.approx(2 * 64**3 / 1e9 * 1e3, rel=1e-3)
