"""Speech with transcripts from a folder, a manifest or the hub, checked once and ready for training or scoring."""

import csv
import json
import math
import re
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
from rich.progress import track

from .audio import duration_s
from .errors import UserError
from .output import check_name
from .text import as_written, is_unpunctuated_capitals, sentence_case

MAX_AUDIO_S = 30.0
_TEXT_COLUMNS = ("text", "transcription", "transcript", "sentence")
_AUDIO_COLUMNS = ("audio", "file_name", "path", "audio_filepath", "file")
_SPEAKER_COLUMNS = ("speaker", "speaker_id", "client_id")
_FORMATS: dict[str, dict[str, Any]] = {
    ".csv": {"skipinitialspace": True},
    ".tsv": {"delimiter": "\t", "quoting": csv.QUOTE_NONE},
}
_OWN_FEATURES = {
    "utterance": datasets.Value("string"),
    "audio": {
        "path": datasets.Value("string"),
        "bytes": datasets.Value("large_binary"),
        "offset_s": datasets.Value("float64"),
        "length_s": datasets.Value("float64"),
    },
    "text": datasets.Value("string"),
    "duration_s": datasets.Value("float64"),
}
_OFFSET, _DURATION = "offset", "duration"  # of a segment in its file, in seconds, as NeMo's manifests call them
_NO_SECONDS = 1e7  # four months are no place in a file
_TARGET = ("target", "target_language")
_WHOLE: dict[str, Any] = {"path": None, "bytes": None, "offset_s": None, "length_s": None}  # an audio entry
_LONGEST_METADATUM = 10_000  # characters
_WHISPERS_MARK = re.compile(r"<\|[^|>]*\|>")  # such as <|endoftext|> or <|0.00|>
_SAVED = ("dataset_dict.json", "state.json")  # in a folder that `save_to_disk` wrote
_FAULT = "what is wrong with this row"  # the key of it in a row


@dataclass(frozen=True)
class Skipped:
    """An utterance that was left out, and why."""

    utterance: str
    reason: str


@dataclass
class Speech:
    """Checked speech. Columns of `dataset`: utterance (the audio's path as the source gives it, and where a segment of
    it begins), audio (path or bytes, undecoded, and the segment), text (as published), target (what a model is trained
    to write), duration_s, and every further column of the source not named like one of these, as text, None where a row
    lacks it. Where `target` is in another language than the speech, target_language has that one's code."""

    dataset: datasets.Dataset
    source: str
    skipped: list[Skipped] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.dataset)


def load_speech(
    source: str | Path,
    *,
    split: str = "train",
    text_column: str | None = None,
    audio_column: str | None = None,
    limit: int | None = None,
    keep_case: bool = False,
    leading_space: bool = True,
    language: str | None = "en",
    longest_s: float = MAX_AUDIO_S,
    strict: bool = False,
    progress: bool = True,
) -> Speech:
    """Speech from an `audiofolder` (metadata.csv or .jsonl), a .csv/.tsv/.jsonl manifest, a hub data set id, or a
    folder that `save_to_disk` of a data set wrote.

    A row with `offset` and `duration`, both in seconds, is a segment of its file, but where the audio is in the source.

    Args:
        source: folder, file or hub id (ORG/SET, ORG/SET:SPLIT or ORG/SET:CONFIG:SPLIT). Relative audio paths are
            relative to the manifest. A .tsv is read without quoting.
        split: of a hub id that names none, or of a folder with several.
        text_column, audio_column: default the first of the usual names that is there.
        limit: only the first so many utterances.
        keep_case: leave transcripts in capitals without punctuation as they are, instead of sentence case.
        leading_space: begin targets with a space, as Whisper's transcripts do in languages with spaces between words.
        language: of the transcripts, as Whisper's code.
        longest_s: an utterance that is longer is bad; Whisper hears 30 s at once.
        strict: stop at the first bad utterance instead of skipping it.
        progress: show a bar while files are checked.

    Raises:
        UserError: no such source or split, no transcripts, an unknown column, nothing usable, a limit below 1, or a bad
            utterance with `strict`.
    """
    if limit is not None and limit < 1:
        raise UserError(f"--limit is {limit}; give at least 1")
    check_name(source)
    source = str(source)
    path = Path(source)
    if any((path / name).is_file() for name in _SAVED):
        rows = _read_saved(path, split, audio_column)
    elif path.is_dir():
        rows = _read_table(_metadata_file(path))
    elif path.suffix.lower() in (*_FORMATS, ".jsonl", ".json") and (path.is_file() or path.parent.is_dir()):
        rows = _read_table(path)
    elif path.exists():
        raise UserError(f"{source}: not a folder with metadata.csv, nor a .csv, .tsv or .jsonl manifest")
    else:
        rows = _read_hub(source, split, audio_column)
    if not rows:
        raise UserError(f"{source}: the data set is empty; it needs at least one utterance with its transcript")
    columns = list(dict.fromkeys(name for row in rows for name in row if name != _FAULT))
    text_column = _column(columns, text_column, _TEXT_COLUMNS, "transcripts", "text_column", source)
    audio_column = _column(columns, audio_column, _AUDIO_COLUMNS, "audio", "audio_column", source)
    further = [name for name in columns if name not in (text_column, audio_column, *_TARGET, *_OWN_FEATURES)]
    rows = rows[:limit]
    kept: list[dict[str, Any]] = []
    skipped: list[Skipped] = []
    base = path if path.is_dir() else path.parent
    for index, row in enumerate(
        track(rows, description=f"checking {path.name}", disable=not progress or len(rows) < 200, transient=True)
    ):
        entry = _audio_entry(row.get(audio_column), base)
        utterance = _utterance(row.get(audio_column), base) or str(index)
        try:
            text = _checked_text(utterance, row, text_column)
            if not isinstance(entry["path"], str | None) or not isinstance(entry["bytes"], bytes | None):
                raise UserError(f"{utterance}: its audio is not the path of a file; give that")
            if entry["bytes"] is None and row.get(_OFFSET) not in (None, ""):
                entry |= _segment(utterance, row)
                utterance = f"{utterance}@{entry['offset_s']:.10g}s"
            duration = checked_duration(utterance, entry, longest_s)
        except UserError as error:
            if strict:
                raise
            skipped.append(Skipped(utterance, str(error)))
            continue
        own = {"utterance": utterance, "audio": entry, "text": text, "duration_s": duration}
        kept.append(own | {name: _metadatum(row.get(name)) for name in further})
    if not kept:
        raise UserError(
            f"{source}: none of its {len(rows)} utterances is usable; the first problem: {skipped[0].reason}"
        )
    recase = not keep_case and is_unpunctuated_capitals([row["text"] for row in kept])
    for row in kept:
        text = unicodedata.normalize("NFC", row["text"])  # as Whisper writes; decomposed it has tokens of its own
        text = sentence_case(text, language) if recase else text
        row["target"] = as_written(text, language) if leading_space else text
    strings = {name: datasets.Value("string") for name in (*further, "target")}
    return Speech(datasets.Dataset.from_list(kept, datasets.Features(_OWN_FEATURES | strings)), source, skipped)


def speakers(speech: Speech) -> tuple[str, list[str]]:
    """What belongs together when a part is held out, "speaker" or "utterance", and its name for each utterance.

    Speakers are in a column speaker, speaker_id or client_id; an utterance of unknown speaker counts for itself, the
    segments of a file for one.
    """
    starts = speech.dataset.select_columns("audio").flatten()["audio.offset_s"][:]
    utterances = [
        name if start is None else name.rpartition("@")[0]
        for name, start in zip(speech.dataset["utterance"][:], starts, strict=True)
    ]
    columns = [speech.dataset[name][:] for name in _SPEAKER_COLUMNS if name in speech.dataset.column_names]
    if not columns:
        return "utterance", utterances
    return "speaker", [next(filter(None, row)) for row in zip(*columns, utterances, strict=True)]


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
            suffix = file.suffix.lower()
            if suffix in _FORMATS:
                reader = csv.DictReader(stream, restkey=_FAULT, **_FORMATS[suffix])
                remedy = "quote the transcript" if suffix == ".csv" else "take the tab out of the transcript"
                excess = "line {} has more fields than columns: " + remedy
                return [row | {_FAULT: excess.format(reader.line_num)} if _FAULT in row else row for row in reader]
            rows = [_json_row(line) for line in stream if line.strip()]
    except FileNotFoundError as error:
        raise UserError(f"{file}: no such manifest") from error
    except (OSError, UnicodeDecodeError, csv.Error, json.JSONDecodeError) as error:
        raise UserError(f"{file}: not readable as a table ({error})") from error
    if not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{file}: not readable as a table (each line has to be a JSON object)")
    return rows


def _json_row(line: str) -> Any:
    """What is in a line; half a pair of escapes, such as \\ud83d alone, is no character and a fault of its row."""
    row = json.loads(line)
    if not isinstance(row, dict) or "\\ud" not in line.lower():
        return row
    text = json.dumps(row, ensure_ascii=False)
    readable = text.encode(errors="replace").decode()
    fault = "half of a pair of \\u escapes stands alone in its line; write the character itself"
    return row if readable == text else json.loads(readable) | {_FAULT: fault}


def _read_hub(source: str, split: str, audio_column: str | None) -> list[dict[str, Any]]:
    name, *further = source.split(":", 2)
    split = further.pop() if further else split
    try:
        splits = datasets.load_dataset(name, *further)  # it prepares all of them whichever is asked for
    except Exception as error:  # whatever the hub client raises: offline, unknown id, gated, no such configuration
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{source}: no such folder or file, and not to be had from the hub ({reason})") from error
    return _undecoded(_split(splits, split, source, f"{name}:SPLIT"), audio_column)


def _read_saved(folder: Path, split: str, audio_column: str | None) -> list[dict[str, Any]]:
    """What `save_to_disk` of a data set, or of several splits, wrote."""
    try:
        found = datasets.load_from_disk(str(folder))
    except Exception as error:  # whatever datasets raises of a folder that is damaged
        raise UserError(f"{folder}: not readable as a saved data set ({str(error).strip().splitlines()[0]})") from error
    if isinstance(found, datasets.DatasetDict):
        found = _split(found, split, str(folder), str(folder / next(iter(found), split)))
    return _undecoded(found, audio_column)


def _split(splits: datasets.DatasetDict, split: str, source: str, way: str) -> datasets.Dataset:
    if split not in splits:
        raise UserError(f"{source}: no split {split!r}; it has {', '.join(splits)}; name one as {way}")
    return splits[split]


def _undecoded(dataset: datasets.Dataset, audio_column: str | None) -> list[dict[str, Any]]:
    """The rows with their audio as a path or bytes, and without any other recordings or pictures."""
    column = audio_column or next((name for name in _AUDIO_COLUMNS if name in dataset.column_names), None)
    for other, feature in dataset.features.items():
        if other == column or column is None:
            if hasattr(feature, "decode"):
                dataset = dataset.cast_column(other, type(feature)(decode=False))
        elif hasattr(feature, "decode_example"):  # a second recording, a picture: not to be decoded for nothing
            dataset = dataset.remove_columns(other)
    return list(dataset)


def _column(
    columns: list[str], wanted: str | None, usual: tuple[str, ...], what: str, argument: str, source: str
) -> str:
    if wanted is not None:
        if wanted not in columns:
            raise UserError(f"{source}: no column {wanted!r} ({argument}); it has {', '.join(columns)}")
        return wanted
    if (found := next((name for name in usual if name in columns), None)) is not None:
        return found
    if any(";" in name for name in columns):
        raise UserError(f"{source}: its columns are separated by semicolons; write commas, or tabs in a .tsv")
    flag = argument.replace("_", "-")
    raise UserError(f"{source}: no column with {what}; it has {', '.join(columns)}; name it with --{flag}")


def _metadatum(value: Any) -> str | None:
    """What a table can hold and a group be made of; None for anything else, as samples or spectra in a list."""
    if value is None or isinstance(value, list | dict | bytes) or len(text := str(value)) > _LONGEST_METADATUM:
        return None
    return text


def _audio_entry(value: Any, base: Path) -> dict[str, Any]:
    if isinstance(value, dict):
        return _WHOLE | {"path": value.get("path"), "bytes": value.get("bytes")}
    return _WHOLE | {"path": str(base / str(value)) if value else None}


def _segment(utterance: str, row: dict[str, Any]) -> dict[str, float]:
    """Where in its file the audio of a row begins, and how long it is."""
    seconds = []
    for column, least in ((_OFFSET, 0.0), (_DURATION, 1e-3)):
        given = row.get(column)
        try:
            number = float(given)  # type: ignore[arg-type]
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not least <= number < _NO_SECONDS:
            raise UserError(
                f"{utterance}: its {column} is {given!r:.40}; a segment has offset and duration in seconds; "
                "rename columns that are something else"
            )
        seconds.append(number)
    return {"offset_s": seconds[0], "length_s": seconds[1]}


def _utterance(value: Any, base: Path) -> str | None:
    """The audio's path with forward slashes, as the table gives it, an absolute one below `base` relative to it."""
    given = value.get("path") if isinstance(value, dict) else value
    if not given:
        return None
    path = Path(str(given))
    if path.is_absolute() and path.is_relative_to(base.absolute()):
        path = path.relative_to(base.absolute())
    return path.as_posix()


def _checked_text(utterance: str, row: dict[str, Any], column: str) -> str:
    if _FAULT in row:
        raise UserError(f"{utterance}: {row[_FAULT]}")
    text = row.get(column)
    if not isinstance(text, str | None):
        raise UserError(f"{utterance}: its transcript is {text!r:.40}, not text; write it in quotation marks")
    if not text or not text.strip():
        raise UserError(f"{utterance}: its transcript is empty")
    text = text.strip()
    if any(character in text for character in "\n\r\t"):
        raise UserError(f"{utterance}: its transcript has a line break or a tab in it; is a quotation mark left open?")
    if mark := _WHISPERS_MARK.search(text):
        raise UserError(f"{utterance}: its transcript has {mark[0]} in it, which Whisper reads as its own; take it out")
    return text


def checked_duration(utterance: str, entry: dict[str, Any], longest_s: float) -> float:
    """Length in seconds of an audio entry ("path" or "bytes").

    Raises:
        UserError: no audio, not readable to its end, empty, or more than `longest_s`, said of `utterance`.
    """
    if entry["path"] is None and entry["bytes"] is None:
        raise UserError(f"{utterance}: no audio is given for it")
    duration = duration_s(entry, longest_s)
    if duration == 0:
        raise UserError(f"{utterance}: the audio is empty")
    if duration > longest_s:
        raise UserError(
            f"{utterance}: {duration:.1f} s of audio, Whisper takes {longest_s:.0f} s; split it, or give rows of it an "
            "offset and duration"
        )
    return duration
