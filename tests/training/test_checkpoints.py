"""Checkpoints as people have them: files of several Whispers in one folder, and settings that others left in them."""

import itertools
import json
import shutil

import pytest
import torch
from transformers import WhisperForConditionalGeneration

from fused_s2lora.training.audio_window import AudioWindow
from fused_s2lora.training.data import load_speech
from fused_s2lora.training.decoding import Decoding, Heard, transcribe_speech
from fused_s2lora.training.errors import UserError
from fused_s2lora.training.models import load_base, remembered_speech
from fused_s2lora.training.train import train
from tests.training.comparisons import QUIET


@pytest.fixture
def checkpoint(tiny_folder, tmp_path):
    """A copy of the tiny Whisper's folder with other values in its files; None takes one away."""

    def make(name: str = "model", **changes) -> str:
        folder = tmp_path / name
        shutil.copytree(tiny_folder, folder)
        for stem, values in changes.items():
            file = folder / f"{stem}.json"
            content = json.loads(file.read_text()) | values
            file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
        return str(folder)

    return make


ENGLISH_ONLY = {"is_multilingual": False, "lang_to_id": None, "task_to_id": None}
TASKS = {"transcribe": 1101, "translate": 1102}  # each other's
MELS_128 = {"feature_extractor_type": "WhisperFeatureExtractor", "feature_size": 128}


@pytest.mark.parametrize(
    ("file", "values", "told"),
    [
        ("generation_config", {"task_to_id": TASKS}, r"has <\|transcribe\|> at 1102, its .* at 1101"),
        ("generation_config", {"decoder_start_token_id": 1000}, r"has <\|startoftranscript\|> at 1001"),
        ("generation_config", {"no_timestamps_token_id": 1105}, r"has <\|notimestamps\|> at 1106"),
        ("generation_config", {"lang_to_id": None}, "knows no languages and tasks"),
        ("generation_config", {"no_timestamps_token_id": None}, "knows no languages and tasks"),
        ("processor_config", {"feature_extractor": MELS_128}, "makes 128 mel bins and it reads 80"),
    ],
)
def test_files_of_different_whispers_are_refused(checkpoint, file, values, told):
    with pytest.raises(UserError, match=told):
        load_base(checkpoint(**{file: values}))


def prompts(monkeypatch, options, output, model, **fields) -> list[list[int]]:
    """The tokens before the text that training reads, and that decoding begins with."""
    seen: dict[bool, list[int]] = {}
    forward = WhisperForConditionalGeneration.forward

    def watched(self, *args, **kwargs):
        seen.setdefault(kwargs.get("labels") is not None, kwargs["decoder_input_ids"][0].tolist())
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(WhisperForConditionalGeneration, "forward", watched)
    train(options(output, model=model, max_steps=1, before=False, **fields), console=QUIET)
    end = load_base(model)[1].tokenizer.eos_token_id  # the last before those of the prompt
    return [list(itertools.takewhile(lambda token: token > end, seen[training])) for training in (True, False)]


@pytest.mark.parametrize(
    ("english_only", "tokenizer"),
    [
        (True, {"language": "english", "task": "transcribe"}),
        (True, {}),
        (False, {"predict_timestamps": True}),
        (False, {"language": "german", "task": "translate"}),
    ],
)
def test_training_and_decoding_have_one_prompt(
    checkpoint, options, tones, tmp_path, monkeypatch, short_decoding, english_only, tokenizer
):
    """Whatever the tokenizer was saved with, and whatever the generation configuration asks for besides."""
    generation = ENGLISH_ONLY | {"language": "<|en|>", "task": "transcribe"} if english_only else {"language": "<|de|>"}
    generation |= {"return_timestamps": True, "logprob_threshold": -1.0, "no_speech_threshold": 0.6}
    generation |= {"return_dict_in_generate": True, "compression_ratio_threshold": 1.35}
    model = checkpoint(generation_config=generation, tokenizer_config=tokenizer)
    ids = load_base(model)[1].tokenizer.convert_tokens_to_ids
    expected = ["<|startoftranscript|>", *([] if english_only else ["<|en|>", "<|transcribe|>"]), "<|notimestamps|>"]
    monkeypatch.setattr("fused_s2lora.training.decoding.MAX_NEW_TOKENS", 1)
    found = prompts(monkeypatch, options, tmp_path / "run", model, test=[f"same={tones}"], decode_once=True)
    assert found == [ids(expected)] * 2
    assert remembered_speech(tmp_path / "run" / "adapter")["language"] == (None if english_only else "en")


@pytest.mark.parametrize("pad", [1000, 999, None])
def test_an_end_is_heard_whatever_the_model_is_padded_with(checkpoint, tones, monkeypatch, pad):
    """Two utterances, of which the first ends after two tokens and the second never."""
    model, processor = load_base(checkpoint(generation_config={"pad_token_id": pad}))
    end, word = processor.tokenizer.eos_token_id, processor.tokenizer(" the").input_ids[-2]
    steps = []

    def say(module, inputs, logits):
        steps.append(1)
        logits = torch.full_like(logits, -100.0)
        logits[:, -1, word] = 0.0
        if len(steps) > 2:
            logits[0, -1, end] = 100.0
        return logits

    model.proj_out.register_forward_hook(say)
    monkeypatch.setattr("fused_s2lora.training.decoding.MAX_NEW_TOKENS", 6)
    audio = load_speech(str(tones)).dataset["audio"][:2]
    heard = transcribe_speech(
        model, processor, audio, window=AudioWindow("trim"), language="en", decoding=Decoding(once=True)
    )
    assert list(heard) == [Heard("the the", True), Heard("the the the the the the", False)]


def test_an_english_only_model_does_not_translate(checkpoint, options, tmp_path):
    with pytest.raises(UserError, match=r"--task translate with .*, an English-only model"):
        train(options(tmp_path / "run", model=checkpoint(generation_config=ENGLISH_ONLY), task="translate"))
    assert not (tmp_path / "run").exists()
