"""Speech from folders and manifests, every format, and every way it can be bad."""

import json

import datasets
import numpy as np
import pytest
import soundfile

from fused_s2lora.training.audio import read_audio
from fused_s2lora.training.data import Speech, drop_overlong, load_speech
from fused_s2lora.training.errors import UserError
from tests.training.speech import TEXTS, tone, write_folder


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.ogg", "a.mp3"])
@pytest.mark.parametrize(("rate", "channels"), [(16_000, 1), (44_100, 2), (8_000, 1)])
def test_every_format_is_read_as_mono_16_khz(tmp_path, name, rate, channels):
    soundfile.write(tmp_path / name, tone(1.0, rate, channels), rate)
    samples = read_audio({"path": str(tmp_path / name), "bytes": None})
    assert samples.dtype == np.float32
    assert samples.ndim == 1
    assert abs(len(samples) - 16_000) < 2000  # mp3 and ogg pad
    spectrum = np.abs(np.fft.rfft(samples[2000:12_000]))
    assert abs(np.argmax(spectrum) * 1.6 - 220) < 5
    content = (tmp_path / name).read_bytes()
    np.testing.assert_array_equal(read_audio({"path": None, "bytes": content}), samples)


def test_audiofolder_becomes_sentence_case(tmp_path):
    speech = load_speech(write_folder(tmp_path))
    assert speech.dataset["text"][:] == list(TEXTS)
    assert speech.dataset["target"][0] == "We call it bear."
    assert speech.dataset["speaker"][:3] == ["s0", "s1", "s2"]
    assert speech.dataset["duration_s"][2] == pytest.approx(0.7)
    assert load_speech(tmp_path, keep_case=True).dataset["target"][0] == "WE CALL IT BEAR"
    assert len(load_speech(tmp_path, limit=2)) == 2


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl"])
def test_manifests(tmp_path, kind):
    soundfile.write(tmp_path / "one.wav", tone(0.5), 16_000)
    manifest = tmp_path / f"list.{kind}"
    if kind == "jsonl":
        manifest.write_text(json.dumps({"path": "one.wav", "sentence": "Hello there.", "region": "north"}) + "\n")
    else:
        mark = {"csv": ",", "tsv": "\t"}[kind]
        manifest.write_text(f"path{mark}sentence{mark}region\none.wav{mark}Hello there.{mark}north\n")
    row = load_speech(manifest).dataset[0]
    assert (row["text"], row["target"], row["region"], row["utterance"]) == (
        "Hello there.",
        "Hello there.",
        "north",
        "one.wav",
    )


def test_hub_path_reads_a_saved_data_set(tmp_path):
    """`datasets.load_dataset` is the hub's path; a folder of parquet files named like an id takes the same one."""
    soundfile.write(tmp_path / "one.wav", tone(0.5), 16_000)
    content = {"bytes": (tmp_path / "one.wav").read_bytes(), "path": "one.wav"}
    rows = datasets.Dataset.from_list([{"audio": content, "text": "Hello."}])
    (tmp_path / "set").mkdir()
    rows.to_parquet(str(tmp_path / "set" / "train.parquet"))
    from fused_s2lora.training.data import _read_hub

    read = _read_hub(str(tmp_path / "set"), None, None)
    assert read[0]["text"] == "Hello."
    assert len(read_audio(read[0]["audio"])) == 8000


def test_bad_utterances_are_skipped_and_counted_or_stop(tmp_path):
    folder = write_folder(tmp_path)
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


def test_bad_sources(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no metadata\.csv or metadata\.jsonl in it; write one"):
        load_speech(tmp_path / "empty")
    folder = write_folder(tmp_path / "none", texts=())
    with pytest.raises(UserError, match="the data set is empty"):
        load_speech(folder)
    folder = write_folder(tmp_path / "folder")
    with pytest.raises(UserError, match=r"no column 'words'.*it has file_name, transcription, speaker, age"):
        load_speech(folder, text_column="words")
    (folder / "metadata.csv").write_text("file_name,age\nu0.flac,6\n")
    with pytest.raises(UserError, match=r"no column with transcripts.*--text-column"):
        load_speech(folder)
    (tmp_path / "broken.jsonl").write_text("{not json\n")
    with pytest.raises(UserError, match=r"broken\.jsonl: not readable as a table"):
        load_speech(tmp_path / "broken.jsonl")
    with pytest.raises(UserError, match=r"missing\.csv: no such manifest"):
        load_speech(tmp_path / "missing.csv")
    (tmp_path / "audio.wav").write_bytes(b"")
    with pytest.raises(UserError, match="not a folder with metadata"):
        load_speech(tmp_path / "audio.wav")
    for name in ("u0", "u1"):
        (tmp_path / "folder" / f"{name}.flac").unlink()
    (folder / "metadata.csv").write_text("file_name,text\nu0.flac,a\nu1.flac,b\n")
    with pytest.raises(UserError, match="none of its 2 utterances is usable; the first problem"):
        load_speech(folder)


def test_unreachable_hub_is_one_sentence(monkeypatch):
    def unreachable(*args, **kwargs):
        raise ConnectionError("couldn't reach the hub\nwith a long trace")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(UserError, match=r"someone/speech: no such folder or file.*\(couldn't reach the hub\)$"):
        load_speech("someone/speech")


class _Words:
    """A tokenizer of one token a word."""

    def __call__(self, texts):
        return type("Encoding", (), {"input_ids": [text.split() for text in texts]})


def test_overlong_transcripts(tmp_path):
    speech = load_speech(write_folder(tmp_path))
    kept = drop_overlong(speech, _Words(), max_tokens=3)
    assert kept.dataset["text"][:] == ["GO HOME NOW", "IT IS RED"]
    assert [item.utterance for item in kept.skipped] == ["u0.flac", "u1.flac", "u2.flac", "u4.flac"]
    assert "transcript of 4 tokens, Whisper takes 3; split it" in kept.skipped[0].reason
    with pytest.raises(UserError, match=r"u0\.flac: transcript of 4 tokens"):
        drop_overlong(speech, _Words(), max_tokens=3, strict=True)
    with pytest.raises(UserError, match="every transcript is longer than 1 tokens"):
        drop_overlong(speech, _Words(), max_tokens=1)
    assert isinstance(drop_overlong(speech, _Words(), max_tokens=9), Speech)
