"""Keeping other languages: training also on how the unadapted model answers when it is asked in one of them.

Adapted to one language, Whisper soon answers every prompt in it. So a share of the utterances is trained on a second
time under the prompt of another language, towards the distributions of the first tokens that the model itself gave
there before the training: Li and Hoiem's "Learning without forgetting" (arXiv 1606.09282) for the language of a prompt.
The first tokens decide it; the rest of such an answer is no transcript of anything.
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
from transformers import WhisperProcessor
from transformers.modeling_outputs import BaseModelOutput

from .audio import read_audio
from .audio_window import AudioWindow
from .collate import ANSWER_TOKENS, SpeechCollator
from .data import Speech
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
    model: Any,
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
    model: Any,
    processor: WhisperProcessor,
    asked: list[tuple[int, str]],
    batch_size: int,
    dtype: torch.dtype | None,
) -> list[dict[str, Any]]:
    """Answers with row, utterance, language, text, tokens and probabilities; those without text are left out."""
    utterances = speech.dataset["utterance"]
    answers: list[dict[str, Any]] = []
    with Progress(transient=True) as bars:
        bar = bars.add_task("asking in other languages", total=len(asked))
        for language in dict.fromkeys(language for _, language in asked):
            rows = [row for row, its_language in asked if its_language == language]
            for first in range(0, len(rows), batch_size):
                batch = rows[first : first + batch_size]
                audio = speech.dataset.select(batch)["audio"][:]
                for row, answer in zip(batch, _answers(model, processor, audio, language, dtype), strict=True):
                    answers.append({"row": row, "utterance": utterances[row], "language": language, **answer})
                bars.advance(bar, len(batch))
    return [answer for answer in answers if answer["text"]]


@torch.inference_mode()
def _answers(
    model: Any, processor: WhisperProcessor, audio: list[dict[str, Any]], language: str, dtype: torch.dtype | None
) -> list[dict[str, Any]]:
    """What the model hears in a batch, "text", and how that begins, "tokens" and "probabilities"."""
    weight = next(model.parameters())
    waveforms = torch.nn.utils.rnn.pad_sequence(
        [torch.from_numpy(read_audio(entry)) for entry in audio], batch_first=True
    )
    log_mel = LogMel(processor.feature_extractor).to(weight.device)
    features = log_mel(waveforms.to(weight.device), AudioWindow().mel_frames(waveforms.shape[1]))
    model.eval()
    with autocast(weight.device, dtype):
        encoded = model.get_encoder()(features.to(weight.dtype))
        texts = _begun(model, processor, encoded, language)
        found = _distributions(model, processor, encoded, texts, language)
    return [
        {"text": text, "tokens": tokens, "probabilities": probabilities}
        for text, (tokens, probabilities) in zip(texts, found, strict=True)
    ]


def _begun(model: Any, processor: WhisperProcessor, encoded: BaseModelOutput, language: str) -> list[str]:
    """The first `MAX_ANSWER_TOKENS` tokens of the greedy answers, as text."""
    written = model.generate(
        encoder_outputs=encoded,
        language=language,
        task="transcribe",
        num_beams=1,
        do_sample=False,
        max_new_tokens=MAX_ANSWER_TOKENS,
    )
    return [text.strip() for text in processor.tokenizer.batch_decode(written, skip_special_tokens=True)]


def _distributions(
    model: Any, processor: WhisperProcessor, encoded: BaseModelOutput, texts: list[str], language: str
) -> list[tuple[list[list[int]], list[list[float]]]]:
    """For each text the most probable tokens at each of its first ones, and their probabilities, which add up to 1."""
    tokenizer = processor.tokenizer
    collate = SpeechCollator(tokenizer, AudioWindow())
    ids = [torch.tensor(collate.ids(text, language)) for text in texts]
    read = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=tokenizer.pad_token_id)
    logits = model(encoder_outputs=encoded, decoder_input_ids=read[:, :-1].to(model.device)).logits
    prefix = len(tokenizer.prefix_tokens)
    best = logits[:, prefix - 1 :].float().softmax(dim=-1).topk(_CANDIDATES)
    shares = best.values / best.values.sum(dim=-1, keepdim=True)
    found = []
    for index, one in enumerate(ids):
        count = len(one) - prefix
        rounded = [[round(share, 5) for share in token] for token in shares[index, :count].tolist()]
        found.append((best.indices[index, :count].tolist(), rounded))
    return found
