"""Runs that go on after a kill, in a folder that was moved, by a clock that was set back, with what a kill leaves."""

import json
import multiprocessing
import os
import shutil
import time

import pytest
import torch

from fused_s2lora.training import fitting
from fused_s2lora.training import interpolate as interpolate_module
from fused_s2lora.training import merge as merge_module
from fused_s2lora.training.comparison import read_comparison, run_comparison
from fused_s2lora.training.interpolate import interpolate_run
from fused_s2lora.training.merge import merge
from fused_s2lora.training.output import claimed, read_json
from fused_s2lora.training.run import RunFolder
from fused_s2lora.training.train import train
from tests.training.comparisons import QUIET, write
from tests.training.kills import train_until
from tests.training.speech import adapter_of


def metrics_of(run) -> list[dict]:
    """A run's metrics.json, but what is of the time it took."""
    timed = ("_runtime", "_per_second")
    return [
        {name: value for name, value in entry.items() if not name.endswith(timed)}
        for entry in read_json(run / "metrics.json", list)
    ]


@pytest.mark.parametrize("step", [3, 6])
def test_metrics_are_those_of_a_run_that_was_not_stopped(step, options, tmp_path):
    train(options(tmp_path / "whole"), console=QUIET)
    train_until(step, options(tmp_path / "killed"))
    train(options(tmp_path / "killed"), console=QUIET)
    assert metrics_of(tmp_path / "killed") == metrics_of(tmp_path / "whole")


@pytest.mark.parametrize("ended", [{"max_steps": 4}, {"early_stopping": 1, "lr": 1e-9}], ids=["steps", "early"])
def test_a_run_that_was_stopped_after_its_last_step_takes_no_further(ended, options, tones, tmp_path, monkeypatch):
    """In the middle of an epoch. Killed before the adapter was written, or the disk was full."""

    def stop(*given):
        raise KeyboardInterrupt

    if "early_stopping" in ended:
        ended = ended | {"dev": str(tones)}
    train(options(tmp_path / "whole", **ended), console=QUIET)
    with monkeypatch.context() as patch:
        patch.setattr(fitting, "write_rank_maps", stop)
        with pytest.raises(KeyboardInterrupt):
            train(options(tmp_path / "killed", **ended), console=QUIET)
    train(options(tmp_path / "killed", **ended), console=QUIET)
    assert metrics_of(tmp_path / "killed") == metrics_of(tmp_path / "whole")
    assert read_json(tmp_path / "killed" / "summary.json")["steps"] == 4


@pytest.fixture(scope="module")
def half_run(options, tmp_path_factory):
    """The folder of a run that was stopped after its second checkpoint."""
    run = tmp_path_factory.mktemp("half") / "run"
    train_until(5, options(run))
    return run


@pytest.mark.parametrize("left", [None, 0, -100])
@pytest.mark.parametrize(
    "name", ["trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth", "adapter_model.safetensors"]
)
def test_a_damaged_checkpoint_is_not_gone_on_from(name, left, half_run, options, tmp_path, capsys):
    """One whose optimizer was not there was, with an optimizer begun anew; others ended in a traceback."""
    shutil.copytree(half_run, tmp_path / "run")
    file = tmp_path / "run" / "checkpoints" / "checkpoint-4" / name
    content = file.read_bytes()[:left]
    file.unlink()
    if left is not None:
        file.write_bytes(content)
    found = RunFolder(options(tmp_path / "run")).last_checkpoint()
    assert found is not None
    assert found.name == "checkpoint-2"
    assert not file.parent.exists()
    assert "checkpoint-4: not written to its end, removed" in capsys.readouterr().err


@pytest.fixture
def worse_and_worse(monkeypatch):
    """The first checkpoint is the best."""
    evaluate = fitting.SpeechTrainer.evaluate
    monkeypatch.setattr(
        fitting.SpeechTrainer,
        "evaluate",
        lambda self, *args, **kwargs: evaluate(self, *args, **kwargs) | {"eval_loss": float(self.state.global_step)},
    )


@pytest.mark.parametrize("way", [shutil.move, shutil.copytree])
def test_a_run_that_was_moved_finds_its_best_checkpoint(way, worse_and_worse, options, tones, tmp_path, monkeypatch):
    """Stopped when all steps are done, so that no later checkpoint says where the best is."""

    def stop(*given):
        raise KeyboardInterrupt

    train(options(tmp_path / "best", max_steps=6, dev=str(tones)), console=QUIET)
    kept = {path.name for path in (tmp_path / "best" / "checkpoints").glob("checkpoint-*")}
    assert kept == {"checkpoint-2", "checkpoint-6"}
    with monkeypatch.context() as patch:
        patch.setattr(fitting, "write_rank_maps", stop)
        with pytest.raises(KeyboardInterrupt):
            train(options(tmp_path / "killed", max_steps=6, dev=str(tones)), console=QUIET)
    way(tmp_path / "killed", tmp_path / "elsewhere")
    shutil.rmtree(tmp_path / "killed", ignore_errors=True)
    train(options(tmp_path / "elsewhere", max_steps=6, dev=str(tones)), console=QUIET)
    expected, got = adapter_of(tmp_path / "best"), adapter_of(tmp_path / "elsewhere")
    assert all(torch.equal(expected[key], got[key]) for key in expected)


def test_the_last_checkpoints_are_kept_by_a_clock_that_was_set_back(options, tmp_path):
    checkpoints = tmp_path / "run" / "checkpoints"
    train_until(5, options(tmp_path / "run", epochs=4.0))
    tomorrow = time.time() + 86_400
    for step in (2, 4):
        os.utime(checkpoints / f"checkpoint-{step}", (tomorrow + step, tomorrow + step))
    train_until(9, options(tmp_path / "run", epochs=4.0))
    assert {path.name for path in checkpoints.glob("checkpoint-*")} == {"checkpoint-6", "checkpoint-8"}


def test_what_a_killed_process_was_at_is_not_kept_by_those_that_read_audio_for_it(tmp_path):
    """They are forked from it, and outlive it by seconds."""
    context = multiprocessing.get_context("fork")
    ends = context.Event()
    stream = (tmp_path / ".alone").open("w")
    assert claimed(stream)
    reader = context.Process(target=ends.wait)
    reader.start()
    try:
        with (tmp_path / ".alone").open("w") as other:
            assert not claimed(other)
        stream.close()  # as a kill does
        with (tmp_path / ".alone").open("w") as other:
            deadline = time.monotonic() + 10
            while not claimed(other):
                assert time.monotonic() < deadline
                time.sleep(0.01)
            assert reader.is_alive()
    finally:
        ends.set()
        reader.join()


def test_what_a_kill_has_left_half_written_is_cleared(options, tones, tmp_path):
    run = tmp_path / "run"
    wanted = options(run, keep_share=0.5)
    train_until(3, wanted)
    left = [run / ".unfinished.1", run / "adapter" / ".unfinished.22", run / "other_languages-1-of-1.json"]
    left[1].parent.mkdir()
    shutil.copy(run / "other_languages.json", left[2])
    for file in left[:2]:
        file.write_text("{")
    train(wanted, console=QUIET)
    assert not any(file.exists() for file in left)
    assert json.loads((run / "summary.json").read_text())["resumed_at_step"] == 2


def test_a_run_is_deleted_in_a_linked_folder_too_and_stays_a_run_to_the_end(finished, options, tmp_path, monkeypatch):
    """Else --fresh that is killed would leave a folder of other files, which the next call refuses."""
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "link").symlink_to(tmp_path / "run")
    deleted = []
    unlink = os.unlink
    with monkeypatch.context() as patch:
        patch.setattr(
            os, "unlink", lambda file, **named: deleted.append(os.path.basename(file)) or unlink(file, **named)
        )
        run = RunFolder(options(tmp_path / "link"), fresh=True)
    own = [name for name in deleted if name != ".alone" and not name.startswith(".unfinished")]
    assert own[-1] == "config.json"
    assert {file.name for file in run.path.iterdir()} == {"command.txt", "config.json", "versions.json"}


@pytest.mark.parametrize("module", [merge_module, interpolate_module])
def test_half_a_model_or_adapter_of_a_killed_process_is_written_anew(module, finished, tmp_path, monkeypatch):
    def stop(*given):
        raise KeyboardInterrupt

    def write(output):
        if module is merge_module:
            merge(str(finished / "adapter"), output)
        else:
            interpolate_run(finished, 0.5, output)
        return {file.name for file in output.iterdir()}

    whole = write(tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(module, "save_processor" if module is merge_module else "write_model_card", stop)
        patch.setattr(shutil, "rmtree", lambda *given, **named: None)  # which a kill leaves no time for
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path / "half")
    assert any((tmp_path / "half").iterdir())
    assert write(tmp_path / "half") == whole


def test_a_comparison_goes_on_with_what_a_kill_has_left(quick, tmp_path, short_decoding, monkeypatch):
    rows = [{"name": "S2-LoRA", "method": "s2lora"}, {"name": "less", "method": "s2lora", "interpolation": 0.5}]
    comparison = read_comparison(write(tmp_path, quick, rows), tmp_path / "out")
    first, less = comparison.cells
    list(run_comparison(comparison, most=1, console=QUIET))
    for part in ("checkpoints", "model"):  # it was finished, and not yet cleared
        (first.path / part).mkdir()
    (first.path / ".running").touch()
    RunFolder(less.options)
    (less.path / "adapter").mkdir()
    (less.path / "adapter" / "adapter_config.json").write_text("{}")  # half of one that was taken from the first

    monkeypatch.setattr("fused_s2lora.training.train.fit", None)
    assert list(run_comparison(comparison, console=QUIET)) == [less]
    assert not any((first.path / part).exists() for part in ("checkpoints", "model", ".running"))
    took = read_json(first.path / "summary.json") | {"interpolation": 0.5}
    assert read_json(less.path / "summary.json") == took
