"""Transcripts of speech of any length: greedy or by beam search, and once more where a transcript does not end."""

import contextlib
import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import nn
from transformers import WhisperProcessor
from transformers.models.whisper.modeling_whisper import WhisperAttention

from fused_s2lora import S2LoraModel
from fused_s2lora.quantized import dequantize_maps, is_quantized

from .audio import SAMPLE_RATE, read_audio
from .audio_window import AudioWindow, window_of
from .data import MAX_AUDIO_S
from .errors import UserError
from .features import LogMel
from .precision import autocast
from .segmentation import speech_segments
from .text import UNSPACED_LANGUAGES, language_code

MAX_NEW_TOKENS = 224  # half of Whisper's text context, as in its authors' own decoding; twice that if need be
_PROMPT_TOKENS = 4
_BEAMS_AGAIN = 5
_MOST_BEAMS = 1000  # for each of which all is held that the decoder has read
_TOKENS_ONCE = 3  # that may not come twice in a second decoding
_SPELT_IN_BYTES = 1.5  # tokens a character, above which a script is written mostly in bytes
_MOST_BYTES = 4  # of a character
_CHARACTERS_ONCE = 10  # that may not come twice there
# Settings of other searches than those of `Decoding`, which mostly lack something here, and of an end that is none.
_OTHER_SEARCHES = (
    "assistant_early_exit", "cache_implementation", "constraints", "dola_layers", "force_words_ids", "guidance_scale",
    "is_assistant", "low_memory", "max_time", "num_beam_groups", "penalty_alpha", "prompt_lookup_num_tokens",
    "stop_strings", "token_healing", "use_mtp",
)  # fmt: skip


@dataclass(frozen=True)
class Decoding:
    """How transcripts are searched for: the most probable token each time, or the best of so many beams.

    A transcript that has not come to its end after `MAX_NEW_TOKENS` and does not repeat itself there, as a long one in
    a script that Whisper writes in bytes, is decoded to all that Whisper's text context holds. One that has no end then
    mostly repeats itself. Unless `once`, it is decoded again with five beams in which no three tokens come twice, or no
    ten characters in such a script, and what is heard then is kept.

    Raises:
        UserError: no beam, or more than a thousand.
    """

    beams: int = 1
    once: bool = False

    def __post_init__(self) -> None:
        if self.beams < 1:
            raise UserError(f"--beams is {self.beams}; give at least 1")
        if self.beams > _MOST_BEAMS:
            raise UserError(f"--beams is {self.beams}; give at most {_MOST_BEAMS}")


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
    audio: Iterable[dict[str, Any]],
    *,
    window: AudioWindow,
    language: str | None,
    task: str | None = None,
    decoding: Decoding | None = None,
    batch_size: int = 8,
    dtype: torch.dtype | None = None,
    longest_s: float = MAX_AUDIO_S,
    at_once_s: float = 3600.0,
    max_new_tokens: int | None = None,
    on_batch: Callable[[float], None] = lambda utterances: None,
) -> Iterator[Heard]:
    """Transcripts of audio entries ("path" or "bytes"), in their order, about `at_once_s` seconds of audio at a time.

    What is longer than `longest_s`, at most 30 s, is cut at its pauses (`speech_segments`) and heard in segments.
    Those read at once are batched by length, and each batch has the window of its longest. `language` and `task` are
    ignored by English-only models; None is what the model's generation configuration says, else the language is
    detected, of a recording in its first segment, and the task is to transcribe. `decoding` is greedy by default.
    `dtype` runs the model under autocast. Decoding stops at `max_new_tokens`, if given; else as `Decoding` says.
    `on_batch` is told how many utterances were done, of one in segments a part for each.

    Raises:
        UserError: no utterance a batch; from the iterator, an audio file cannot be read.
    """
    if batch_size < 1:
        raise UserError(f"--eval-batch-size is {batch_size}; give at least 1")
    transcriber = _Transcriber(
        _for_decoding(model, dtype), processor, window, language, task, decoding or Decoding(), batch_size, dtype,
        max_new_tokens,
    )  # fmt: skip
    return chain.from_iterable(transcriber(part, longest_s, on_batch) for part in _in_parts(audio, at_once_s))


def _in_parts(audio: Iterable[dict[str, Any]], at_once_s: float) -> Iterator[list[np.ndarray]]:
    """What the entries hold, in parts of about so many seconds."""
    part: list[np.ndarray] = []
    length = 0
    for samples in map(read_audio, audio):
        part.append(samples)
        length += len(samples)
        if length >= at_once_s * SAMPLE_RATE:
            yield part
            part, length = [], 0
    if part:
        yield part


class _Transcriber:
    """What `transcribe_speech` does with the audio that it reads at once."""

    def __init__(
        self,
        model: Any,
        processor: WhisperProcessor,
        window: AudioWindow,
        language: str | None,
        task: str | None,
        decoding: Decoding,
        batch_size: int,
        dtype: torch.dtype | None,
        max_new_tokens: int | None,
    ) -> None:
        self.model = model.eval()
        self.tokenizer = processor.tokenizer
        self.window, self.language, self.task, self.decoding = window, language, task, decoding
        self.batch_size, self.dtype = batch_size, dtype
        self.device = next(model.parameters()).device
        self.log_mel = LogMel(processor.feature_extractor).to(self.device)
        self.limit = max_new_tokens or MAX_NEW_TOKENS
        context = model.config.max_target_positions
        self.longest = self.limit if max_new_tokens else min(2 * self.limit, context - _PROMPT_TOKENS)

    def __call__(
        self, samples: list[np.ndarray], longest_s: float, on_batch: Callable[[float], None]
    ) -> Iterator[Heard]:
        recordings = [_stretches(one, longest_s) for one in samples]
        languages = self._languages(recordings)
        waveforms = [waveform for stretches in recordings for _, waveform in stretches]
        spoken = [language for stretches, language in zip(recordings, languages, strict=True) for _ in stretches]
        shares = [1 / len(stretches) for stretches in recordings for _ in stretches]
        on_batch(sum(not stretches for stretches in recordings))  # in which nothing is said
        heard: dict[int, Heard] = {}
        for batch in self._batches(waveforms):
            heard |= self._hear_batch(batch, waveforms, spoken)
            on_batch(sum(shares[index] for index in batch))
        in_order = (heard[index] for index in range(len(waveforms)))
        for stretches, language in zip(recordings, languages, strict=True):
            yield _joined(stretches, list(islice(in_order, len(stretches))), language)

    def _batches(self, waveforms: Sequence[torch.Tensor]) -> Iterator[list[int]]:
        order = sorted(range(len(waveforms)), key=lambda index: len(waveforms[index]))
        for start in range(0, len(order), self.batch_size):
            yield order[start : start + self.batch_size]

    def _features(self, waveforms: list[torch.Tensor]) -> tuple[torch.Tensor, int]:
        """Log-mel features in the window of the longest, and that window."""
        padded = torch.nn.utils.rnn.pad_sequence(waveforms, batch_first=True)
        mel_frames = self.window.mel_frames(padded.shape[1])
        return self.log_mel(padded.to(self.device), mel_frames), mel_frames

    def _languages(self, recordings: Sequence[list[tuple[int, torch.Tensor]]]) -> list[str | None]:
        """The language of each recording: the one that is known, else what its first stretch sounds like."""
        configured = self.model.generation_config
        language = self.language or getattr(configured, "language", None)
        if language is not None:
            language = language_code(language.strip("<|>"))
        languages = [language] * len(recordings)
        if language is not None or not configured.is_multilingual:
            return languages
        spoken = [index for index, stretches in enumerate(recordings) if stretches]
        first = [recordings[index][0][1] for index in spoken]
        for batch in self._batches(first):
            features, mel_frames = self._features([first[index] for index in batch])
            for index, found in zip(batch, _detected(self.model, features, mel_frames, self.dtype), strict=True):
                languages[spoken[index]] = found
        return languages

    def _hear_batch(
        self, batch: list[int], waveforms: Sequence[torch.Tensor], spoken: Sequence[str | None]
    ) -> dict[int, Heard]:
        features, mel_frames = self._features([waveforms[index] for index in batch])
        heard: dict[int, Heard] = {}

        def hear(rows: list[int], most: int, *, again: bool = False, **search: int) -> dict[int, list[int]]:
            """Hears these rows of the batch; the tokens of those that have no end, by their row."""
            languages = [spoken[batch[row]] for row in rows]
            asked: Any = languages[0] if len(set(languages)) == 1 else languages
            tokens = _generate(
                self.model, features[rows], mel_frames, asked, self.task, self.dtype, self.tokenizer.pad_token_id,
                max_new_tokens=most, **search,
            )  # fmt: skip
            decoded = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
            # What ended has its end token, which is that of padding too, and padding up to the longest of them.
            ended = (tokens[:, -1] == self.tokenizer.pad_token_id) | (tokens.shape[1] < most)
            for row, text, whole in zip(rows, decoded, ended.tolist(), strict=True):
                heard[batch[row]] = Heard(text.strip(), whole, again)
            return {rows[index]: tokens[index].tolist() for index in (~ended).nonzero().flatten().tolist()}

        endless = hear([*range(len(batch))], self.limit, num_beams=self.decoding.beams)
        long = [row for row, tokens in endless.items() if not _repeats(tokens, self.limit // 4)]
        if long and self.longest > self.limit:
            left = hear(long, self.longest, num_beams=self.decoding.beams)
            endless = {row: tokens for row, tokens in endless.items() if row not in long} | left
        if endless and not self.decoding.once:
            alike: dict[int, list[int]] = {}
            for row in sorted(endless):
                alike.setdefault(_tokens_once(heard[batch[row]].text, endless[row]), []).append(row)
            for once, rows in alike.items():
                hear(rows, self.longest, again=True, num_beams=_BEAMS_AGAIN, no_repeat_ngram_size=once)
        return heard


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
    """How many tokens may not come twice: in a script that Whisper writes in bytes, three are but a letter or two.

    Where there are more than the bytes of a character for each, most are blanks or marks that are no text.
    """
    per_character = len(tokens) / max(1, len(text))
    in_bytes = _SPELT_IN_BYTES < per_character <= _MOST_BYTES
    return math.ceil(_CHARACTERS_ONCE * per_character) if in_bytes else _TOKENS_ONCE


def _for_decoding(model: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """A copy with the adapter merged and every linear map in `dtype`, to be run under autocast to that dtype.

    It computes what the model computes under autocast, but does not add the update and cast every weight again at every
    token. In float32 (None) only the adapter is merged. Quantised maps are made ordinary ones for as long; with an
    adapter of PEFT's own, which would round the sum to 4 bits again, they stay and are not merged.
    """
    whole = dtype is None or dtype == torch.float32
    quantized = any(isinstance(module, nn.Linear) and is_quantized(module) for module in model.modules())
    if quantized and isinstance(model, PeftModel) and not isinstance(model.base_model, S2LoraModel):
        return model
    if whole and not quantized and not isinstance(model, PeftModel):
        return model
    decoder: Any = copy.deepcopy(model)
    if quantized:
        dequantize_maps(decoder)
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
def as_trained(model: Any, pad: int) -> Iterator[Any]:
    """The model's generation configuration, for now without what would give another prompt than in training, search
    otherwise, return something else, or hide where a transcript ends. What it generates is to be read `without_prompt`.
    """
    found = model.generation_config
    model.generation_config = configured = copy.deepcopy(found)
    configured.num_return_sequences = 1
    # Else what has time stamps, though none are asked for, would be heard again from the last of them on, for ever
    # where that is the first.
    configured.force_unique_generate_call = True
    configured.update(return_timestamps=False, return_dict_in_generate=False, pad_token_id=pad)
    others = ["compression_ratio_threshold", "logprob_threshold", "no_speech_threshold", *_OTHER_SEARCHES]
    others += [] if configured.is_multilingual else ["language", "task"]
    for name in others:
        if hasattr(configured, name):
            setattr(configured, name, None)
    try:
        yield configured
    finally:
        model.generation_config = found


def without_prompt(tokens: torch.Tensor, configured: Any) -> torch.Tensor:
    """What was generated as `as_trained` configures it, [B, tokens], from the first token after the prompt on."""
    last = (tokens[0] == configured.no_timestamps_token_id).nonzero()[:1]  # of the prompt
    return tokens[:, int((last + 1).sum()) :]


@torch.inference_mode()
def _detected(model: Any, features: torch.Tensor, mel_frames: int, dtype: torch.dtype | None) -> list[str]:
    """The language that each row of a batch sounds like, as Whisper's code."""
    with window_of(model, mel_frames), autocast(features.device, dtype):
        found = model.detect_language(input_features=features.to(next(model.parameters()).dtype))
    codes = {number: token.strip("<|>") for token, number in model.generation_config.lang_to_id.items()}
    return [codes[number] for number in found.tolist()]


@torch.inference_mode()
def _generate(
    model: Any,
    features: torch.Tensor,
    mel_frames: int,
    language: str | list[str] | None,
    task: str | None,
    dtype: torch.dtype | None,
    pad: int,
    **search: int,
) -> torch.Tensor:
    weight_dtype = next(model.parameters()).dtype
    with as_trained(model, pad) as configured, window_of(model, mel_frames), autocast(features.device, dtype):
        task = task or getattr(configured, "task", None) or "transcribe"
        prompt = {"language": language, "task": task} if configured.is_multilingual else {}
        tokens: torch.Tensor = model.generate(
            input_features=features.to(weight_dtype),
            attention_mask=torch.ones(features.shape[0], mel_frames, dtype=torch.long, device=features.device),
            do_sample=False,
            **prompt,
            **search,
        )
        return without_prompt(tokens, configured)
