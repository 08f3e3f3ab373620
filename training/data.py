"""Speech with transcripts from a folder, a manifest or the hub, checked once and ready for training or scoring."""

import csv
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
from rich.progress import track

from .audio import duration_s
from .errors import UserError
from .text import is_unpunctuated_capitals, sentence_case

MAX_AUDIO_S = 30.0
_TEXT_COLUMNS = ("text", "transcription", "transcript", "sentence")
_AUDIO_COLUMNS = ("audio", "file_name", "path", "audio_filepath", "file")
_DELIMITERS = {".csv": ",", ".tsv": "\t"}


@dataclass(frozen=True)
class Skipped:
    """An utterance that was left out, and why."""

    utterance: str
    reason: str


@dataclass
class Speech:
    """Checked speech. Columns of `dataset`: audio (path or bytes, undecoded), text (as published), target (what a model
    is trained to write), duration_s, utterance, and every further column of the source."""

    dataset: datasets.Dataset
    source: str
    skipped: list[Skipped] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.dataset)


def load_speech(
    source: str | Path,
    *,
    split: str | None = None,
    text_column: str | None = None,
    audio_column: str | None = None,
    limit: int | None = None,
    keep_case: bool = False,
    strict: bool = False,
    progress: bool = True,
) -> Speech:
    """Speech from an `audiofolder` (metadata.csv or .jsonl), a .csv/.tsv/.jsonl manifest, or a hub data set id.

    Args:
        source: folder, file or hub id. Relative audio paths are relative to the manifest.
        split: for a hub data set, default "train".
        text_column, audio_column: default the first of the usual names that is there.
        limit: only the first so many utterances.
        keep_case: leave transcripts in capitals without punctuation as they are, instead of sentence case.
        strict: stop at the first bad utterance instead of skipping it.
        progress: show a bar while files are checked.

    Raises:
        UserError: no such source, no transcripts, an unknown column, nothing usable, or a bad utterance with `strict`.
    """
    source = str(source)
    path = Path(source)
    if path.is_dir():
        rows = _read_table(_metadata_file(path))
    elif path.suffix in (*_DELIMITERS, ".jsonl", ".json") and (path.is_file() or path.parent.is_dir()):
        rows = _read_table(path)
    elif path.exists():
        raise UserError(f"{source}: not a folder with metadata.csv, nor a .csv, .tsv or .jsonl manifest")
    else:
        rows = _read_hub(source, split, audio_column)
    if not rows:
        raise UserError(f"{source}: the data set is empty; it needs at least one utterance with its transcript")
    text_column = _column(rows[0], text_column, _TEXT_COLUMNS, "transcripts", "text_column", source)
    audio_column = _column(rows[0], audio_column, _AUDIO_COLUMNS, "audio", "audio_column", source)
    rows = rows[:limit]
    kept: list[dict[str, Any]] = []
    skipped: list[Skipped] = []
    base = path if path.is_dir() else path.parent
    for row in track(
        rows, description=f"checking {path.name}", disable=not progress or len(rows) < 200, transient=True
    ):
        entry = _audio_entry(row.pop(audio_column), base)
        utterance = Path(entry["path"] or f"{len(kept) + len(skipped)}").name
        text = row.pop(text_column)
        try:
            duration = _checked_duration(entry, text)
        except UserError as error:
            if strict:
                raise
            skipped.append(Skipped(utterance, str(error)))
            continue
        kept.append({"utterance": utterance, "audio": entry, "text": text.strip(), "duration_s": duration, **row})
    if not kept:
        raise UserError(
            f"{source}: none of its {len(rows)} utterances is usable; the first problem: {skipped[0].reason}"
        )
    recase = not keep_case and is_unpunctuated_capitals([row["text"] for row in kept])
    for row in kept:
        row["target"] = sentence_case(row["text"]) if recase else row["text"]
    return Speech(datasets.Dataset.from_list(kept), source, skipped)


def drop_overlong(speech: Speech, tokenizer: Any, max_tokens: int, strict: bool = False) -> Speech:
    """Without the utterances whose target has more than `max_tokens` tokens, prefix and end included (Whisper: 448).

    Raises:
        UserError: nothing is left, or a transcript is too long with `strict`.
    """
    lengths = [len(ids) for ids in tokenizer(speech.dataset["target"][:]).input_ids]
    too_long = [index for index, length in enumerate(lengths) if length > max_tokens]
    if not too_long:
        return speech
    names = speech.dataset["utterance"]
    skipped = [
        Skipped(names[i], f"{names[i]}: transcript of {lengths[i]} tokens, Whisper takes {max_tokens}; split it")
        for i in too_long
    ]
    if strict:
        raise UserError(skipped[0].reason)
    if len(too_long) == len(lengths):
        raise UserError(f"{speech.source}: every transcript is longer than {max_tokens} tokens; split them")
    keep = sorted(set(range(len(lengths))) - set(too_long))
    return Speech(speech.dataset.select(keep), speech.source, speech.skipped + skipped)


def _metadata_file(folder: Path) -> Path:
    for name in ("metadata.csv", "metadata.jsonl", "metadata.tsv"):
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"{folder}: no metadata.csv or metadata.jsonl in it; write one with columns file_name and text")


def _read_table(file: Path) -> list[dict[str, Any]]:
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            if file.suffix in _DELIMITERS:
                return list(csv.DictReader(stream, delimiter=_DELIMITERS[file.suffix]))
            return [json.loads(line) for line in stream if line.strip()]
    except FileNotFoundError as error:
        raise UserError(f"{file}: no such manifest") from error
    except (OSError, UnicodeDecodeError, csv.Error, json.JSONDecodeError) as error:
        raise UserError(f"{file}: not readable as a table ({error})") from error


def _read_hub(source: str, split: str | None, audio_column: str | None) -> list[dict[str, Any]]:
    try:
        dataset = datasets.load_dataset(source, split=split or "train")
    except Exception as error:  # whatever the hub client raises: offline, unknown id, gated, no such split
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{source}: no such folder or file, and not to be had from the hub ({reason})") from error
    column = audio_column or next((name for name in _AUDIO_COLUMNS if name in dataset.column_names), None)
    if column in dataset.column_names and isinstance(dataset.features[column], datasets.Audio):
        dataset = dataset.cast_column(column, datasets.Audio(decode=False))
    return list(dataset)


def _column(
    row: dict[str, Any], wanted: str | None, usual: tuple[str, ...], what: str, argument: str, source: str
) -> str:
    if wanted is not None:
        if wanted not in row:
            raise UserError(f"{source}: no column {wanted!r} ({argument}); it has {', '.join(row)}")
        return wanted
    found = next((name for name in usual if name in row), None)
    if found is None:
        raise UserError(
            f"{source}: no column with {what}; it has {', '.join(row)}; name it with --{argument.replace('_', '-')}"
        )
    return found


def _audio_entry(value: Any, base: Path) -> dict[str, Any]:
    if isinstance(value, dict):
        return {"path": value.get("path"), "bytes": value.get("bytes")}
    return {"path": str(base / (value or "")), "bytes": None}


def _checked_duration(entry: dict[str, Any], text: Any) -> float:
    name = Path(entry["path"] or "utterance").name
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{name}: its transcript is empty")
    duration = duration_s(entry)
    if duration == 0:
        raise UserError(f"{name}: the audio is empty")
    if duration > MAX_AUDIO_S:
        raise UserError(f"{name}: {duration:.1f} s of audio, Whisper takes {MAX_AUDIO_S:.0f} s; split it")
    return duration
