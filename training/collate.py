"""Utterances to batches: waveforms padded to the longest, labels, and the window the batch is given."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import WhisperTokenizer

from .audio import read_audio
from .audio_window import AudioWindow

IGNORED = -100


class SpeechCollator:
    """Rows of `Speech.dataset` -> {"waveforms": [B, samples], "mel_frames": int, "labels": [B, tokens]}.

    Waveforms are float32, 16 kHz, padded with zeros to the longest of the batch and no further; features are made from
    them on the training device. Labels follow the tokenizer's prefix (set language and task on it before), with the
    language of the row's `target_language` where it has one, without the start token, which Whisper puts there itself,
    and with -100 after their end.

    A trimmed batch is given the full window with probability `full_share`, decided by the batch's own text and `seed`,
    so that a resumed run decides alike.
    """

    def __init__(
        self, tokenizer: WhisperTokenizer, window: AudioWindow, *, full_share: float = 0.0, seed: int = 0
    ) -> None:
        self.tokenizer = tokenizer
        self.window = window
        self.full_share = full_share
        self.seed = seed

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        waveforms = [torch.from_numpy(read_audio(row["audio"])) for row in rows]
        longest = max(len(waveform) for waveform in waveforms)
        window = AudioWindow() if self._gets_full_window(rows) else self.window
        return {
            "waveforms": torch.nn.utils.rnn.pad_sequence(waveforms, batch_first=True),
            "mel_frames": window.mel_frames(longest),
            "labels": self.labels([row["target"] for row in rows], [row.get("target_language") for row in rows]),
        }

    def labels(self, targets: Sequence[str], languages: Sequence[str | None]) -> Tensor:
        """Token ids [B, tokens] without the start token, padded with -100; None is the tokenizer's own language."""
        ids = [torch.tensor(tokens[1:]) for tokens in self.tokenizer(list(targets)).input_ids]
        for tokens, language in zip(ids, languages, strict=True):
            if language is not None:
                tokens[0] = torch.tensor(self.tokenizer.convert_tokens_to_ids(f"<|{language}|>"))
        return torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=IGNORED)

    def _gets_full_window(self, rows: Sequence[dict[str, Any]]) -> bool:
        if self.full_share <= 0:
            return False
        key = [self.seed, *"".join(row["utterance"] for row in rows).encode()]
        return bool(np.random.default_rng(key).random() < self.full_share)
