"""Speech that is checked and ready: its columns, what is skipped and why, and what is left of it on disk."""

import gc
import json
import math
import time
import unicodedata

import datasets
import numpy as np
import pyarrow
import pytest
import soundfile

from fused_s2lora.training.audio import read_audio
from fused_s2lora.training.data import Skipped, Speech, drop_overlong, in_threads, load_speech, speakers
from fused_s2lora.training.errors import UserError
from fused_s2lora.training.sets import _hold_out
from tests.training.speech import TEXTS, tone, write_folder, write_lines


@pytest.mark.parametrize("typed", [True, False])
@pytest.mark.parametrize("bad", [(), (3, 10)])
def test_audio_of_a_data_set_stays_on_disk(tmp_path, typed, bad):
    """A corpus of hundreds of hours takes no more memory than its transcripts."""
    soundfile.write(tmp_path / "one.wav", tone(10.0), 16_000)
    content = (tmp_path / "one.wav").read_bytes()
    audio = [{"bytes": content, "path": f"{index}.wav"} for index in range(64)]
    texts = ["" if index in bad else f"{index}." for index in range(64)]
    saved = datasets.Dataset.from_dict({"speech": audio, "text": texts})
    if typed:
        saved = saved.cast_column("speech", datasets.Audio())
    saved.save_to_disk(tmp_path / "saved")
    del saved
    gc.collect()
    before = pyarrow.total_allocated_bytes()
    speech = load_speech(tmp_path / "saved", audio_column="speech")
    rest, held = _hold_out(speech, 0.25, seed=0)
    rows = [*rest.dataset, *held.dataset]
    assert pyarrow.total_allocated_bytes() - before < 2 * len(content)
    assert len(rows) == 64 - len(bad)
    assert [item.utterance for item in speech.skipped] == [f"{index}.wav" for index in bad]
    assert sorted(int(row["text"][:-1]) for row in rows) == sorted({*range(64)} - {*bad})
    assert {len(read_audio(entry)) for entry in speech.audio()} == {160_000}
    first = load_speech(tmp_path / "saved", audio_column="speech", limit=5)
    assert first.dataset["text"][:] == [f"{index}." for index in range(5) if index not in bad]


def test_threads_keep_the_order_and_take_little_ahead():
    taken = []
    numbers = (taken.append(number) or number for number in range(10_000))
    found = in_threads(lambda number: time.sleep(0.001 * (number % 3)) or -number, numbers)
    assert [next(found) for _ in range(300)] == [-number for number in range(300)]
    assert len(taken) < 500


def test_audiofolder_becomes_sentence_case(tmp_path):
    speech = load_speech(write_folder(tmp_path))
    assert speech.dataset["text"][:] == list(TEXTS)
    assert speech.dataset["target"][0] == " We call it bear."
    assert speech.dataset["speaker"][:3] == ["s0", "s1", "s2"]
    assert speech.dataset["duration_s"][2] == pytest.approx(0.7)
    assert load_speech(tmp_path, keep_case=True).dataset["target"][0] == " WE CALL IT BEAR"
    assert load_speech(tmp_path, leading_space=False).dataset["target"][0] == "We call it bear."
    assert load_speech(tmp_path, language="tr").dataset["target"][-1] == " It ıs red."
    assert len(load_speech(tmp_path, limit=2)) == 2
    assert (speech.recased, load_speech(tmp_path, keep_case=True).recased) == (6, 0)


def test_columns_of_our_names_do_not_replace_ours(tmp_path):
    row = {
        "path": "one.wav",
        "sentence": "Right.",
        "duration_s": "x",
        "target": "wrong",
        "utterance": "?",
        "audio": "-",
    }
    manifest = write_lines(tmp_path, "list.jsonl", *(json.dumps(row | {"text": text}) for text in ("wrong", None)))
    speech = load_speech(manifest, text_column="sentence", audio_column="path")
    for row in speech.dataset:
        written = (row["text"], row["target"], row["utterance"], row["duration_s"])
        assert written == ("Right.", " Right.", "one.wav", 0.5)
        assert row["audio"]["path"] == str(tmp_path / "one.wav")
    ours = ["audio", "duration_s", "length_s", "offset_s", "target", "text", "utterance"]
    assert sorted(speech.dataset.column_names) == ours
    assert not speech.skipped


def test_utterances_in_folders_of_speakers_differ(tmp_path):
    manifest = write_lines(tmp_path, "list.csv", "path,text", "a/sx1.wav,A", "./b/sx1.wav,B", f"{tmp_path}/one.wav,C")
    for speaker in "ab":
        (tmp_path / speaker).mkdir()
        soundfile.write(tmp_path / speaker / "sx1.wav", tone(0.5), 16_000)
    assert load_speech(manifest).dataset["utterance"][:] == ["a/sx1.wav", "b/sx1.wav", "one.wav"]
    (tmp_path / "b" / "sx1.wav").write_bytes(b"no audio")
    assert [item.utterance for item in load_speech(manifest).skipped] == ["b/sx1.wav"]


def test_transcripts_that_are_no_text_or_no_unicode(tmp_path):
    lines = [
        '{"path": "one.wav", "text": 7}',
        '{"path": "\\uD83d.wav", "text": "a"}',
        '{"path": "two.wav", "text": "A."}',
    ]
    speech = load_speech(write_lines(tmp_path, "list.jsonl", *lines))
    assert speech.dataset["utterance"][:] == ["two.wav"]
    assert [item.reason for item in speech.skipped] == [
        "one.wav: its transcript is 7, not text; write it in quotation marks",
        "?.wav: half of a pair of \\u escapes stands alone in its line; write the character itself",
    ]
    whole = load_speech(write_lines(tmp_path, "list.jsonl", '{"path": "one.wav", "text": "\\ud83d\\ude00"}'))
    assert whole.dataset["text"][:] == ["😀"]


def test_sources_of_different_columns_can_be_joined(tmp_path, monkeypatch):
    table = load_speech(write_lines(tmp_path, "list.csv", "path,text,age", "one.wav,A.,7")).dataset
    content = {"bytes": (tmp_path / "one.wav").read_bytes(), "path": None}
    hub = datasets.Dataset.from_list([{"audio": content, "text": "B.", "age": 8, "gender": "f"}])
    monkeypatch.setattr(datasets, "load_dataset", lambda *names: datasets.DatasetDict(train=hub))
    joined = datasets.concatenate_datasets([table, load_speech("someone/speech").dataset])
    assert joined["age"][:] == ["7", "8"]
    assert joined["gender"][:] == [None, "f"]
    assert [len(read_audio(entry)) for entry in joined["audio"][:]] == [8000, 8000]


def test_the_segments_of_a_file_are_held_out_together(tmp_path):
    lines = ("path,text,offset,duration", "one.wav,A.,0,0.2", "one.wav,B.,0.2,0.2", "two.wav,C.,,")
    assert speakers(load_speech(write_lines(tmp_path, "list.csv", *lines))) == (
        "utterance",
        ["one.wav", "one.wav", "two.wav"],
    )


def test_audio_in_the_source_is_whole(tmp_path, monkeypatch):
    """An offset beside it is where it was in another file."""
    soundfile.write(tmp_path / "one.wav", tone(0.5), 16_000)
    content = {"bytes": (tmp_path / "one.wav").read_bytes(), "path": "one.wav"}
    hub = datasets.Dataset.from_list([{"audio": content, "text": "A.", "offset": 12.0, "duration": 0.5}])
    monkeypatch.setattr(datasets, "load_dataset", lambda *names: datasets.DatasetDict(train=hub))
    (row,) = load_speech("someone/speech").dataset
    assert (row["utterance"], row["duration_s"], row["offset"]) == ("one.wav", 0.5, "12.0")


def test_metadata_is_what_a_group_can_be_made_of(tmp_path):
    """Samples and the like are no metadata, and would be more than a table's field can hold."""
    row = {"path": "one.wav", "text": "A.", "age": 7, "array": [0.0] * 20_000, "info": {"a": 1}, "base64": "A" * 20_000}
    row |= {"note": "", "adult": False, "grade": math.nan}
    (kept,) = load_speech(write_lines(tmp_path, "list.jsonl", json.dumps(row))).dataset
    names = ("age", "array", "info", "base64", "note", "adult", "grade")
    assert [kept[name] for name in names] == ["7", None, None, None, "", "False", None]


def test_marks_of_whispers_own_are_no_transcript(tmp_path):
    texts = ("Go <|endoftext|> home.", "<|0.00|> Go home.", "<|en|>Go home.", "a <| b |> c", "Go <b>home</b> | now")
    rows = (json.dumps({"path": "one.wav", "text": text}) for text in texts)
    speech = load_speech(write_lines(tmp_path, "list.jsonl", *rows))
    assert speech.dataset["text"][:] == ["Go <b>home</b> | now"]
    assert "its transcript has <|endoftext|> in it, which Whisper reads as its own" in speech.skipped[0].reason
    assert len(speech.skipped) == 4


def test_targets_are_composed_as_whisper_writes(tmp_path):
    decomposed = unicodedata.normalize("NFD", "Größe")
    speech = load_speech(write_lines(tmp_path, "list.jsonl", json.dumps({"path": "one.wav", "text": decomposed})))
    assert speech.dataset["text"][0] == decomposed
    assert speech.dataset["target"][0] == " Größe"
    assert speech.recased == 0


def test_audio_that_is_no_path_is_named(tmp_path):
    entries = [{"path": 3}, {"path": ["a"]}, {"bytes": "UklGRg=="}, [0.0] * 20_000, 3, "one.wav"]
    rows = (json.dumps({"audio": entry, "text": "A."}) for entry in entries)
    speech = load_speech(write_lines(tmp_path, "list.jsonl", *rows))
    assert [skipped.reason.partition(": ")[2] for skipped in speech.skipped] == [
        "its audio is not the path of a file; give that"
    ] * 5
    assert max(len(skipped.utterance) for skipped in speech.skipped) < 10  # and not all its samples
    assert len(speech) == 1


@pytest.mark.parametrize("column", ["speaker", "speaker_id", "client_id"])
def test_speakers_are_known_by_several_columns(tmp_path, column):
    lines = (f"path,text,{column}", "one.wav,A.,s1", "two.wav,B.,", "one.wav,C.,s1")
    speech = load_speech(write_lines(tmp_path, "list.csv", *lines))
    assert speakers(speech) == ("speaker", ["s1", "two.wav", "s1"])
    speech.dataset = speech.dataset.remove_columns(column)
    assert speakers(speech) == ("utterance", ["one.wav", "two.wav", "one.wav"])


def test_speakers_that_pandas_has_no_name_of_are_not_one(tmp_path):
    rows = [{"path": "one.wav", "text": "A.", "speaker": math.nan}, {"path": "two.wav", "text": "B."}]
    speech = load_speech(write_lines(tmp_path, "list.jsonl", *map(json.dumps, rows)))
    assert speakers(speech) == ("speaker", ["one.wav", "two.wav"])


def test_a_transcript_in_the_place_of_a_path_is_an_audio_file_that_is_not_there(tmp_path):
    """It is longer than names of files can be, of which the system says so."""
    lines = ("text,path", f"A.,{'and so on ' * 30}", "B.,one.wav")
    speech = load_speech(write_lines(tmp_path, "list.csv", *lines))
    assert speech.dataset["text"][:] == ["B."]
    assert speech.skipped[0].reason.endswith(": no such audio file")


def test_bad_utterances_are_skipped_and_counted_or_stop(tmp_path):
    folder = write_folder(tmp_path)
    soundfile.write(folder / "u0.flac", tone(30.0), 16_000)  # the longest that is no longer
    (folder / "u1.flac").write_bytes(b"this is not audio")
    (folder / "u2.flac").unlink()
    soundfile.write(folder / "u3.flac", tone(30.5), 16_000)
    soundfile.write(folder / "u4.wav", np.zeros(0, np.float32), 16_000)
    (folder / "u4.wav").rename(folder / "u4.flac")
    metadata = (folder / "metadata.csv").read_text().replace("IT IS RED", " ")
    (folder / "metadata.csv").write_text(metadata)
    speech = load_speech(folder)
    assert speech.dataset["utterance"][:] == ["u0.flac"]
    reasons = {item.utterance: item.reason for item in speech.skipped}
    assert "not readable as audio" in reasons["u1.flac"]
    assert "no such audio file" in reasons["u2.flac"]
    assert "30.5 s of audio, Whisper takes 30 s; split it" in reasons["u3.flac"]
    assert "the audio is empty" in reasons["u4.flac"]
    assert "its transcript is empty" in reasons["u5.flac"]
    with pytest.raises(UserError, match=r"u1\.flac: not readable as audio"):
        load_speech(folder, strict=True)


class _Words:
    """A tokenizer of one token a word."""

    def __call__(self, texts):
        return type("Encoding", (), {"input_ids": [text.split() for text in texts]})


def test_overlong_transcripts(tmp_path):
    speech = load_speech(write_folder(tmp_path))
    speech.skipped.append(Skipped("u6.flac", "u6.flac: no such audio file"))
    kept = drop_overlong(speech, _Words(), max_tokens=3)
    assert kept.dataset["text"][:] == ["GO HOME NOW", "IT IS RED"]
    assert [item.utterance for item in kept.skipped] == ["u6.flac", "u0.flac", "u1.flac", "u2.flac", "u4.flac"]
    assert "transcript of 4 tokens, Whisper takes 3; split it" in kept.skipped[1].reason
    with pytest.raises(UserError, match=r"u0\.flac: transcript of 4 tokens"):
        drop_overlong(speech, _Words(), max_tokens=3, strict=True)
    with pytest.raises(UserError, match="every transcript is longer than 1 tokens"):
        drop_overlong(speech, _Words(), max_tokens=1)
    assert isinstance(drop_overlong(speech, _Words(), max_tokens=9), Speech)
