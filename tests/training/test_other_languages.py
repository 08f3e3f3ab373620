"""Other languages kept: what is asked, what is trained on, and what a run does with it."""

import functools
import json

import datasets
import pytest
import torch

from fused_s2lora.training import fitting, other_languages, trainer
from fused_s2lora.training import train as train_module
from fused_s2lora.training.audio import read_audio
from fused_s2lora.training.audio_window import AudioWindow
from fused_s2lora.training.collate import ANSWER_TOKENS, IGNORED, SpeechCollator
from fused_s2lora.training.data import load_speech
from fused_s2lora.training.decoding import transcribe_speech
from fused_s2lora.training.errors import UserError
from fused_s2lora.training.features import LogMel
from fused_s2lora.training.models import load_base
from fused_s2lora.training.options import TrainOptions
from fused_s2lora.training.other_languages import LARGEST_LANGUAGES, with_answers
from tests.training.comparisons import QUIET
from tests.training.ranks import run_ranks
from tests.training.speech import TEXTS, write_folder


@pytest.fixture
def heard(monkeypatch):
    """What was asked, as (language, utterances), and answers that name their language."""
    asked = []

    def answer(model, processor, audio, language, dtype):
        asked.append((language, len(audio)))
        texts = ["" if language == "ko" else f"{language} {entry['path'][-4:]}" for entry in audio]
        return [{"text": text, "ids": [7], "tokens": [[7, 8]], "probabilities": [[0.75, 0.25]]} for text in texts]

    monkeypatch.setattr(other_languages, "_answers", answer)
    return asked


def test_a_share_is_asked_in_each_language_in_turn(tmp_path, heard):
    speech = load_speech(write_folder(tmp_path / "speech", TEXTS * 2))
    file = tmp_path / "answers.json"
    more, asked = with_answers(speech, None, None, share=0.5, languages=["de", "ko", "zh"], file=file, seed=1)
    assert asked == 6
    assert sorted(heard) == [(code, 2) for code in ("de", "ko", "zh")]
    assert more.dataset["target"][:12] == speech.dataset["target"][:]
    assert more.dataset["target_language"][:12] == [None] * 12
    added = more.dataset.select(range(12, len(more)))
    assert sorted(added["target_language"]) == ["de", "de", "zh", "zh"]  # nothing was heard in Korean
    assert all(row["target"].startswith(row["target_language"]) for row in added)
    assert added["answer_tokens"][:] == [[[7, 8]]] * 4
    assert added["answer_probabilities"][:] == [[[0.75, 0.25]]] * 4
    assert set(added["utterance"]) < set(speech.dataset["utterance"])
    assert len(set(added["utterance"])) == 4
    answers = json.loads(file.read_text())
    assert len(answers) == 6
    assert [answer["utterance"] for answer in answers if answer["text"]] == added["utterance"][:]
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

asked = []
def answer(model, processor, audio, language, dtype):
    asked.extend(audio)
    return [{"text": language, "ids": [7], "tokens": [[7]], "probabilities": [[1.0]]} for _ in audio]

other_languages._answers = answer
folder = Path(sys.argv[1])
more, count = other_languages.with_answers(
    load_speech(folder / "speech"), None, None, share=0.5, languages=["de", "zh"], file=folder / "answers.json"
)
rows = more.dataset.select(range(12, len(more)))
(folder / f"rank{os.environ['RANK']}.txt").write_text(f"{len(asked)} of {count}: {list(rows['utterance'])}")
"""
    run_ranks(code, tmp_path)
    first, second = ((tmp_path / f"rank{rank}.txt").read_text() for rank in range(2))
    assert first == second
    assert first.startswith("3 of 6: ")


def test_no_answer_no_row(tmp_path, heard):
    speech = load_speech(write_folder(tmp_path / "speech"))
    same, asked = with_answers(speech, None, None, share=0.5, languages=["ko"], file=tmp_path / "answers.json")
    assert (asked, len(same)) == (3, 6)
    assert [answer["text"] for answer in json.loads((tmp_path / "answers.json").read_text())] == [""] * 3


def test_metadata_named_like_an_answer_is_left_out(tmp_path, heard):
    folder = write_folder(tmp_path / "speech")
    table = folder / "metadata.csv"
    table.write_text(table.read_text().replace("speaker", "answer"))
    speech = load_speech(folder)
    assert "answer" in speech.dataset.column_names
    more, _ = with_answers(speech, None, None, share=0.5, languages=["de"], file=tmp_path / "answers.json")
    assert more.dataset["answer"][:6] == [None] * 6
    assert all(more.dataset["answer"][6:])


def test_a_saved_data_set_stays_as_it_is(tmp_path, heard):
    folder = write_folder(tmp_path / "speech")
    audio = [{"path": file.name, "bytes": file.read_bytes()} for file in sorted(folder.glob("*.flac"))]
    saved = datasets.Dataset.from_dict({"audio": audio, "text": TEXTS})
    saved.cast_column("audio", datasets.Audio(decode=False)).save_to_disk(tmp_path / "saved")
    there = sorted((tmp_path / "saved").iterdir())
    speech = load_speech(tmp_path / "saved")
    more, _ = with_answers(speech, None, None, share=0.5, languages=["de"], file=tmp_path / "answers.json")
    assert [read_audio(entry).shape for entry in more.audio()][6:] == [
        read_audio(speech.dataset[answer["row"]]["audio"]).shape
        for answer in json.loads((tmp_path / "answers.json").read_text())
    ]
    assert sorted((tmp_path / "saved").iterdir()) == there


def test_answers_of_other_speech_are_refused(tmp_path, heard):
    """A run that goes on when an audio file is missing that was there before."""
    folder = write_folder(tmp_path / "speech", TEXTS * 2)
    options = {"share": 0.25, "languages": ["de"], "file": tmp_path / "answers.json"}
    with_answers(load_speech(folder), None, None, **options)
    (folder / "u0.flac").unlink()
    with pytest.raises(UserError, match=r"answers\.json: was written when u\d+\.flac was utterance"):
        with_answers(load_speech(folder), None, None, **options)


@pytest.mark.parametrize("kept", ["answers-1-of-1.json", "answers-2-of-3.json"])
def test_asking_that_was_stopped_goes_on(kept, tmp_path, heard, monkeypatch):
    """Also where more processes had asked than go on, whose answers would be lost, and left beside the run's."""
    speech = load_speech(write_folder(tmp_path / "speech", TEXTS * 2))
    options = {"share": 0.5, "languages": ["de", "zh"], "file": tmp_path / "answers.json", "batch_size": 2}
    whole = with_answers(speech, None, None, **{**options, "file": tmp_path / "whole.json"})[0].dataset[:]
    answer, left = other_languages._answers, iter(range(2))

    def stopped(*operands):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return answer(*operands)

    monkeypatch.setattr(other_languages, "_answers", stopped)
    with pytest.raises(KeyboardInterrupt):
        with_answers(speech, None, None, **options)
    (tmp_path / "answers-1-of-1.json").rename(tmp_path / kept)
    heard.clear()
    monkeypatch.setattr(other_languages, "_answers", answer)
    assert with_answers(speech, None, None, **options)[0].dataset[:] == whole
    assert sum(count for _, count in heard) == 6 - 3  # of German two and one, then Chinese
    assert [file.name for file in tmp_path.glob("answers*")] == ["answers.json"]


@pytest.fixture(scope="module")
def base(packaged_base):
    """Whisper-base and its processor, set to English."""
    model, processor = load_base(str(packaged_base))
    processor.tokenizer.set_prefix_tokens(language="en", task="transcribe")
    return model, processor


def test_answers_are_what_the_model_transcribes(base, tmp_path):
    model, processor = base
    speech = load_speech(write_folder(tmp_path / "speech"))
    with_answers(speech, *base, share=0.5, languages=["de", "zh"], file=tmp_path / "answers.json", batch_size=2)
    answers = json.loads((tmp_path / "answers.json").read_text())
    assert answers
    for answer in answers:
        audio = speech.dataset.select([answer["row"]])["audio"][:]
        language, limit = answer["language"], ANSWER_TOKENS
        (heard,) = transcribe_speech(
            model, processor, audio, window=AudioWindow(), language=language, max_new_tokens=limit
        )
        assert answer["text"] == heard.text
        assert processor.tokenizer.decode(answer["ids"], skip_special_tokens=True).strip() == heard.text
        assert [candidates[0] for candidates in answer["tokens"]][1:] == answer["ids"][
            1:
        ]  # the first may be suppressed


def test_answers_are_begun_without_timestamps_whatever_the_model_is_saved_with(base, tmp_path, monkeypatch):
    speech = load_speech(write_folder(tmp_path / "speech"))
    answers = []
    for name, saved in {"plain": {}, "other": {"return_timestamps": True, "return_dict_in_generate": True}}.items():
        with monkeypatch.context() as patch:
            for option, value in saved.items():
                patch.setattr(base[0].generation_config, option, value)
            with_answers(speech, *base, share=0.5, languages=["de"], file=tmp_path / name)
        answers.append(json.loads((tmp_path / name).read_text()))
    assert answers[0] == answers[1] != []


@pytest.fixture
def answered(base, tmp_path, monkeypatch):
    """Six utterances, and two of them again with a long and a short answer in other languages."""
    answers = iter([["请问我一个", False], [" Ja", True]])

    def begun(model, tokenizer, encoded, language):
        text, ended = next(answers)
        return [tokenizer(text, add_special_tokens=False).input_ids + [tokenizer.eos_token_id] * ended]

    monkeypatch.setattr(other_languages, "_begun", begun)
    speech = load_speech(write_folder(tmp_path / "speech"))
    more, _ = with_answers(speech, *base, share=0.3, languages=["zh", "de"], file=tmp_path / "answers.json")
    assert len(more) == 8
    return more


def test_how_an_answer_begins_is_trained_on_under_its_own_language(base, answered):
    tokenizer = base[1].tokenizer
    start, time_stamps = tokenizer.convert_tokens_to_ids(["<|startoftranscript|>", "<|notimestamps|>"])
    batch = SpeechCollator(tokenizer, AudioWindow())(list(answered.dataset))
    assert batch["decoder_input_ids"].shape == batch["labels"].shape
    for read, write in zip(batch["decoder_input_ids"][:6].tolist(), batch["labels"][:6].tolist(), strict=True):
        written = [token for token in write if token != IGNORED]
        assert tokenizer.decode(written).startswith("<|en|><|transcribe|><|notimestamps|>")
        assert tokenizer.decode(written).endswith("<|endoftext|>")
        assert read[: len(written)] == [start, *written[:-1]]
    assert not batch["answer_probabilities"][:6].any()
    expected = {
        "请问我一个": ("zh", "请问我一个"),
        "Ja": ("de", " Ja<|endoftext|>"),
    }  # with its space, as it was written
    for index in (6, 7):
        language, beginning = expected.pop(answered.dataset[index]["target"])
        read, write = batch["decoder_input_ids"][index], batch["labels"][index]
        assert tokenizer.decode(read[:4]) == f"<|startoftranscript|><|{language}|><|transcribe|><|notimestamps|>"
        # Which language it is, and the answer itself, is not to be learnt as if it were right.
        assert write[write != IGNORED].tolist() == [read[2], time_stamps]
        answer = tokenizer(beginning, add_special_tokens=False).input_ids
        assert read[4 : 4 + len(answer) - 1].tolist() == answer[:-1]
        count = len(answer)
        assert torch.equal(batch["answer_probabilities"][index].sum(-1) > 0.99, torch.arange(ANSWER_TOKENS) < count)
        assert read[batch["answer_start"]] == time_stamps


def test_answers_are_the_models_own_distributions(base, answered):
    """The loss of the unadapted model is the entropy of its answers, and what lies beyond the candidates."""
    model, processor = base
    tokenizer = processor.tokenizer
    batch = SpeechCollator(tokenizer, AudioWindow())(list(answered.dataset.select([6, 7])))
    features = LogMel(processor.feature_extractor)(batch["waveforms"], batch["mel_frames"])
    with torch.no_grad():
        logits = model(input_features=features, decoder_input_ids=batch["decoder_input_ids"]).logits
    wanted = batch["answer_probabilities"]
    tokens = (batch["labels"] != IGNORED).sum() + (wanted.sum(-1) > 0).sum()
    entropy = -torch.special.xlogy(wanted, wanted).sum() / tokens
    loss = trainer._answer_loss(logits, batch)
    start = batch["answer_start"]
    written = logits[:, start : start + ANSWER_TOKENS].log_softmax(-1).gather(-1, batch["answer_tokens"])
    asked = wanted.sum(-1) > 0
    left_out = written.logsumexp(-1)[asked].sum() / tokens  # of the model's share beyond the candidates
    torch.testing.assert_close(loss, entropy - left_out, rtol=1e-3, atol=1e-3)
    shares = (written - written.logsumexp(-1, keepdim=True)).exp()
    torch.testing.assert_close(shares[asked], wanted[asked], rtol=1e-3, atol=1e-4)
    worse = trainer._answer_loss(logits.roll(1, 1), batch)
    assert worse > loss + 1


@pytest.fixture
def quick_run(options, tmp_path):
    return functools.partial(options, tmp_path / "run", epochs=1.0)


def test_a_run_keeps_other_languages(quick_run, heard, tmp_path):
    train_module.train(quick_run(keep_share=0.5, keep_languages=["German", "fr", "en"]), console=QUIET)
    assert [code for code, *_ in heard] == ["de", "fr"]  # English is what is trained
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["utterances"], summary["answers_in_other_languages"]) == (6, 3)
    assert summary["steps"] == 5
    answers = json.loads((tmp_path / "run" / "other_languages.json").read_text())
    assert sorted(answer["language"] for answer in answers) == ["de", "de", "fr"]


def test_what_is_asked_by_default_and_when_not(quick_run, heard, monkeypatch):
    monkeypatch.setattr(train_module, "fit", lambda *args: pytest.fail("enough"))
    with pytest.raises(BaseException, match="enough"):
        train_module.train(quick_run(keep_share=0.99, language="pt"), console=QUIET)
    assert {code for code, *_ in heard} == set(LARGEST_LANGUAGES[:7]) - {"pt"}
    heard.clear()
    with pytest.raises(BaseException, match="enough"):
        train_module.train(quick_run(keep_share=0.0), fresh=True, console=QUIET)
    assert not heard


@pytest.mark.parametrize("learnt", [True, False])
def test_a_run_learns_the_language_only_if_asked_to(learnt, quick_run, monkeypatch):
    collated = []

    class Spied(SpeechCollator):
        def __call__(self, rows):
            batch = super().__call__(rows)
            collated.append(batch["labels"][:, 0])
            return batch

    monkeypatch.setattr(fitting, "SpeechCollator", Spied)
    train_module.train(quick_run(learn_language=learnt, max_steps=1), console=QUIET)
    assert all((labels != IGNORED).all() if learnt else (labels == IGNORED).all() for labels in collated)
    assert collated


def test_bad_options_are_named():
    with pytest.raises(UserError, match="--keep-share is 1"):
        TrainOptions(data=["x"], output="y", keep_share=1)
    with pytest.raises(UserError, match="the language of the speech alone"):
        TrainOptions(data=["x"], output="y", language="de", keep_languages=["German"])
    with pytest.raises(UserError, match="'Elvish'"):
        TrainOptions(data=["x"], output="y", keep_languages=["Elvish"])
