"""Long recordings: where they are cut, and what becomes of the segments."""

import contextlib
import json
import os
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from fused_s2lora.training import decoding as decoding_module
from fused_s2lora.training import models, segmentation
from fused_s2lora.training import transcribe as transcribe_module
from fused_s2lora.training.audio import SAMPLE_RATE, read_audio
from fused_s2lora.training.audio_window import AudioWindow
from fused_s2lora.training.cli import app
from fused_s2lora.training.data import load_speech
from fused_s2lora.training.decoding import Decoding, Segment, transcribe_speech
from fused_s2lora.training.errors import UserError
from fused_s2lora.training.models import load_base
from fused_s2lora.training.segmentation import speech_segments
from fused_s2lora.training.sets import named_sets
from fused_s2lora.training.synthesis import TEST_CHILDREN, TEST_PATTERNS, Synthesizer, sentences
from fused_s2lora.training.transcribe import Transcript, transcribe
from tests.training.speech import TEXTS, tone, write_folder


def cut(monkeypatch, spoken_s: list[tuple[float, float]], recording_s: float, longest_s: float):
    """Segments in seconds of a recording in which speech is found at these seconds."""
    spoken = [(round(start * SAMPLE_RATE), round(end * SAMPLE_RATE)) for start, end in spoken_s]
    monkeypatch.setattr(segmentation, "_spoken", lambda samples, longest: spoken)
    samples = np.zeros(round(recording_s * SAMPLE_RATE), np.float32)
    return [(start / SAMPLE_RATE, end / SAMPLE_RATE) for start, end in speech_segments(samples, longest_s)]


def test_a_recording_is_cut_at_its_longest_pauses(monkeypatch):
    spoken = [(1.0, 4.0), (4.5, 7.0), (9.0, 12.0), (12.25, 14.0)]
    assert cut(monkeypatch, spoken, 20.0, 30.0) == [(0.6, 14.4)]
    assert cut(monkeypatch, spoken, 20.0, 10.0) == [(0.6, 7.4), (8.6, 14.4)]
    # Of a pause shorter than 0.8 s each side has half.
    assert cut(monkeypatch, spoken, 20.0, 4.0) == [(0.6, 4.25), (4.25, 7.4), (8.6, 12.125), (12.125, 14.4)]
    assert cut(monkeypatch, [(0.1, 3.0)], 3.2, 30.0) == [(0.0, 3.2)]
    assert cut(monkeypatch, [], 40.0, 30.0) == []


@given(
    lengths=st.lists(st.tuples(st.integers(1, 19_200), st.integers(1, 40_000)), min_size=1, max_size=40),
    longest_s=st.sampled_from([2.0, 2.5, 7.0, 30.0]),
)
def test_segments_hold_all_speech_and_are_short_enough(lengths, longest_s):
    ends = np.cumsum(np.array(lengths)[:, ::-1].ravel())  # of pauses and of speech in turn
    spoken = list(zip(ends[::2].tolist(), ends[1::2].tolist(), strict=True))
    samples = np.zeros(int(ends[-1]) + 1000, np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segmentation, "_spoken", lambda samples, longest: spoken)
        segments = speech_segments(samples, longest_s)
    assert all(0 <= start < end <= len(samples) and end - start <= longest_s * SAMPLE_RATE for start, end in segments)
    assert all(first[1] <= second[0] for first, second in pairwise(segments))
    assert all(any(low <= start and end <= high for low, high in segments) for start, end in spoken)


@pytest.fixture(scope="module")
def dialogue() -> tuple[np.ndarray, list[tuple[int, int]]]:
    """40 s and more of sentences in children's synthetic voices, and where they are; between them a second of noise."""
    synthesizer, rng = Synthesizer(), np.random.default_rng(0)
    parts, places, length = [], [], 0
    for index, sentence in enumerate(sentences(14, 0, TEST_PATTERNS)):
        pause = rng.normal(scale=1e-3, size=SAMPLE_RATE).astype(np.float32)
        speech = synthesizer.speak(sentence, TEST_CHILDREN[index % len(TEST_CHILDREN)], rng)
        parts += [pause, speech]
        places.append((length + len(pause), length + len(pause) + len(speech)))
        length = places[-1][1]
    return np.concatenate(parts), places


@contextlib.contextmanager
def several_threads():
    """Three threads, which whoever takes another number has to give back."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("longest_s", [6.0, 30.0])
def test_sentences_stay_whole(dialogue, longest_s):
    samples, places = dialogue
    assert len(samples) > 40 * SAMPLE_RATE
    with several_threads():
        segments = speech_segments(samples, longest_s)
        assert torch.get_num_threads() == 3
    quarter = SAMPLE_RATE // 4  # of silence is around each sentence, besides the pause
    inner = [(start + quarter, end - quarter) for start, end in places]
    longest = max(end - start for start, end in inner) / SAMPLE_RATE
    assert longest < 5.0
    # Not cut where there is no need.
    assert max(end - start for start, end in segments) > (longest_s - 1.5 - longest) * SAMPLE_RATE / 2
    # A tenth of a second at either end may be too soft to be told from a pause.
    spread = SAMPLE_RATE // 10
    assert all(any(low <= start + spread and end - spread <= high for low, high in segments) for start, end in inner)


def test_speech_without_a_pause_is_cut_all_the_same(dialogue):
    samples, places = dialogue
    start, end = places[0]
    endless = np.tile(samples[start + SAMPLE_RATE // 2 : end - SAMPLE_RATE // 2], 20)
    segments = speech_segments(endless, 5.0)
    assert max(end - start for start, end in segments) <= 5 * SAMPLE_RATE
    assert sum(end - start for start, end in segments) > 0.95 * len(endless)


def test_nothing_is_said_in_silence_and_noise():
    noise = np.random.default_rng(0).normal(scale=0.1, size=40 * SAMPLE_RATE).astype(np.float32)
    assert speech_segments(noise, 30.0) == []
    assert speech_segments(np.zeros(0, np.float32), 30.0) == []
    with pytest.raises(ValueError, match=r"longest_s=1\.0 is below 2"):
        speech_segments(noise, 1.0)


@pytest.fixture
def counting(tiny_folder, monkeypatch):
    """What is "heard" is the number of the call, from 0 for the shortest; what is heard fourth does not end."""
    _, processor = load_base(str(tiny_folder))
    said = []

    def generate(model, features, *rest, max_new_tokens, **search):
        number = processor.tokenizer(str(len(said)), add_special_tokens=False).input_ids
        said.append(number)
        left = (max_new_tokens if len(said) == 4 else 3) - len(number)
        last = processor.tokenizer.pad_token_id if len(said) != 4 else processor.tokenizer.prefix_tokens[0]
        return torch.tensor([number + [last] * left])

    monkeypatch.setattr(decoding_module, "_generate", generate)
    return {"model": str(tiny_folder), "language": "en", "batch_size": 1, "decode_once": True}


@pytest.fixture
def recordings(dialogue, tmp_path) -> Path:
    """A folder with a dialogue, an utterance, and a long tone."""
    samples, _ = dialogue
    (tmp_path / "speech").mkdir()
    soundfile.write(tmp_path / "speech" / "a.flac", samples, SAMPLE_RATE)
    soundfile.write(tmp_path / "speech" / "b.flac", tone(1.0), SAMPLE_RATE)
    soundfile.write(tmp_path / "speech" / "c.flac", tone(31.0), SAMPLE_RATE)
    return tmp_path / "speech"


def cut_at(file: Path, longest_s: float) -> tuple[list[tuple[float, float]], list[str]]:
    """Offset and duration of a file's segments, and what is "heard" in them with one second besides."""
    found = speech_segments(read_audio({"path": str(file)}), longest_s)
    lengths = [end - start for start, end in found]
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    texts = [str(1 + order.index(index)) for index in range(len(lengths))]
    places = [(start / SAMPLE_RATE, (end - start) / SAMPLE_RATE) for start, end in found]
    return places, texts


def test_a_long_recording_is_heard_in_segments(recordings, counting, tmp_path, monkeypatch):
    table = tmp_path / "tables" / "heard.tsv"
    table.parent.mkdir()
    monkeypatch.chdir(tmp_path)
    transcripts, skipped = transcribe(["speech"], **counting, max_segment=6, output=table, timestamps=True)
    assert not skipped
    long, short, silent = transcripts
    places, texts = cut_at(recordings / "a.flac", 6)
    assert len(texts) > 5
    assert [(one.offset_s, one.duration_s) for one in long.segments] == places
    assert [one.text for one in long.segments] == texts
    assert long.text == " ".join(texts)
    assert [one.ended for one in transcripts] == [False, True, True]
    assert short.segments == (Segment(0.0, 1.0, "0"),)
    assert silent == Transcript(Path("speech/c.flac"), "")
    # The table is one of speech to train on: its paths start where it is.
    speech = load_speech(str(table), strict=True)
    assert speech.dataset["text"][:] == [*texts, "0"]
    assert {entry["path"] for entry in speech.audio()} == {
        str(table.parent / f"../speech/{name}") for name in ("a.flac", "b.flac")
    }
    seconds = [len(read_audio(entry)) / SAMPLE_RATE for entry in speech.audio()]
    assert seconds == pytest.approx([*(length for _, length in places), 1.0], abs=0.01)


def test_a_table_in_a_linked_folder_names_files_that_are_there(counting, tmp_path, monkeypatch):
    write_folder(tmp_path / "speech", TEXTS[:2])
    (tmp_path / "disk" / "runs").mkdir(parents=True)
    (tmp_path / "runs").symlink_to("disk/runs")
    (tmp_path / "linked").symlink_to("speech")
    monkeypatch.chdir(tmp_path)
    for number, recordings in enumerate(("speech", "linked")):
        transcribe([recordings], **counting, output=f"runs/{number}.tsv")
        assert len(load_speech(f"runs/{number}.tsv", strict=True)) == 2


def test_recordings_in_linked_folders_are_heard_each_once(counting, tmp_path, monkeypatch):
    write_folder(tmp_path / "speech", TEXTS[:2])
    (tmp_path / "all").mkdir()
    (tmp_path / "all" / "linked").symlink_to("../speech")
    (tmp_path / "all" / "round").symlink_to("../all")
    monkeypatch.chdir(tmp_path)
    transcripts, _ = transcribe(["all/linked/u1.flac", "all"], **counting)
    assert [str(one.file) for one in transcripts] == ["all/linked/u1.flac", "all/linked/u0.flac"]


def test_no_more_is_heard_at_once_than_asked(dialogue, counting, tmp_path):
    samples, _ = dialogue
    soundfile.write(tmp_path / "a.flac", samples[: 15 * SAMPLE_RATE], SAMPLE_RATE)
    (whole,), _ = transcribe([tmp_path], **counting)
    assert [(one.offset_s, one.duration_s) for one in whole.segments] == [(0.0, 15.0)]
    (cut,), _ = transcribe([tmp_path], **counting, max_segment=8)
    assert len(cut.segments) > 1
    assert max(one.duration_s for one in cut.segments) <= 8


def test_segments_are_joined_as_the_language_is_written(recordings, counting):
    (transcript,), _ = transcribe([recordings / "a.flac"], **{**counting, "language": "zh"})
    assert transcript.text == "".join(segment.text for segment in transcript.segments)
    assert len(transcript.segments) > 1


@pytest.fixture
def stopped(recordings, counting, tmp_path, monkeypatch):
    """Options with which the first recording was transcribed before a Ctrl-C, its lines, and what is read since."""
    options = {**counting, "output": tmp_path / "heard.tsv", "max_segment": 6, "timestamps": True}
    monkeypatch.setattr("fused_s2lora.training.transcribe._WRITTEN_AFTER_S", 20.0)
    names: list[str] = []
    stop = ["b.flac"]

    def reading(entry):
        names.append(Path(entry["path"]).name)
        if names[-1:] == stop:
            stop.clear()
            raise KeyboardInterrupt
        return read_audio(entry)

    monkeypatch.setattr(decoding_module, "read_audio", reading)
    with pytest.raises(KeyboardInterrupt):
        transcribe([recordings], **options)
    names.clear()
    return options, options["output"].read_text().splitlines(), names


def names_in(table: Path) -> list[str]:
    return list(dict.fromkeys(line.split("\t")[0].rpartition("/")[2] for line in table.read_text().splitlines()))


def test_a_stopped_command_goes_on(recordings, stopped):
    options, lines, read = stopped
    table = options["output"]
    assert len(lines) > 5
    assert names_in(table) == ["file", "a.flac"]
    soundfile.write(recordings / "0.flac", tone(1.0), SAMPLE_RATE)
    transcripts, _ = transcribe([recordings], **options)
    assert read == ["0.flac", "b.flac", "c.flac"]
    assert names_in(table) == ["file", "0.flac", "a.flac", "b.flac"]  # nothing is said in c
    assert [line for line in table.read_text().splitlines() if "a.flac" in line] == lines[1:]
    assert [one.file.name for one in transcripts] == ["0.flac", "a.flac", "b.flac", "c.flac"]
    assert len(transcripts[1].segments) == len(lines) - 1
    assert [one.ended for one in transcripts] == [True, False, True, True]
    assert sorted(file.name for file in table.parent.iterdir()) == ["heard.tsv", "speech"]
    read.clear()
    table.write_text("corrected since\n")
    with pytest.raises(UserError, match=r"heard\.tsv: exists already, and was finished; give another --output"):
        transcribe([recordings], **options)
    assert (read, table.read_text()) == ([], "corrected since\n")


@pytest.mark.parametrize("change", ["recording", "other", "setting", "model", "torn"])
def test_what_changed_is_heard_again(recordings, stopped, tiny_folder, change):
    options, lines, read = stopped
    record = options["output"].with_name("heard.tsv.unfinished")
    if change == "recording":
        os.utime(recordings / "a.flac", ns=(0, 0))
    elif change == "other":  # that was unpacked with it, at the same time
        then = (recordings / "a.flac").stat().st_mtime_ns
        soundfile.write(recordings / "a.flac", read_audio({"path": str(recordings / "a.flac")})[:-SAMPLE_RATE], 16_000)
        os.utime(recordings / "a.flac", ns=(then, then))
    elif change == "setting":
        options["max_segment"] = 8
    elif change == "model":
        os.utime(tiny_folder / "config.json", ns=(0, 0))
    else:  # a line that was being written when the machine went down
        record.write_text(record.read_text()[:-10])
    transcribe([recordings], **options)
    assert read == ["a.flac", "b.flac", "c.flac"]
    heard = [line for line in options["output"].read_text().splitlines() if "a.flac" in line]
    assert not {*heard} & {*lines}
    assert len(heard) > 4
    assert not record.exists()


def test_every_option_and_the_adapter_are_of_what_was_heard(counting, tmp_path, monkeypatch):
    """Each is changed in turn, and all is stopped at the second recording: is the first heard again?"""
    recordings, adapter = write_folder(tmp_path / "speech", TEXTS[:2]), tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"audio_window": "trim", "audio_window_margin": 64}))
    options = {**counting, "adapter": str(adapter), "output": tmp_path / "heard.tsv"}
    loaded, margins = load_base(counting["model"]), []
    monkeypatch.setattr(models, "load_base", lambda model: loaded)
    monkeypatch.setattr(models, "load_adapter", lambda whisper, adapter: whisper)
    frames = AudioWindow.mel_frames
    monkeypatch.setattr(AudioWindow, "mel_frames", lambda self, n: margins.append(self.margin) or frames(self, n))
    monkeypatch.setattr(transcribe_module, "_WRITTEN_AFTER_S", 0.1)

    def heard() -> list[str]:
        names = []

        def reading(entry):
            names.append(Path(entry["path"]).name)
            if names[-1] == "u1.flac":
                raise KeyboardInterrupt
            return read_audio(entry)

        monkeypatch.setattr(decoding_module, "read_audio", reading)
        with pytest.raises(KeyboardInterrupt):
            transcribe([recordings], **options)
        return names

    assert heard() == ["u0.flac", "u1.flac"]
    assert heard() == ["u1.flac"]
    others = {
        "margin": 8, "window": "full", "language": "de", "task": "translate", "beams": 2, "decode_once": False,
        "precision": "bf16",
    }  # fmt: skip
    for name, value in others.items():
        options[name] = value
        assert heard() == ["u0.flac", "u1.flac"], name
    os.utime(adapter / "adapter_config.json", ns=(0, 0))  # trained anew in its place
    assert heard() == ["u0.flac", "u1.flac"]
    assert margins[:2] == [64, 8]


def test_there_is_no_table_where_the_model_is_no_good(recordings, counting, tmp_path):
    """It would be in the way of the next."""
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no adapter_config"):
        transcribe([recordings], **counting, adapter=str(tmp_path / "empty"), output=tmp_path / "heard.tsv")
    assert not (tmp_path / "heard.tsv").exists()


def test_a_recording_is_in_one_language(recordings, counting, monkeypatch):
    """In what its first segment sounds like, however the others sound."""
    first, asked = [], []

    def detected(model, features, mel_frames, dtype):
        first.append(mel_frames)
        return ["de" if len(first) == 1 else "zh"]

    real = decoding_module._generate
    monkeypatch.setattr(decoding_module, "_detected", detected)
    monkeypatch.setattr(decoding_module, "_generate", lambda *a, **k: asked.append(a[3]) or real(*a, **k))
    long, short, silent = transcribe([recordings], **{**counting, "language": None, "max_segment": 6})[0]
    places, _ = cut_at(recordings / "a.flac", 6)
    assert first == [3000, 3000]  # of b and of a
    assert asked == ["de", *["zh"] * len(places)]
    assert long.text == "".join(segment.text for segment in long.segments)
    assert (short.text, silent.text) == ("0", "")


def test_the_command_says_what_it_heard_and_when(recordings, counting):
    options = ["--language", "en", "--eval-batch-size", "1", "--decode-once", "--timestamps"]
    command = ["transcribe", str(recordings), "--model", counting["model"], *options]
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    rows = [line.split("\t") for line in result.stdout.splitlines()]
    assert len(rows) > 2
    assert {row[0] for row in rows} == {str(recordings / "a.flac"), str(recordings / "b.flac")}
    assert rows[-1][1:] == ["0.00", "1.00", "0"]
    assert f"no speech found: {recordings / 'c.flac'}" in result.stderr
    with pytest.raises(UserError, match="--max-segment is 31; give 2 to 30 seconds"):
        transcribe([recordings], model=counting["model"], max_segment=31)


def test_a_test_set_may_have_long_recordings(recordings, counting):
    """All of it is scored, where training speech of more than 30 s is left out."""
    (recordings / "metadata.csv").write_text("file_name,text\na.flac,one two\nb.flac,zero\nc.flac,nothing\n")
    sets = named_sets([f"long={recordings}"], "en")
    told: list[float] = []
    options = {"window": AudioWindow("trim"), "language": "en", "decoding": Decoding(once=True), "batch_size": 1}
    heard = list(
        transcribe_speech(*load_base(counting["model"]), sets["long"].speech.audio(), on_batch=told.append, **options)
    )
    _, texts = cut_at(recordings / "a.flac", 30)
    assert [one.text for one in heard] == [" ".join(texts), "0", ""]
    assert told == pytest.approx([1, 1, *[1 / len(texts)] * len(texts)])
    assert [item.utterance for item in load_speech(str(recordings)).skipped] == ["a.flac", "c.flac"]
