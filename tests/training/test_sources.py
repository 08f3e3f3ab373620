"""Where speech is read from: manifests of every kind, saved data sets and the hub, and how each can be wrong."""

import json

import datasets
import pytest
import soundfile

from fused_s2lora.training.audio import read_audio
from fused_s2lora.training.data import load_speech
from fused_s2lora.training.errors import UserError
from tests.training.speech import tone, write_folder, write_lines


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


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl"])
def test_a_byte_order_mark_is_no_part_of_a_name(tmp_path, kind):
    """Excel writes one before the first column."""
    line = json.dumps({"path": "one.wav", "text": "A."})
    content = {"csv": "path,text\none.wav,A.\n", "tsv": "path\ttext\none.wav\tA.\n", "jsonl": f"{line}\n"}[kind]
    manifest = write_lines(tmp_path, f"list.{kind}")
    manifest.write_bytes(b"\xef\xbb\xbf" + content.encode())
    assert load_speech(manifest).dataset["utterance"][:] == ["one.wav"]


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


@pytest.mark.parametrize("columns", ["path,text,text", "path,text,age,age"])
def test_two_columns_of_one_name_are_refused(columns, tmp_path):
    """The last would be taken, and nothing said."""
    name = columns.rpartition(",")[2]
    with pytest.raises(UserError, match=rf"list\.csv: two of its columns are named '{name}'"):
        load_speech(write_lines(tmp_path, "list.csv", columns, "one.wav,A.,B.,C."))


def test_columns_without_a_name_are_no_two_of_one(tmp_path):
    speech = load_speech(write_lines(tmp_path, "list.csv", "path,text,,", "one.wav,A.,,"))
    assert speech.dataset["text"][:] == ["A."]


def test_the_line_that_is_no_json_is_named(tmp_path):
    lines = ('{"path": "one.wav", "text": "A."}', "", '{"path": "two.wav" "text": "B."}')
    with pytest.raises(UserError, match=r"its line 3 is no JSON \(Expecting ',' delimiter at its character 20\)"):
        load_speech(write_lines(tmp_path, "list.jsonl", *lines))


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


def test_other_recordings_of_a_hub_data_set_are_left_alone(tmp_path, monkeypatch):
    soundfile.write(tmp_path / "one.wav", tone(0.5), 16_000)
    content = {"bytes": (tmp_path / "one.wav").read_bytes(), "path": "one.wav"}
    rows = [{"noisy": {"bytes": b"none", "path": None}, "audio": content, "text": "A.", "age": 7}]
    hub = datasets.Dataset.from_list(rows).cast_column("audio", datasets.Audio()).cast_column("noisy", datasets.Audio())
    monkeypatch.setattr(datasets, "load_dataset", lambda *names: datasets.DatasetDict(train=hub))
    (row,) = load_speech("someone/speech").dataset
    assert (row["duration_s"], row["age"]) == (0.5, "7")
    assert "noisy" not in row
    renamed = hub.rename_column("audio", "speech")
    monkeypatch.setattr(datasets, "load_dataset", lambda *names: datasets.DatasetDict(train=renamed))
    with pytest.raises(UserError, match="it has noisy, speech, text, age; name it with --audio-column"):
        load_speech("someone/speech")
    assert len(load_speech("someone/speech", audio_column="speech")) == 1


def test_audio_comes_before_a_path_beside_it(tmp_path, monkeypatch):
    """As in Common Voice, whose paths are of another machine."""
    soundfile.write(tmp_path / "one.wav", tone(0.5), 16_000)
    content = {"bytes": (tmp_path / "one.wav").read_bytes(), "path": "one.wav"}
    hub = datasets.Dataset.from_list([{"client_id": "a", "path": "/elsewhere/one.mp3", "audio": content, "text": "A."}])
    hub = hub.cast_column("audio", datasets.Audio())
    monkeypatch.setattr(datasets, "load_dataset", lambda *names: datasets.DatasetDict(train=hub))
    (row,) = load_speech("someone/speech").dataset
    assert row["path"] == "/elsewhere/one.mp3"
    assert len(read_audio(row["audio"])) == 8000


def test_saved_data_sets(tmp_path):
    soundfile.write(tmp_path / "one.wav", tone(0.5), 16_000)
    content = {"bytes": (tmp_path / "one.wav").read_bytes(), "path": "one.wav"}
    one = datasets.Dataset.from_list([{"audio": content, "text": "A."}]).cast_column("audio", datasets.Audio())
    datasets.DatasetDict(train=one, test=datasets.concatenate_datasets([one, one])).save_to_disk(tmp_path / "saved")
    assert len(load_speech(tmp_path / "saved")) == len(load_speech(tmp_path / "saved" / "train")) == 1
    assert len(load_speech(tmp_path / "saved", split="test")) == 2
    with pytest.raises(UserError, match=r"no split 'dev'; it has train, test; name one as .*saved/train"):
        load_speech(tmp_path / "saved", split="dev")
    (tmp_path / "saved" / "train" / "dataset_info.json").unlink()
    with pytest.raises(UserError, match="train: not readable as a saved data set"):
        load_speech(tmp_path / "saved" / "train")


def test_classes_of_a_data_set_are_named(tmp_path):
    """Of which it holds numbers: of a speaker's sex to group by, or of the word that is spoken."""
    soundfile.write(tmp_path / "one.wav", tone(0.5), 16_000)
    audio = {"bytes": None, "path": str(tmp_path / "one.wav")}
    rows = [{"audio": audio, "text": text, "sex": sex} for text, sex in ((1, 0), (0, 1), (1, -1))]
    saved = datasets.Dataset.from_list(rows).cast_column("audio", datasets.Audio())
    saved = saved.cast_column("text", datasets.ClassLabel(names=["no", "yes"]))
    saved.cast_column("sex", datasets.ClassLabel(names=["female", "male"])).save_to_disk(tmp_path / "saved")
    speech = load_speech(tmp_path / "saved").dataset
    assert speech["text"][:] == ["yes", "no", "yes"]
    assert speech["sex"][:] == ["female", "male", None]


def test_a_table_with_spaces_after_its_commas(tmp_path):
    lines = ("path, text, age", 'one.wav, "Go, home.", 7')
    (row,) = load_speech(write_lines(tmp_path, "list.csv", *lines)).dataset
    assert (row["text"], row["age"]) == ("Go, home.", "7")


@pytest.mark.parametrize(
    ("name", "sign", "told"),
    [
        ("list.csv", ";", "semicolons; write commas"),
        ("list.csv", "|", "vertical bars; write commas"),
        ("list.csv", "\t", "tabs; call it .tsv"),
        ("list.tsv", ",", "commas; call it .csv"),
    ],
)
@pytest.mark.parametrize("asked", [None, "text"])
def test_another_separator_than_the_file_s_is_told(tmp_path, name, sign, told, asked):
    table = write_lines(tmp_path, name, f"path{sign}text", f"one.wav{sign}A.")
    with pytest.raises(UserError, match=f"{name}: its columns are separated by {told}"):
        load_speech(table, text_column=asked)


def test_a_column_may_be_named_with_a_separator(tmp_path):
    table = write_lines(tmp_path, "list.csv", "path,text;raw", "one.wav,A.")
    with pytest.raises(UserError, match=r"no column with transcripts; it has path, text;raw"):
        load_speech(table)
    assert load_speech(table, text_column="text;raw").dataset["text"][0] == "A."


def test_a_source_that_cannot_be_named_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"lat\\udcfc': its name has characters that no table can have"):
        load_speech(f"{tmp_path}/lat\udcfc")


def test_hub_path_reads_a_saved_data_set(tmp_path):
    """`datasets.load_dataset` is the hub's path; a folder of parquet files named like an id takes the same one."""
    soundfile.write(tmp_path / "one.wav", tone(0.5), 16_000)
    content = {"bytes": (tmp_path / "one.wav").read_bytes(), "path": "one.wav"}
    (tmp_path / "set").mkdir()
    for split in ("train", "test"):
        rows = datasets.Dataset.from_list([{"audio": content, "text": f"For {split}."}])
        rows.to_parquet(str(tmp_path / "set" / f"{split}.parquet"))
    from fused_s2lora.training.sources import _read_hub

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
