"""Speech in several languages: what each utterance's prompt says, and what the adapter remembers."""

import json

import pytest
from huggingface_hub import ModelCard

from fused_s2lora.training import fitting
from fused_s2lora.training.collate import SpeechCollator
from fused_s2lora.training.errors import UserError
from fused_s2lora.training.models import load_base, remembered_speech
from fused_s2lora.training.sets import training_speech
from fused_s2lora.training.text import source_and_language
from fused_s2lora.training.train import train
from tests.training.comparisons import QUIET
from tests.training.speech import TEXTS, write_folder

MANDARIN = ["今天天气很好", "我们回家吧"]


@pytest.fixture
def prompts(monkeypatch):
    """(language of the prompt, text) of every utterance that is trained on."""
    seen = []

    class Spied(SpeechCollator):
        def tokens(self, rows):
            batch = super().tokens(rows)
            for row, read, write in zip(rows, batch["decoder_input_ids"], batch["labels"], strict=True):
                start, language, *_ = self._tokenizer.convert_ids_to_tokens(read)
                assert start == "<|startoftranscript|>"
                assert self._tokenizer.convert_ids_to_tokens([write[0]]) == [language]
                seen.append((language.strip("<|>"), row["target"]))
            return batch

    monkeypatch.setattr(fitting, "SpeechCollator", Spied)
    return seen


def test_every_utterance_is_prompted_in_its_own_language(options, tones, tmp_path, prompts):
    other = write_folder(tmp_path / "zh", MANDARIN)
    run = tmp_path / "run"
    asked = options(run, data=[str(tones), f"{other}@Chinese"], dev=f"{other}@zh", epochs=1.0)
    train(asked, console=QUIET)
    assert {text: language for language, text in prompts} == dict.fromkeys(MANDARIN, "zh") | {
        f" {text.capitalize()}.": "en" for text in TEXTS
    }
    assert remembered_speech(run / "adapter")["language"] is None
    assert json.loads((run / "summary.json").read_text())["languages"] == ["en", "zh"]
    card = ModelCard.load(run / "adapter" / "README.md")
    assert card.data.language == ["en", "zh"]
    assert "adapted to English and Chinese speech" in card.text
    assert str(tmp_path) not in card.content
    train(asked, console=QUIET)  # already trained


def test_speech_all_in_one_other_language(options, tmp_path, prompts):
    other = write_folder(tmp_path / "zh", MANDARIN)
    train(options(tmp_path / "run", data=[f"{other}@zh"], epochs=1.0), console=QUIET)
    assert sorted(prompts) == sorted(("zh", text) for text in MANDARIN)
    assert remembered_speech(tmp_path / "run" / "adapter")["language"] == "zh"


def test_a_model_without_an_adapter_detects_them(options, tones, tmp_path):
    other = write_folder(tmp_path / "zh", MANDARIN)
    asked = options(tmp_path / "run", data=[str(tones), f"{other}@zh"], method="bitfit", max_steps=1)
    train(asked, console=QUIET)
    model, _ = load_base(str(tmp_path / "run" / "model"))
    assert model.generation_config.language is None


def test_a_path_may_have_an_at_in_it(options, tmp_path):
    speech, _ = training_speech(options(tmp_path / "run", data=[str(write_folder(tmp_path / "child@home"))]))
    assert "prompt_language" not in speech.dataset.column_names
    assert source_and_language(f"{tmp_path}/child@home@de") == (f"{tmp_path}/child@home", "de")
    assert source_and_language("me@there/set") == ("me@there/set", "")


def test_what_cannot_be_is_refused(options, tones, tmp_path):
    with pytest.raises(UserError, match="language 'elvish' is not one Whisper knows"):
        options(tmp_path / "run", data=[f"{tones}@elvish"])
    with pytest.raises(UserError, match="names the language of the speech alone"):
        options(tmp_path / "run", data=[str(tones), f"{tones}@zh"], keep_share=0.5, keep_languages=["zh", "en"])
    options(tmp_path / "run", data=[f"{tones}@zh"], keep_share=0.5, keep_languages=["en"])
    every = [f"{tones}@{code}" for code in ("zh", "de", "es", "ru", "fr", "pt", "ko", "ja")]
    with pytest.raises(UserError, match="the speech is in all; add --keep-languages"):
        train(options(tmp_path / "run", data=every, keep_share=0.5), console=QUIET)


def test_fresh_does_not_delete_speech_of_another_language(options, tones, tmp_path):
    train(options(tmp_path / "run", max_steps=1), console=QUIET)
    inside = write_folder(tmp_path / "run" / "speech", MANDARIN)
    with pytest.raises(UserError, match=r"--fresh would delete .*speech with it"):
        train(options(tmp_path / "run", data=[str(tones), f"{inside}@zh"], max_steps=1), fresh=True, console=QUIET)
    assert inside.is_dir()
