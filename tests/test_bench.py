"""The benchmarks measure and count what they say, and refuse what computes something else."""

import os
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from torch import nn

from bench import counted, host, layer, measure, static, step
from bench.cases import LAYERS, PRECISIONS, SIZES, Case, make_operands
from bench.providers import Provided, WrongResultError, providers, refuse_wrong
from bench.step import StepCase
from fused_s2lora.kernels import device as kernels_device
from tests.bench_cases import DEVICE_IN_HAND, built, make_small
from tests.conftest import ROOT
from tests.oracle import DEVICE


@pytest.fixture(autouse=True)
def small_sizes(monkeypatch):
    make_small(monkeypatch)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", LAYERS)
def test_every_provider_computes_the_operation(name, precision):
    case = Case(name, "tiny", 48, 4, precision)
    found, groups = built(case)
    wanted = {"frozen", "addmm-lora", "peft-lora", "peft-adalora", "peft-vera", "s2-reference", "s2-auto", "s2-merged"}
    assert wanted <= set(found)
    assert ("peft-lora-half" in found) == (precision in ("fp16", "bf16"))
    for provider, provided in found.items():
        for one, group in zip(provided, groups, strict=True):
            refuse_wrong(provider, one, group, case.compute_dtype)


def test_the_compiled_reference_computes_the_operation():
    case = Case("fc1", "tiny", 48, 4, "fp32")
    (group,) = make_operands(case, DEVICE)
    refuse_wrong("s2-compiled", providers(case, DEVICE)["s2-compiled"](group), group, case.compute_dtype)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_wrong_output_is_refused(precision):
    case = Case("qkv", "tiny", 48, 4, precision)
    found, (group,) = built(case)
    (right,) = found["s2-auto"]
    faults = {
        "zeroed strip": lambda: [y * (torch.arange(32, device=DEVICE) < 31) for y in right.forward()],
        "no adapter": found["frozen"][0].forward,
        "not finite": lambda: [y * torch.nan for y in right.forward()],
        "one of three": lambda: [right.forward()[0], *found["frozen"][0].forward()[1:]],
    }
    for name, forward in faults.items():
        with pytest.raises(WrongResultError, match=f"{name}: .* it is not timed"):
            refuse_wrong(name, Provided(forward), group, case.compute_dtype)


@pytest.mark.parametrize("provider", ["addmm-lora", "peft-lora", "peft-adalora", "peft-vera", "s2-auto"])
def test_a_wrong_gradient_is_refused(provider):
    case = Case("out", "tiny", 48, 4, "fp32")
    found, (group,) = built(case)
    (right,) = found[provider]
    for index, learned in enumerate(right.learned):
        wrong = [*right.learned]
        wrong[index] = replace(learned, factor=1.1 * learned.factor)
        with pytest.raises(WrongResultError, match=f"gradient of {learned.quantity} is off"):
            refuse_wrong(provider, Provided(right.forward, wrong), group, case.compute_dtype)


def test_a_planted_fault_is_shown_and_not_timed(monkeypatch):
    def broken(case, device):
        def build(group):
            return Provided(lambda: [torch.zeros_like(dy) * group.x.sum() for dy in group.dys])

        return {**providers(case, device), "broken": build}

    monkeypatch.setattr(layer, "providers", broken)
    names = ["frozen", "s2-auto", "broken"]
    rows = layer.measure(Case("fc2", "tiny", 40, 4, "fp32"), DEVICE_IN_HAND, only=names, rounds=3)
    kinds = {(row["provider"], row["kind"]) for row in rows}
    assert kinds == {("frozen", "measured"), ("s2-auto", "measured"), ("broken", "refused")}
    (refused,) = (row for row in rows if row["kind"] == "refused")
    assert "output is off by" in refused["reason"]
    assert "p50_ms" not in refused
    assert {row["pass"] for row in rows if row["provider"] == "s2-auto"} == set(layer.PASSES)


_HOST = """
from bench import host, report

loads = []
load = host.NoDriver.load_binary
host.NoDriver.load_binary = lambda self, *given: loads.append(given[1]) or load(self, *given)
rows = host.measure("fc1", 3)
again = len(loads) - len(set(loads))
rows += host.measure_step(1)
print(len(rows), again)
print(report.tables([{**row, "device": "a CPU", "utc": "2026-11-26T"} for row in rows]))
"""


def test_the_hosts_time_is_measured_without_a_gpu():
    """With each build loaded once, as by a real driver."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run([sys.executable, "-c", _HOST], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith(f"{3 * len(host.PROVIDERS)} 0\n")
    assert f"| provider | fc1, forward, ms | fc1, both, ms | {host.STEP}, both, ms |" in done.stdout


@pytest.mark.skipif(not kernels_device.INTERPRETING, reason="kernels are compiled here, and could be launched")
def test_nothing_is_launched_in_the_interpreter():
    with pytest.raises(RuntimeError, match="unset it"), host.launches_do_nothing(host.NoDriver()):
        pytest.fail("kernels are interpreted")


def test_latency_is_that_of_the_call():
    times = measure.latencies({"short": lambda: time.sleep(0.002), "long": lambda: time.sleep(0.02)}, rounds=5)
    assert 2 <= times["short"].p20_ms <= times["short"].p50_ms <= times["short"].p80_ms
    assert times["long"].p50_ms > 2 * times["short"].p50_ms
    assert times["long"].rounds == 5
    staged = measure.Staged(lambda: time.sleep(0.02) or 3, lambda given: time.sleep(0.001 * given))
    assert 3 <= measure.latencies({"staged": staged}, rounds=5)["staged"].p50_ms < 15
    assert measure.latencies({"long": lambda: time.sleep(0.02)}, rounds=50, seconds=0.1)["long"].rounds < 10


def test_percentiles_are_those_of_the_samples():
    # Of eleven samples 0 to 10 ms, shuffled, a fifth lies up to 2, half up to 5 and four fifths up to 8.
    samples_ms = [7, 0, 10, 3, 1, 9, 4, 2, 8, 6, 5]
    ticks = iter([tick for ms in samples_ms for tick in (0.0, ms / 1e3)])
    (found,) = measure.latencies({"call": list}, rounds=11, warmup=0, clock=lambda: next(ticks)).values()
    assert [found.p20_ms, found.p50_ms, found.p80_ms] == pytest.approx([2, 5, 8])
    assert found.rounds == 11


@pytest.mark.skipif(not torch.cuda.is_available(), reason="queued launches are timed on a GPU only")
def test_queued_calls_are_timed_without_their_host():
    x = torch.randn(64, 64, device="cuda")

    def call() -> None:
        for _ in range(20):
            time.sleep(1e-4)
            x.mul_(1.0)

    plain = measure.latencies({"call": call}, rounds=5)["call"]
    queued = measure.latencies({"call": call}, rounds=5, queued=True)["call"]
    assert queued.p50_ms < 1 < plain.p50_ms


@pytest.mark.parametrize(
    ("target", "registers", "warps", "shared", "blocks"),
    [
        ("90", 32, 4, 0, 16),  # 16 blocks of 4 warps are all 64 warps
        ("90", 128, 8, 0, 2),  # 65,536 / (128 · 32 · 8)
        ("90", 32, 4, 100 << 10, 2),  # 228 KiB hold two of 101
        ("89", 32, 4, 0, 12),  # 48 warps
        ("80", 255, 8, 163 << 10, 1),
    ],
)
def test_occupancy(target, registers, warps, shared, blocks):
    found, share = static.occupancy(target, registers, warps, shared)
    assert found == blocks
    assert share == blocks * warps / static.MULTIPROCESSORS[target].warps


BUILD = {
    "kernel": "linear", "config": "wide", "direction": "forward", "dtype": "bf16", "target": "90", "num_warps": 8,
    "num_stages": 4, "registers": 213, "spilled": 0, "shared_memory": 1024, "shared_memory_limit": 2048,
    "matrix_instructions": {"wgmma": 9}, "tensor_memory": 0, "bulk_copies": 0, "partitions": 0,
}  # fmt: skip


def test_builds_are_those_of_the_ranks_asked_for(monkeypatch):
    class Alone:
        """One process instead of a pool, and nothing compiled."""

        def __init__(self, *arguments):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def map(self, function, jobs):
            return [static.aot.Report(R=static.aot.variants(target)[index].R, **BUILD) for target, index in jobs]

    monkeypatch.setattr(static, "ProcessPoolExecutor", Alone)
    every = [row["R"] for row in static.report(["90"])]
    assert {0, 16, 32, 64, 128, 256} == set(every)
    assert len(every) == len(static.aot.variants("90"))
    some = [row["R"] for row in static.report(["90"], [1, 8, 24])]
    usual = [variant.R for variant in static.aot.variants("90") if not variant.rare]
    assert some == [R for R in usual if R in (0, 16, 32)]
    assert {64, 128} <= {row["R"] for row in static.report(["90"], [128])}  # 128 ranks are taken in tiles of 64


def test_speech_is_the_whole_batch():
    assert StepCase("tiny", 4, "full").speech_s == 4 * 30
    assert StepCase("tiny", 4, "trim", audio_s=2.5).speech_s == 4 * 2.5


def test_lora_by_hand_is_that_of_peft():
    """The same model and the same factors: the same loss and the same gradients."""
    case = StepCase("tiny", 2, "trim", audio_s=1.0, tokens=5, rank=4)
    ours, theirs = (step.build_step(name, case, "cpu") for name in (step.ADDMM_LORA, "lora-six"))
    pairs = {}
    for name, module in theirs.model.named_modules():
        if hasattr(module, "lora_A"):
            twin = ours.model.get_submodule(name.removeprefix("base_model.model."))
            nn.init.normal_(module.lora_B["default"].weight, std=0.1)
            with torch.no_grad():
                twin.down.copy_(module.lora_A["default"].weight)
                twin.up.copy_(module.lora_B["default"].weight)
            pairs[twin.down], pairs[twin.up] = module.lora_A["default"].weight, module.lora_B["default"].weight
    assert len(pairs) == len(ours.trainable) == len(theirs.trainable)
    theirs.batch = ours.batch
    losses = [one.loss() for one in (ours, theirs)]
    torch.testing.assert_close(*losses, rtol=1e-2, atol=1e-2)
    for loss in losses:
        loss.backward()
    for mine, wanted in pairs.items():
        assert (mine.grad - wanted.grad).norm() <= 0.05 * wanted.grad.norm()


def test_adapted_steps_train_and_the_frozen_one_does_not():
    for method in step.METHODS:
        call = step.build_step(method, StepCase("base", 2, "trim", audio_s=1.0, tokens=5, rank=4))
        losses = [call() for _ in range(6)]
        assert (losses[-1] < losses[0]) == (method != "frozen"), method


def test_steps_of_quantised_maps():
    pytest.importorskip("bitsandbytes")
    case = StepCase("base", 2, "trim", audio_s=1.0, tokens=5, rank=4, quantize="nf4")
    assert "nf4 maps" in str(case)
    losses = {method: step.build_step(method, case)() for method in ("frozen", "lora-six", "s2lora")}
    plain = step.build_step("frozen", replace(case, quantize=None))
    with torch.no_grad():
        whole = plain.loss().item()
    for method, loss in losses.items():  # the adapters do nothing yet; 4 bits make a difference, and bfloat16 little
        assert abs(loss - losses["frozen"]) <= 0.02 * loss, method
    assert losses["frozen"] != whole
    with pytest.raises(ValueError, match="addmm-lora-six does not go with quantised maps"):
        step.build_step(step.ADDMM_LORA, case)


def test_s2lora_is_timed_with_and_without_its_attention():
    case = StepCase("tiny", 1, "trim", audio_s=1.0, tokens=3)
    attention = {name: step.build_step(name, case).model.config._attn_implementation for name in step.METHODS}
    assert {attention.pop(name) for name in ("s2lora", "s2lora-unshared")} == {"sdpa_in_blocks"}
    assert set(attention.values()) == {"sdpa"}
    (row,) = counted.count_step(case, ["frozen", step.TORCH_ATTENTION])
    assert row["provider"] == "frozen"  # what a GPU does is the same


def test_every_size_is_known_to_both_sections():
    assert {Case("qkv", size, 1).groups()[0].inputs for size in SIZES} == {row[0] for row in SIZES.values()}


def test_results_need_no_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert measure.provenance()["commit"] == "unknown"
