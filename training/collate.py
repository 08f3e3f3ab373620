"""Utterances to batches: waveforms padded to the longest, labels, and the window the batch is given."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import WhisperTokenizer

from .audio import read_audio
from .audio_window import AudioWindow
from .data import audio_entry

IGNORED = -100
ANSWER_TOKENS = 4  # at most, of an answer in another language than the speech


def prefix_in(tokenizer: WhisperTokenizer, language: str) -> list[int]:
    """The tokenizer's prefix with another language's token in it."""
    prefix: list[Any] = list(tokenizer.prefix_tokens)
    prefix[1] = tokenizer.convert_tokens_to_ids(f"<|{language}|>")
    return prefix


class SpeechCollator:
    """Rows of `Speech.dataset` -> "waveforms" [B, samples], "mel_frames", "decoder_input_ids" and "labels" [B, tokens].

    Waveforms are float32, 16 kHz, padded with zeros to the longest of the batch and no further; features are made from
    them on the training device. The decoder reads the tokenizer's prefix (set language and task on it before) and the
    target, and is to write each of their tokens but the first, and the end; labels are -100 after it, and at the
    language's token unless `learn_language`: it says which language the speech sounds like, which is not to be learnt
    from speech all in one, and is given in decoding.

    Rows with a `prompt_language`, those of speech in another language than the tokenizer's, have that in the prefix.

    Rows of `with_answers` have their `target_language` in the prefix, and no labels but for task and time stamps: which
    language it is is not to be learnt from this speech. What is to be written after the prefix is in
    "answer_tokens" and "answer_probabilities" [B, ANSWER_TOKENS, candidates], with zeros for other rows, where a row of
    the batch has them; "answer_start" is the position that writes the first.

    Tokens are padded to the longest, or to the next multiple of `token_multiple`, so that shapes come again; the
    padding is not learnt from, and nothing before it reads it.

    A trimmed batch is given the full window with probability `full_share`, decided by the batch's own text and `seed`,
    so that a resumed run decides alike.
    """

    def __init__(
        self,
        tokenizer: WhisperTokenizer,
        window: AudioWindow,
        *,
        full_share: float = 0.0,
        seed: int = 0,
        learn_language: bool = True,
        token_multiple: int = 1,
    ) -> None:
        self.learn_language = learn_language
        self.token_multiple = token_multiple
        self._tokenizer = tokenizer  # a public one the Trainer writes into every checkpoint
        self.window = window
        self.full_share = full_share
        self.seed = seed

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        waveforms = [torch.from_numpy(read_audio(audio_entry(row))) for row in rows]
        longest = max(len(waveform) for waveform in waveforms)
        window = AudioWindow() if self._gets_full_window(rows) else self.window
        return {
            "waveforms": torch.nn.utils.rnn.pad_sequence(waveforms, batch_first=True),
            "mel_frames": window.mel_frames(longest),
            **self.tokens(rows),
        }

    def tokens(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """What the decoder reads and what it is to write next, both [B, tokens], and the answers if there are any."""
        read, write = [], []
        prefix = len(self._tokenizer.prefix_tokens)
        multilingual = prefix > 2  # else it is the start and no time stamps
        for row in rows:
            language = row.get("target_language")
            if language is None:
                ids = self._tokenizer(row["target"]).input_ids
                if multilingual and (spoken := row.get("prompt_language")) is not None:
                    ids[:prefix] = prefix_in(self._tokenizer, spoken)
                kept = ids[1:]
            else:
                ids = [*prefix_in(self._tokenizer, language), *row["answer"]]
                kept = ids[1:prefix] + [IGNORED] * len(row["answer"])
            if multilingual and not (self.learn_language and language is None):
                kept[0] = IGNORED
            read.append(torch.tensor(ids[:-1]))
            write.append(torch.tensor(kept))
        batch = {
            "decoder_input_ids": self._padded(read, self._tokenizer.pad_token_id),
            "labels": self._padded(write, IGNORED),
        }
        return batch | self._answers(rows, prefix - 1)

    def _padded(self, sequences: list[torch.Tensor], value: int) -> torch.Tensor:
        padded = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=value)
        return torch.nn.functional.pad(padded, (0, -padded.shape[1] % self.token_multiple), value=value)

    @staticmethod
    def _answers(rows: Sequence[dict[str, Any]], start: int) -> dict[str, Any]:
        answered = {index: row for index, row in enumerate(rows) if row.get("target_language") is not None}
        if not answered:
            return {}
        candidates = max(len(row["answer_tokens"][0]) for row in answered.values())
        tokens = torch.zeros(len(rows), ANSWER_TOKENS, candidates, dtype=torch.long)
        probabilities = torch.zeros(len(rows), ANSWER_TOKENS, candidates)
        for index, row in answered.items():
            count = len(row["answer_tokens"])
            tokens[index, :count] = torch.tensor(row["answer_tokens"])
            probabilities[index, :count] = torch.tensor(row["answer_probabilities"])
        return {"answer_tokens": tokens, "answer_probabilities": probabilities, "answer_start": start}

    def _gets_full_window(self, rows: Sequence[dict[str, Any]]) -> bool:
        if self.full_share <= 0:
            return False
        key = [self.seed, *"".join(row["utterance"] for row in rows).encode()]
        return bool(np.random.default_rng(key).random() < self.full_share)
