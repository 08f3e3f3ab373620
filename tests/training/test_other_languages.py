"""Other languages kept: what is asked, what is trained on, and what a run does with it."""

import json
import os
import socket
import subprocess
import sys

import pytest
from rich.console import Console
from transformers import WhisperTokenizer

from fused_s2lora.training import other_languages
from fused_s2lora.training import train as train_module
from fused_s2lora.training.audio_window import AudioWindow
from fused_s2lora.training.collate import SpeechCollator
from fused_s2lora.training.data import load_speech
from fused_s2lora.training.errors import UserError
from fused_s2lora.training.evaluation import Heard
from fused_s2lora.training.options import TrainOptions
from fused_s2lora.training.other_languages import LARGEST_LANGUAGES, with_answers
from tests.training.speech import TEXTS, write_folder

QUIET = Console(quiet=True)


@pytest.fixture
def heard(monkeypatch):
    """What was asked, as (language, utterances, tokens at most, window), and answers that name their language."""
    asked = []

    def answer(model, processor, audio, *, window, language, max_new_tokens, **_):
        asked.append((language, len(audio), max_new_tokens, window.mode))
        return [Heard(f"{language}: {entry['path'][-4:]}", language != "ko") for entry in audio]

    monkeypatch.setattr(other_languages, "transcribe_speech", answer)
    return asked


def test_a_share_is_asked_in_each_language_in_turn(tmp_path, heard):
    speech = load_speech(write_folder(tmp_path / "speech", TEXTS * 2))
    file = tmp_path / "answers.json"
    more, asked = with_answers(speech, None, None, share=0.5, languages=["de", "ko", "zh"], file=file, seed=1)
    assert asked == 6
    assert sorted(heard) == [(code, 2, other_languages.MAX_ANSWER_TOKENS, "full") for code in ("de", "ko", "zh")]
    assert more.dataset["target"][:12] == speech.dataset["target"][:]
    assert more.dataset["target_language"][:12] == [None] * 12
    added = more.dataset.select(range(12, len(more)))
    assert sorted(added["target_language"]) == ["de", "de", "zh", "zh"]  # Korean never came to an end
    assert all(row["target"].startswith(row["target_language"]) for row in added)
    assert set(added["utterance"]) < set(speech.dataset["utterance"])
    assert len(set(added["utterance"])) == 4
    answers = json.loads(file.read_text())
    assert [answer["utterance"] for answer in answers] == added["utterance"][:]
    assert all(speech.dataset[answer["row"]]["utterance"] == answer["utterance"] for answer in answers)

    heard.clear()
    again, _ = with_answers(speech, None, None, share=0.5, languages=["de", "ko", "zh"], file=file, seed=1)
    assert not heard
    assert again.dataset[:] == more.dataset[:]
    other, _ = with_answers(speech, None, None, share=0.5, languages=["de"], file=tmp_path / "other.json", seed=2)
    assert set(other.dataset["utterance"][12:]) != set(added["utterance"])


def test_several_processes_share_the_asking(tmp_path):
    """Two ranks: each asks half, and both train on all answers, in the same order."""
    write_folder(tmp_path / "speech", TEXTS * 2)
    code = """
import os, sys
from pathlib import Path
from fused_s2lora.training import other_languages
from fused_s2lora.training.data import load_speech
from fused_s2lora.training.evaluation import Heard

asked = []
def answer(model, processor, audio, *, language, **_):
    asked.extend(audio)
    return [Heard(language, True) for _ in audio]

other_languages.transcribe_speech = answer
folder = Path(sys.argv[1])
more, count = other_languages.with_answers(
    load_speech(folder / "speech"), None, None, share=0.5, languages=["de", "zh"], file=folder / "answers.json"
)
rows = more.dataset.select(range(12, len(more)))
(folder / f"rank{os.environ['RANK']}.txt").write_text(f"{len(asked)} of {count}: {list(rows['utterance'])}")
"""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)],
            env={**os.environ, **world, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    first, second = ((tmp_path / f"rank{rank}.txt").read_text() for rank in range(2))
    assert first == second
    assert first.startswith("3 of 6: ")


def test_no_answer_no_row(tmp_path, heard):
    speech = load_speech(write_folder(tmp_path / "speech"))
    same, asked = with_answers(speech, None, None, share=0.5, languages=["ko"], file=tmp_path / "answers.json")
    assert (asked, len(same)) == (3, 6)
    assert json.loads((tmp_path / "answers.json").read_text()) == []


def test_an_answer_is_trained_on_under_its_own_language(tmp_path, heard, packaged_base):
    tokenizer = WhisperTokenizer.from_pretrained(packaged_base)
    tokenizer.set_prefix_tokens(language="en", task="transcribe")
    speech = load_speech(write_folder(tmp_path / "speech"))
    more, _ = with_answers(speech, None, None, share=0.2, languages=["zh"], file=tmp_path / "answers.json")
    labels = SpeechCollator(tokenizer, AudioWindow())(list(more.dataset))["labels"]
    texts = [tokenizer.decode([token for token in row if token != -100]) for row in labels.tolist()]
    assert all(text.startswith("<|en|><|transcribe|><|notimestamps|>") for text in texts[:6])
    assert texts[6].startswith("<|zh|><|transcribe|><|notimestamps|>zh: flac<|endoftext|>")


@pytest.fixture
def quick_run(tiny_folder, tmp_path):
    def options(**fields) -> TrainOptions:
        speech = tmp_path / "speech"
        if not speech.exists():
            write_folder(speech)
        quick = {"model": str(tiny_folder), "window": "trim", "precision": "fp32", "batch_size": 2}
        return TrainOptions(data=[str(speech)], output=str(tmp_path / "run"), **{**quick, **fields})

    return options


def test_a_run_keeps_other_languages(quick_run, heard, tmp_path):
    train_module.train(quick_run(keep_share=0.5, keep_languages=["German", "fr", "en"]), console=QUIET)
    assert [code for code, *_ in heard] == ["de", "fr"]  # English is what is trained
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["utterances"], summary["answers_in_other_languages"]) == (6, 3)
    assert summary["steps"] == 5
    answers = json.loads((tmp_path / "run" / "other_languages.json").read_text())
    assert sorted(answer["language"] for answer in answers) == ["de", "de", "fr"]


def test_what_is_asked_by_default_and_when_not(quick_run, heard, monkeypatch):
    monkeypatch.setattr(train_module, "_train", lambda *args: pytest.fail("enough"))
    with pytest.raises(BaseException, match="enough"):
        train_module.train(quick_run(keep_share=0.99, language="pt"), console=QUIET)
    assert {code for code, *_ in heard} == set(LARGEST_LANGUAGES[:7]) - {"pt"}
    heard.clear()
    for fields in ({"keep_share": 0.0}, {"keep_share": 0.5, "task": "translate"}):
        with pytest.raises(BaseException, match="enough"):
            train_module.train(quick_run(**fields), fresh=True, console=QUIET)
    assert not heard


def test_bad_options_are_named():
    with pytest.raises(UserError, match="--keep-share is 1"):
        TrainOptions(data=["x"], output="y", keep_share=1)
    with pytest.raises(UserError, match="the language of the speech alone"):
        TrainOptions(data=["x"], output="y", language="de", keep_languages=["German"])
    with pytest.raises(UserError, match="'Elvish'"):
        TrainOptions(data=["x"], output="y", keep_languages=["Elvish"])
