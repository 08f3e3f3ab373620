"""Whole runs on a tiny Whisper: train, go on after a kill, keep the best, and what a run leaves."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file
from transformers import ProgressCallback, WhisperForConditionalGeneration
from transformers.models.whisper.modeling_whisper import WhisperModel
from typer.testing import CliRunner

from fused_s2lora import S2LoraConfig
from fused_s2lora.training import evaluation as evaluation_module
from fused_s2lora.training import fitting
from fused_s2lora.training import train as train_module
from fused_s2lora.training.cli import app
from fused_s2lora.training.errors import DivergedError, UserError
from fused_s2lora.training.methods import PRESETS
from fused_s2lora.training.models import remembered_speech
from fused_s2lora.training.options import LEAST_STEPS
from fused_s2lora.training.train import train
from tests.training.comparisons import QUIET
from tests.training.kills import train_until
from tests.training.speech import TEXTS, adapter_of, write_folder


def test_run_folder_tells_the_whole_story(finished, capsys):
    config = json.loads((finished / "config.json").read_text())
    assert config["window"] == "trim"
    assert json.loads((finished / "versions.json").read_text()).keys() >= {"torch", "peft", "transformers", "utc"}
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["steps"] == 6
    assert summary["trainable_parameters"] == 3 * 2 * 32 * 8 + 2 * 96 * 8 + 32 * 8
    history = json.loads((finished / "metrics.json").read_text())
    logged = [entry for entry in history if "cross_entropy" in entry]
    assert len(logged) == 6
    for entry in logged:
        parts = ("cross_entropy", "other_languages", "sparsity", "norm")
        assert entry["loss"] == pytest.approx(sum(entry[part] for part in parts), abs=2e-4)
    assert (finished / "command.txt").read_text().strip()
    assert (finished / "skipped.tsv").read_text() == "utterance\treason\n"
    before, after = json.loads((finished / "results.json").read_text())
    assert before["label"] == "before"
    groups = after["sets"]["same"]["groups"]
    assert list(groups) == ["all", "age 6-8", "age 9-12"]
    assert groups["all"]["wer"]["utterances"] == len(TEXTS)
    lines = (finished / "after" / "same.tsv").read_text().splitlines()
    assert len(lines) == 1 + len(TEXTS)
    assert "WE CALL IT BEAR" in lines[1]
    assert list((finished / "checkpoints").rglob("events.out.tfevents*"))


def test_adapter_remembers_the_window(finished):
    config = S2LoraConfig.from_pretrained(finished / "adapter")
    assert (config.audio_window, config.audio_window_margin, config.language) == ("trim", 64, "en")
    assert remembered_speech(finished / "adapter")["task"] == "transcribe"


def test_finished_run_is_not_done_again(finished, options, tones, monkeypatch):
    monkeypatch.setattr(train_module, "fit", lambda *args: pytest.fail("trained again"))
    monkeypatch.setattr(evaluation_module, "transcribe_speech", lambda *args, **kwargs: pytest.fail("heard again"))
    evaluations = train(options(finished, test=[f"same={tones}"], group_by=["speaker"]), console=QUIET)
    assert list(evaluations[1].sets[0].rates) == ["all", "speaker s0", "speaker s1", "speaker s2"]


def test_overlong_development_transcripts_are_skipped(options, tmp_path):
    dev = write_folder(tmp_path / "dev", ("GO HOME NOW", "AGAIN AND " * 300))
    train(options(tmp_path / "run", dev=str(dev), max_steps=2), console=QUIET)
    assert "Whisper takes 448; split it" in (tmp_path / "run" / "skipped.tsv").read_text()


@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_has_a_bar_of_steps_and_of_development_speech(options, tones, tmp_path, monkeypatch, terminal):
    batches = []
    spy = lambda self, *args, eval_dataloader, **kwargs: batches.append(len(eval_dataloader))  # noqa: E731
    monkeypatch.setattr(ProgressCallback, "on_prediction_step", spy)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    asked = {"dev": str(tones), "eval_batch_size": 2, "max_steps": 2, "save_steps": 1, "test": []}
    train(options(tmp_path / "run", **asked), console=QUIET)
    assert batches == [3] * 6 * terminal  # three batches, twice


def test_losses_fall_and_every_method_trains(options, tmp_path):
    for method in ("s2lora", "lora"):
        run = tmp_path / method
        train(options(run, method=method, epochs=12.0, lr=3e-2, save_steps=100), console=QUIET)
        history = [e["cross_entropy"] for e in json.loads((run / "metrics.json").read_text()) if "cross_entropy" in e]
        assert sum(history[-3:]) < sum(history[:3]) - 0.6, method
        assert remembered_speech(run / "adapter")["audio_window"] == "trim"


def test_accumulated_gradients_are_the_mean(options, tmp_path):
    """transformers takes Whisper for a model that scales its own loss and would sum the batches' gradients."""
    norms = []
    for accumulation in (1, 3):
        run = tmp_path / str(accumulation)
        train(
            options(run, accumulation=accumulation, max_steps=1, epochs=1.0, lr=1e-9, warmup=0.0, seed=3),
            console=QUIET,
        )
        history = json.loads((run / "metrics.json").read_text())
        norms.append(history[0]["grad_norm"])
    assert norms[1] < 1.6 * norms[0]  # summed instead of averaged it would be about three times as large


def test_killed_run_ends_as_an_uninterrupted_one(options, tiny_folder, tones, tmp_path, monkeypatch):
    monkeypatch.setenv("S2LORA_BACKEND", "merged")  # the same in a process that has not these tests' fixtures
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(options(whole, epochs=8.0, save_steps=3), console=QUIET)
    command = [
        sys.executable, "-c", "from fused_s2lora.training.cli import main; main()", "train",
        "--model", tiny_folder, "--data", tones, "--window", "trim", "--precision", "fp32", "--batch-size", "2",
        "--epochs", "8", "--save-steps", "3", "--logging-steps", "1", "--output", killed,
    ]  # fmt: skip
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not list((killed / "checkpoints").glob("checkpoint-*/trainer_state.json")):
        assert process.poll() is None, process.stderr.read().decode()[-2000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "adapter").exists()
    train(options(killed, epochs=8.0, save_steps=3), console=QUIET)
    resumed_at = json.loads((killed / "summary.json").read_text())["resumed_at_step"]
    assert resumed_at > 0
    expected, got = adapter_of(whole), adapter_of(killed)
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[key], got[key]) for key in expected)


@pytest.mark.parametrize("window", ["full", "trim"])
def test_a_run_that_goes_on_in_a_later_epoch_finds_its_order(window, options, tmp_path, monkeypatch):
    data = write_folder(tmp_path / "speech", TEXTS * 2)

    def given(name):
        return options(tmp_path / name, data=[str(data)], window=window, epochs=2.0, save_steps=4)

    batches = []
    collate = fitting.SpeechCollator.__call__
    monkeypatch.setattr(
        fitting.SpeechCollator,
        "__call__",
        lambda self, rows: batches.append([row["utterance"] for row in rows]) or collate(self, rows),
    )
    train(given("whole"), console=QUIET)
    whole = batches.copy()
    assert len(whole) == 12
    assert whole[:6] != whole[6:]

    train_until(9, given("killed"))  # the last checkpoint is the second of the second epoch's six steps
    batches.clear()
    train(given("killed"), console=QUIET)
    assert batches == whole[8:]
    expected, got = adapter_of(tmp_path / "whole"), adapter_of(tmp_path / "killed")
    assert all(torch.equal(expected[key], got[key]) for key in expected)


def test_a_run_that_goes_on_saves_as_often_as_it_is_asked_now(options, tmp_path):
    run = tmp_path / "run"
    train_until(3, options(run, save_steps=2, logging_steps=1))
    train(options(run, save_steps=5, logging_steps=2), console=QUIET)
    assert {path.name for path in (run / "checkpoints").glob("checkpoint-*")} == {"checkpoint-5", "checkpoint-6"}
    assert not [*run.glob("checkpoints/*/*token*")]  # megabytes each, and the same as the model's
    logged = [entry["step"] for entry in json.loads((run / "metrics.json").read_text()) if "cross_entropy" in entry]
    assert logged == [1, 2, 4, 6]


def test_loss_that_is_not_finite_stops_the_run(options, tmp_path, monkeypatch):
    def broken(self, waveforms, frames):
        return torch.full((len(waveforms), 80, frames), torch.nan)

    monkeypatch.setattr("fused_s2lora.training.trainer.LogMel.forward", broken)
    with pytest.raises(UserError, match="the loss is nan at step 1; lower --lr"):
        train(options(tmp_path / "run", dev_share=0.0), console=QUIET)
    assert not (tmp_path / "run" / "adapter").exists()


@pytest.mark.parametrize(
    ("asked", "gpu", "cores", "expected"),
    [
        (None, False, 16, 0),
        (None, True, 16, 4),
        (None, True, 2, 1),
        (None, True, 1, 0),
        (0, True, 16, 0),
        (7, False, 2, 7),
    ],
)
def test_audio_is_read_ahead_where_a_gpu_would_wait(options, tmp_path, monkeypatch, asked, gpu, cores, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    assert fitting._workers(options(tmp_path, workers=asked)) == expected


@pytest.mark.parametrize("workers", [0, 1])
def test_audio_lost_during_training_is_named_in_one_sentence(options, tmp_path, workers, monkeypatch):
    data = write_folder(tmp_path / "speech", TEXTS[:2])
    real = fitting.SpeechTrainer.get_train_dataloader
    monkeypatch.setattr(
        fitting.SpeechTrainer,
        "get_train_dataloader",
        lambda self: (data / "u1.flac").unlink(missing_ok=True) or real(self),
    )
    with pytest.raises(UserError) as caught:
        train(options(tmp_path / "run", data=[str(data)], workers=workers), console=QUIET)
    assert str(caught.value) == f"{data}/u1.flac: no such audio file"


def test_best_checkpoint_and_early_stopping(options, tones, tmp_path):
    run = tmp_path / "run"
    train(
        options(run, dev=str(tones), early_stopping=1, lr=5.0, warmup=0.0, epochs=20.0, save_steps=1),
        console=QUIET,
    )
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] < 60
    losses = [entry["eval_loss"] for entry in json.loads((run / "metrics.json").read_text()) if "eval_loss" in entry]
    assert len(losses) >= 2


def test_the_loss_of_development_speech_is_that_of_any_batches(options, tones, tmp_path):
    """A run that goes on may be given another batch size, and keeps the best checkpoint by losses of both."""
    losses = []
    for size in (1, 4):
        run = tmp_path / str(size)
        asked = {"window": "full", "dev": str(tones), "eval_batch_size": size, "max_steps": 1, "save_steps": 1}
        train(options(run, **asked), console=QUIET)
        metrics = json.loads((run / "metrics.json").read_text())
        losses.append(next(entry["eval_loss"] for entry in metrics if "eval_loss" in entry))
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


def test_checks_without_gain_are_counted_over_an_interruption(options, tones, tmp_path):
    def given(name):
        return options(tmp_path / name, dev=str(tones), early_stopping=3, lr=5.0, warmup=0.0, epochs=20.0, save_steps=1)

    train(given("whole"), console=QUIET)
    steps = json.loads((tmp_path / "whole" / "summary.json").read_text())["steps"]

    train_until(steps - 1, given("killed"))
    train(given("killed"), console=QUIET)
    summary = json.loads((tmp_path / "killed" / "summary.json").read_text())
    assert (summary["resumed_at_step"], summary["steps"]) == (steps - 2, steps)


def test_a_run_of_other_steps_does_not_go_on(options, tmp_path, monkeypatch):
    """Such as one begun on another number of processes, whose half would be taken for the whole."""

    train_until(3, options(tmp_path / "run"))
    with monkeypatch.context() as patch:
        patch.setattr(fitting, "processes", lambda: 2)
        with pytest.raises(UserError, match=r"was begun with 6 steps in all, and would have 4 now; go on with as many"):
            train(options(tmp_path / "run"), console=QUIET)
    train(options(tmp_path / "run"), console=QUIET)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["resumed_at_step"] == 2


def test_a_run_of_as_many_steps_does_not_go_on_in_other_processes(options, tmp_path, monkeypatch):
    """Which would pass over some of its utterances, and over others again."""
    train_until(3, options(tmp_path / "run", max_steps=6))
    with monkeypatch.context() as patch:
        patch.setattr(fitting, "processes", lambda: 2)
        with pytest.raises(UserError, match=r"run: processes were 1 when it was begun, and are 2 now; go on with as"):
            train(options(tmp_path / "run", max_steps=6), console=QUIET)
    train(options(tmp_path / "run", max_steps=6), console=QUIET)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["resumed_at_step"] == 2


def test_options_that_reach_the_model(options, tmp_path):
    run = tmp_path / "run"
    train(
        options(
            run, max_steps=2, sharing="all", rank=4, preset="paper", norm_weight=0.3, spec_augment=True,
            gradient_checkpointing=True, full_share=0.5, accumulation=2, dev_share=0.34, half_base=True,
            precision="bf16",
        ),
        console=QUIET,
    )  # fmt: skip
    config = S2LoraConfig.from_pretrained(run / "adapter")
    assert (config.sharing, config.r, config.norm_weight, config.init) == ("all", 4, 0.3, "normal")
    assert json.loads((run / "summary.json").read_text())["utterances"] == 4


def test_weights_of_half_precision_are_for_training_alone(options, tones, tmp_path, short_decoding, monkeypatch):
    """An adapter is used with the model in float32; merged into fewer bits a part of it would be lost."""
    dtypes = []
    evaluate, trained = train_module.evaluate_sets, train_module.fit
    monkeypatch.setattr(
        train_module, "evaluate_sets", lambda model, *a, **k: dtypes.append(model.dtype) or evaluate(model, *a, **k)
    )
    monkeypatch.setattr(
        train_module,
        "fit",
        lambda options, run, model, *a: dtypes.append(model.dtype) or trained(options, run, model, *a),
    )
    run = tmp_path / "run"
    asked = options(run, test=[f"same={tones}"], max_steps=1, half_base=True, precision="bf16")
    evaluations = train(asked, console=QUIET)
    assert dtypes == [torch.float32, torch.bfloat16, torch.float32]
    assert [evaluation.label for evaluation in evaluations] == ["before", "s2lora"]


def test_little_speech_is_passed_over_until_there_are_steps_enough(options, tmp_path, monkeypatch):
    """At least one epoch, and in whole ones, unless --epochs says how many."""
    monkeypatch.setattr(fitting, "LEAST_STEPS", 5)
    found = {}
    for epochs, batch_size in ((None, 2), (None, 1), (1.0, 2)):
        run = tmp_path / f"{epochs}-{batch_size}"
        train(options(run, epochs=epochs, batch_size=batch_size), console=QUIET)
        summary = json.loads((run / "summary.json").read_text())
        found[epochs, batch_size] = summary["steps"], summary["epochs"]
    assert found == {(None, 2): (6, 2), (None, 1): (6, 1), (1.0, 2): (3, 1)}


def test_the_command_says_how_many_steps_are_enough():
    result = CliRunner().invoke(app, ["train", "--help"], env={"COLUMNS": "200"})
    assert f"as many as make {LEAST_STEPS} steps" in result.output


def test_masking_is_of_the_run_that_asks_for_it(options, tiny_folder, tmp_path, monkeypatch):
    """And not of a later one on the model that was saved, or on another that was saved with it."""
    names = ("apply_spec_augment", "mask_time_prob", "mask_feature_prob")
    masked = []
    monkeypatch.setattr(
        WhisperModel,
        "_mask_input_features",
        lambda self, features, **_: masked.append([getattr(self.config, name) for name in names]) or features,
    )
    train(options(tmp_path / "first", method="full", spec_augment=True, max_steps=1), console=QUIET)
    saved = tmp_path / "first" / "model"
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (tiny_folder, saved))
    assert {name: before[name] for name in names} == {name: after[name] for name in names}
    (saved / "config.json").write_text(json.dumps(after | {"apply_spec_augment": True}))
    train(options(tmp_path / "second", model=str(saved), max_steps=1), console=QUIET)
    assert masked == [[True, 0.05, 0.05], [False, 0.05, 0.05]]


def test_a_share_of_the_update_is_kept(options, tmp_path):
    """The adapter that is saved is `interpolation` times the one that was trained, by default the preset's."""
    found = {}
    shares = {"whole": {"interpolation": 1.0}, "little": {"interpolation": 0.1}, "usual": {}}
    for name, given in shares.items():
        train(options(tmp_path / name, max_steps=3, **given), console=QUIET)
        found[name] = load_file(tmp_path / name / "adapter" / "adapter_model.safetensors")
    coefficients = [name for name in found["whole"] if "coefficients" in name]
    assert all(found["whole"][name].abs().max() > 0 for name in coefficients)
    for run, share in {"little": 0.1, "usual": PRESETS["default"].interpolation}.items():
        assert share < 1
        for name, value in found["whole"].items():
            torch.testing.assert_close(found[run][name], (share if name in coefficients else 1) * value, msg=name)


def test_command_line_from_end_to_end(tiny_folder, tones, tmp_path, monkeypatch, short_decoding):
    runner = CliRunner()
    common = ["--model", str(tiny_folder), "--precision", "fp32"]
    run = tmp_path / "run"
    arguments = ["train", *common, "--data", str(tones), "--test", f"t={tones}@en", "--window", "trim"]
    result = runner.invoke(app, [*arguments, "--max-steps", "2", "--output", str(run)], catch_exceptions=False)
    assert result.exit_code == 0
    adapter = ["--adapter", str(run / "adapter")]
    for command in (
        ["evaluate", *common, *adapter, "--test", f"t={tones}", "--output", str(tmp_path / "e"), "--group-by", "age"],
        ["transcribe", *common, *adapter, "--margin", "8", str(tones / "u0.flac")],
        ["transcribe", *common, *adapter, str(tones / "u0.flac")],
        ["merge", "--model", str(tiny_folder), str(run / "adapter"), str(tmp_path / "m")],
    ):
        result = runner.invoke(app, command, catch_exceptions=False)
        assert result.exit_code == 0, command
    assert "decode it with" in result.output
    assert WhisperForConditionalGeneration.from_pretrained(tmp_path / "m").generation_config.language == "en"


def test_a_last_step_that_breaks_the_weights_is_no_end(options, tmp_path):
    """Its loss was finite, for that is computed before the step."""
    run = tmp_path / "run"
    with pytest.raises(DivergedError, match="the last step left weights that are not finite; lower --lr"):
        train(options(run, max_steps=1, warmup=0.0, lr=1e38), console=QUIET)
    assert not (run / "adapter").exists()
    assert not (run / "summary.json").exists()


def test_one_weight_that_is_not_finite_is_no_end_either(options, tmp_path, monkeypatch):
    def broken(self, **given):
        torch.nn.init.constant_(next(weight for weight in self.model.parameters() if weight.requires_grad), torch.inf)

    monkeypatch.setattr(fitting.SpeechTrainer, "train", broken)
    with pytest.raises(DivergedError, match="the last step left weights that are not finite"):
        train(options(tmp_path / "run"), console=QUIET)
    assert not (tmp_path / "run" / "adapter").exists()
