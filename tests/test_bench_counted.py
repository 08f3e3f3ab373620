"""What the benchmarks count without running anything."""

import pytest
import torch
from torch import nn

from bench import cases, counted, layer, step
from bench.cases import Case
from bench.counter import count
from bench.kernel_launches import KERNELS
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


def test_what_is_only_written_is_not_counted_as_read():
    a, b = torch.ones(64), torch.ones(64)
    assert count(lambda: a.copy_(b)).bytes == 2 * 256
    assert count(lambda: a.zero_()).bytes == 256
    assert count(lambda: a.fill_(3.0)).bytes == 256
    assert count(lambda: a.add_(b)).bytes == 3 * 256


def test_a_question_to_the_library_is_no_launch():
    def call():
        torch.ops.mkldnn._is_mkldnn_bf16_supported()

    assert not count(call).launches


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


# Operands of hand-counted launches, in bfloat16 (2 bytes) but for factors, coefficients, g and workspaces (4 bytes).
M, K, N = 192, 64, 32
LONG = 132 * 128  # rows that give each multiprocessor of an H100 one tile of the persistent product
BF16, FP32 = torch.bfloat16, torch.float32


def half(*shape):
    return torch.empty(shape, dtype=BF16, device="meta")


def single(*shape):
    return torch.empty(shape, device="meta")


def gradients_of(group, rank, z=True, factors=True, coefficients=True, add_to_g=True):
    """Operands of `adapter_gradients`: everything is wanted, or g without the factors' or coefficients' gradients."""
    operands = [[half(M, N)] * group, half(M, rank) if z else None, single(N, rank), single(group, rank)]
    of_factors = [single(N, rank), half(M, K), single(rank, K)]
    operands += [single(M, rank), *(of_factors if factors else (None,) * 3)]
    return operands, {"needs_coefficients": coefficients, "add_to_g": add_to_g}


def linear_of(rows, z=None, want_z=True, bias=None, out=()):
    """Operands of `fused_linear`, rank 8."""
    return [half(rows, K), half(N, K), bias, single(8, K), single(N, 8), single(8), z, *out, want_z, "auto"], {}


# Name, kernel, (operands, keywords), launches, bytes by what is read and written, flops.
COUNTED = [
    (
        "merge, one", "merge", ([[half(N, K)], single(8, K), single(N, 8), single(1, 8), BF16, None], {}), 1,
        {"W": 2 * N * K, "A": 4 * 8 * K, "B": 4 * N * 8, "e": 4 * 8, "W_eff": 2 * N * K},
        2 * N * K * 8,
    ),
    (
        "merge, three from float32", "merge",
        ([[single(N, K)] * 3, single(40, K), single(N, 40), single(3, 40), BF16, None], {}), 1,
        {"W": 3 * 4 * N * K, "A": 4 * 40 * K, "B": 4 * N * 40, "e": 3 * 4 * 40, "W_eff": 3 * 2 * N * K},
        3 * 2 * N * K * 40,
    ),
    (
        "project", "project", ([half(M, K), single(8, K)], {}), 1,
        {"x": 2 * M * K, "A": 4 * 8 * K, "z": 2 * M * 8},
        2 * M * K * 8,
    ),
    (  # Passes take blocks of 16 rows, 12 of them; what is tall is split by 64 rows, in 3.
        "gradients, one, added to g", "adapter_gradients", gradients_of(1, 8), 3,
        {
            "pass: dy, z, B, e": 2 * M * N + 2 * M * 8 + 4 * N * 8 + 4 * 8,
            "pass: g read and written": 2 * 4 * M * 8,
            "pass: dB and de by block": 12 * 4 * 8 * N + 12 * 4 * 8,
            "over x: x, g, dA by split": 2 * M * K + 4 * M * 8 + 3 * 4 * 8 * K,
            "reduce: dB, de and dA by block or split": 12 * 4 * 8 * N + 12 * 4 * 8 + 3 * 4 * 8 * K,
            "reduce: dB and dA read and written, de": 2 * 4 * N * 8 + 2 * 4 * 8 * K + 4 * 8,
        },
        2 * 2 * M * N * 8 + 2 * M * K * 8,  # dy B and dyᵀ z; gᵀ x
    ),
    (  # One pass for the three: dB of a block is that of all.
        "gradients, three, g overwritten", "adapter_gradients", gradients_of(3, 8, add_to_g=False), 3,
        {
            "pass: dy, z, B, e": 3 * 2 * M * N + 2 * M * 8 + 4 * N * 8 + 3 * 4 * 8,
            "pass: g written": 4 * M * 8,
            "pass: dB and de by block": 12 * 4 * 8 * N + 12 * 3 * 4 * 8,
            "over x: x, g, dA by split": 2 * M * K + 4 * M * 8 + 3 * 4 * 8 * K,
            "reduce: dB, de and dA by block or split": 12 * 4 * 8 * N + 12 * 3 * 4 * 8 + 3 * 4 * 8 * K,
            "reduce: dB and dA read and written, de": 2 * 4 * N * 8 + 2 * 4 * 8 * K + 3 * 4 * 8,
        },
        3 * 2 * 2 * M * N * 8 + 2 * M * K * 8,
    ),
    (
        "gradients, three, g alone", "adapter_gradients", gradients_of(3, 8, z=False, factors=False), 1,
        {"dy, B, e": 3 * 2 * M * N + 4 * N * 8 + 3 * 4 * 8, "g read and written": 2 * 4 * M * 8},
        3 * 2 * M * N * 8,
    ),
    (  # Beyond rank 16 a pass each, in 6 blocks of 32 rows, with its own e; all but the first add to g.
        "gradients, three of rank 20, g overwritten", "adapter_gradients", gradients_of(3, 20, add_to_g=False), 5,
        {
            "passes: dy, z, B, e": 3 * (2 * M * N + 2 * M * 20 + 4 * N * 20 + 4 * 20),
            "passes: g written, and twice read and written": 5 * 4 * M * 20,
            "passes: dB and de by block": 3 * (6 * 4 * 20 * N + 6 * 4 * 20),
            "over x: x, g, dA by split": 2 * M * K + 4 * M * 20 + 3 * 4 * 20 * K,
            "reduce: dB, de and dA by block or split": 3 * (6 * 4 * 20 * N + 6 * 4 * 20) + 3 * 4 * 20 * K,
            "reduce: dB and dA read and written, de": 2 * 4 * N * 20 + 2 * 4 * 20 * K + 3 * 4 * 20,
        },
        3 * 2 * 2 * M * N * 20 + 2 * M * K * 20,
    ),
    (  # Beyond rank 32 dB is a second pass over each dy, in 3 splits; blocks of 64 rows are 3.
        "gradients, three of rank 40, added to g", "adapter_gradients", gradients_of(3, 40), 8,
        {
            "passes: dy, z, B, e": 3 * (2 * M * N + 2 * M * 40 + 4 * N * 40 + 4 * 40),
            "passes: g read and written": 3 * 2 * 4 * M * 40,
            "passes: de by block": 3 * 3 * 4 * 40,
            "over dy: dy, z, e, dB by split": 3 * (2 * M * N + 2 * M * 40 + 4 * 40 + 3 * 4 * 40 * N),
            "over x: x, g, dA by split": 2 * M * K + 4 * M * 40 + 3 * 4 * 40 * K,
            "reduce: dB, de and dA by split or block": 3 * 3 * 4 * 40 * N + 3 * 3 * 4 * 40 + 3 * 4 * 40 * K,
            "reduce: dB and dA read and written, de": 2 * 4 * N * 40 + 2 * 4 * 40 * K + 3 * 4 * 40,
        },
        3 * 2 * 2 * M * N * 40 + 2 * M * K * 40,
    ),
    (  # Only the second pass over dy reads z.
        "gradients, one of rank 40, e frozen", "adapter_gradients", gradients_of(1, 40, coefficients=False), 4,
        {
            "pass: dy, B, e, g read and written": 2 * M * N + 4 * N * 40 + 4 * 40 + 2 * 4 * M * 40,
            "over dy: dy, z, e, dB by split": 2 * M * N + 2 * M * 40 + 4 * 40 + 3 * 4 * 40 * N,
            "over x: x, g, dA by split": 2 * M * K + 4 * M * 40 + 3 * 4 * 40 * K,
            "reduce: dB and dA by split, read and written": 3 * 4 * 40 * (N + K) + 2 * 4 * 40 * (N + K),
        },
        2 * 2 * M * N * 40 + 2 * M * K * 40,
    ),
    (
        "gradient of A for a g of many", "input_gradient_factor", ([half(M, K), single(M, 8), single(8, K)], {}), 2,
        {
            "over x: x, g, dA by split": 2 * M * K + 4 * M * 8 + 3 * 4 * 8 * K,
            "reduce: dA by split, dA read and written": 3 * 4 * 8 * K + 2 * 4 * 8 * K,
        },
        2 * M * K * 8,
    ),
    (
        "fused", "fused_linear", linear_of(M, bias=half(N)), 1,
        {
            "x, W, b": 2 * M * K + 2 * N * K + 2 * N, "A, B, e": 4 * 8 * K + 4 * N * 8 + 4 * 8,
            "y, z": 2 * M * N + 2 * M * 8,
        },
        2 * M * (K * N + K * 8 + 8 * N),
    ),
    (
        "fused, z given", "fused_linear", linear_of(M, z=half(M, 8)), 1,
        {"x, W": 2 * M * K + 2 * N * K, "z, B, e": 2 * M * 8 + 4 * N * 8 + 4 * 8, "y": 2 * M * N},
        2 * M * (K * N + 8 * N),
    ),
    (
        "fused, added, no z", "fused_linear_add", linear_of(M, want_z=False, out=[half(M, N)]), 1,
        {
            "x, W": 2 * M * K + 2 * N * K, "A, B, e": 4 * 8 * K + 4 * N * 8 + 4 * 8,
            "y read and written": 2 * 2 * M * N,
        },
        2 * M * (K * N + K * 8 + 8 * N),
    ),
    (  # Factors are cast in a launch each, and read as cast.
        "fused, persistent", "fused_linear", linear_of(LONG), 3,
        {
            "casts: A, B": (4 + 2) * 8 * K + (4 + 2) * N * 8, "x, W": 2 * LONG * K + 2 * N * K,
            "A, B, e": 2 * 8 * K + 2 * N * 8 + 4 * 8, "y, z": 2 * LONG * N + 2 * LONG * 8,
        },
        2 * LONG * (K * N + K * 8 + 8 * N),
    ),
    (  # Rank 8 is padded to 16 spare columns.
        "spare columns", "write_spare_columns_", ([half(3 * N, K + 16)[:, K:], single(N, 8), single(3, 8)], {}), 1,
        {"B, e": 4 * N * 8 + 3 * 4 * 8, "spare": 3 * 2 * N * 16},
        0,
    ),
    (
        "add low rank", "add_low_rank_", ([half(M, K + 16), single(8, K)], {}), 1,
        {"dh and ge, padded": 2 * M * (K + 16), "A": 4 * 8 * K, "dh": 2 * M * K},
        2 * M * 8 * K,
    ),
    (
        "copy with spare columns", "activation_project", ([single(M, K), single(8, K), False, BF16, 16], {}), 1,
        {"x": 4 * M * K, "A": 4 * 8 * K, "h": 2 * M * K, "z, padded": 2 * M * 16},
        2 * M * K * 8,
    ),
    (
        "gelu and z", "activation_project", ([half(M, K), single(8, K), True, BF16, 0], {}), 2,
        {"gelu: x, h": 2 * 2 * M * K, "project: h, A, z": 2 * M * K + 4 * 8 * K + 2 * M * 8},
        2 * M * K * 8,
    ),
    (
        "gelu, cast and z", "activation_project", ([single(M, K), single(8, K), True, BF16, 0], {}), 3,
        {
            "gelu: x, h": 2 * 4 * M * K, "cast: h, h": 4 * M * K + 2 * M * K,
            "project: h, A, z": 2 * M * K + 4 * 8 * K + 2 * M * 8,
        },
        2 * M * K * 8,
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("kernel", "operands", "launches", "moved", "flops"), [case[1:] for case in COUNTED], ids=[c[0] for c in COUNTED]
)
def test_kernels_are_counted_as_by_hand(kernel, operands, launches, moved, flops):
    given, keywords = operands
    found = KERNELS[f"fused_s2lora.{kernel}"](*given, **keywords)
    assert len(found) == launches
    assert sum(launch.bytes for launch in found) == sum(moved.values())
    assert sum(launch.flops for launch in found) == flops


def test_every_kernel_is_counted_by_hand():
    assert {f"fused_s2lora.{case[1]}" for case in COUNTED} == set(KERNELS)


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


def test_counted_state_is_what_adamw_keeps():
    case = StepCase("tiny", 1, "trim", audio_s=1.0, tokens=3)
    (row,) = counted.count_step(case, ["lora-six"])
    call = step.build_step("lora-six", case)
    call()
    kept = [state[name] for state in call.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert sum(tensor.nbytes for tensor in kept) == 8 * row["trainable"]
    assert row["state_mib"] == round(8 * row["trainable"] / 2**20, 2) > 0


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
