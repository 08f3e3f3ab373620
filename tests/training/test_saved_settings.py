"""Models that were saved with settings of their own for generating, which decoding takes or puts aside."""

import copy

import pytest
import torch
from transformers import WhisperForConditionalGeneration

from fused_s2lora.training import decoding as decoding_module
from fused_s2lora.training.audio import read_audio
from fused_s2lora.training.audio_window import AudioWindow
from fused_s2lora.training.data import load_speech
from fused_s2lora.training.decoding import Decoding, Heard, Segment, transcribe_speech
from fused_s2lora.training.models import load_base


def test_time_stamps_that_were_not_asked_for_are_not_heard_from_again(tiny_folder, tones, monkeypatch):
    """Of a model that writes nothing else, which would be for ever."""
    model, processor = load_base(str(tiny_folder))
    embedding, last = model.get_decoder().embed_tokens.weight, model.get_decoder().layer_norm
    stamp = processor.tokenizer.convert_tokens_to_ids("<|0.00|>")
    with torch.no_grad():
        last.weight.zero_()
        last.bias.copy_(100 * embedding[stamp])
    real, passes = WhisperForConditionalGeneration.generate_with_fallback, []

    def counted(*given, **options):
        passes.append(len(options["decoder_input_ids"]))
        assert len(passes) == 1
        return real(*given, **options)

    monkeypatch.setattr(WhisperForConditionalGeneration, "generate_with_fallback", counted)
    speech = load_speech(tones, limit=2)
    options = {"window": AudioWindow(), "language": "en", "max_new_tokens": 6, "decoding": Decoding(once=True)}
    assert list(transcribe_speech(model, processor, speech.audio(), **options)) == [
        Heard("", ended=False, segments=(Segment(0.0, len(read_audio(entry)) / 16_000, ""),))
        for entry in speech.audio()
    ]
    assert passes == [2]


@pytest.mark.parametrize("beams", [1, 2])
def test_one_transcript_is_returned_of_each(tiny_folder, tones, beams):
    """Also by a model that was saved to return several."""
    model, processor = load_base(str(tiny_folder))
    speech = load_speech(tones, limit=2)
    options = {"window": AudioWindow("trim"), "language": "en", "max_new_tokens": 4}
    options["decoding"] = Decoding(beams=beams, once=True)
    expected = list(transcribe_speech(model, processor, speech.audio(), **options))
    model.generation_config.num_return_sequences = 2
    assert list(transcribe_speech(model, processor, speech.audio(), **options)) == expected


def test_a_model_that_was_saved_to_search_otherwise_is_decoded_as_asked(tiny_folder, tones):
    """Not refused by transformers, and not stopped after a time."""
    model, processor = load_base(str(tiny_folder))
    speech, own = load_speech(tones, limit=2), model.generation_config
    options = {"window": AudioWindow("trim", 0), "language": "en", "max_new_tokens": 3}

    def heard(beams: int = 1) -> list[Heard]:
        decoding = Decoding(beams=beams, once=True)
        return list(transcribe_speech(model, processor, speech.audio(), decoding=decoding, **options))

    expected = {beams: heard(beams) for beams in (1, 2)}
    for beams, setting in (
        (1, {"penalty_alpha": 0.6, "top_k": 4}),
        (1, {"dola_layers": "high"}),
        (1, {"prompt_lookup_num_tokens": 3}),
        (1, {"assistant_early_exit": 1}),
        (1, {"use_mtp": True}),
        (1, {"guidance_scale": 2.0}),
        (1, {"stop_strings": ["the"]}),
        (1, {"token_healing": True}),
        (1, {"is_assistant": True, "assistant_confidence_threshold": 0.4}),
        (1, {"cache_implementation": "quantized"}),
        (1, {"max_time": 1e-4}),
        (2, {"num_beam_groups": 2, "diversity_penalty": 0.5}),
        (2, {"force_words_ids": [[5]]}),
        (2, {"constraints": [1]}),
        (2, {"low_memory": True}),
    ):
        model.generation_config = copy.deepcopy(own)
        model.generation_config.update(**setting)
        assert heard(beams) == expected[beams], setting


def test_the_language_asked_for_comes_before_the_models_own(tiny_folder, tones, monkeypatch):
    model, processor = load_base(str(tiny_folder))
    model.generation_config.language = "<|de|>"
    asked, ended = [], torch.tensor([[processor.tokenizer.pad_token_id]])
    monkeypatch.setattr(decoding_module, "_generate", lambda *given, **_: asked.append(given[3]) or ended)
    for language in ("sw", None):
        audio = load_speech(tones).dataset["audio"][:1]
        list(transcribe_speech(model, processor, audio, window=AudioWindow(), language=language))
    assert asked == ["sw", "de"]


def test_a_generation_configuration_is_given_back(tiny_folder):
    """A model that was scored before it is trained is saved as it was, also after a Ctrl-C."""
    model, _ = load_base(str(tiny_folder))
    own = model.generation_config
    own.return_timestamps = True

    def stop():
        assert not model.generation_config.return_timestamps
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), decoding_module.as_trained(model, pad=7):
        stop()
    assert model.generation_config is own
    assert own.return_timestamps
