"""Keeping other languages: training also on how the unadapted model answers when it is asked in one of them.

Adapted to one language, Whisper soon answers every prompt in it. So a share of the utterances is trained on a second
time under the prompt of another language, towards the distributions of the first tokens that the model itself gave
there before the training: Li and Hoiem's "Learning without forgetting" (arXiv 1606.09282) for the language of a prompt.
The first tokens decide it; the rest of such an answer is no transcript of anything.
"""

import functools
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accelerate.utils import gather_object
from rich.progress import Progress
from transformers import WhisperProcessor, WhisperTokenizer
from transformers.modeling_outputs import BaseModelOutput

from .audio import read_audio
from .audio_window import AudioWindow
from .collate import ANSWER_TOKENS, prefix_in
from .data import Speech, audio_entry
from .decoding import as_trained, without_prompt
from .errors import UserError
from .features import LogMel
from .output import read_json, write_json
from .precision import autocast
from .world import speaks, world

# Those Whisper was trained on for longest, after English (arXiv 2212.04356, appendix E).
LARGEST_LANGUAGES = ("zh", "de", "es", "ru", "fr", "pt", "ko", "ja")
_CANDIDATES = 20  # of a token, the most probable
_COLUMNS = {
    "target": "text", "target_language": "language", "answer": "ids", "answer_tokens": "tokens",
    "answer_probabilities": "probabilities",
}  # fmt: skip
_OURS = _COLUMNS.keys() - {"target"}  # metadata of the user's named so is of no use in training


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

    The added rows have how the answer begins as `target`, its tokens as `answer`, its language as `target_language`,
    and for each token the most probable ones and their probabilities, in `answer_tokens` and `answer_probabilities`.
    Utterances and their languages are drawn by `seed`; the model hears 30 s, as it was trained to. An answer without
    text is left out. Answers are written to `file` and read from there when it exists, so that a run that goes on
    trains on the same. Several processes share the asking, and each keeps what it has asked beside `file` until all is;
    what is kept there is taken by as many processes as ask then.

    Returns:
        The speech, and how many utterances were asked about.

    Raises:
        UserError: the answers in `file` are to other utterances than the speech has now.
    """
    drawn = np.random.default_rng(seed).permutation(len(speech))[: round(share * len(speech))]
    asked = [(int(row), languages[turn % len(languages)]) for turn, row in enumerate(drawn)]
    state = world()
    if not file.is_file():
        mine = asked[state.process_index :: state.num_processes]
        everyones = gather_object(_ask(speech, model, processor, mine, file, batch_size, dtype))
        if state.is_main_process:
            write_json(file, sorted(everyones, key=lambda answer: answer["row"]))
        state.wait_for_everyone()
    if state.is_main_process:  # also those that a kill has left beside all of the answers
        for kept in _parts(file):
            kept.unlink(missing_ok=True)
    answers = [answer for answer in _read_answers(file, speech) if answer["text"]]
    if not answers:
        return speech, len(asked)
    own = speech.dataset.remove_columns([name for name in speech.dataset.column_names if name in _OURS])
    again = own.select([answer["row"] for answer in answers]).remove_columns("target")
    again = again.flatten_indices(keep_in_memory=True)  # `add_column` would, beside the data set's own files
    for column, name in _COLUMNS.items():
        again = again.add_column(column, [answer[name] for answer in answers])
    return Speech(datasets.concatenate_datasets([own, again]), speech.source, speech.skipped), len(asked)


def _parts(file: Path) -> list[Path]:
    """What is kept beside `file` until all is asked, by however many processes."""
    return sorted(file.parent.glob(f"{file.stem}-*-of-*.json"))


def _read_answers(file: Path, speech: Speech) -> list[dict[str, Any]]:
    """The answers in `file`, if there is one, each to the utterance that `speech` has in its row."""
    answers = read_json(file, list) if file.is_file() else []
    utterances = speech.dataset["utterance"][:]
    for answer in answers:
        row, utterance = answer["row"], answer["utterance"]
        if row >= len(utterances) or utterances[row] != utterance:
            raise UserError(
                f"{file}: was written when {utterance} was utterance {row + 1} of the speech, which it is not now; "
                "make the speech what it was, or give --fresh to start anew"
            )
    return answers


def _ask(
    speech: Speech,
    model: Any,
    processor: WhisperProcessor,
    asked: list[tuple[int, str]],
    file: Path,
    batch_size: int,
    dtype: torch.dtype | None,
) -> list[dict[str, Any]]:
    """Answers with row, utterance, language, text, ids, tokens and probabilities; kept beside `file`."""
    utterances, wanted, state = speech.dataset["utterance"], {row for row, _ in asked}, world()
    part = file.with_name(f"{file.stem}-{state.process_index + 1}-of-{state.num_processes}.json")
    kept = [answer for other in _parts(file) for answer in _read_answers(other, speech)]
    known = {answer["row"]: answer for answer in kept if answer["row"] in wanted}
    answers = [*known.values()]
    with Progress(transient=True, disable=not speaks()) as bars:
        bar = bars.add_task("asking in other languages", total=len(asked), completed=len(known))
        for language in dict.fromkeys(language for _, language in asked):
            rows = [row for row, its_language in asked if its_language == language and row not in known]
            for first in range(0, len(rows), batch_size):
                batch = rows[first : first + batch_size]
                audio = [audio_entry(row) for row in speech.dataset.select(batch)]
                for row, answer in zip(batch, _answers(model, processor, audio, language, dtype), strict=True):
                    answers.append({"row": row, "utterance": utterances[row], "language": language, **answer})
                write_json(part, answers)
                bars.advance(bar, len(batch))
    return answers


@torch.inference_mode()
def _answers(
    model: Any, processor: WhisperProcessor, audio: list[dict[str, Any]], language: str, dtype: torch.dtype | None
) -> list[dict[str, Any]]:
    """How the model's greedy answers to a batch begin: "text", "ids", "tokens" and "probabilities"."""
    weight = next(model.parameters())
    waveforms = torch.nn.utils.rnn.pad_sequence(
        [torch.from_numpy(read_audio(entry)) for entry in audio], batch_first=True
    )
    log_mel = LogMel(processor.feature_extractor).to(weight.device)
    features = log_mel(waveforms.to(weight.device), AudioWindow().mel_frames(waveforms.shape[1]))
    model.eval()
    with autocast(weight.device, dtype):
        encoded = model.get_encoder()(features.to(weight.dtype))
        begun = _begun(model, processor.tokenizer, encoded, language)
        candidates = _candidates(model, processor.tokenizer, encoded, begun, language)
    texts = processor.tokenizer.batch_decode(begun, skip_special_tokens=True)
    return [
        {"text": text.strip(), "ids": ids, "tokens": tokens, "probabilities": probabilities}
        for text, ids, (tokens, probabilities) in zip(texts, begun, candidates, strict=True)
    ]


def _begun(model: Any, tokenizer: WhisperTokenizer, encoded: BaseModelOutput, language: str) -> list[list[int]]:
    """The first `ANSWER_TOKENS` tokens of each greedy answer, fewer and the end where it is over before."""
    with as_trained(model, tokenizer.pad_token_id) as configured:
        written = model.generate(
            encoder_outputs=encoded,
            language=language,
            task="transcribe",
            num_beams=1,
            do_sample=False,
            max_new_tokens=ANSWER_TOKENS,
        )
    end = tokenizer.eos_token_id
    answers = []
    for ids in without_prompt(written, configured).tolist():
        text = ids[: ids.index(end)] if end in ids else ids  # what ended is padded with ends, or has none
        answers.append([*text, end][:ANSWER_TOKENS])
    return answers


def _candidates(
    model: Any, tokenizer: WhisperTokenizer, encoded: BaseModelOutput, begun: list[list[int]], language: str
) -> list[tuple[list[list[int]], list[list[float]]]]:
    """For each token of each answer the most probable ones, and their probabilities, which add up to 1."""
    prefix = prefix_in(tokenizer, language)
    pad = functools.partial(torch.nn.utils.rnn.pad_sequence, batch_first=True, padding_value=tokenizer.pad_token_id)
    read = pad([torch.tensor([*prefix, *ids[:-1]]) for ids in begun]).to(model.device)
    logits = model(encoder_outputs=encoded, decoder_input_ids=read).logits
    best = logits[:, len(prefix) - 1 :].float().softmax(dim=-1).topk(_CANDIDATES)
    shares = best.values / best.values.sum(dim=-1, keepdim=True)
    found = []
    for index, ids in enumerate(begun):
        rounded = [[round(share, 5) for share in token] for token in shares[index, : len(ids)].tolist()]
        found.append((best.indices[index, : len(ids)].tolist(), rounded))
    return found
