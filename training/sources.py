"""Reading where speech and transcripts are: an audiofolder, a manifest, a saved data set or one of the hub."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets

from .errors import UserError
from .output import check_name

FAULT = "what is wrong with this row"  # the key of it in a row
AUDIO_COLUMNS = ("audio", "file_name", "path", "audio_filepath", "file")
_FORMATS: dict[str, dict[str, Any]] = {
    ".csv": {"skipinitialspace": True},
    ".tsv": {"delimiter": "\t", "quoting": csv.QUOTE_NONE},
}
_OTHER_SEPARATORS = {
    ";": "semicolons; write commas, or tabs in a .tsv",
    "|": "vertical bars; write commas, or tabs in a .tsv",
    "\t": "tabs; call it .tsv",
    ",": "commas; call it .csv",
}
_SAVED = ("dataset_dict.json", "state.json")  # in a folder that `save_to_disk` wrote


def read_source(source: str, split: str, audio_column: str | None) -> list[dict[str, Any]] | datasets.Dataset:
    """The rows of a source, as they are in a table, or as a data set with its audio undecoded, which stays on disk.

    Raises:
        UserError: no such source or split, not readable, or empty.
    """
    check_name(source)
    path = Path(source)
    rows: list[dict[str, Any]] | datasets.Dataset
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
    if not len(rows):
        raise UserError(f"{source}: the data set is empty; it needs at least one utterance with its transcript")
    return rows


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
                reader = csv.DictReader(stream, restkey=FAULT, **_FORMATS[suffix])
                _check_columns(file, reader.fieldnames or ())
                remedy = "quote the transcript" if suffix == ".csv" else "take the tab out of the transcript"
                excess = "line {} has more fields than columns: " + remedy
                return [row | {FAULT: excess.format(reader.line_num)} if FAULT in row else row for row in reader]
            rows = [_json_row(file, number, line) for number, line in enumerate(stream, start=1) if line.strip()]
    except FileNotFoundError as error:
        raise UserError(f"{file}: no such manifest") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not readable as a table ({error}); save it as UTF-8") from error
    except (OSError, csv.Error) as error:
        raise UserError(f"{file}: not readable as a table ({error})") from error
    return rows


def _check_columns(file: Path, columns: Sequence[str]) -> None:
    """Refuses two of one name, of which the last would be taken, and columns that are separated otherwise.

    A table of one column holds no speech with transcripts.
    """
    if twice := [name for name in dict.fromkeys(columns) if name and columns.count(name) > 1]:
        raise UserError(f"{file}: two of its columns are named {twice[0]!r}; rename one, or take it out")
    if len(columns) == 1:
        for sign, told in _OTHER_SEPARATORS.items():
            if sign in columns[0]:
                raise UserError(f"{file}: its columns are separated by {told}")


def _json_row(file: Path, number: int, line: str) -> dict[str, Any]:
    """What is in a line; half a pair of escapes, such as \\ud83d alone, is no character and a fault of its row."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        why = f"{error.msg} at its character {error.pos + 1}"
        raise UserError(f"{file}: not readable as a table: its line {number} is no JSON ({why})") from error
    if not isinstance(row, dict):
        raise UserError(f"{file}: not readable as a table: each line has to be a JSON object, and line {number} is not")
    if "\\ud" not in line.lower():
        return row
    text = json.dumps(row, ensure_ascii=False)
    readable = text.encode(errors="replace").decode()
    fault = "half of a pair of \\u escapes stands alone in its line; write the character itself"
    return row if readable == text else json.loads(readable) | {FAULT: fault}


def _read_hub(source: str, split: str, audio_column: str | None) -> datasets.Dataset:
    name, *further = source.split(":", 2)
    split = further.pop() if further else split
    try:
        splits = datasets.load_dataset(name, *further)  # it prepares all of them whichever is asked for
    except Exception as error:  # whatever the hub client raises: offline, unknown id, gated, no such configuration
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{source}: no such folder or file, and not to be had from the hub ({reason})") from error
    return _undecoded(_split(splits, split, source, f"{name}:SPLIT"), audio_column)


def _read_saved(folder: Path, split: str, audio_column: str | None) -> datasets.Dataset:
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


def _undecoded(dataset: datasets.Dataset, audio_column: str | None) -> datasets.Dataset:
    """The data set with its audio as a path and bytes, and without any other recordings or pictures."""
    column = audio_column or next((name for name in AUDIO_COLUMNS if name in dataset.column_names), None)
    for other, feature in dataset.features.items():
        if other == column or column is None:
            if hasattr(feature, "decode"):
                dataset = dataset.cast_column(other, type(feature)(decode=False))
        elif hasattr(feature, "decode_example"):  # a second recording, a picture: not to be decoded for nothing
            dataset = dataset.remove_columns(other)
    return dataset
