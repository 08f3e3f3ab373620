"""Keeping other languages: training also on how the unadapted model answers when it is asked in one of them.

Adapted to one language, Whisper soon answers every prompt in it. So a share of the utterances is trained on a second
time under the prompt of another language, towards the distributions of the first tokens that the model itself gave
there before the training: Li and Hoiem's "Learning without forgetting" (arXiv 1606.09282) for the language of a prompt.
The first tokens decide it; the rest of such an answer is no transcript of anything.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from rich.progress import Progress
from torch import nn
from transformers import WhisperProcessor

from .audio import read_audio
from .audio_window import AudioWindow
from .collate import ANSWER_TOKENS, SpeechCollator
from .data import Speech
from .evaluation import transcribe_speech
from .features import LogMel
from .precision import autocast
from .run import write_json

# Those Whisper was trained on for longest, after English (arXiv 2212.04356, appendix E).
LARGEST_LANGUAGES = ("zh", "de", "es", "ru", "fr", "pt", "ko", "ja")
# What is decoded of an answer. Fewer are trained on, so that a character cut in two is not among them.
MAX_ANSWER_TOKENS = 4 * ANSWER_TOKENS
_CANDIDATES = 20  # of a token, the most probable
_COLUMNS = {
    "target": "text", "target_language": "language", "answer_tokens": "tokens",
    "answer_probabilities": "probabilities",
}  # fmt: skip


def with_answers(
    speech: Speech,
    model: nn.Module,
    processor: WhisperProcessor,
    *,
    share: float,
    languages: list[str],
    file: Path,
    seed: int = 0,
    batch_size: int = 8,
    dtype: torch.dtype | None = None,
) -> tuple[Speech, int]:
    """The speech, and after it a share of its utterances again, each with the model's answer in one of `languages`.

    The added rows have the answer as `target`, its language as `target_language`, and for each of its first tokens the
    most probable ones and their probabilities, in `answer_tokens` and `answer_probabilities`. Utterances and their
    languages are drawn by `seed`; the model hears 30 s, as it was trained to. An answer without text is left out.
    Answers are written to `file` and read from there when it exists, so that a run that goes on trains on the same.
    Several processes share the asking.

    Returns:
        The speech, and how many utterances were asked about.
    """
    drawn = np.random.default_rng(seed).permutation(len(speech))[: round(share * len(speech))]
    asked = [(int(row), languages[turn % len(languages)]) for turn, row in enumerate(drawn)]
    state = PartialState(cpu=not torch.cuda.is_available())
    if not file.is_file():
        mine = asked[state.process_index :: state.num_processes]
        everyones = gather_object(_ask(speech, model, processor, mine, batch_size, dtype))
        if state.is_main_process:
            write_json(file, sorted(everyones, key=lambda answer: answer["row"]))
        state.wait_for_everyone()
    answers: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))
    if not answers:
        return speech, len(asked)
    again = speech.dataset.select([answer["row"] for answer in answers]).remove_columns("target")
    for column, name in _COLUMNS.items():
        again = again.add_column(column, [answer[name] for answer in answers])
    return Speech(datasets.concatenate_datasets([speech.dataset, again]), speech.source, speech.skipped), len(asked)


def _ask(
    speech: Speech,
    model: nn.Module,
    processor: WhisperProcessor,
    asked: list[tuple[int, str]],
    batch_size: int,
    dtype: torch.dtype | None,
) -> list[dict[str, Any]]:
    """Answers with row, utterance, language, text, tokens and probabilities."""
    utterances = speech.dataset["utterance"]
    answers: list[dict[str, Any]] = []
    with Progress(transient=True) as bars:
        bar = bars.add_task("asking in other languages", total=len(asked))
        for language in dict.fromkeys(language for _, language in asked):
            rows = [row for row, its_language in asked if its_language == language]
            audio = speech.dataset.select(rows)["audio"][:]
            heard = transcribe_speech(
                model,
                processor,
                audio,
                window=AudioWindow(),
                language=language,
                batch_size=batch_size,
                dtype=dtype,
                max_new_tokens=MAX_ANSWER_TOKENS,
            )
            texts = [one.text for one in heard]
            found = _distributions(
                model,
                processor,
                audio,
                texts,
                language,
                batch_size=batch_size,
                dtype=dtype,
                on_batch=lambda done: bars.advance(bar, done),
            )
            for row, text, (tokens, probabilities) in zip(rows, texts, found, strict=True):
                answer = {"row": row, "utterance": utterances[row], "language": language, "text": text}
                answers.append(answer | {"tokens": tokens, "probabilities": probabilities})
    return [answer for answer in answers if answer["text"]]


@torch.inference_mode()
def _distributions(
    model: nn.Module,
    processor: WhisperProcessor,
    audio: list[dict[str, Any]],
    texts: list[str],
    language: str,
    *,
    batch_size: int,
    dtype: torch.dtype | None,
    on_batch: Callable[[int], None],
) -> list[tuple[list[list[int]], list[list[float]]]]:
    """For each text the most probable tokens at each of its first ones, and their probabilities, which add up to 1."""
    collate = SpeechCollator(processor.tokenizer, AudioWindow())
    weight = next(model.parameters())
    log_mel = LogMel(processor.feature_extractor).to(weight.device)
    prefix = len(processor.tokenizer.prefix_tokens)
    model.eval()
    found = []
    for first in range(0, len(texts), batch_size):
        batch = slice(first, first + batch_size)
        waveforms = [torch.from_numpy(read_audio(entry)) for entry in audio[batch]]
        padded = torch.nn.utils.rnn.pad_sequence(waveforms, batch_first=True).to(weight.device)
        features = log_mel(padded, AudioWindow().mel_frames(padded.shape[1])).to(weight.dtype)
        ids = [torch.tensor(collate.ids(text, language)) for text in texts[batch]]
        read = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=processor.tokenizer.pad_token_id)
        with autocast(weight.device, dtype):
            logits = model(input_features=features, decoder_input_ids=read[:, :-1].to(weight.device)).logits
        best = logits[:, prefix - 1 :].float().softmax(dim=-1).topk(_CANDIDATES)
        shares = best.values / best.values.sum(dim=-1, keepdim=True)
        for index, one in enumerate(ids):
            count = len(one) - prefix
            rounded = [[round(share, 5) for share in token] for token in shares[index, :count].tolist()]
            found.append((best.indices[index, :count].tolist(), rounded))
        on_batch(len(ids))
    return found
