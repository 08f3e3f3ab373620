"""By how much each row of a comparison is better or worse than its first one, on the same utterances."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from .comparison_lines import Column, Line
from .evaluation import ALL
from .metrics import Difference, difference
from .utterance_errors import SetErrors, read_errors


@dataclass(frozen=True)
class Gap:
    """A row's error rate in a set less that of the row `against`, as it is and with errors capped by utterance."""

    name: str
    against: str
    seeds: int
    column: Column
    plain: Difference
    capped: Difference


def gaps_of(names: Mapping[str, Line], columns: list[Column]) -> Iterator[Gap]:
    """The gaps of every row to the first one that was trained, in each whole set that both were scored on.

    `names` are the rows by their names. Rows whose runs have no `errors.csv` are left out, and so are sets that have
    not the same utterances with references as long in both.

    Raises:
        UserError: an `errors.csv` is damaged.
    """
    seeds = {name: [read_errors(cell["path"]) for cell in line.cells] for name, line in names.items()}
    seeds = {name: kept for name, errors in seeds.items() if (kept := [one for one in errors if one])}
    against = next((name for name in seeds if names[name].trainable), None)
    if against is None:
        return
    for name in seeds:
        for column in columns:
            ours, theirs = (_of_set(column, seeds[row]) for row in (name, against))
            if name == against or column.group != ALL or not ours or not theirs:
                continue
            lengths = theirs[0].lengths[column.unit]
            if any(
                one.utterances != theirs[0].utterances or not np.array_equal(one.lengths[column.unit], lengths)
                for one in (*ours, *theirs)
            ):
                continue
            one, other = (np.stack([errors.errors[column.unit] for errors in some]) for some in (ours, theirs))
            plain = difference(one, other, lengths)
            capped = difference(np.minimum(one, lengths), np.minimum(other, lengths), lengths)
            yield Gap(name, against, len(ours), column, plain, capped)


def told_of(gaps: list[Gap]) -> str:
    """What the differences are, in words."""
    return (
        f"Each row less {gaps[0].against}, in points, with a 95 % interval: a bootstrap over utterances, the same for "
        "both, and over seeds. It is short where a row has two or three seeds, and where it has one does not say what "
        "another would give."
    )


def _of_set(column: Column, seeds: list[dict[str, SetErrors]]) -> list[SetErrors]:
    return [errors[column.set] for errors in seeds if column.set in errors]
