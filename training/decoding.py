"""Transcripts of speech of any length: greedy or by beam search, and once more where a transcript does not end."""

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import nn
from transformers import WhisperProcessor
from transformers.models.whisper.modeling_whisper import WhisperAttention

from .audio import SAMPLE_RATE, read_audio
from .audio_window import AudioWindow, window_of
from .data import MAX_AUDIO_S
from .errors import UserError
from .features import LogMel
from .precision import autocast
from .segmentation import speech_segments
from .text import UNSPACED_LANGUAGES

MAX_NEW_TOKENS = 224  # half of Whisper's text context, as in its authors' own decoding; twice that if need be
_PROMPT_TOKENS = 4
_BEAMS_AGAIN = 5
_TOKENS_ONCE = 3  # that may not come twice in a second decoding
_SPELT_IN_BYTES = 1.5  # tokens a character, above which a script is written mostly in bytes
_CHARACTERS_ONCE = 10  # that may not come twice there


@dataclass(frozen=True)
class Decoding:
    """How transcripts are searched for: the most probable token each time, or the best of so many beams.

    A transcript that has not come to its end after `MAX_NEW_TOKENS` and does not repeat itself there, as a long one in
    a script that Whisper writes in bytes, is decoded to all that Whisper's text context holds. One that has no end then
    mostly repeats itself. Unless `once`, it is decoded again with five beams in which no three tokens come twice, or no
    ten characters in such a script, and what is heard then is kept.

    Raises:
        UserError: no beam.
    """

    beams: int = 1
    once: bool = False

    def __post_init__(self) -> None:
        if self.beams < 1:
            raise UserError(f"--beams is {self.beams}; give at least 1")


@dataclass(frozen=True)
class Segment:
    """What was heard in one stretch of a recording; offset and duration in seconds."""

    offset_s: float
    duration_s: float
    text: str


@dataclass(frozen=True)
class Heard:
    """A transcript, whether it came to its end before the most tokens that are decoded, whether it is a second.

    `segments` are the stretches that were heard each by itself, one where the recording was not cut.
    """

    text: str
    ended: bool
    again: bool = False
    segments: tuple[Segment, ...] = field(default=(), compare=False)  # not in a run's tables


def transcribe_speech(
    model: nn.Module,
    processor: WhisperProcessor,
    audio: Sequence[dict[str, Any]],
    *,
    window: AudioWindow,
    language: str | None,
    task: str | None = None,
    decoding: Decoding | None = None,
    batch_size: int = 8,
    dtype: torch.dtype | None = None,
    longest_s: float = MAX_AUDIO_S,
    max_new_tokens: int | None = None,
    on_batch: Callable[[float], None] = lambda utterances: None,
) -> list[Heard]:
    """Transcripts of audio entries ("path" or "bytes"), in their order.

    What is longer than `longest_s`, at most 30 s, is cut at its pauses (`speech_segments`) and heard in segments.
    These are batched by length, and each batch has the window of its longest. `language` and `task` are ignored by
    English-only models; None is what the model's generation configuration says, else the language is detected and the
    task is to transcribe. `decoding` is greedy by default. `dtype` runs the model under autocast. Decoding stops at
    `max_new_tokens`, if given; else as `Decoding` says. `on_batch` is told how many utterances were done, of one in
    segments a part for each.

    Raises:
        UserError: an audio file cannot be read; no utterance a batch.
    """
    if batch_size < 1:
        raise UserError(f"--eval-batch-size is {batch_size}; give at least 1")
    recordings = [_stretches(read_audio(entry), longest_s) for entry in audio]
    waveforms = [waveform for stretches in recordings for _, waveform in stretches]
    shares = [1 / len(stretches) for stretches in recordings for _ in stretches]
    on_batch(sum(not stretches for stretches in recordings))  # in which nothing is said
    decoding = decoding or Decoding()
    context: int = model.config.max_target_positions  # type: ignore[union-attr, assignment]
    pad: int = processor.tokenizer.pad_token_id
    model = _for_decoding(model, dtype)
    device = next(model.parameters()).device
    log_mel = LogMel(processor.feature_extractor).to(device)
    limit = max_new_tokens or MAX_NEW_TOKENS
    longest = limit if max_new_tokens else min(2 * limit, context - _PROMPT_TOKENS)
    order = sorted(range(len(waveforms)), key=lambda index: len(waveforms[index]))
    heard: dict[int, Heard] = {}
    model.eval()

    def hear(
        batch: list[int], features: torch.Tensor, mel_frames: int, most: int, *, again: bool = False, **search: int
    ) -> dict[int, list[int]]:
        """Hears a batch; the tokens of those that have no end, by their row."""
        tokens = _generate(model, features, mel_frames, language, task, dtype, pad, max_new_tokens=most, **search)
        decoded = processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        # What ended has no end token left, but padding up to the longest of the batch, or is the longest itself.
        ended = (tokens[:, -1] == pad) | (tokens.shape[1] < most)
        for index, text, whole in zip(batch, decoded, ended.tolist(), strict=True):
            heard[index] = Heard(text.strip(), whole, again)
        return {row: tokens[row].tolist() for row in (~ended).nonzero().flatten().tolist()}

    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        padded = torch.nn.utils.rnn.pad_sequence([waveforms[index] for index in batch], batch_first=True)
        mel_frames = window.mel_frames(padded.shape[1])
        features = log_mel(padded.to(device), mel_frames)
        endless = hear(batch, features, mel_frames, limit, num_beams=decoding.beams)
        long = [row for row, tokens in endless.items() if not _repeats(tokens, limit // 4)]
        if long and longest > limit:
            some = [batch[row] for row in long]
            left = hear(some, features[long], mel_frames, longest, num_beams=decoding.beams)
            endless = {row: tokens for row, tokens in endless.items() if row not in long}
            endless |= {long[row]: tokens for row, tokens in left.items()}
        if endless and not decoding.once:
            rows = sorted(endless)
            once = max(_tokens_once(heard[batch[row]].text, endless[row]) for row in rows)
            search = {"num_beams": _BEAMS_AGAIN, "no_repeat_ngram_size": once}
            hear([batch[row] for row in rows], features[rows], mel_frames, longest, again=True, **search)
        on_batch(sum(shares[index] for index in batch))
    in_order = (heard[index] for index in range(len(waveforms)))
    return [_joined(stretches, list(islice(in_order, len(stretches))), language) for stretches in recordings]


def _stretches(samples: np.ndarray, longest_s: float) -> list[tuple[int, torch.Tensor]]:
    """What is to be heard of a recording, and the sample each begins at: all of it, or its segments if it is longer."""
    whole = len(samples) <= longest_s * SAMPLE_RATE
    ranges = [(0, len(samples))] if whole else speech_segments(samples, longest_s)
    return [(start, torch.from_numpy(samples[start:end])) for start, end in ranges]


def _joined(stretches: Sequence[tuple[int, torch.Tensor]], heard: Sequence[Heard], language: str | None) -> Heard:
    """One recording's transcript from those of its stretches."""
    between = "" if language in UNSPACED_LANGUAGES else " "
    text = between.join(one.text for one in heard if one.text)
    segments = tuple(
        Segment(start / SAMPLE_RATE, len(waveform) / SAMPLE_RATE, one.text)
        for (start, waveform), one in zip(stretches, heard, strict=True)
    )
    return Heard(text, all(one.ended for one in heard), any(one.again for one in heard), segments)


def _repeats(tokens: list[int], least: int) -> bool:
    """Whether the last `least` tokens or more are one sequence over and over, at least three times."""
    for period in range(1, len(tokens) // 3 + 1):
        tail = tokens[-max(3 * period, least) :]
        if tail[period:] == tail[:-period]:
            return True
    return False


def _tokens_once(text: str, tokens: list[int]) -> int:
    """How many tokens may not come twice: in a script that Whisper writes in bytes, three are but a letter or two."""
    per_character = len(tokens) / max(1, len(text))
    return _TOKENS_ONCE if per_character <= _SPELT_IN_BYTES else math.ceil(_CHARACTERS_ONCE * per_character)


def _for_decoding(model: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """A copy with the adapter merged and every linear map in `dtype`, to be run under autocast to that dtype.

    It computes what the model computes under autocast, but does not add the update and cast every weight again at every
    token. In float32 (None) only the adapter is merged.
    """
    whole = dtype is None or dtype == torch.float32
    if whole and not isinstance(model, PeftModel):
        return model
    decoder: Any = copy.deepcopy(model)
    if isinstance(decoder, PeftModel):
        decoder = decoder.merge_and_unload()
    if whole:
        return decoder
    for module in decoder.modules():
        if isinstance(module, nn.Linear):
            # A new parameter, for the last one's is the embedding's too.
            module.weight = nn.Parameter(module.weight.detach().to(dtype), requires_grad=False)
            if module.bias is not None:
                module.bias = nn.Parameter(module.bias.detach().to(dtype), requires_grad=False)
    if next(decoder.parameters()).device.type == "cpu":
        # PyTorch's fused attention in half precision takes a CPU several times as long for one query.
        plain = copy.deepcopy(decoder.config)
        plain._attn_implementation = "eager"
        decoder.get_decoder().config = plain  # which makes the causal mask; "sdpa" would be given none for the prompt
        for module in decoder.get_decoder().modules():
            if isinstance(module, WhisperAttention):
                module.config = plain
    return decoder


@contextlib.contextmanager
def _configured(model: Any, pad: int) -> Iterator[Any]:
    """The model's generation configuration, for now without what would give another prompt than in training, return
    something else, or hide where a transcript ends."""
    found = model.generation_config
    model.generation_config = configured = copy.deepcopy(found)
    configured.update(return_timestamps=False, return_dict_in_generate=False, pad_token_id=pad)
    others = ["compression_ratio_threshold", "logprob_threshold", "no_speech_threshold"]
    others += [] if configured.is_multilingual else ["language", "task"]
    for name in others:
        if hasattr(configured, name):
            setattr(configured, name, None)
    try:
        yield configured
    finally:
        model.generation_config = found


@torch.inference_mode()
def _generate(
    model: Any,
    features: torch.Tensor,
    mel_frames: int,
    language: str | None,
    task: str | None,
    dtype: torch.dtype | None,
    pad: int,
    **search: int,
) -> torch.Tensor:
    weight_dtype = next(model.parameters()).dtype
    with _configured(model, pad) as configured, window_of(model, mel_frames), autocast(features.device, dtype):
        task = task or getattr(configured, "task", None) or "transcribe"
        prompt = {"language": language, "task": task} if configured.is_multilingual else {}
        return model.generate(
            input_features=features.to(weight_dtype),
            attention_mask=torch.ones(features.shape[0], mel_frames, dtype=torch.long, device=features.device),
            do_sample=False,
            **prompt,
            **search,
        )
