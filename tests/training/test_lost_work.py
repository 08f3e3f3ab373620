"""Work that is not lost, nor mixed with other: full disks, what was stopped, what has changed meanwhile."""

import errno
import json
import shutil

import pytest
import soundfile
import torch

from fused_s2lora.training import decoding as decoding_module
from fused_s2lora.training import evaluation as evaluation_module
from fused_s2lora.training import fitting
from fused_s2lora.training import interpolate as interpolate_module
from fused_s2lora.training import merge as merge_module
from fused_s2lora.training import train as train_module
from fused_s2lora.training import transcribe as transcribe_module
from fused_s2lora.training.audio import read_audio
from fused_s2lora.training.decoding import Decoding, Heard
from fused_s2lora.training.errors import UserError
from fused_s2lora.training.evaluate import evaluate
from fused_s2lora.training.interpolate import interpolate_run
from fused_s2lora.training.merge import merge
from fused_s2lora.training.output import read_json, write_json, writing
from fused_s2lora.training.run import RunFolder
from fused_s2lora.training.sets import named_sets
from fused_s2lora.training.train import train
from fused_s2lora.training.transcribe import transcribe
from tests.training.comparisons import QUIET
from tests.training.kills import train_until
from tests.training.speech import TEXTS, tone, write_folder

FULL = [
    OSError(errno.ENOSPC, "No space left on device"),
    Exception("No space left on device (os error 28)"),  # of tokenizers
    RuntimeError("[enforce fail at inline_container.cc:867] . PytorchStreamWriter failed writing file data/1"),
    RuntimeError("basic_ios::clear: iostream error"),  # of the same, at the end of a file
]


@pytest.mark.parametrize("error", FULL, ids=lambda error: type(error).__name__)
def test_a_full_disk_is_one_sentence(tmp_path, error):
    with pytest.raises(UserError, match=r"run: cannot be written \(.*\); give another --output"), writing("run"):
        raise error
    with pytest.raises(RuntimeError, match="something else"), writing(tmp_path):
        raise RuntimeError("something else")


def test_a_disk_that_fills_up_in_training_is_told(options, tmp_path, monkeypatch):
    def save(*args, **kwargs):
        raise FULL[2]

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(UserError, match=r"run: cannot be written \(is the disk full\?\)"):
        train(options(tmp_path / "run"), console=QUIET)


@pytest.mark.parametrize(
    ("module", "write"),
    [
        (fitting, "remember_speech"), (fitting, "write_rank_maps"), (train_module, "evaluate_sets"),
        (train_module, "write_model_card"),
    ],
)  # fmt: skip
def test_a_disk_that_fills_up_after_training_is_told_and_the_run_goes_on(
    module, write, options, tones, tmp_path, monkeypatch
):
    def full(*args, **kwargs):
        raise FULL[0]

    monkeypatch.setattr(evaluation_module, "transcribe_speech", lambda *given, **named: [Heard("", True)] * len(TEXTS))
    wanted = options(tmp_path / "run", before=False, test=[f"same={tones}"], max_steps=2)
    with monkeypatch.context() as patch:
        patch.setattr(module, write, full)
        with pytest.raises(UserError, match=r"run: cannot be written \(No space left on device\); give another"):
            train(wanted, console=QUIET)
    (scored,) = train(wanted, console=QUIET)
    assert len(scored.sets[0].heard) == len(TEXTS)


@pytest.mark.parametrize("given", ["data", "dev", "test"])
def test_speech_in_its_folder_is_not_deleted_with_a_run(given, finished, options, tones, tmp_path):
    """A table that was heard with the run's adapter, say, and corrected by hand."""
    shutil.copytree(finished, tmp_path / "run")
    speech = str(write_folder(tmp_path / "run" / "corrected"))
    wanted = {"data": {"data": [str(tones), speech]}, "dev": {"dev": speech}, "test": {"test": [f"it={speech}@en"]}}
    with pytest.raises(UserError, match=r"run: --fresh would delete .*corrected with it; move that elsewhere"):
        train(options(tmp_path / "run", **wanted[given]), fresh=True, console=QUIET)
    assert (tmp_path / "run" / "corrected" / "metadata.csv").is_file()


@pytest.mark.parametrize("fresh", [False, True])
def test_a_run_is_one_process_at_a_time(fresh, options, tmp_path, monkeypatch):
    """Two would delete each other's checkpoints."""
    wanted = options(tmp_path / "run", max_steps=2)
    with RunFolder(wanted).alone():
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(UserError, match="run: another process is at this run; wait for it, or give another"):
            train(wanted, fresh=fresh, console=QUIET)
        assert sorted(tmp_path.rglob("*")) == before

    def second(*given):  # while the first trains
        with pytest.raises(UserError, match="another process is at this run"):
            RunFolder(wanted, fresh=fresh)

    monkeypatch.setattr(fitting, "write_rank_maps", second)
    train(wanted, fresh=fresh, console=QUIET)
    assert not (tmp_path / "run" / ".alone").exists()


def test_a_table_is_one_process_at_a_time(tiny_folder, tmp_path, short_decoding, monkeypatch):
    """Two would append what both hear, and one that is finished first would be begun anew."""
    recordings, table = write_folder(tmp_path / "speech", TEXTS[:2]), tmp_path / "heard.tsv"
    options = {"model": str(tiny_folder), "language": "en", "window": "trim", "decode_once": True}
    refused = []

    def reading(entry):  # while the first hears it
        monkeypatch.setattr(decoding_module, "read_audio", read_audio)
        with pytest.raises(UserError, match=r"heard\.tsv: another process is writing it; wait for it, or give another"):
            transcribe([recordings], output=table, **options)
        refused.append(entry)
        return read_audio(entry)

    monkeypatch.setattr(decoding_module, "read_audio", reading)
    transcribe([recordings / "u0.flac"], output=table, **options)
    assert (len(refused), len(table.read_text().splitlines())) == (1, 2)

    finished = tmp_path / "other.tsv"
    finished.with_name("other.tsv.unfinished").touch()

    def finish(table):  # after the second has looked
        finished.with_name("other.tsv.unfinished").unlink()
        finished.write_text("finished meanwhile\n")

    monkeypatch.setattr(transcribe_module, "check_writable", finish)
    with pytest.raises(UserError, match=r"other\.tsv: exists already, and was finished"):
        transcribe([recordings], output=finished, **options)
    assert finished.read_text() == "finished meanwhile\n"
    assert {*tmp_path.iterdir()} == {recordings, table, finished}


def test_an_evaluation_is_one_process_at_a_time(tiny_folder, tmp_path, monkeypatch):
    """Else evaluation.json would tell of one model and results.json of another."""
    sets = named_sets([f"same={write_folder(tmp_path / 'same', TEXTS[:2])}"], "en")
    output = tmp_path / "scored"
    options = {"model": str(tiny_folder), "console": QUIET}

    def heard(*given, **named):  # while the first decodes
        monkeypatch.setattr(evaluation_module, "transcribe_speech", lambda *given, **named: [Heard("", True)] * 2)
        before = (output / "evaluation.json").read_bytes()
        with pytest.raises(UserError, match="scored: another process is at this evaluation; wait for it, or"):
            evaluate(sets, output, decoding=Decoding(beams=2), **options)
        assert (output / "evaluation.json").read_bytes() == before
        return [Heard("", True)] * 2

    monkeypatch.setattr(evaluation_module, "transcribe_speech", heard)
    evaluate(sets, output, **options)
    assert sorted(file.name for file in output.iterdir()) == ["evaluation.json", "results.json", "same.tsv"]


@pytest.mark.parametrize(
    ("stopped_by", "raised", "told"),
    [
        (FULL[1], UserError, r"new: cannot be written .*; give another (OUTPUT|--output)"),
        (KeyboardInterrupt(), None, ""),
    ],
    ids=["full", "Ctrl-C"],
)
@pytest.mark.parametrize("module", [merge_module, interpolate_module])
def test_half_a_model_or_adapter_is_not_left(module, stopped_by, raised, told, finished, tmp_path, monkeypatch):
    def stop(*args):
        raise stopped_by

    def write():
        if module is merge_module:
            merge(str(finished / "adapter"), tmp_path / "new")
        else:
            interpolate_run(finished, 0.5, tmp_path / "new")

    with monkeypatch.context() as patch:
        patch.setattr(module, "save_processor" if module is merge_module else "write_model_card", stop)
        with pytest.raises(raised or KeyboardInterrupt, match=told):
            write()
    assert not (tmp_path / "new").exists()
    write()


@pytest.fixture
def scored(finished, tiny_folder, tmp_path, monkeypatch):
    """`evaluate` on two sets, in one of which an utterance is missing, and the number of utterances heard each time."""
    for name in ("one", "two"):
        write_folder(tmp_path / name)
    (tmp_path / "two" / "u1.flac").unlink()
    heard: list[int] = []

    def transcribe(model, processor, audio, **given):
        heard.append(len(list(audio)))
        if stop and len(heard) == 2:
            raise KeyboardInterrupt
        return [Heard("HELLO", True)] * heard[-1]

    monkeypatch.setattr(evaluation_module, "transcribe_speech", transcribe)
    stop = [True]

    def run(**changed):
        heard.clear()
        sets = named_sets([f"{name}={tmp_path / name}" for name in ("one", "two")], "en")
        options = {"model": str(tiny_folder), "adapter": str(finished / "adapter"), "precision": "fp32"} | changed
        try:
            evaluate(sets, tmp_path / "scored", console=QUIET, **options)
        finally:
            stop.clear()
        return list(heard)

    return run


def test_an_evaluation_that_was_stopped_goes_on_and_says_what_it_is_of(scored, tiny_folder, tmp_path):
    folder, few = tmp_path / "scored", len(TEXTS) - 1
    with pytest.raises(KeyboardInterrupt):
        scored()
    assert scored() == [few]
    assert list(json.loads((folder / "results.json").read_text())["sets"]) == ["one", "two"]
    said = json.loads((folder / "evaluation.json").read_text())
    assert [item["utterance"] for item in said["skipped"]] == ["u1.flac"]
    assert said["model"][0] == str(tiny_folder)
    assert said["adapter"][0].endswith("adapter")
    assert (said["window"], said["decoding"]) == ({"mode": "trim", "margin": 64}, {"beams": 1, "once": False})
    assert {"task", "precision", "command", "versions"} <= said.keys()
    assert scored() == []


def test_an_evaluation_leaves_other_files_alone(scored, tmp_path):
    """Tables of sets that it does not have are deleted from an evaluation's folder."""
    (tmp_path / "scored").mkdir()
    (tmp_path / "scored" / "train.tsv").write_text("mine")
    with pytest.raises(UserError, match="scored: the folder holds other files; give an empty --output"):
        scored()
    assert [file.name for file in (tmp_path / "scored").iterdir()] == ["train.tsv"]


@pytest.mark.parametrize("changed", [{"adapter": None}, {"decoding": Decoding(2)}, {"window": "full"}, {"margin": 8}])
def test_an_evaluation_of_something_else_begins_anew(scored, changed):
    with pytest.raises(KeyboardInterrupt):
        scored()
    scored()
    assert scored(**changed) == [len(TEXTS), len(TEXTS) - 1]


def test_an_evaluation_hears_recordings_of_another_length_again(scored, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        scored()
    scored()
    soundfile.write(tmp_path / "one" / "u2.flac", tone(3.0), 16_000)
    assert scored() == [len(TEXTS)]


def refused_while_changed(asked, file, other: bytes, what: str) -> None:
    """Of a stopped run, and of a finished one; in between it goes on with the file as it was."""
    right = file.read_bytes()
    refusal = pytest.raises(UserError, match=f"run: was begun with other {what}; restore them, give another")
    train_until(3, asked)
    file.write_bytes(other)
    with refusal:
        train(asked, console=QUIET)
    file.write_bytes(right)
    train(asked, console=QUIET)
    file.write_bytes(other)
    with refusal:
        train(asked, console=QUIET)


def test_a_run_does_not_go_on_with_other_transcripts(options, tmp_path):
    data = write_folder(tmp_path / "speech")
    asked = options(tmp_path / "run", data=[str(data)])
    table = data / "metadata.csv"
    other = table.read_bytes().replace(TEXTS[0].encode(), b"SOMETHING ELSE")
    refused_while_changed(asked, table, other, "utterances or transcripts")
    train(asked, fresh=True, console=QUIET)


def test_a_run_does_not_go_on_with_other_recordings(options, tmp_path):
    """As long as they were, as after denoising."""
    data = write_folder(tmp_path / "speech")
    asked = options(tmp_path / "run", data=[str(data)])
    samples, rate = soundfile.read(data / "u1.flac", dtype="int16")
    soundfile.write(tmp_path / "other.flac", samples // 2, rate)
    refused_while_changed(asked, data / "u1.flac", (tmp_path / "other.flac").read_bytes(), "recordings")
    noted = tmp_path / "run" / "speech.json"
    write_json(noted, {"sha256": read_json(noted)["sha256"]})  # as before recordings were noted
    train(asked, console=QUIET)
