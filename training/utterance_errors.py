"""Errors of every utterance without its text: what a comparison keeps of a run to set others against it."""

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .errors import UserError
from .evaluation import Evaluation
from .metrics import Unit
from .output import write_rows

_FILE = "errors.csv"
_COLUMNS = ("set", "utterance", "words", "word_errors", "characters", "character_errors")
_UNITS: dict[Unit, tuple[str, str]] = {"wer": ("words", "word_errors"), "cer": ("characters", "character_errors")}


@dataclass(frozen=True)
class SetErrors:
    """Of one set, in its order: the utterances' names and, by unit, their lengths and errors, [utterances] each."""

    utterances: list[str]
    lengths: dict[Unit, np.ndarray]
    errors: dict[Unit, np.ndarray]


def write_errors(run: Path, evaluation: Evaluation) -> None:
    """Writes `errors.csv` into the folder of a run, by what was scored last of it."""
    rows: list[tuple[str | int, ...]] = [_COLUMNS]
    for result in evaluation.sets:
        names = result.speech.dataset["utterance"][:]
        for name, words, characters in zip(names, result.words, result.characters, strict=True):
            rows.append((result.name, name, words.length, words.errors, characters.length, characters.errors))
    write_rows(run / _FILE, rows)  # its \r\n has a \r in a name quoted


def read_errors(run: Path) -> dict[str, SetErrors]:
    """What `write_errors` wrote, by set; nothing where there is no file.

    Raises:
        UserError: the file is damaged.
    """
    file = run / _FILE
    if not file.is_file():
        return {}
    by_set: dict[str, list[dict[str, str]]] = {}
    try:
        with file.open(encoding="utf-8", newline="") as stream:
            for row in csv.DictReader(stream):
                by_set.setdefault(row["set"], []).append(row)
        return {
            name: SetErrors(
                [row["utterance"] for row in rows],
                {unit: np.array([int(row[length]) for row in rows]) for unit, (length, _) in _UNITS.items()},
                {unit: np.array([int(row[errors]) for row in rows]) for unit, (_, errors) in _UNITS.items()},
            )
            for name, rows in by_set.items()
        }
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file}: is damaged ({error}); restore it, or delete the folder of the run") from error
