"""Audio of every format: whole, damaged, and segments of it."""

import json

import numpy as np
import pytest
import soundfile

from fused_s2lora.training.audio import duration_s, read_audio
from fused_s2lora.training.data import load_speech
from fused_s2lora.training.errors import UserError
from tests.training.speech import TEXTS, tone, write_folder, write_lines


def _without_length(content: bytes) -> bytes:
    """A FLAC as one written to a pipe: 36 bits of its header are zero."""
    cut = bytearray(content)
    cut[21] &= 0xF0
    cut[22:26] = bytes(4)
    return bytes(cut)


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
        assert skipped.reason.endswith("); convert it to FLAC, as ffmpeg -i FILE FILE.flac does")
        with pytest.raises(UserError, match=r"u1\.flac: not readable as audio"):
            read_audio({"path": str(file), "bytes": None})


@pytest.mark.parametrize(("name", "order"), [("one.wav", "little"), ("one.aiff", "big")])
def test_a_file_shorter_than_its_header_says_is_told(tmp_path, name, order):
    """libsndfile takes what is there for all of it, which would be trained on with the whole transcript."""
    file = tmp_path / name
    soundfile.write(file, tone(3.0), 16_000)
    whole = file.read_bytes()
    assert duration_s({"path": str(file)}) == 3.0
    file.write_bytes(whole[: len(whole) // 3])
    for entry in ({"path": str(file)}, {"path": None, "bytes": file.read_bytes()}):
        with pytest.raises(UserError, match=f"was cut short, for its header tells of {len(whole)} bytes and there are"):
            duration_s(entry)
    file.write_bytes(whole[:4] + (2**32 - 1).to_bytes(4, order) + whole[8:])  # written to a pipe
    assert duration_s({"path": str(file)}) == 3.0


@pytest.mark.parametrize("subtype", ["OPUS", "VORBIS"])
def test_an_ogg_that_was_cut_short_is_told(tmp_path, subtype):
    file = tmp_path / "one.ogg"
    noise = np.random.default_rng(0).normal(0, 0.1, 16_000 * 4).astype(np.float32)
    soundfile.write(file, noise, 16_000, format="OGG", subtype=subtype)
    whole = file.read_bytes()
    for content in (whole, whole + bytes(200), whole + bytes(70_000)):  # what follows the last page is no part of it
        assert duration_s({"path": None, "bytes": content}) == 4.0
    for share in (0.4, 0.7, 0.99):
        file.write_bytes(whole[: round(share * len(whole))])
        for entry in ({"path": str(file)}, {"path": None, "bytes": file.read_bytes()}):
            with pytest.raises(UserError, match="was cut short, for its last page is not whole"):
                duration_s(entry)
    header = whole.rindex(b"OggS")
    with pytest.raises(UserError, match="its last page is not whole"):
        duration_s({"path": None, "bytes": whole[: header + 20]})


def _without_count(content: bytes) -> bytes:
    """An MP3 as one written to a pipe: its first frame, which counts the others, is not there."""
    first = content.index(b"\xff")
    counts = max(content.find(b"Info"), content.find(b"Xing"))
    return content[content.index(content[first : first + 2], counts) :]


@pytest.mark.parametrize("cover", [b"", b"ID3\3\0\0\0\0\x50\0" + bytes(80 * 128)], ids=["bare", "tagged"])
@pytest.mark.parametrize("mode", ["CONSTANT", "VARIABLE"])
def test_an_mp3_that_would_not_be_read_to_its_end_is_told(tmp_path, mode, cover):
    """Libsndfile takes half of one for all of it, and of a bit rate that changes guesses the length by its first."""
    noise = np.random.default_rng(0).normal(0, 0.1, 16_000 * 4).astype(np.float32)
    file = tmp_path / "one.mp3"
    soundfile.write(file, np.concatenate([tone(2.0), noise]), 16_000, bitrate_mode=mode, compression_level=0.5)
    whole = file.read_bytes()

    def check(content: bytes) -> float:
        file.write_bytes(cover + content)
        told = duration_s({"path": str(file)})
        assert told == len(read_audio({"path": None, "bytes": cover + content})) / 16_000
        return told

    assert check(whole) == pytest.approx(6.0)
    with pytest.raises(
        UserError, match=r"one\.mp3: was cut short, for its header tells of 6\.0 s and there are [1-4]\."
    ):
        check(whole[: len(whole) // 2])
    bare = _without_count(whole)
    if mode == "CONSTANT":
        assert check(bare) == pytest.approx(6.0, abs=0.15)
        assert check(bare[:-100]) == pytest.approx(6.0, abs=0.15)
    else:
        with pytest.raises(
            UserError, match=r"one\.mp3: an MP3 of a bit rate that changes, .* of whose 6\.\d s only [1-5]"
        ):
            check(bare)


@pytest.mark.parametrize("number", [np.nan, np.inf, 1e30])
def test_samples_that_are_not_finite_are_named(tmp_path, number):
    """Nor those of which the spectrum would not be."""
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
    first, second, rest, whole = (read_audio(entry) for entry in speech.audio())
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
        "long.wav@0s: 31.0 s of audio, Whisper takes 30 s; split it, or give rows of it an offset and duration",
        f"{path}: it ends before the segment of 2 s from 39 s on does; {remedy}",
        f"{path}: it ends before the segment of 2 s from 41 s on does; {remedy}",
        f"long.wav: its offset is '-1'; {needed}",
        f"long.wav: its offset is 'x'; {needed}",
        f"long.wav: its duration is 'nan'; {needed}",
        f"long.wav: its duration is ''; {needed}",
        f"long.wav: its offset is '1{'0' * 38}; {needed}",
        f"long.wav: its duration is '0'; {needed}",
    ]
