"""The benchmarks measure what they say, and refuse what computes something else."""

import json
import sys
import time

import pytest
import torch

from bench import layer, measure, step
from tests.oracle import DEVICE


@pytest.fixture
def case() -> layer.Case:
    return layer.make_case(64, 32, 48, 4, torch.float32, DEVICE)


def test_every_provider_computes_the_operation(case):
    providers = layer.providers(case, DEVICE)
    assert {"frozen", "addmm-lora", "peft-lora", "s2-auto", "s2-reference"} <= set(providers)
    for name, forward in providers.items():
        layer.refuse_wrong(name, forward, case)


def test_a_wrong_provider_is_refused(case):
    right = layer.providers(case, DEVICE)["s2-auto"]
    faults = {
        "zeroed strip": lambda: right() * (torch.arange(48, device=DEVICE) < 47),
        "no adapter": layer.providers(case, DEVICE)["frozen"],
        "not finite": lambda: right() * torch.nan,
    }
    for name, forward in faults.items():
        with pytest.raises(ValueError, match=f"{name}: .* it is not timed"):
            layer.refuse_wrong(name, forward, case)


def test_latency_is_that_of_the_call():
    times = measure.latencies({"short": lambda: time.sleep(0.002), "long": lambda: time.sleep(0.02)}, rounds=5)
    assert 2 <= times["short"].p20_ms <= times["short"].p50_ms <= times["short"].p80_ms
    assert times["long"].p50_ms > 2 * times["short"].p50_ms
    assert times["long"].rounds == 5


def test_step_writes_a_line_for_every_method(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(step.SIZES, "base", (64, 1, 1, 80))
    monkeypatch.setattr(step, "peak_mib", lambda *args: 1.0)  # a process of its own would not see the small size
    output = tmp_path / "step.jsonl"
    arguments = ["step", "--size", "base", "--batch", "1", "--window", "trim", "--rounds", "2", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", arguments)
    step.main()
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["provider"] for row in rows] == list(step.METHODS)
    assert all(row["p50_ms"] > 0 and row["kind"] == "measured" for row in rows)
    assert {"device", "versions", "commit", "utc", "command"} <= rows[0].keys()
    assert "lora-six" in capsys.readouterr().out


def test_adapted_steps_train_and_the_frozen_one_does_not(monkeypatch):
    monkeypatch.setitem(step.SIZES, "base", (64, 1, 1, 80))
    for method in step.METHODS:
        call = step.build_step(method, "base", 2, 100, 5, 4)
        losses = [call() for _ in range(6)]
        assert (losses[-1] < losses[0]) == (method != "frozen"), method
