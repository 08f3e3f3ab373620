"""Whole runs on a tiny Whisper: train, resume after a kill, evaluate, transcribe, merge, and how bad input ends."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import soundfile
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import WhisperForConditionalGeneration
from typer.testing import CliRunner

from fused_s2lora import S2LoraConfig
from fused_s2lora.training import models
from fused_s2lora.training import train as train_module
from fused_s2lora.training.audio_window import AudioWindow
from fused_s2lora.training.cli import app
from fused_s2lora.training.errors import UserError
from fused_s2lora.training.evaluate import evaluate
from fused_s2lora.training.evaluation import read_evaluation
from fused_s2lora.training.merge import merge
from fused_s2lora.training.models import load_adapter, load_base, remembered_speech
from fused_s2lora.training.options import TrainOptions
from fused_s2lora.training.run import RunFolder
from fused_s2lora.training.train import named_sets, train
from fused_s2lora.training.transcribe import transcribe
from tests.training.speech import TEXTS, tone, write_folder

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def speech(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("speech"))


@pytest.fixture(scope="module")
def short_decoding():
    """Untrained models never stop by themselves: few tokens are enough here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fused_s2lora.training.evaluation.MAX_NEW_TOKENS", 4)
        yield


@pytest.fixture(scope="module")
def options(tiny_folder, speech):
    """Options of a quick run; fields can be given."""

    def make(output: Path, **fields) -> TrainOptions:
        quick = {
            "model": str(tiny_folder),
            "data": [str(speech)],
            "window": "trim",
            "precision": "fp32",
            "batch_size": 2,
            "epochs": 2.0,
            "save_steps": 2,
            "logging_steps": 1,
        }
        return TrainOptions(output=str(output), **{**quick, **fields})

    return make


@pytest.fixture(scope="module")
def finished(options, speech, short_decoding, tmp_path_factory) -> Path:
    """The folder of a finished run with a test set."""
    output = tmp_path_factory.mktemp("finished") / "run"
    train(options(output, test=[f"same={speech}"], group_by=["age"]), console=QUIET)
    return output


def adapter_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


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
        assert entry["loss"] == pytest.approx(entry["cross_entropy"] + entry["sparsity"] + entry["norm"], abs=2e-4)
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


def test_finished_run_is_not_done_again(finished, options, speech, monkeypatch):
    monkeypatch.setattr(train_module, "_train", lambda *args: pytest.fail("trained again"))
    monkeypatch.setattr(train_module, "evaluate_sets", lambda *args, **kwargs: pytest.fail("scored again"))
    evaluations = train(options(finished, test=[f"same={speech}"], group_by=["speaker"]), console=QUIET)
    assert list(evaluations[1].sets[0].rates) == ["all", "speaker s0", "speaker s1", "speaker s2"]


def test_results_of_another_source_or_language_are_not_taken_over(finished, speech, tmp_path):
    def kept(name: str) -> bool:
        sets = named_sets([name], "en")
        return read_evaluation(finished / "after", "after", sets, ()) is not None

    other = write_folder(tmp_path / "noisy")  # the same file names
    assert kept(f"same={speech}")
    assert not kept(f"same={other}")
    assert not kept(f"same={speech}@de")
    assert not kept(f"another={speech}")


def test_a_group_without_words_does_not_lose_the_evaluation(tmp_path, tiny_folder, short_decoding):
    folder = write_folder(tmp_path / "speech", ("WE CALL IT BEAR", "UM HMM", "THE SUN IS UP"))
    console = Console(record=True, width=200)
    (result,) = evaluate(
        named_sets([f"t={folder}"], "en"), tmp_path / "out", model=str(tiny_folder), precision="fp32",
        group_by=["speaker"], console=console,
    ).sets  # fmt: skip
    assert list(result.rates) == ["all", "speaker s0", "speaker s2"]
    assert result.wordless == ["speaker s1"]
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert written["sets"]["t"]["groups_without_words"] == ["speaker s1"]
    nothing = write_folder(tmp_path / "nothing", ("UM", "HMM"))
    with pytest.raises(UserError, match="no transcript has a word left"):
        evaluate(named_sets([f"t={nothing}"], "en"), tmp_path / "no", model=str(tiny_folder), console=QUIET)


def test_overlong_development_transcripts_are_skipped(options, tmp_path):
    dev = write_folder(tmp_path / "dev", ("GO HOME NOW", "AGAIN AND " * 300))
    train(options(tmp_path / "run", dev=str(dev), max_steps=2), console=QUIET)
    assert "Whisper takes 448; split it" in (tmp_path / "run" / "skipped.tsv").read_text()


def test_test_sets_in_a_path_with_an_at_sign(tmp_path):
    folder = write_folder(tmp_path / "me@home" / "speech", TEXTS[:2])
    sets = named_sets([f"a={folder}", f"b={folder}@de"], "en")
    assert [test.language for test in sets.values()] == ["en", "de"]


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


def test_killed_run_ends_as_an_uninterrupted_one(options, tiny_folder, speech, tmp_path, monkeypatch):
    monkeypatch.setenv("S2LORA_BACKEND", "merged")  # the same in a process that has not these tests' fixtures
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(options(whole, epochs=8.0, save_steps=3), console=QUIET)
    command = [
        sys.executable, "-c", "from fused_s2lora.training.cli import main; main()", "train",
        "--model", tiny_folder, "--data", speech, "--window", "trim", "--precision", "fp32", "--batch-size", "2",
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


def test_half_written_checkpoint_is_passed_over(options, tmp_path, capsys):
    run = RunFolder(options(tmp_path / "run"))
    for step in (2, 4):
        (run.checkpoints / f"checkpoint-{step}").mkdir(parents=True)
    (run.checkpoints / "checkpoint-2" / "trainer_state.json").write_text("{}")
    assert run.last_checkpoint() == run.checkpoints / "checkpoint-2"
    assert "checkpoint-4: not written to its end" in capsys.readouterr().err
    assert not (run.checkpoints / "checkpoint-4").exists()


def test_loss_that_is_not_finite_stops_the_run(options, tmp_path, monkeypatch):
    def broken(self, waveforms, frames):
        return torch.full((len(waveforms), 80, frames), torch.nan)

    monkeypatch.setattr("fused_s2lora.training.trainer.LogMel.forward", broken)
    with pytest.raises(UserError, match="the loss is nan at step 1; lower --lr"):
        train(options(tmp_path / "run", dev_share=0.0), console=QUIET)
    assert not (tmp_path / "run" / "adapter").exists()


def test_best_checkpoint_and_early_stopping(options, speech, tmp_path):
    run = tmp_path / "run"
    train(
        options(run, dev=str(speech), early_stopping=1, lr=5.0, warmup=0.0, epochs=20.0, save_steps=1),
        console=QUIET,
    )
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] < 60
    losses = [entry["eval_loss"] for entry in json.loads((run / "metrics.json").read_text()) if "eval_loss" in entry]
    assert len(losses) >= 2


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


def test_a_share_of_the_update_is_kept(options, tmp_path):
    """The adapter that is saved is `interpolation` times the one that was trained."""
    found = {}
    for name, given in {"whole": {}, "little": {"interpolation": 0.1}}.items():
        train(options(tmp_path / name, max_steps=3, **given), console=QUIET)
        found[name] = load_file(tmp_path / name / "adapter" / "adapter_model.safetensors")
    coefficients = [name for name in found["whole"] if "coefficients" in name]
    assert all(found["whole"][name].abs().max() > 0 for name in coefficients)
    for name, value in found["whole"].items():
        torch.testing.assert_close(found["little"][name], (0.1 if name in coefficients else 1) * value, msg=name)


def test_evaluate_transcribe_and_merge_use_what_training_used(
    finished, tiny_folder, speech, tmp_path, monkeypatch, short_decoding
):
    windows = []
    real = AudioWindow.mel_frames
    monkeypatch.setattr(AudioWindow, "mel_frames", lambda self, n: windows.append(self.mode) or real(self, n))
    adapter = str(finished / "adapter")
    sets = named_sets([f"same={speech}"], "en")
    evaluation = evaluate(
        sets, tmp_path / "out", model=str(tiny_folder), adapter=adapter, precision="fp32", console=QUIET
    )
    expected = [line.split("\t") for line in (finished / "after" / "same.tsv").read_text().splitlines()[1:]]
    assert "trim" in windows
    assert evaluation.sets[0].hypotheses == [row[5] for row in expected]
    transcripts, skipped = transcribe(
        [speech], model=str(tiny_folder), adapter=adapter, precision="fp32", output=tmp_path / "texts.tsv"
    )
    assert [transcript.text for transcript in transcripts] == evaluation.sets[0].hypotheses
    assert not skipped
    assert len((tmp_path / "texts.tsv").read_text().splitlines()) == 1 + len(TEXTS)
    assert merge(adapter, tmp_path / "merged", model=str(tiny_folder))["audio_window"] == "trim"
    merged = evaluate(
        sets, tmp_path / "again", model=str(tmp_path / "merged"), window="trim", precision="fp32", console=QUIET
    )
    assert merged.sets[0].hypotheses == evaluation.sets[0].hypotheses
    with pytest.raises(UserError, match="exists already"):
        merge(adapter, tmp_path / "merged", model=str(tiny_folder))


def test_command_line_from_end_to_end(tiny_folder, speech, tmp_path, monkeypatch, short_decoding):
    runner = CliRunner()
    common = ["--model", str(tiny_folder), "--precision", "fp32"]
    run = tmp_path / "run"
    arguments = ["train", *common, "--data", str(speech), "--test", f"t={speech}@en", "--window", "trim"]
    result = runner.invoke(app, [*arguments, "--max-steps", "2", "--output", str(run)], catch_exceptions=False)
    assert result.exit_code == 0
    adapter = ["--adapter", str(run / "adapter")]
    for command in (
        ["evaluate", *common, *adapter, "--test", f"t={speech}", "--output", str(tmp_path / "e"), "--group-by", "age"],
        ["transcribe", *common, *adapter, "--margin", "8", str(speech / "u0.flac")],
        ["transcribe", *common, *adapter, str(speech / "u0.flac")],
        ["merge", "--model", str(tiny_folder), str(run / "adapter"), str(tmp_path / "m")],
    ):
        result = runner.invoke(app, command, catch_exceptions=False)
        assert result.exit_code == 0, command
    assert "decode it with" in result.output
    assert WhisperForConditionalGeneration.from_pretrained(tmp_path / "m").generation_config.language == "en"


def test_an_adapter_says_its_language(finished, tiny_folder, speech, tmp_path, short_decoding, monkeypatch):
    """From a folder, and from the hub, whose download stands here for it."""
    adapter = tmp_path / "adapter"
    shutil.copytree(finished / "adapter", adapter)
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"language": "sw"}))
    arguments = ["--model", str(tiny_folder), "--precision", "fp32", "--test", f"t={speech}"]
    for given, expected in (([], "sw"), (["--language", "de"], "de")):
        command = ["evaluate", *arguments, *given, "--adapter", str(adapter), "--output", str(tmp_path / expected)]
        assert CliRunner().invoke(app, command, catch_exceptions=False).exit_code == 0
        written = json.loads((tmp_path / expected / "results.json").read_text())
        assert written["sets"]["t"]["language"] == expected
    monkeypatch.setattr(models, "hf_hub_download", lambda repository, name: str(adapter / name))
    assert remembered_speech("user/adapter")["language"] == "sw"


def s2lora(*arguments, **environment) -> subprocess.CompletedProcess:
    code = "from fused_s2lora.training.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
    )


def test_bad_input_is_one_sentence_and_status_2(tmp_path):
    result = s2lora("train", "--data", tmp_path / "nowhere", "--output", tmp_path / "run")
    assert result.returncode == 2
    (line,) = [line for line in result.stderr.splitlines() if line.strip()]
    assert line.startswith(f"error: {tmp_path}/nowhere: no such folder or file")
    assert "Traceback" not in result.stdout + result.stderr


@pytest.mark.parametrize("command", ["train", "evaluate", "transcribe", "merge", "demo"])
def test_every_option_has_help(command):
    import typer

    click_command = typer.main.get_command(app).commands[command]
    assert click_command.help
    for parameter in click_command.params:
        assert getattr(parameter, "help", None), f"{command} {parameter.name}"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data": []}, "no training data"),
        ({"language": "klingon"}, "language 'klingon'"),
        ({"task": "sing"}, "--task 'sing'"),
        ({"precision": "int8"}, "--precision 'int8'"),
        ({"rank": 0}, "--rank is 0; give at least 1"),
        ({"window": "short"}, "audio window 'short'"),
        ({"full_share": 1.5}, "--full-share is 1.5"),
        ({"dev": "a", "dev_share": 0.1}, "exclude each other"),
        ({"early_stopping": 2}, "needs a development set"),
        ({"lr": 0.0}, "--lr is 0.0"),
        ({"interpolation": 1.5}, "--interpolation is 1.5; give a share above 0, at most 1"),
        ({"method": "bitfit", "interpolation": 0.5}, "--interpolation goes with --method s2lora, .*, not bitfit"),
        ({"exclude_modules": "*decoder*"}, r"--exclude-modules '\*decoder\*' is no regular expression"),
        ({"method": "lora", "exclude_modules": "x"}, "--exclude-modules goes with --method s2lora, not lora"),
        ({"method": "magic"}, "--method 'magic' is not one of s2lora, lora"),
        ({"preset": "best"}, "--preset 'best'"),
        ({"sharing": "some"}, "sharing='some'"),
        ({"target_modules": ["missing"]}, "--target-modules: .*missing"),
        ({"rank": 300}, "r=300 is not between 1 and 256"),
        ({"group_by": ["town"], "test": ["SPEECH"]}, "no test set has a column 'town' to group by; there is age"),
        ({"test": ["a=SPEECH", "a=SPEECH"]}, "two test sets are named 'a'"),
        ({"dev_share": 0.01}, r"too few to hold out 1%"),
        ({"model": "NOWHERE"}, "not to be had as a Whisper model"),
        ({"text_column": "words"}, "no column 'words'"),
    ],
    ids=str,
)
def test_bad_options(options, speech, tmp_path, fields, message, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if "test" in fields:
        fields = fields | {"test": [name.replace("SPEECH", str(speech)) for name in fields["test"]]}
    with pytest.raises(UserError, match=message):
        train(options(tmp_path / "run", **fields), console=QUIET)


def test_bad_models(tiny_folder, tmp_path):
    shutil.copytree(tiny_folder, tmp_path / "bert")
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match="a bert model; give a Whisper"):
        load_base(str(tmp_path / "bert"))
    shutil.copytree(tiny_folder, tmp_path / "damaged")
    (tmp_path / "damaged" / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match="damaged: not to be had as a Whisper model"):
        load_base(str(tmp_path / "damaged"))
    shutil.copytree(tiny_folder, tmp_path / "old")
    (tmp_path / "old" / "generation_config.json").unlink()
    with pytest.raises(UserError, match=r"its generation_config\.json knows no languages"):
        load_base(str(tmp_path / "old"))


def test_bad_adapters(finished, tiny_folder, tmp_path, tiny_whisper):
    model, _ = load_base(str(tiny_folder))
    with pytest.raises(UserError, match=r"no adapter_config\.json in it; give the `adapter` folder"):
        load_adapter(model, finished)
    with pytest.raises(UserError, match=r"cannot be put on this model.*does not fit this model"):
        load_adapter(tiny_whisper(d_model=48, encoder_ffn_dim=96, decoder_ffn_dim=96), finished / "adapter")
    for name in ("rank", "damaged", "missing", "config"):
        shutil.copytree(finished / "adapter", tmp_path / name)
    config = json.loads((tmp_path / "rank" / "adapter_config.json").read_text())
    (tmp_path / "rank" / "adapter_config.json").write_text(json.dumps(config | {"r": 4}))
    with pytest.raises(UserError, match=r"is \(8,\) in the file and \(4,\) here"):
        load_adapter(load_base(str(tiny_folder))[0], tmp_path / "rank")
    file = tmp_path / "damaged" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"adapter_model\.safetensors is damaged"):
        load_adapter(load_base(str(tiny_folder))[0], tmp_path / "damaged")
    tensors = adapter_of(finished)
    tensors.pop(next(iter(tensors)))
    save_file(tensors, tmp_path / "missing" / "adapter_model.safetensors")
    with pytest.raises(UserError, match="it lacks"):
        load_adapter(load_base(str(tiny_folder))[0], tmp_path / "missing")
    (tmp_path / "config" / "adapter_config.json").write_text("{not json")
    with pytest.raises(UserError, match="not readable as JSON"):
        remembered_speech(tmp_path / "config")


def test_run_folder_of_other_options_or_files(options, finished, speech, tmp_path):
    with pytest.raises(UserError, match=r"holds a run with epochs = 2\.0, not 3\.0; give another --output, or --fresh"):
        train(options(finished, epochs=3.0), console=QUIET)
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(UserError, match="holds other files"):
        train(options(tmp_path), console=QUIET)
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "whisper"}')
    with pytest.raises(UserError, match="holds other files"):
        train(options(model), fresh=True, console=QUIET)
    assert (model / "config.json").is_file()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the run there"):
        train(options(tmp_path / "file"), console=QUIET)


def test_transcribe_refuses_and_skips(tiny_folder, tmp_path, short_decoding):
    soundfile.write(tmp_path / "good.wav", tone(0.4), 16_000)
    soundfile.write(tmp_path / "long.wav", tone(31.0, 8000), 8000)
    soundfile.write(tmp_path / "nothing.wav", tone(0.0), 16_000)
    (tmp_path / "bad.mp3").write_bytes(b"no audio")
    transcripts, skipped = transcribe([tmp_path], model=str(tiny_folder), language="en")
    assert [transcript.file.name for transcript in transcripts] == ["good.wav"]
    assert sorted(Path(item.utterance).name for item in skipped) == ["bad.mp3", "long.wav", "nothing.wav"]
    with pytest.raises(UserError, match=r"bad\.mp3: not readable as audio"):
        transcribe([tmp_path], model=str(tiny_folder), strict=True)
    with pytest.raises(UserError, match="none of the 1 audio files is usable"):
        transcribe([tmp_path / "bad.mp3"], model=str(tiny_folder))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no audio in"):
        transcribe([tmp_path / "empty"], model=str(tiny_folder))


def test_english_only_model_takes_english_only(tiny_folder, tmp_path, options):
    shutil.copytree(tiny_folder, tmp_path / "en")
    config = json.loads((tmp_path / "en" / "generation_config.json").read_text())
    config["is_multilingual"] = False
    (tmp_path / "en" / "generation_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="'zh' on an English-only model"):
        train(options(tmp_path / "run", model=str(tmp_path / "en"), language="zh"), console=QUIET)
    train(options(tmp_path / "ok", model=str(tmp_path / "en"), max_steps=1), console=QUIET)
    assert (tmp_path / "ok" / "adapter" / "adapter_model.safetensors").is_file()
