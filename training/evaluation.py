"""Test sets transcribed, and their error rates, overall and by group."""

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import nn
from transformers import WhisperProcessor

from .audio_window import AudioWindow
from .data import Speech
from .decoding import Decoding, Heard, transcribe_speech
from .errors import UserError
from .metrics import ErrorRate, Unit, UtteranceErrors, score, summarize
from .output import read_json, write_json, write_rows
from .text import UNSPACED_LANGUAGES, normalizer
from .world import world

ALL = "all"
_AGE_GROUPS = ((0, 5), (6, 8), (9, 12), (13, 17))
_OWN_COLUMNS = ("audio", "length_s", "offset_s", "target", "text", "utterance")
_COUNTS = ("substitutions", "deletions", "insertions", "length")
# What a table of transcripts has beside the utterance and its metadata.
SCORED_COLUMNS = (
    "reference", "hypothesis", "normalized_reference", "normalized_hypothesis",
    *(f"{unit}_{name}" for unit in ("word", "character") for name in _COUNTS), "cut_off", "decoded_again",
)  # fmt: skip


@dataclass(frozen=True)
class TestSet:
    """Speech to score, the language it is decoded in, and the task."""

    speech: Speech
    language: str | None
    task: str | None = None

    @property
    def scoring_language(self) -> str | None:
        """The language of its references, which errors are normalised for: English where it is translated."""
        return "en" if self.task == "translate" else self.language

    __test__ = False  # not a pytest class


@dataclass
class SetResult:
    """One scored set: transcripts in the set's own order, errors by utterance, rates by group."""

    name: str
    language: str | None
    scoring_language: str | None
    heard: list[Heard]
    words: list[UtteranceErrors]
    characters: list[UtteranceErrors]
    rates: dict[str, dict[str, ErrorRate]]  # group -> {"wer": ..., "cer": ...}
    wordless: list[str]  # groups without a word to be counted, which have no rates
    skipped: int
    speech: Speech = field(repr=False)

    @property
    def hypotheses(self) -> list[str]:
        """The transcripts' texts."""
        return [one.text for one in self.heard]

    @property
    def cut_off(self) -> list[bool]:
        """Which transcripts have no end after all the tokens that are decoded."""
        return [not one.ended for one in self.heard]

    @property
    def again(self) -> list[bool]:
        """Which transcripts are of a second decoding, because the first had no end."""
        return [one.again for one in self.heard]


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
                    "audio_sha256": result.speech.audio_sha256,
                    "language": result.language,
                    "scoring_language": result.scoring_language,
                    "skipped": result.skipped,
                    "cut_off": sum(result.cut_off),
                    "decoded_again": sum(result.again),
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
        # Last, so that a set in it has its transcripts.
        write_json(folder / "results.json", self.to_dict())


def evaluate_sets(
    model: nn.Module,
    processor: WhisperProcessor,
    sets: Mapping[str, TestSet],
    *,
    label: str,
    window: AudioWindow,
    task: str | None = None,
    decoding: Decoding | None = None,
    batch_size: int = 8,
    dtype: torch.dtype | None = None,
    group_by: Sequence[str] = (),
    folder: Path | None = None,
    progress: bool = True,
) -> Evaluation:
    """Transcribes and scores each set, overall and by the values of the metadata columns in `group_by`.

    A set without such a column is scored as a whole; what is blank or missing in it is the group "unknown". A numeric
    column "age" is grouped as up to 5, 6-8, 9-12, 13-17 and 18 or over. With a `folder` the transcripts that it has of
    these sets are taken from there and each set is written into it as soon as it is transcribed; in the end it has
    these sets and no others. Processes that run together share the utterances of each set, and all return the same.

    Raises:
        UserError: a column of `group_by` is in none of the sets, or a set has no word to be counted.
    """
    task = task or getattr(model.generation_config, "task", None)
    sets = {name: replace(test, task=task) for name, test in sets.items()}
    check_sets(sets, group_by)
    results = {} if folder is None else read_sets(folder, sets, group_by)
    state = world()
    left = {*gather_object([name for name in sets if name not in results])}  # not every process may see the same files
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not (progress and state.is_main_process)) as bars:
        for name, test in ((name, test) for name, test in sets.items() if name in left):
            mine = range(state.process_index, len(test.speech), state.num_processes)
            bar = bars.add_task(f"{label}: {name}", total=len(mine))
            heard = transcribe_speech(
                model,
                processor,
                test.speech.audio(mine),
                window=window,
                language=test.language,
                task=task,
                decoding=decoding,
                batch_size=batch_size,
                dtype=dtype,
                on_batch=lambda done, bar=bar: bars.advance(bar, done),  # type: ignore[misc]
            )
            everyones = sorted(gather_object([*zip(mine, heard, strict=True)]), key=lambda one: one[0])
            results[name] = score_set(name, test, [one for _, one in everyones], group_by)
            if folder is not None and state.is_main_process:
                Evaluation(label, [results[name] for name in sets if name in results]).write(folder)
    evaluation = Evaluation(label, [results[name] for name in sets])
    if folder is not None and state.is_main_process:
        evaluation.write(folder)  # transcripts that were there may be scored by other references or groups now
        for file in folder.glob("*.tsv"):
            if file.stem not in sets:
                file.unlink(missing_ok=True)
    return evaluation


def check_sets(sets: Mapping[str, TestSet], group_by: Sequence[str]) -> None:
    """Nothing, where every set can be scored and grouped; needs no model.

    Raises:
        UserError: a column of `group_by` is in none of the sets, there is no set to group, or one has no word to be
            counted.
    """
    if group_by and not sets:
        raise UserError(f"--group-by {group_by[0]} without a set to score; give --test, or leave it out")
    for name, test in sets.items():
        normalize = normalizer(test.scoring_language)
        if not any(normalize(text).strip() for text in test.speech.dataset["text"][:]):
            raise UserError(f"test set {name} ({test.speech.source}): no transcript has a word left once normalised")
    known = sorted({name for test in sets.values() for name in test.speech.dataset.column_names} - {*_OWN_COLUMNS})
    if missing := [column for column in group_by if column not in known]:
        raise UserError(f"no test set has a column {missing[0]!r} to group by; there is {', '.join(known)}")


def score_set(name: str, test: TestSet, heard: Sequence[Heard], group_by: Sequence[str] = ()) -> SetResult:
    """Error rates of transcripts given in the set's order, of every group with a word in its references."""
    hypotheses = [one.text for one in heard]
    references = test.speech.dataset["text"][:]
    words = score(references, hypotheses, language=test.scoring_language, unit="wer")
    characters = score(references, hypotheses, language=test.scoring_language, unit="cer")
    rates, wordless = {}, []
    for group, members in _groups(test.speech, group_by).items():
        by_unit = {"wer": [words[i] for i in members], "cer": [characters[i] for i in members]}
        if any(utterance.length for utterance in by_unit["wer"]):
            rates[group] = {unit: summarize(utterances) for unit, utterances in by_unit.items()}
        else:
            wordless.append(group)
    skipped = len(test.speech.skipped)
    return SetResult(
        name,
        test.language,
        test.scoring_language,
        list(heard),
        words,
        characters,
        rates,
        wordless,
        skipped,
        test.speech,
    )


def read_sets(folder: Path, sets: Mapping[str, TestSet], group_by: Sequence[str] = ()) -> dict[str, SetResult]:
    """Those of the sets that `Evaluation.write` left in `folder`, scored again.

    A set of another source or language, or with other utterances or recordings, or whose table is damaged is not among
    them.
    """
    written = folder / "results.json"
    found = read_json(written)["sets"] if written.is_file() else {}
    results = {}
    for name, test in sets.items():
        file = folder / f"{name}.tsv"
        had = found.get(name, {})
        was = (had.get("source"), had.get("language"), _scoring_language(had))
        if was != (test.speech.source, test.language, test.scoring_language) or not file.is_file():
            continue
        try:
            rows = read_table(file)
        except UserError:
            continue
        own = test.speech.dataset
        there = [(row["utterance"], row.get("duration_s")) for row in rows]
        if there != [*zip(own["utterance"][:], map(str, own["duration_s"][:]), strict=True)]:
            continue
        # Written before there was the digest: recordings of the same length are taken for the same.
        if "audio_sha256" in had and had["audio_sha256"] != test.speech.audio_sha256:
            continue
        # Written before there was the column: not known to be cut off, or decoded once.
        heard = [
            Heard(row["hypothesis"], row.get("cut_off", "0") == "0", row.get("decoded_again", "0") == "1")
            for row in rows
        ]
        results[name] = score_set(name, test, heard, group_by)
    return results


def read_table(file: Path) -> list[dict[str, str]]:
    """The lines of a table of transcripts that `Evaluation.write` wrote.

    Raises:
        UserError: it was cut off or edited, so that a line lacks a column or has too many, or is not in UTF-8.
    """
    try:
        with file.open(encoding="utf-8", newline="") as stream:
            rows = list(csv.DictReader(stream, delimiter="\t"))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{file}: is damaged ({error}); restore it, or delete it") from error
    for number, row in enumerate(rows, start=1):
        if None in row or None in row.values() or not {"utterance", *SCORED_COLUMNS[:4]} <= row.keys():
            raise UserError(f"{file}: is damaged (the columns of utterance {number}); restore it, or delete it")
    return rows


def unit_of(result: Mapping[str, Any]) -> Unit:
    """The error unit to read of a set in results.json: characters of a language written without spaces, else words."""
    return "cer" if _scoring_language(result) in UNSPACED_LANGUAGES else "wer"


def _scoring_language(result: Mapping[str, Any]) -> str | None:
    # Before it was written, all sets were scored for the language of the speech.
    return result.get("scoring_language", result.get("language"))


def _groups(speech: Speech, group_by: Sequence[str]) -> dict[str, list[int]]:
    groups = {ALL: list(range(len(speech)))}
    for column in dict.fromkeys(group_by):
        if column not in speech.dataset.column_names:
            continue
        for index, value in enumerate(speech.dataset[column][:]):
            groups.setdefault(f"{column} {_group_name(column, value)}", []).append(index)
    first, *others = groups
    return {first: groups[first], **{name: groups[name] for name in sorted(others, key=_natural)}}


def _group_name(column: str, value: Any) -> str:
    name = str(value or "").strip() or "unknown"
    if column != "age":
        return name
    try:
        age = float(value)
    except (TypeError, ValueError):
        return name  # "twenties"
    if not 0 <= age < math.inf:
        return "unknown"
    return next((f"{low}-{high}" for low, high in _AGE_GROUPS if low <= age < high + 1), "18+")


def _natural(name: str) -> tuple[str, int, str]:
    column, _, value = name.partition(" ")
    digits = value.split("-")[0].rstrip("+")
    return column, int(digits) if digits.isdecimal() else 0, value


def results_table(evaluations: Sequence[Evaluation], title: str = "") -> Table:
    """One line a set and group, the error rates of every evaluation side by side (percent, 95 % bootstrap interval)."""
    table = Table(title=escape(title) or None)
    for column in ("set", "group", "utterances"):
        table.add_column(column, justify="right" if column == "utterances" else "left")
    for evaluation in evaluations:
        for unit in ("WER", "capped", "CER"):
            table.add_column(f"{escape(evaluation.label)}\n{unit}", justify="right")
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
            name = escape(first.name) if group == ALL else ""
            table.add_row(name, escape(group), str(first.rates[group]["wer"].utterances), *cells, end_section=False)
        table.add_section()
    told = [
        f"{what}: {found}"
        for what, of in (("without an end", "cut_off"), ("decoded again", "again"))
        if (found := _counted(evaluations, of))
    ]
    if told:
        table.caption = escape(f"transcripts {'; '.join(told)}")
    return table


def _counted(evaluations: Sequence[Evaluation], of: str) -> str:
    """Where, and how many of, what `SetResult` lists under the name `of`."""
    counts = [
        (f"{evaluation.label}, {result.name}", sum(getattr(result, of)))
        for evaluation in evaluations
        for result in evaluation.sets
    ]
    return ", ".join(f"{count} ({where})" for where, count in counts if count)


def _write_utterances(file: Path, result: SetResult) -> None:
    """One line an utterance: its metadata, reference, hypothesis, both normalised, word and character errors.

    Metadata named like one of these, as another system's hypothesis, is left out: a column's name comes once.
    """
    dataset = result.speech.dataset
    metadata = [name for name in dataset.column_names if name not in (*_OWN_COLUMNS, *SCORED_COLUMNS)]
    rows: list[list[Any]] = [["utterance", *metadata, *SCORED_COLUMNS]]
    of_each = zip(dataset.remove_columns("audio"), result.heard, result.words, result.characters, strict=True)
    for row, heard, words, characters in of_each:
        rows.append(
            [row["utterance"], *(row[name] for name in metadata), row["text"], heard.text]
            + [words.reference, words.hypothesis]
            + [getattr(errors, name) for errors in (words, characters) for name in _COUNTS]
            + [int(not heard.ended), int(heard.again)]
        )
    write_rows(file, rows, delimiter="\t")
