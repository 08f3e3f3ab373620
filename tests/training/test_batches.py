"""Windows, features and batches."""

import numpy as np
import pytest
import torch
from transformers import WhisperFeatureExtractor, WhisperTokenizer

from fused_s2lora.training.audio_window import AudioWindow, window_of
from fused_s2lora.training.collate import SpeechCollator
from fused_s2lora.training.data import load_speech
from fused_s2lora.training.errors import UserError
from fused_s2lora.training.features import LogMel
from tests.training.speech import tone, write_folder


def test_window_lengths():
    assert AudioWindow("full").mel_frames(16_000) == 3000
    assert AudioWindow("trim", 64).mel_frames(320 * 100) == 2 * 164
    assert AudioWindow("trim", 64).mel_frames(320 * 100 + 1) == 2 * 165
    assert AudioWindow("trim", 64).mel_frames(480_000) == 3000
    assert AudioWindow("trim", 0).mel_frames(0) == 2
    with pytest.raises(UserError, match="'short' is not one of full, trim"):
        AudioWindow("short")
    with pytest.raises(UserError, match="negative"):
        AudioWindow("trim", -1)


def test_short_window_is_a_whisper_of_that_length(tiny_whisper):
    model, short = tiny_whisper(), tiny_whisper(max_source_positions=20)
    state = model.state_dict()
    state["model.encoder.embed_positions.weight"] = state["model.encoder.embed_positions.weight"][:20]
    short.load_state_dict(state)
    features, labels = torch.randn(2, 8, 40), torch.randint(3, 90, (2, 5))
    full = torch.randn(2, 8, 100)
    before = model(input_features=full, labels=labels).logits
    with window_of(model, 40):
        inside = model(input_features=features, labels=labels).logits
        generated = model.generate(input_features=features, max_new_tokens=5)
    torch.testing.assert_close(inside, short(input_features=features, labels=labels).logits, rtol=0, atol=0)
    assert torch.equal(generated, short.generate(input_features=features, max_new_tokens=5))
    assert torch.equal(model(input_features=full, labels=labels).logits, before)
    assert model.config.max_source_positions == 50
    with pytest.raises(ValueError, match="length 100"):
        model(input_features=features, labels=labels)


def test_window_is_restored_after_an_error(tiny_whisper):
    model = tiny_whisper()
    with pytest.raises(ValueError, match="expects the mel input"), window_of(model, 40):
        model(input_features=torch.randn(1, 8, 60), labels=torch.ones(1, 2, dtype=torch.long))
    assert model.config.max_source_positions == model.model.encoder.embed_positions.num_embeddings == 50
    for frames in (0, 41, 102):
        with pytest.raises(ValueError, match="not an even number between 2 and 100"), window_of(model, frames):
            pass


@pytest.mark.parametrize("mel_bins", [80, 128])
def test_features_are_those_of_transformers(mel_bins):
    extractor = WhisperFeatureExtractor(feature_size=mel_bins)
    waveforms = [tone(0.8), tone(1.3, pitch=330)]
    padded = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(waveform) for waveform in waveforms], batch_first=True)
    expected = extractor(waveforms, sampling_rate=16_000, return_tensors="pt").input_features
    log_mel = LogMel(extractor)
    torch.testing.assert_close(log_mel(padded, 3000), expected, rtol=0, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        short = log_mel(padded, 200)
    torch.testing.assert_close(short[..., :-2], expected[..., :198], rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="100 frames hold 16000"):
        log_mel(padded, 100)


@pytest.fixture(scope="module")
def tokenizer(packaged_base) -> WhisperTokenizer:
    tokenizer = WhisperTokenizer.from_pretrained(packaged_base)
    tokenizer.set_prefix_tokens(language="en", task="transcribe")
    return tokenizer


def test_batch(tmp_path, tokenizer):
    rows = list(load_speech(write_folder(tmp_path)).dataset)[:3]
    batch = SpeechCollator(tokenizer, AudioWindow("trim", 10))(rows)
    assert batch["waveforms"].shape == (3, round(0.7 * 16_000))
    assert batch["mel_frames"] == 2 * (35 + 10)
    assert not batch["waveforms"][0, 8000:].any()
    first = [token for token in batch["labels"][0].tolist() if token != -100]
    assert tokenizer.decode(first) == "<|en|><|transcribe|><|notimestamps|> We call it bear.<|endoftext|>"
    assert SpeechCollator(tokenizer, AudioWindow())(rows)["mel_frames"] == 3000


def test_the_decoder_reads_all_but_the_end_and_learns_all_but_the_start_and_the_padding(tmp_path, tokenizer):
    rows = list(load_speech(write_folder(tmp_path)).dataset)
    ids = [tokenizer(row["target"]).input_ids for row in rows]
    longest = max(map(len, ids)) - 1
    assert min(map(len, ids)) - 1 < longest < 16
    for multiple, width in ((1, longest), (longest, longest), (16, 16)):
        batch = SpeechCollator(tokenizer, AudioWindow(), token_multiple=multiple).tokens(rows)
        pad = [width - len(one) + 1 for one in ids]
        read = [one[:-1] + [tokenizer.pad_token_id] * more for one, more in zip(ids, pad, strict=True)]
        assert batch["decoder_input_ids"].tolist() == read
        assert batch["labels"].tolist() == [one[1:] + [-100] * more for one, more in zip(ids, pad, strict=True)]


def test_the_language_is_not_learnt_where_not_asked_for(tmp_path, tokenizer, packaged_base):
    rows = list(load_speech(write_folder(tmp_path)).dataset)[:3]
    usual = SpeechCollator(tokenizer, AudioWindow())(rows)
    batch = SpeechCollator(tokenizer, AudioWindow(), learn_language=False)(rows)
    assert torch.equal(batch["decoder_input_ids"], usual["decoder_input_ids"])
    assert torch.equal(batch["labels"][:, 1:], usual["labels"][:, 1:])
    assert usual["labels"][:, 0].tolist() == [tokenizer.convert_tokens_to_ids("<|en|>")] * 3
    assert batch["labels"][:, 0].tolist() == [-100] * 3
    english_only = WhisperTokenizer.from_pretrained(packaged_base)
    english_only.set_prefix_tokens(language=None, task=None)
    labels = SpeechCollator(english_only, AudioWindow(), learn_language=False)(rows)["labels"]
    assert labels[:, 0].tolist() == [tokenizer.convert_tokens_to_ids("<|notimestamps|>")] * 3


def test_share_of_full_windows(tmp_path, tokenizer):
    rows = list(load_speech(write_folder(tmp_path)).dataset)
    rng = np.random.default_rng(0)
    batches = [[rows[i] for i in rng.choice(len(rows), 3, replace=False)] for _ in range(40)]

    def frames(seed: int) -> list[int]:
        collate = SpeechCollator(tokenizer, AudioWindow("trim"), full_share=0.2, seed=seed)
        return [collate(batch)["mel_frames"] for batch in batches]

    share = np.mean([count == 3000 for count in frames(0)])
    assert 0.05 < share < 0.4
    assert frames(0) == frames(0)
    assert frames(0) != frames(1)
