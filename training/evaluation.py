"""Greedy transcription of test sets and their error rates, overall and by group."""

import copy
import csv
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import nn
from transformers import WhisperProcessor
from transformers.models.whisper.modeling_whisper import WhisperAttention

from .audio import read_audio
from .audio_window import AudioWindow, window_of
from .data import Speech
from .errors import UserError
from .features import LogMel
from .metrics import ErrorRate, UtteranceErrors, score, summarize
from .precision import autocast
from .text import normalizer

ALL = "all"
MAX_NEW_TOKENS = 224  # half of Whisper's text context, as in its authors' own decoding
_AGE_GROUPS = ((0, 5), (6, 8), (9, 12), (13, 17))
_OWN_COLUMNS = ("audio", "target", "text", "utterance")


@dataclass(frozen=True)
class TestSet:
    """Speech to score, and the language its errors are normalised for (and decoded in)."""

    speech: Speech
    language: str | None

    __test__ = False  # not a pytest class


@dataclass(frozen=True)
class Heard:
    """A transcript, and whether it came to its end before the most tokens that are decoded."""

    text: str
    ended: bool


@dataclass
class SetResult:
    """One scored set: transcripts in the set's own order, errors by utterance, rates by group."""

    name: str
    language: str | None
    hypotheses: list[str]
    words: list[UtteranceErrors]
    characters: list[UtteranceErrors]
    rates: dict[str, dict[str, ErrorRate]]  # group -> {"wer": ..., "cer": ...}
    wordless: list[str]  # groups without a word to be counted, which have no rates
    skipped: int
    cut_off: list[bool]  # transcripts that had not come to their end after `MAX_NEW_TOKENS`
    speech: Speech = field(repr=False)


@dataclass
class Evaluation:
    """Several scored sets under one label, such as "zero-shot" or "S2-LoRA"."""

    label: str
    sets: list[SetResult]

    def to_dict(self) -> dict[str, Any]:
        """Rates, counts and skipped utterances, for JSON."""
        return {
            "label": self.label,
            "sets": {
                result.name: {
                    "source": result.speech.source,
                    "language": result.language,
                    "skipped": result.skipped,
                    "cut_off": sum(result.cut_off),
                    "groups_without_words": result.wordless,
                    "groups": {
                        group: {unit: asdict(rate) for unit, rate in rates.items()}
                        for group, rates in result.rates.items()
                    },
                }
                for result in self.sets
            },
        }

    def write(self, folder: Path) -> None:
        """Writes `results.json` and, for each set, `SET.tsv` with one line an utterance."""
        folder.mkdir(parents=True, exist_ok=True)
        for result in self.sets:
            _write_utterances(folder / f"{result.name}.tsv", result)
        # Last, so that its presence says the folder is complete.
        (folder / "results.json").write_text(json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n")


def transcribe_speech(
    model: nn.Module,
    processor: WhisperProcessor,
    audio: Sequence[dict[str, Any]],
    *,
    window: AudioWindow,
    language: str | None,
    task: str | None = None,
    batch_size: int = 8,
    dtype: torch.dtype | None = None,
    max_new_tokens: int | None = None,
    on_batch: Callable[[int], None] = lambda utterances: None,
) -> list[Heard]:
    """Greedy transcripts of audio entries ("path" or "bytes"), in their order; each at most 30 s.

    Utterances are batched by length, and each batch has the window of its longest. `language` and `task` are ignored by
    English-only models; None is what the model's generation configuration says, else the language is detected and the
    task is to transcribe. `dtype` runs the model under autocast. Decoding stops at
    `max_new_tokens`, by default `MAX_NEW_TOKENS`. `on_batch` is told how many utterances were done.

    Raises:
        UserError: an audio file cannot be read, or is longer than 30 s; no utterance a batch.
    """
    if batch_size < 1:
        raise UserError(f"--eval-batch-size is {batch_size}; give at least 1")
    waveforms = [torch.from_numpy(read_audio(entry)) for entry in audio]
    for entry, waveform in zip(audio, waveforms, strict=True):
        if len(waveform) > AudioWindow().mel_frames(0) * processor.feature_extractor.hop_length:
            raise UserError(f"{entry['path']}: more than 30 s of audio; cut it into utterances")
    model = _for_decoding(model, dtype)
    device = next(model.parameters()).device
    log_mel = LogMel(processor.feature_extractor).to(device)
    limit = max_new_tokens or MAX_NEW_TOKENS
    order = sorted(range(len(waveforms)), key=lambda index: len(waveforms[index]))
    heard: dict[int, Heard] = {}
    model.eval()
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        padded = torch.nn.utils.rnn.pad_sequence([waveforms[index] for index in batch], batch_first=True)
        mel_frames = window.mel_frames(padded.shape[1])
        features = log_mel(padded.to(device), mel_frames)
        tokens = _generate(model, features, mel_frames, language, task, dtype, limit)
        decoded = processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        # What ended has no end token left, but padding up to the longest of the batch, or is the longest itself.
        ended = (tokens[:, -1] == processor.tokenizer.pad_token_id) | (tokens.shape[1] < limit)
        for index, text, whole in zip(batch, decoded, ended.tolist(), strict=True):
            heard[index] = Heard(text.strip(), whole)
        on_batch(len(batch))
    return [heard[index] for index in range(len(waveforms))]


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


@torch.inference_mode()
def _generate(
    model: Any,
    features: torch.Tensor,
    mel_frames: int,
    language: str | None,
    task: str | None,
    dtype: torch.dtype | None,
    max_new_tokens: int,
) -> torch.Tensor:
    configured = model.generation_config
    task = task or getattr(configured, "task", None) or "transcribe"
    prompt = {"language": language, "task": task} if configured.is_multilingual else {}
    weight_dtype = next(model.parameters()).dtype
    with window_of(model, mel_frames), autocast(features.device, dtype):
        return model.generate(
            input_features=features.to(weight_dtype),
            attention_mask=torch.ones(features.shape[0], mel_frames, dtype=torch.long, device=features.device),
            num_beams=1,
            do_sample=False,
            max_new_tokens=max_new_tokens,
            **prompt,
        )


def evaluate_sets(
    model: nn.Module,
    processor: WhisperProcessor,
    sets: Mapping[str, TestSet],
    *,
    label: str,
    window: AudioWindow,
    task: str | None = None,
    batch_size: int = 8,
    dtype: torch.dtype | None = None,
    group_by: Sequence[str] = (),
    progress: bool = True,
) -> Evaluation:
    """Transcribes and scores each set, overall and by the values of the metadata columns in `group_by`.

    A set without such a column is scored as a whole. A numeric column "age" is grouped as up to 5, 6-8, 9-12, 13-17
    and 18 or over.

    Raises:
        UserError: a column of `group_by` is in none of the sets, or a set has no word to be counted.
    """
    for name, test in sets.items():
        normalize = normalizer(test.language)
        if not any(normalize(text) for text in test.speech.dataset["text"][:]):
            raise UserError(f"test set {name} ({test.speech.source}): no transcript has a word left once normalised")
    for column in group_by:
        if not any(column in test.speech.dataset.column_names for test in sets.values()):
            known = sorted(
                {name for test in sets.values() for name in test.speech.dataset.column_names} - {*_OWN_COLUMNS}
            )
            raise UserError(f"no test set has a column {column!r} to group by; there is {', '.join(known)}")
    results = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not progress) as bars:
        for name, test in sets.items():
            bar = bars.add_task(f"{label}: {name}", total=len(test.speech))
            heard = transcribe_speech(
                model,
                processor,
                test.speech.dataset["audio"][:],
                window=window,
                language=test.language,
                task=task,
                batch_size=batch_size,
                dtype=dtype,
                on_batch=lambda done, bar=bar: bars.advance(bar, done),  # type: ignore[misc]
            )
            results.append(score_set(name, test, heard, group_by))
    return Evaluation(label, results)


def score_set(name: str, test: TestSet, heard: Sequence[Heard], group_by: Sequence[str] = ()) -> SetResult:
    """Error rates of transcripts given in the set's order, of every group with a word in its references."""
    hypotheses, cut_off = [one.text for one in heard], [not one.ended for one in heard]
    references = test.speech.dataset["text"][:]
    words = score(references, hypotheses, language=test.language, unit="wer")
    characters = score(references, hypotheses, language=test.language, unit="cer")
    rates, wordless = {}, []
    for group, members in _groups(test.speech, group_by).items():
        by_unit = {"wer": [words[i] for i in members], "cer": [characters[i] for i in members]}
        if any(utterance.length for utterance in by_unit["wer"]):
            rates[group] = {unit: summarize(utterances) for unit, utterances in by_unit.items()}
        else:
            wordless.append(group)
    skipped = len(test.speech.skipped)
    return SetResult(name, test.language, hypotheses, words, characters, rates, wordless, skipped, cut_off, test.speech)


def read_evaluation(
    folder: Path, label: str, sets: Mapping[str, TestSet], group_by: Sequence[str] = ()
) -> Evaluation | None:
    """The evaluation `Evaluation.write` left in `folder`, scored again.

    None unless it has these sets, of the same sources, utterances and languages.
    """
    written = folder / "results.json"
    found = json.loads(written.read_text(encoding="utf-8"))["sets"] if written.is_file() else {}
    results = []
    for name, test in sets.items():
        file = folder / f"{name}.tsv"
        had = found.get(name, {})
        if (had.get("source"), had.get("language")) != (test.speech.source, test.language) or not file.is_file():
            return None
        with file.open(encoding="utf-8", newline="") as stream:
            rows = list(csv.DictReader(stream, delimiter="\t"))
        if [row["utterance"] for row in rows] != test.speech.dataset["utterance"][:]:
            return None
        # Written before there was the column: not known to be cut off.
        heard = [Heard(row["hypothesis"], row.get("cut_off", "0") == "0") for row in rows]
        results.append(score_set(name, test, heard, group_by))
    return Evaluation(label, results)


def _groups(speech: Speech, group_by: Sequence[str]) -> dict[str, list[int]]:
    groups = {ALL: list(range(len(speech)))}
    for column in group_by:
        if column not in speech.dataset.column_names:
            continue
        for index, value in enumerate(speech.dataset[column][:]):
            groups.setdefault(f"{column} {_group_name(column, value)}", []).append(index)
    first, *others = groups
    return {first: groups[first], **{name: groups[name] for name in sorted(others, key=_natural)}}


def _group_name(column: str, value: Any) -> str:
    if column != "age":
        return str(value)
    try:
        age = float(value)
    except (TypeError, ValueError):
        return "unknown"
    if not 0 <= age < math.inf:
        return "unknown"
    return next((f"{low}-{high}" for low, high in _AGE_GROUPS if low <= age < high + 1), "18+")


def _natural(name: str) -> tuple[str, int, str]:
    column, _, value = name.partition(" ")
    digits = value.split("-")[0].rstrip("+")
    return column, int(digits) if digits.isdecimal() else 0, value


def results_table(evaluations: Sequence[Evaluation], title: str = "") -> Table:
    """One line a set and group, the error rates of every evaluation side by side (percent, 95 % bootstrap interval)."""
    table = Table(title=title or None)
    for column in ("set", "group", "utterances"):
        table.add_column(column, justify="right" if column == "utterances" else "left")
    for evaluation in evaluations:
        for unit in ("WER", "capped", "CER"):
            table.add_column(f"{evaluation.label}\n{unit}", justify="right")
    for index, first in enumerate(evaluations[0].sets):
        for group in first.rates:
            cells = []
            for evaluation in evaluations:
                words, characters = (evaluation.sets[index].rates[group][unit] for unit in ("wer", "cer"))
                cells += [
                    f"{words.rate:.1f} [{words.low:.1f}, {words.high:.1f}]",
                    f"{words.capped_rate:.1f}",
                    f"{characters.rate:.1f}",
                ]
            name = first.name if group == ALL else ""
            table.add_row(name, group, str(first.rates[group]["wer"].utterances), *cells, end_section=False)
        table.add_section()
    cut_off = [
        f"{evaluation.label}, {result.name}: {sum(result.cut_off)}"
        for evaluation in evaluations
        for result in evaluation.sets
        if any(result.cut_off)
    ]
    if cut_off:
        table.caption = f"transcripts without an end after {MAX_NEW_TOKENS} tokens: {'; '.join(cut_off)}"
    return table


def _write_utterances(file: Path, result: SetResult) -> None:
    """One line an utterance: its metadata, reference, hypothesis, both normalised, word and character errors."""
    dataset = result.speech.dataset
    metadata = [name for name in dataset.column_names if name not in _OWN_COLUMNS]
    header = ["utterance", *metadata, "reference", "hypothesis", "normalized_reference", "normalized_hypothesis"]
    counts = ("substitutions", "deletions", "insertions", "length")
    header += [f"word_{name}" for name in counts] + [f"character_{name}" for name in counts] + ["cut_off"]
    rows = dataset.remove_columns("audio")
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, delimiter="\t")
        writer.writerow(header)
        for row, hypothesis, words, characters, cut_off in zip(
            rows, result.hypotheses, result.words, result.characters, result.cut_off, strict=True
        ):
            writer.writerow(
                [row["utterance"], *(row[name] for name in metadata), row["text"], hypothesis]
                + [words.reference, words.hypothesis]
                + [getattr(errors, name) for errors in (words, characters) for name in counts]
                + [int(cut_off)]
            )
