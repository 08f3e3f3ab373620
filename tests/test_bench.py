"""The benchmarks measure and count what they say, and refuse what computes something else."""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from bench import cases, counted, host, layer, measure, plan, plots, report, run, static, step
from bench.cases import LAYERS, PRECISIONS, SIZES, Case, make_operands
from bench.providers import Provided, WrongResultError, providers, refuse_wrong
from bench.roofline import Device
from bench.step import StepCase
from fused_s2lora.kernels import device as kernels_device
from tests.bench_cases import TINY, built
from tests.conftest import ROOT
from tests.oracle import DEVICE

DEVICE_IN_HAND = Device(DEVICE, 10.0, dict.fromkeys(PRECISIONS, 0.1))


def make_small(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(cases.SIZES, "tiny", TINY)
    patch.setitem(cases.SIZES, "base", (64, 1, 1, 80))


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
print(len(rows), len(loads) - len(set(loads)))
print(report.tables([{**row, "device": "a CPU", "utc": "2026-11-26T"} for row in rows]))
"""


def test_the_hosts_time_is_measured_without_a_gpu():
    """With each build loaded once, as by a real driver."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run([sys.executable, "-c", _HOST], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith(f"{2 * len(host.PROVIDERS)} 0\n")
    assert "| provider | fc1, forward, ms | fc1, both, ms |" in done.stdout


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


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """Every section of a small run, its folder and what it printed."""
    folder = tmp_path_factory.mktemp("run")
    arguments = ["--size", "tiny", "--rows", "40", "--rows", "80", "--batch", "1", "--window", "trim", "--rounds", "3"]
    for name in ("frozen", "peft-lora", "s2-auto", "s2-merged"):
        arguments += ["--provider", name]
    for name in ("frozen", "lora-six", "s2lora"):
        arguments += ["--method", name]
    with pytest.MonkeyPatch.context() as patch:
        make_small(patch)
        patch.setattr(step, "peak_mib", lambda *args: 1.0)  # a process of its own would not see the small sizes
        patch.setattr(run, "measure_device", lambda: DEVICE_IN_HAND)
        patch.setattr(
            run.static,
            "report",
            lambda targets, ranks: [
                dict(STATIC, target=target, R=16 * rank, section="static") for target in targets for rank in ranks
            ],
        )
        result = CliRunner().invoke(app(), [*arguments, "--results", str(folder)])
    assert result.exit_code == 0, result.output
    return folder, result.output


@pytest.fixture
def one_run(finished_run, tmp_path):
    """It in a folder of the test's own."""
    folder, output = finished_run
    return Path(shutil.copytree(folder, tmp_path / "run")), output


STATIC = {
    "provider": "s2-fused", "kind": "static", "kernel": "linear", "config": "wide", "direction": "forward",
    "dtype": "bf16", "R": 16, "num_warps": 8, "num_stages": 4, "registers": 213, "spilled": 0, "shared_memory": 1024,
    "shared_memory_limit": 2048, "matrix_instructions": {"wgmma": 9},
    "blocks_per_multiprocessor": 1, "occupancy": 0.125,
}  # fmt: skip
BUILD = {
    "kernel": "linear", "config": "wide", "direction": "forward", "dtype": "bf16", "target": "90", "num_warps": 8,
    "num_stages": 4, "registers": 213, "spilled": 0, "shared_memory": 1024, "shared_memory_limit": 2048,
    "matrix_instructions": {"wgmma": 9}, "tensor_memory": 0, "bulk_copies": 0, "partitions": 0,
}  # fmt: skip


def app():
    import typer

    command = typer.Typer()
    command.command()(run.main)
    return command


def test_a_provider_without_a_colour_is_drawn_too(one_run):
    folder, _ = one_run
    rows = [{**row, "provider": row["provider"].replace("s2", "new")} for row in report.load(folder)]
    plots.draw(rows, folder / "new")
    assert any((folder / "new").glob("*.svg"))


def test_a_run_writes_lines_tables_and_plots(one_run):
    folder, output = one_run
    assert {file.name for file in folder.glob("*.jsonl")} == {
        "device.jsonl",
        "layer.jsonl",
        "step.jsonl",
        "static.jsonl",
    }
    rows = report.load(folder)
    assert all({"device", "versions", "commit", "utc", "command", "kind"} <= row.keys() for row in rows)
    steps = [row for row in rows if row["section"] == "step" and row["kind"] == "measured"]
    assert [row["provider"] for row in steps] == ["frozen", "lora-six", "s2lora"]
    assert all(row["audio_s_per_s"] == pytest.approx(3.9e3 / row["p50_ms"], rel=0.01) for row in steps)
    text = (folder / "tables.md").read_text()
    for heading in ("Devices, measured", "tiny encoder-layer, M 40", "tiny step, batch 1", ", counted", "static"):
        assert heading in text
    assert "tiny encoder-layer, M 80" in output
    kinds = {file.name.split("-")[0] for file in (folder / "plots").glob("*.svg")}
    assert kinds == {"roofline", "time", "step", "bytes"}


def test_a_table_shows_the_newest_line_and_the_right_ratio(one_run):
    folder, _ = one_run
    lines = [json.loads(line) for line in (folder / "step.jsonl").read_text().splitlines()]
    (lora,) = (row for row in lines if row["provider"] == "lora-six" and row["kind"] == "measured")
    newer = {**lora, "provider": "s2lora", "p20_ms": 1, "p50_ms": lora["p50_ms"] / 4, "p80_ms": 3, "peak_mib": 0.5}
    with (folder / "step.jsonl").open("a") as stream:
        stream.write(json.dumps(newer) + "\n")
    (line,) = (
        line
        for line in report.tables(report.load(folder)).splitlines()
        if line.startswith("| s2lora ") and " 0.25 " in line
    )
    assert " 0.50 " in line


def test_figures_of_equal_rows_are_equal(one_run):
    folder, _ = one_run
    first = {file.name: file.read_text() for file in (folder / "plots").iterdir()}
    plots.draw(report.load(folder), folder / "plots")
    assert {file.name: file.read_text() for file in (folder / "plots").iterdir()} == first


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layer", "fc3"], "'fc3' is not one of"),
        (["--section", "all"], "'all' is not one of"),
        (["--size", "huge"], "'huge'"),
        (["--quantize", "nf4", "--method", "full"], "'full' is not one of"),
    ],
)
def test_a_selection_that_does_not_exist_is_refused(arguments, message):
    result = CliRunner().invoke(app(), arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())


def test_what_no_time_is_left_for_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(run, "measure_device", lambda: DEVICE_IN_HAND)
    arguments = ["--section", "layer", "--size", "tiny", "--minutes", "0", "--results", str(tmp_path)]
    result = CliRunner().invoke(app(), arguments)
    assert result.exit_code == 0
    assert "no time for: tiny encoder-layer" in result.output
    assert not (tmp_path / "layer.jsonl").exists()


@pytest.mark.parametrize(("asked", "made"), [(["--rounds", "5"], 5), ([], 3)])
def test_rounds_asked_for_are_made_whatever_time_is_planned(monkeypatch, tmp_path, asked, made):
    monkeypatch.setattr(run, "measure_device", lambda: DEVICE_IN_HAND)
    planned = replace(getattr(plan, DEVICE)(), seconds=0.0)
    monkeypatch.setattr(plan, DEVICE, lambda: planned)
    arguments = ["--section", "layer", "--size", "tiny", "--rows", "40", "--provider", "frozen", *asked]
    result = CliRunner().invoke(app(), [*arguments, "--results", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert {row["rounds"] for row in report.load(tmp_path) if row["section"] == "layer"} == {made}


def test_every_size_is_known_to_both_sections():
    assert {Case("qkv", size, 1).groups()[0].inputs for size in SIZES} == {row[0] for row in SIZES.values()}


def test_results_need_no_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert measure.provenance()["commit"] == "unknown"
