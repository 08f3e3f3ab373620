"""Speech from folders and manifests, every format, and every way it can be bad."""

import json

import datasets
import numpy as np
import pytest
import soundfile

from fused_s2lora.training.audio import read_audio
from fused_s2lora.training.data import Speech, drop_overlong, load_speech, speakers
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


def test_more_audio_than_32_bit_offsets_reach(tmp_path):
    """Arrow's binary ends at 2 GiB a column."""
    soundfile.write(tmp_path / "one.wav", tone(0.5), 16_000)
    content = {"bytes": (tmp_path / "one.wav").read_bytes(), "path": "one.wav"}
    hub = datasets.Dataset.from_list([{"audio": content, "text": "A."}])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "load_dataset", lambda *names: datasets.DatasetDict(train=hub))
        dataset = load_speech("someone/speech").dataset
    assert dataset.features["audio"]["bytes"].dtype == "large_binary"
    assert len(read_audio(dataset[0]["audio"])) == 8000


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
        " Hello there.",
        "north",
        "one.wav",
    )


def write_lines(folder, name, *lines):
    """A manifest of two recordings, one.wav and two.wav."""
    folder.mkdir(exist_ok=True)
    for recording in ("one.wav", "two.wav"):
        soundfile.write(folder / recording, tone(0.5), 16_000)
    (folder / name).write_text("\n".join(lines) + "\n")
    return folder / name


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
    assert sorted(speech.dataset.column_names) == ["audio", "duration_s", "target", "text", "utterance"]
    assert not speech.skipped


def test_utterances_in_folders_of_speakers_differ(tmp_path):
    manifest = write_lines(tmp_path, "list.csv", "path,text", "a/sx1.wav,A", "./b/sx1.wav,B", f"{tmp_path}/one.wav,C")
    for speaker in "ab":
        (tmp_path / speaker).mkdir()
        soundfile.write(tmp_path / speaker / "sx1.wav", tone(0.5), 16_000)
    assert load_speech(manifest).dataset["utterance"][:] == ["a/sx1.wav", "b/sx1.wav", "one.wav"]
    (tmp_path / "b" / "sx1.wav").write_bytes(b"no audio")
    assert [item.utterance for item in load_speech(manifest).skipped] == ["b/sx1.wav"]


def test_malformed_tables(tmp_path):
    manifest = write_lines(
        tmp_path,
        "list.csv",
        "path,text",
        "one.wav,Yes, please.",
        'two.wav,"Yes, please."',
        'one.wav,"and',
        'two.wav,so"',
    )
    speech = load_speech(manifest)
    assert speech.dataset["text"][:] == ["Yes, please."]
    assert [item.reason for item in speech.skipped] == [
        "one.wav: line 2 has more fields than columns: quote the transcript",
        "one.wav: its transcript has a line break or a tab in it; is a quotation mark left open?",
    ]
    with pytest.raises(UserError, match=r"one\.wav: line 2 has more fields than columns: quote the transcript"):
        load_speech(manifest, strict=True)
    lines = ("path\ttext", 'one.wav\t"No," she said', 'two.wav\t"Open', "one.wav\ttab\there")
    speech = load_speech(write_lines(tmp_path, "list.tsv", *lines))
    assert speech.dataset["text"][:] == ['"No," she said', '"Open']
    assert speech.skipped[0].reason == (
        "one.wav: line 4 has more fields than columns: take the tab out of the transcript"
    )
    rows = [{"path": "one.wav", "text": text} for text in ("a\tb", "a\nb", " fine\n")]
    speech = load_speech(write_lines(tmp_path, "list.jsonl", *map(json.dumps, rows)))
    assert speech.dataset["text"][:] == ["fine"]


def test_lines_of_different_keys_and_types(tmp_path):
    rows = [
        {"path": "one.wav", "age": 7},
        {"path": "one.wav", "text": "A.", "age": 7},
        {"path": "two.wav", "text": "B.", "age": "eight", "gender": None},
        {"text": "C.", "age": 7.5},
    ]
    speech = load_speech(write_lines(tmp_path, "list.jsonl", *map(json.dumps, rows)))
    assert speech.dataset["age"][:] == ["7", "eight"]
    assert speech.dataset["gender"][:] == [None, None]
    assert [item.reason for item in speech.skipped] == [
        "one.wav: its transcript is empty",
        "3: no audio is given for it",
    ]
    with pytest.raises(UserError, match="each line has to be a JSON object"):
        load_speech(write_lines(tmp_path, "list.jsonl", "[1, 2]"))


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


def test_audio_that_is_no_path_is_named(tmp_path):
    entries = [{"path": 3}, {"path": ["a"]}, {"bytes": "UklGRg=="}, "one.wav"]
    rows = (json.dumps({"audio": entry, "text": "A."}) for entry in entries)
    speech = load_speech(write_lines(tmp_path, "list.jsonl", *rows))
    assert [skipped.reason.partition(": ")[2] for skipped in speech.skipped] == [
        "its audio is not the path of a file; give that"
    ] * 3
    assert len(speech) == 1


def test_a_source_that_cannot_be_named_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"lat\\udcfc': its name has characters that no table can have"):
        load_speech(f"{tmp_path}/lat\udcfc")


@pytest.mark.parametrize("column", ["speaker", "speaker_id", "client_id"])
def test_speakers_are_known_by_several_columns(tmp_path, column):
    lines = (f"path,text,{column}", "one.wav,A.,s1", "two.wav,B.,", "one.wav,C.,s1")
    speech = load_speech(write_lines(tmp_path, "list.csv", *lines))
    assert speakers(speech) == ("speaker", ["s1", "two.wav", "s1"])
    speech.dataset = speech.dataset.remove_columns(column)
    assert speakers(speech) == ("utterance", ["one.wav", "two.wav", "one.wav"])


def test_cut_off_or_damaged_audio_is_found_before_training(tmp_path):
    folder = write_folder(tmp_path, seconds=3.0)
    file = folder / "u1.flac"
    whole = file.read_bytes()
    middle = len(whole) // 2
    damaged = whole[:middle] + bytes(500) + whole[middle + 500 :]
    for content in (*(whole[: round(share * len(whole))] for share in (0.3, 0.6, 0.99)), damaged):
        file.write_bytes(content)
        (skipped,) = load_speech(folder).skipped
        assert skipped.reason.startswith(f"{file}: not readable as audio (")
        with pytest.raises(UserError, match=r"u1\.flac: not readable as audio"):
            read_audio({"path": str(file), "bytes": None})


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_samples_that_are_not_finite_are_named(tmp_path, number):
    samples = tone(0.5)
    samples[100] = number
    soundfile.write(tmp_path / "one.wav", samples, 16_000, subtype="FLOAT")
    soundfile.write(tmp_path / "two.wav", tone(0.5), 16_000, subtype="FLOAT")
    (tmp_path / "list.csv").write_text("path,text\none.wav,A.\ntwo.wav,B.\n")
    speech = load_speech(tmp_path / "list.csv")
    assert speech.dataset["utterance"][:] == ["two.wav"]
    assert speech.skipped[0].reason.startswith(f"{tmp_path}/one.wav: it has samples that are not finite numbers")


def test_flac_without_a_length_is_read(tmp_path):
    folder = write_folder(tmp_path, TEXTS[:1], seconds=1.0)
    file = folder / "u0.flac"
    expected = read_audio({"path": str(file), "bytes": None})
    file.write_bytes(_without_length(file.read_bytes()))
    (row,) = load_speech(folder).dataset
    assert row["duration_s"] == pytest.approx(1.0)
    np.testing.assert_array_equal(read_audio(row["audio"]), expected)


def test_hub_path_reads_a_saved_data_set(tmp_path):
    """`datasets.load_dataset` is the hub's path; a folder of parquet files named like an id takes the same one."""
    soundfile.write(tmp_path / "one.wav", tone(0.5), 16_000)
    content = {"bytes": (tmp_path / "one.wav").read_bytes(), "path": "one.wav"}
    (tmp_path / "set").mkdir()
    for split in ("train", "test"):
        rows = datasets.Dataset.from_list([{"audio": content, "text": f"For {split}."}])
        rows.to_parquet(str(tmp_path / "set" / f"{split}.parquet"))
    from fused_s2lora.training.data import _read_hub

    read = _read_hub(str(tmp_path / "set"), "train", None)
    assert read[0]["text"] == "For train."
    assert len(read_audio(read[0]["audio"])) == 8000
    assert _read_hub(f"{tmp_path}/set:test", "train", None)[0]["text"] == "For test."
    assert _read_hub(f"{tmp_path}/set:default:test", "train", None)[0]["text"] == "For test."
    with pytest.raises(UserError, match=r"set: no split 'validation'; it has train, test; name one as .*/set:SPLIT$"):
        _read_hub(str(tmp_path / "set"), "validation", None)


@pytest.mark.parametrize(
    ("source", "names", "split"),
    [
        ("org/ds", ("org/ds",), "validation"),
        ("org/ds:test", ("org/ds",), "test"),
        ("org/ds:sw_ke:train", ("org/ds", "sw_ke"), "train"),
    ],
)
def test_splits_and_configurations_of_the_hub(tmp_path, monkeypatch, source, names, split):
    soundfile.write(tmp_path / "one.wav", tone(0.5), 16_000)
    asked = []

    def load_dataset(*given):
        asked.append(given)
        rows = {name: [{"path": str(tmp_path / "one.wav"), "text": name}] for name in ("train", "validation", "test")}
        return datasets.DatasetDict({name: datasets.Dataset.from_list(row) for name, row in rows.items()})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_speech(source, split="validation").dataset["text"][:] == [split]
    assert asked == [names]


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


def _without_length(content: bytes) -> bytes:
    """A FLAC as one written to a pipe: 36 bits of its header are zero."""
    cut = bytearray(content)
    cut[21] &= 0xF0
    cut[22:26] = bytes(4)
    return bytes(cut)


@pytest.mark.parametrize("kind", ["wav", "wav in GSM610", "flac", "flac without a length", "ogg", "opus", "mp3"])
def test_segments_of_a_file(tmp_path, kind):
    """As NeMo's manifests name them."""
    file = tmp_path / f"talk.{kind.partition(' ')[0]}"
    rate = 16_000
    tolerance = 2e-3 if kind == "opus" else 1e-6  # where its decoder begins changes its rounding
    encoding = {"opus": {"format": "OGG", "subtype": "OPUS"}, "wav in GSM610": {"subtype": "GSM610"}}.get(kind, {})
    soundfile.write(file, np.concatenate([tone(1.0, pitch=pitch) for pitch in (200, 300, 400)]), rate, **encoding)
    if "without" in kind:
        file.write_bytes(_without_length(file.read_bytes()))
    rows = [
        {"audio_filepath": file.name, "text": "One.", "offset": 0, "duration": 1.0},
        {"audio_filepath": file.name, "text": "Two.", "offset": 1.25, "duration": 0.5},
        {"audio_filepath": file.name, "text": "To the end.", "offset": 2.5, "duration": 0.5},
        {"audio_filepath": file.name, "text": "All.", "offset": None, "duration": 9.0},
    ]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    speech = load_speech(tmp_path / "list.jsonl")
    assert speech.dataset["utterance"][:] == [f"{file.name}@0s", f"{file.name}@1.25s", f"{file.name}@2.5s", file.name]
    first, second, rest, whole = (read_audio(entry) for entry in speech.dataset["audio"][:])
    for got, start, end in ((first, 0, rate), (second, 5 * rate // 4, 7 * rate // 4), (rest, 5 * rate // 2, None)):
        np.testing.assert_allclose(got, whole[start:end], atol=tolerance)
    assert np.abs(second - whole[5 * rate // 4 + 1 : 7 * rate // 4 + 1]).max() > 0.03  # a sample late
    lengths = [len(part) / rate for part in (first, second, rest, whole)]
    assert speech.dataset["duration_s"][:] == pytest.approx(lengths)


def test_segments_that_cannot_be(tmp_path):
    """And one in a file of more than 30 s, which can."""
    soundfile.write(tmp_path / "long.wav", np.tile(tone(1.0), 40), 16_000)
    segments = ("35.5,2", "0,31", "39,2", "41,2", "-1,2", "x,2", "1,nan", "39.03,1", "40,", f"1{'0' * 400},2", "1,0")
    lines = ("path,text,offset,duration", *(f"long.wav,A.,{segment}" for segment in segments))
    speech = load_speech(write_lines(tmp_path, "list.csv", *lines))
    assert speech.dataset["utterance"][:] == ["long.wav@35.5s", "long.wav@39.03s"]
    assert speech.dataset["duration_s"][:] == pytest.approx([2, 0.97])
    path = tmp_path / "long.wav"
    remedy = "correct offset and duration, which are in seconds"
    needed = "a segment has offset and duration in seconds; rename columns that are something else"
    assert [skipped.reason for skipped in speech.skipped] == [
        "long.wav@0s: 31.0 s of audio, Whisper takes 30 s; split it",
        f"{path}: it ends before the segment of 2 s from 39 s on does; {remedy}",
        f"{path}: it ends before the segment of 2 s from 41 s on does; {remedy}",
        f"long.wav: its offset is '-1'; {needed}",
        f"long.wav: its offset is 'x'; {needed}",
        f"long.wav: its duration is 'nan'; {needed}",
        f"long.wav: its duration is ''; {needed}",
        f"long.wav: its offset is '1{'0' * 38}; {needed}",
        f"long.wav: its duration is '0'; {needed}",
    ]
