"""Speech with transcripts from a folder, a manifest or the hub, checked once and ready for training or scoring."""

import functools
import hashlib
import itertools
import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
from rich.progress import track

from .audio import duration_s
from .errors import UserError
from .sources import AUDIO_COLUMNS, FAULT, read_source
from .text import as_written, in_capitals, sentence_case
from .world import speaks

MAX_AUDIO_S = 30.0
_TEXT_COLUMNS = ("text", "transcription", "transcript", "sentence")
_SPEAKER_COLUMNS = ("speaker", "speaker_id", "client_id")
_OWN_FEATURES = {
    "utterance": datasets.Value("string"),
    "text": datasets.Value("string"),
    "duration_s": datasets.Value("float64"),
    "offset_s": datasets.Value("float64"),
    "length_s": datasets.Value("float64"),
}
_STORED = datasets.Features({"audio": {"path": datasets.Value("string"), "bytes": datasets.Value("binary")}})
_OFFSET, _DURATION = "offset", "duration"  # of a segment in its file, in seconds, as NeMo's manifests call them
_TAKEN_AT_ONCE = 128
_NO_SECONDS = 1e7  # four months are no place in a file
_TARGET = ("target", "target_language", "prompt_language")
_WHOLE: dict[str, Any] = {"path": None, "bytes": None, "offset_s": None, "length_s": None}  # an audio entry
_LONGEST_METADATUM = 10_000  # characters
_WHISPERS_MARK = re.compile(r"<\|[^|>]*\|>")  # such as <|endoftext|> or <|0.00|>


@dataclass(frozen=True)
class Skipped:
    """An utterance that was left out, and why."""

    utterance: str
    reason: str


@dataclass
class Speech:
    """Checked speech. Columns of `dataset`: utterance (the audio's path as the source gives it, and where a segment of
    it begins), audio (path or bytes, undecoded), offset_s and length_s (of a segment in its audio, else None), text (as
    published), target (what a model is trained to write), duration_s, and every further column of the source not named
    like one of these, as text, None where a row lacks it. Where `target` is in another language than the speech,
    target_language has that one's code; where the speech is in another than the run's, prompt_language has its code.
    Audio of a data set stays in its files on disk until it is read."""

    dataset: datasets.Dataset
    source: str
    skipped: list[Skipped] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def recased(self) -> int:
        """How many transcripts are published in capitals and to be written in sentence case."""
        pairs = zip(self.dataset["text"][:], self.dataset["target"][:], strict=True)
        return sum(target.strip() != unicodedata.normalize("NFC", text) for text, target in pairs)

    def audio(self, rows: range | None = None) -> Iterator[dict[str, Any]]:
        """What `read_audio` takes, of each utterance, or of those in these rows."""
        of = self.dataset.select_columns(["audio", "offset_s", "length_s"])
        return map(audio_entry, of if rows is None else of.select(rows))

    @functools.cached_property
    def audio_sha256(self) -> str:
        """A digest of the recordings as they are stored, in this order."""
        together = hashlib.sha256()
        digest_of_file = functools.cache(_digest_of_file)  # several segments may be of one
        for entry in self.audio():
            content = entry["bytes"]
            together.update(digest_of_file(entry["path"]) if content is None else hashlib.sha256(content).digest())
        return together.hexdigest()


def _digest_of_file(path: str) -> bytes:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()


def audio_entry(row: Mapping[str, Any]) -> dict[str, Any]:
    """What `read_audio` takes, of a row of `Speech.dataset`."""
    return row["audio"] | {"offset_s": row["offset_s"], "length_s": row["length_s"]}


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
    prompt_language: str | None = None,
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
        keep_case: leave transcripts as they are where they are published in capitals, instead of sentence case.
        leading_space: begin targets with a space, as Whisper's transcripts do in languages with spaces between words.
        language: of the transcripts, as Whisper's code.
        prompt_language: that of the speech, where it is not the run's; noted with each utterance.
        longest_s: an utterance that is longer is bad; Whisper hears 30 s at once.
        strict: stop at the first bad utterance instead of skipping it.
        progress: show a bar while files are checked.

    Raises:
        UserError: no such source or split, no transcripts, an unknown column, nothing usable, a limit below 1, or a bad
            utterance with `strict`.
    """
    if limit is not None and limit < 1:
        raise UserError(f"--limit is {limit}; give at least 1")
    source = str(source)
    rows = read_source(source, split, audio_column)
    classes: dict[str, list[str]] = {}  # names by column, of which a data set holds numbers
    if isinstance(rows, datasets.Dataset):
        columns = rows.column_names
        classes = {name: kind.names for name, kind in rows.features.items() if isinstance(kind, datasets.ClassLabel)}
        rows = rows.select(range(len(rows))[:limit])
    else:
        columns = list(dict.fromkeys(name for row in rows for name in row if name != FAULT))
        rows = rows[:limit]
    text_column = _column(columns, text_column, _TEXT_COLUMNS, "transcripts", "text_column", source)
    audio_column = _column(columns, audio_column, AUDIO_COLUMNS, "audio", "audio_column", source)
    taken = (text_column, audio_column, "audio", *_TARGET, *_OWN_FEATURES)
    further = [name for name in columns if name not in taken]
    strings = {name: datasets.Value("string") for name in (*further, "target")}
    if prompt_language is not None:
        strings["prompt_language"] = datasets.Value("string")
    features = datasets.Features(_OWN_FEATURES | strings)
    path = Path(source)
    check = functools.partial(
        _checked, base=path if path.is_dir() else path.parent, text_column=text_column, audio_column=audio_column,
        further=further, classes=classes, longest_s=longest_s,
    )  # fmt: skip
    bar: dict[str, Any] = {
        "description": f"checking {path.name}",
        "disable": not (progress and speaks()) or len(rows) < 200,
        "transient": True,
    }
    checked: list[dict[str, Any]] = []  # as many as `rows`, of a bad one without anything
    files: list[str | None] = []
    usable: list[int] = []
    skipped: list[Skipped] = []
    for index, (file, found) in enumerate(track(in_threads(check, enumerate(rows)), total=len(rows), **bar)):
        files.append(file)
        checked.append(dict.fromkeys(features))
        if isinstance(found, Skipped):
            if strict:
                raise UserError(found.reason)
            skipped.append(found)
        else:
            checked[-1] |= found
            usable.append(index)
    if not usable:
        raise UserError(
            f"{source}: none of its {len(rows)} utterances is usable; the first problem: {skipped[0].reason}"
        )
    kept = [checked[index] for index in usable]
    recased = [False] * len(kept) if keep_case else in_capitals([row["text"] for row in kept])
    for row, recase in zip(kept, recased, strict=True):
        text = unicodedata.normalize("NFC", row["text"])  # as Whisper writes; decomposed it has tokens of its own
        text = sentence_case(text, language) if recase else text
        row["target"] = as_written(text, language) if leading_space else text
        if prompt_language is not None:
            row["prompt_language"] = prompt_language
    audio = _audio_column(rows, audio_column, files)
    dataset = datasets.concatenate_datasets([datasets.Dataset.from_list(checked, features), audio], axis=1)
    return Speech(dataset if not skipped else dataset.select(usable), source, skipped)


def in_threads(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
    """What the function makes of each, in their order, by several threads; few are taken ahead.

    Decoding audio leaves Python's lock to the others.
    """
    left = iter(items)
    with ThreadPoolExecutor() as pool:
        while part := list(itertools.islice(left, _TAKEN_AT_ONCE)):
            yield from pool.map(function, part)


def _checked(
    numbered: tuple[int, dict[str, Any]],
    *,
    base: Path,
    text_column: str,
    audio_column: str,
    further: Sequence[str],
    classes: Mapping[str, list[str]],
    longest_s: float,
) -> tuple[str | None, dict[str, Any] | Skipped]:
    """A row's audio file, if it is one, and what a row of `Speech.dataset` has of it, but for target and audio."""
    index, row = numbered
    row = row | {name: _class_name(row[name], names) for name, names in classes.items()}
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
        return None, Skipped(utterance, str(error))
    own = {"utterance": utterance, "text": text, "duration_s": duration}
    segment = {name: entry[name] for name in ("offset_s", "length_s")}
    return entry["path"], own | segment | {name: _metadatum(row.get(name)) for name in further}


def _audio_column(rows: Sequence[Any], column: str, files: list[str | None]) -> datasets.Dataset:
    """A column "audio" of path and bytes, as `rows` have it in a data set, which is not copied, else of these files."""
    if isinstance(rows, datasets.Dataset) and _holds_audio(rows.features[column]):
        audio = rows.select_columns(column).rename_columns({column: "audio"})
    else:
        audio = datasets.Dataset.from_dict({"audio": [{"path": file, "bytes": None} for file in files]}, _STORED)
    return audio.cast_column("audio", datasets.Audio(decode=False))


def _holds_audio(feature: Any) -> bool:
    return isinstance(feature, datasets.Audio) or (isinstance(feature, dict) and "bytes" in feature)


def speakers(speech: Speech) -> tuple[str, list[str]]:
    """What belongs together when a part is held out, "speaker" or "utterance", and its name for each utterance.

    Speakers are in a column speaker, speaker_id or client_id; an utterance of unknown speaker counts for itself, the
    segments of a file for one.
    """
    starts = speech.dataset["offset_s"][:]
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


def _column(
    columns: list[str], wanted: str | None, usual: tuple[str, ...], what: str, argument: str, source: str
) -> str:
    if wanted in columns:
        return wanted
    if wanted is None and (found := next((name for name in usual if name in columns), None)) is not None:
        return found
    if wanted is not None:
        raise UserError(f"{source}: no column {wanted!r} ({argument}); it has {', '.join(columns)}")
    flag = argument.replace("_", "-")
    raise UserError(f"{source}: no column with {what}; it has {', '.join(columns)}; name it with --{flag}")


def _class_name(number: int | None, names: list[str]) -> str | None:
    """What a column of classes has of one row; -1 is no class."""
    return None if number is None or number < 0 else names[number]


def _metadatum(value: Any) -> str | None:
    """What a table can hold and a group be made of; None for anything else, as samples or spectra in a list.

    NaN is what pandas writes where there is nothing.
    """
    if value is None or isinstance(value, list | dict | bytes) or (isinstance(value, float) and math.isnan(value)):
        return None
    return text if len(text := str(value)) <= _LONGEST_METADATUM else None


def _audio_entry(value: Any, base: Path) -> dict[str, Any]:
    if isinstance(value, dict):
        return _WHOLE | {"path": value.get("path"), "bytes": value.get("bytes")}
    return _WHOLE | {"path": str(base / value) if value and isinstance(value, str) else value or None}


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
    if not given or not isinstance(given, str):  # as samples, which are no name
        return None
    path = Path(given)
    if path.is_absolute() and path.is_relative_to(base.absolute()):
        path = path.relative_to(base.absolute())
    return path.as_posix()


def _checked_text(utterance: str, row: dict[str, Any], column: str) -> str:
    if FAULT in row:
        raise UserError(f"{utterance}: {row[FAULT]}")
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
