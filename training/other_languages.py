"""Keeping other languages: training also on what the unadapted model hears when it is asked in one of them.

Adapted to one language, Whisper soon answers every prompt in it. So a share of the utterances is trained on a second
time, under the prompt of another language, and the transcript is the model's own answer from before the training: after
Li and Hoiem, "Learning without forgetting" (arXiv 1606.09282), with transcripts in place of output distributions.
"""

import json
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

from .audio_window import AudioWindow
from .data import Speech
from .evaluation import Heard, transcribe_speech
from .run import write_json

# Those Whisper was trained on for longest, after English (arXiv 2212.04356, appendix E).
LARGEST_LANGUAGES = ("zh", "de", "es", "ru", "fr", "pt", "ko", "ja")
# An answer to an utterance of children or learners has some 10 tokens; one that is not at its end here never will be.
MAX_ANSWER_TOKENS = 64


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

    The added rows have the answer as `target` and its language as `target_language`. Utterances and their languages are
    drawn by `seed`; the model hears 30 s, as it was trained to. An answer without text or without an end within
    `MAX_ANSWER_TOKENS` is left out. Answers are written to `file` and read from there when it exists, so that a run
    that goes on trains on the same. Several processes share the asking.

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
    again = again.add_column("target", [answer["text"] for answer in answers])
    again = again.add_column("target_language", [answer["language"] for answer in answers])
    return Speech(datasets.concatenate_datasets([speech.dataset, again]), speech.source, speech.skipped), len(asked)


def _ask(
    speech: Speech,
    model: nn.Module,
    processor: WhisperProcessor,
    asked: list[tuple[int, str]],
    batch_size: int,
    dtype: torch.dtype | None,
) -> list[dict[str, Any]]:
    """Answers with row, utterance, language and text."""
    audio, utterances = speech.dataset["audio"], speech.dataset["utterance"]
    heard: dict[int, Heard] = {}
    with Progress(transient=True) as bars:
        bar = bars.add_task("hearing other languages", total=len(asked))
        for language in dict.fromkeys(language for _, language in asked):
            rows = [row for row, its_language in asked if its_language == language]
            answers = transcribe_speech(
                model,
                processor,
                [audio[row] for row in rows],
                window=AudioWindow(),
                language=language,
                batch_size=batch_size,
                dtype=dtype,
                max_new_tokens=MAX_ANSWER_TOKENS,
                on_batch=lambda done: bars.advance(bar, done),
            )
            heard |= dict(zip(rows, answers, strict=True))
    return [
        {"row": row, "utterance": utterances[row], "language": language, "text": heard[row].text}
        for row, language in asked
        if heard[row].text and heard[row].ended
    ]
