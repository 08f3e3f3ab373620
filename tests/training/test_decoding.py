"""Decoding, for scoring and for transcribing files, on a tiny Whisper."""

import json
import os
import shutil
from pathlib import Path

import pytest
import soundfile
import torch
from transformers import WhisperForConditionalGeneration, WhisperTokenizer
from typer.testing import CliRunner

from fused_s2lora.training import decoding as decoding_module
from fused_s2lora.training.audio import read_audio
from fused_s2lora.training.audio_window import AudioWindow
from fused_s2lora.training.cli import app
from fused_s2lora.training.data import load_speech
from fused_s2lora.training.decoding import Decoding, Heard, Segment, transcribe_speech
from fused_s2lora.training.errors import UserError
from fused_s2lora.training.evaluate import evaluate
from fused_s2lora.training.evaluation import read_sets, results_table
from fused_s2lora.training.features import LogMel
from fused_s2lora.training.models import load_base
from fused_s2lora.training.sets import named_sets
from fused_s2lora.training.transcribe import transcribe
from tests.training.comparisons import QUIET
from tests.training.speech import tone


def test_decoding_in_half_precision_computes_what_the_model_does(tiny_folder):
    """Within bfloat16's rounding, for the prompt in one pass and a token after it from the cache."""
    model, processor = load_base(str(tiny_folder))
    model.eval()
    with torch.no_grad():
        for weight in model.get_decoder().layers.parameters():
            weight.mul_(4)  # as initialised, attention hardly matters
    torch.manual_seed(0)
    features = torch.randn(2, model.config.num_mel_bins, 2 * model.config.max_source_positions)
    prompt = torch.tensor([processor.tokenizer.prefix_tokens] * 2)
    decoder = decoding_module._for_decoding(model, torch.bfloat16)

    def logits(whisper):
        first = whisper(input_features=features, decoder_input_ids=prompt, use_cache=True)
        encoded = (first.encoder_last_hidden_state,)
        second = whisper(decoder_input_ids=prompt[:, -1:], encoder_outputs=encoded, cache=first.cache)
        return torch.cat([first.logits, second.logits], dim=1)

    with torch.no_grad():
        expected = logits(model)
        with torch.autocast("cpu", torch.bfloat16):
            rounding = (logits(model) - expected).abs().max()
            error = (logits(decoder) - expected).abs().max()
    assert error < 2 * rounding


@pytest.fixture
def endless(tiny_folder, monkeypatch):
    """Four batches of two of what "is heard", once or twice: the first never ends, the third at its second decoding."""
    _, processor = load_base(str(tiny_folder))
    pad = processor.tokenizer.pad_token_id
    day, way = (processor.tokenizer(word).input_ids[-2] for word in (" day", " way"))
    ended = [way, way, way, pad]
    once = [[[day] * 4, ended], [[day] * 4, ended], [[way] * 3, [way, way, pad]]]
    twice = [once[0], [[day] * 4], once[1], [ended], once[2]]
    asked = []

    def start(tokens: list) -> list:
        left = iter(tokens)
        asked.clear()

        def generate(model, features, *_, max_new_tokens, **search):
            asked.append((len(features), search))
            return torch.tensor([row + row[-1:] * (max_new_tokens - 4) if len(row) == 4 else row for row in next(left)])

        monkeypatch.setattr(decoding_module, "_generate", generate)
        return asked

    return {"once": once, "twice": twice, "start": start}


def test_what_does_not_end_is_decoded_again(tiny_folder, tones, endless):
    model, processor = load_base(str(tiny_folder))
    audio = load_speech(tones).dataset["audio"][:]
    options = {"window": AudioWindow("trim"), "language": "en", "max_new_tokens": 4, "batch_size": 2}
    asked = endless["start"](endless["twice"])
    heard = list(transcribe_speech(model, processor, audio, decoding=Decoding(beams=2), **options))
    first, second = {"num_beams": 2}, {"num_beams": 5, "no_repeat_ngram_size": 3}
    assert asked == [(2, first), (1, second), (2, first), (1, second), (2, first)]
    assert [one.ended for one in heard] == [False, True, True, True, True, True]
    assert [one.again for one in heard] == [True, False, True, False, False, False]
    assert heard[2].text == heard[3].text  # that of the second decoding
    asked = endless["start"](endless["once"])
    heard = list(transcribe_speech(model, processor, audio, decoding=Decoding(once=True), **options))
    assert [found for _, found in asked] == [{"num_beams": 1}] * 3
    assert [one.ended for one in heard] == [False, True, False, True, True, True]
    assert not any(one.again for one in heard)
    with pytest.raises(UserError, match="--beams is 0; give at least 1"):
        Decoding(beams=0)


def test_what_repeats_itself_and_what_is_long_in_one_batch(tiny_folder, tones, monkeypatch):
    """The long one is decoded on alone, then the other anew, to all that the text context holds."""
    model, processor = load_base(str(tiny_folder))
    (day,) = processor.tokenizer(" day", add_special_tokens=False).input_ids
    words = processor.tokenizer(" you and they said that was very good", add_special_tokens=False).input_ids
    said = iter([[[day] * 8, words], [[*words, *words[:4]]], [[day]]])
    asked = []

    def generate(model, features, *_, max_new_tokens, **search):
        asked.append((len(features), max_new_tokens, search["num_beams"]))
        return torch.tensor(next(said))

    monkeypatch.setattr(decoding_module, "_generate", generate)
    monkeypatch.setattr(decoding_module, "MAX_NEW_TOKENS", 8)
    audio = load_speech(tones).dataset["audio"][:2]
    heard = list(transcribe_speech(model, processor, audio, window=AudioWindow("trim"), language="en"))
    assert asked == [(2, 8, 1), (1, 16, 1), (1, 16, 5)]
    long = "you and they said that was very good you and they said"
    assert heard == [Heard("day", True, again=True), Heard(long, True)]


GEORGIAN = "ყველა ადამიანი იბადება თავისუფალი და თანასწორი თავისი ღირსებითა და უფლებებით."


@pytest.mark.parametrize("once", [True, False])
def test_a_long_transcript_in_a_script_spelt_in_bytes_is_whole(tiny_folder, tones, monkeypatch, once):
    """A model that knows every next token says all of it, though it is longer than 224 tokens."""
    model, processor = load_base(str(tiny_folder))
    expected = processor.tokenizer(f"{GEORGIAN} {GEORGIAN[::-1]}", add_special_tokens=False).input_ids
    assert len(expected) > decoding_module.MAX_NEW_TOKENS
    said = [*expected, processor.tokenizer.eos_token_id]
    model.generation_config.suppress_tokens = model.generation_config.begin_suppress_tokens = None
    real, written = WhisperForConditionalGeneration.forward, 0

    def knowing(self, *args, **given):
        nonlocal written
        output = real(self, *args, **given)
        written = written + 1 if output.logits.shape[1] == 1 else 0  # the prompt in one pass, then token by token
        output.logits[:, -1] = 0
        output.logits[:, -1, said[written]] = 20
        return output

    monkeypatch.setattr(WhisperForConditionalGeneration, "forward", knowing)
    audio = load_speech(tones).dataset["audio"][:1]
    options = {"window": AudioWindow("trim"), "language": "ka", "decoding": Decoding(once=once)}
    (heard,) = transcribe_speech(model, processor, audio, **options)
    assert heard == Heard(f"{GEORGIAN} {GEORGIAN[::-1]}", ended=True)


def test_what_may_not_come_twice_is_more_than_letters(packaged_base):
    tokenizer = WhisperTokenizer.from_pretrained(packaged_base)
    once = {}
    for language, text in {"en": "Go home and go to bed.", "zh": "今天天气很好。", "ka": GEORGIAN}.items():
        tokens = tokenizer(text, add_special_tokens=False).input_ids
        once[language] = decoding_module._tokens_once(text, tokens)
    assert once["en"] == once["zh"] == 3
    assert 20 <= once["ka"] <= 30


def test_each_that_does_not_end_is_decoded_again_by_its_own_script(tiny_folder, tones, monkeypatch):
    """A batch's other transcripts do not change what may not come twice in one; blanks are no script."""
    model, processor = load_base(str(tiny_folder))
    spelt = [processor.tokenizer(text, add_special_tokens=False).input_ids for text in (" day", "ყ", " ")]
    assert [len(tokens) for tokens in spelt] == [1, 3, 1]
    endless = torch.tensor([(tokens * 12)[:12] for tokens in spelt])
    asked = []

    def generate(model, features, *_, no_repeat_ngram_size=0, **search):
        asked.append((len(features), no_repeat_ngram_size))
        return endless[: len(features)]

    monkeypatch.setattr(decoding_module, "_generate", generate)
    audio = load_speech(tones).dataset["audio"][:3]
    options = {"window": AudioWindow("trim"), "language": "ka", "max_new_tokens": 12}
    assert len(list(transcribe_speech(model, processor, audio, **options))) == 3
    assert asked == [(3, 0), (2, 3), (1, 30)]


@pytest.mark.parametrize(
    ("tokens", "repeats"),
    [
        ([1, 2, 3, *[7] * 60], True),
        ([*range(100), *[4, 5, 6] * 20], True),
        ([*range(200), 7, 7, 7], False),  # not for long
        ([*range(224)], False),
        ([*range(60), *range(60)], False),  # twice is no loop
        ([*range(60)] * 3, True),
        ([], False),
    ],
)
def test_what_repeats_itself_at_its_end(tokens, repeats):
    assert decoding_module._repeats(tokens, 56) is repeats


def test_a_second_decoding_does_not_repeat_itself(tiny_folder, tones, monkeypatch):
    """An untrained Whisper never stops: it says the same over and over, and the second time no three tokens twice."""
    model, processor = load_base(str(tiny_folder))
    audio = load_speech(tones).dataset["audio"][:2]
    found = []
    real = decoding_module._generate
    monkeypatch.setattr(decoding_module, "_generate", lambda *a, **k: found.append(real(*a, **k)) or found[-1])
    options = {"window": AudioWindow("trim"), "language": "en", "max_new_tokens": 16}
    heard = list(transcribe_speech(model, processor, audio, **options))
    first, second = (
        [len(set(zip(row, row[1:], row[2:], strict=False))) for row in tokens.tolist()] for tokens in found
    )
    assert max(first) < 14
    assert second == [14, 14]
    texts = processor.tokenizer.batch_decode(found[1], skip_special_tokens=True)
    assert heard == [Heard(text.strip(), ended=False, again=True) for text in texts]


def test_a_language_is_detected_as_transformers_does(tiny_folder, tones):
    model, processor = load_base(str(tiny_folder))
    (entry, *_) = load_speech(tones).audio()
    options = {"window": AudioWindow(), "max_new_tokens": 6, "decoding": Decoding(once=True)}
    heard = list(transcribe_speech(model, processor, [entry], language=None, **options))
    features = processor.feature_extractor(read_audio(entry), sampling_rate=16_000, return_tensors="pt")
    (found,) = model.detect_language(features.input_features).tolist()
    language = processor.tokenizer.convert_ids_to_tokens(found).strip("<|>")
    assert heard == list(transcribe_speech(model, processor, [entry], language=language, **options))


def test_a_recording_is_what_its_segments_come_to():
    stretches = [(0, torch.zeros(16_000)), (32_000, torch.zeros(8_000)), (48_000, torch.zeros(4_000))]
    heard = [Heard("Go home.", True), Heard("", True, again=True), Heard("Now.", True)]
    joined = decoding_module._joined(stretches, heard, "en")
    assert joined == Heard("Go home. Now.", True, again=True)
    assert joined.segments == (Segment(0.0, 1.0, "Go home."), Segment(2.0, 0.5, ""), Segment(3.0, 0.25, "Now."))
    heard[2] = Heard("Now.", False)
    assert decoding_module._joined(stretches, heard, "zh") == Heard("Go home.Now.", False, again=True)


def test_each_of_a_batch_has_its_language(tiny_folder, tones, monkeypatch):
    model, processor = load_base(str(tiny_folder))
    speech = load_speech(tones)
    codes = ["de", "sw", "zh", "sw", "fr", "ka"]
    log_mel, frames = LogMel(processor.feature_extractor), AudioWindow().mel_frames(0)
    waveforms = [torch.from_numpy(read_audio(entry)) for entry in speech.audio()]
    known = {log_mel(one[None], frames)[0].sum().item(): code for one, code in zip(waveforms, codes, strict=True)}
    assert len(known) == 6

    def right(features) -> list[str]:
        return [known[row.sum().item()] for row in features]

    wrong = []
    real = decoding_module._generate

    def generate(model, features, mel_frames, language, *rest, **search):
        wrong.append(language != (right(features) if len(features) > 1 else right(features)[0]))
        return real(model, features, mel_frames, language, *rest, **search)

    monkeypatch.setattr(decoding_module, "_detected", lambda model, features, *rest: right(features))
    monkeypatch.setattr(decoding_module, "_generate", generate)
    options = {"window": AudioWindow(), "max_new_tokens": 2, "batch_size": 5, "decoding": Decoding(once=True)}
    assert len(list(transcribe_speech(model, processor, speech.audio(), language=None, **options))) == 6
    assert wrong == [False, False]


def test_transcripts_without_an_end_are_told(tiny_folder, tones, tmp_path, monkeypatch, endless):
    monkeypatch.setattr(decoding_module, "MAX_NEW_TOKENS", 4)
    endless["start"](endless["twice"])
    sets = named_sets([f"same={tones}"], "en")
    options = {"model": str(tiny_folder), "precision": "fp32", "batch_size": 2}
    evaluation = evaluate(sets, tmp_path / "out", **options, console=QUIET)
    written = json.loads((tmp_path / "out" / "results.json").read_text())["sets"]["same"]
    assert (written["cut_off"], written["decoded_again"]) == (1, 2)
    table = results_table([evaluation])
    of = f"{tiny_folder.name}, same"
    assert table.caption == f"transcripts without an end: 1 ({of}); decoded again: 2 ({of})"
    read = read_sets(tmp_path / "out", sets)["same"]
    assert read.heard == evaluation.sets[0].heard
    assert read.cut_off == [True] + [False] * 5
    endless["start"]([endless["once"][0][:1]] * 2)
    command = ["transcribe", "--model", str(tiny_folder), "--language", "en", str(tones / "u0.flac")]
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    assert f"cut off: {tones / 'u0.flac'}" in result.output
    assert result.stdout.startswith(f"{tones / 'u0.flac'}\t")  # and no progress


def test_transcribe_decodes_as_asked(tiny_folder, tones, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "fused_s2lora.training.transcribe.transcribe_speech",
        lambda *arguments, decoding, **options: asked.append(decoding) or [],
    )
    command = ["transcribe", str(tones), "--model", str(tiny_folder), "--decode-once", "--beams", "3"]
    CliRunner().invoke(app, command)
    assert asked == [Decoding(beams=3, once=True)]


def test_transcribe_refuses_and_skips(tiny_folder, tmp_path, short_decoding):
    soundfile.write(tmp_path / "first.wav", tone(0.4), 16_000)
    with pytest.raises(UserError, match=r"--output .*first\.wav: is named as a recording"):
        transcribe([tmp_path / "first.wav"], model=str(tiny_folder), output=tmp_path / "first.wav")
    with pytest.raises(UserError, match="the name of a recording is empty; give files or folders"):
        transcribe([""], model=str(tiny_folder))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match=r"pipe: is a device or a pipe; give a file as --output, or none"):
        transcribe([tmp_path / "first.wav"], model=str(tiny_folder), output=tmp_path / "pipe")
    (tmp_path / "first.wav").unlink()
    soundfile.write(tmp_path / "good.wav", tone(0.4), 16_000)
    soundfile.write(tmp_path / "nothing.wav", tone(0.0), 16_000)
    (tmp_path / "bad.mp3").write_bytes(b"no audio")
    soundfile.write(tmp_path / "damaged.flac", tone(3.0), 16_000)
    content = (tmp_path / "damaged.flac").read_bytes()
    (tmp_path / "damaged.flac").write_bytes(content[:20_000] + bytes(500) + content[20_500:])
    (tmp_path / "phone.m4a").write_bytes(b"not for libsndfile")
    (tmp_path / "gone.wav").symlink_to("nowhere.wav")
    for name in (b"\xfc.wav", b"a\tb.wav"):  # Latin-1, and what a TSV cannot have
        shutil.copy(tmp_path / "good.wav", os.fsencode(tmp_path) + b"/" + name)
    (tmp_path / "link.tsv").symlink_to("table.tsv")
    transcripts, skipped = transcribe([tmp_path], model=str(tiny_folder), language="en", output=tmp_path / "link.tsv")
    assert (tmp_path / "link.tsv").is_symlink()
    assert len((tmp_path / "table.tsv").read_text().splitlines()) == 2
    assert [transcript.file.name for transcript in transcripts] == ["good.wav"]
    assert sorted(Path(item.utterance).name for item in skipped) == [
        "\\udcfc.wav",
        "a\tb.wav",
        "bad.mp3",
        "damaged.flac",
        "gone.wav",
        "nothing.wav",
        "phone.m4a",
    ]
    assert all(item.reason.isprintable() for item in skipped)
    with pytest.raises(UserError, match=r"bad\.mp3: not readable as audio"):
        transcribe([tmp_path / "bad.mp3", tmp_path / "good.wav"], model=str(tiny_folder), strict=True)
    with pytest.raises(UserError, match="none of the 1 audio files is usable"):
        transcribe([tmp_path / "bad.mp3"], model=str(tiny_folder))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no audio in"):
        transcribe([tmp_path / "empty"], model=str(tiny_folder))
