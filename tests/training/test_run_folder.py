"""What a run writes: whole files, and its own peak memory."""

import json
from pathlib import Path

import pytest
import torch

from fused_s2lora.training.errors import UserError
from fused_s2lora.training.output import read_json, write_json
from fused_s2lora.training.run import peak_memory_mib, reset_peak_memory, versions
from fused_s2lora.training.trainer import StepTimes


def test_json_is_whole_or_not_there(tmp_path, monkeypatch):
    file = tmp_path / "summary.json"
    write_json(file, {"steps": 1})

    def killed(self, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_json(file, {"steps": 2})
    assert json.loads(file.read_text()) == {"steps": 1}
    assert list(tmp_path.iterdir()) == [file]
    monkeypatch.undo()
    write_json(file, {"steps": 2})
    assert json.loads(file.read_text()) == {"steps": 2}


def test_damaged_json_names_its_file(tmp_path):
    file = tmp_path / "summary.json"
    file.write_text('{"steps": ')
    with pytest.raises(UserError, match=r"summary\.json: is damaged .* restore it, or delete the folder of the run"):
        read_json(file)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory can be reset on Linux only")
@pytest.mark.skipif(torch.cuda.is_available(), reason="counts the GPU's memory")
def test_peak_memory_is_that_since_the_reset():
    reset_peak_memory()
    before = peak_memory_mib()
    large = torch.ones(64, 2**20)  # 256 MiB, each page touched
    assert peak_memory_mib() > before + 200
    del large
    assert peak_memory_mib() > before + 200
    reset_peak_memory()
    assert peak_memory_mib() < before + 100


def test_the_time_of_a_step_is_the_middle_one(monkeypatch):
    clock = iter([100.0, 103.0, 104.0, 105.5, 125.5, 126.5])  # a slow start, a checkpoint
    monkeypatch.setattr("fused_s2lora.training.trainer.time.perf_counter", lambda: next(clock))
    times = StepTimes()
    assert times.median_s() is None
    times.on_train_begin(None, None, None)
    for _ in range(5):
        times.on_step_end(None, None, None)
    assert times.durations_s == [3.0, 1.0, 1.5, 20.0, 1.0]
    assert times.median_s() == 1.5


def test_versions_need_no_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert versions()["commit"] is None
